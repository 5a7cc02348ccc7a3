"""`evaluate`: the files it writes say the same as pycocotools says about them."""

import json
import shutil

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from softteacher.config import Settings
from softteacher.data.coco import load_coco
from softteacher.detections import Detections
from softteacher.errors import UserError
from softteacher.evaluation.analyze import analyze
from softteacher.evaluation.evaluate import evaluate, score_at_both_thresholds
from softteacher.evaluation.metrics import KEYS, LOW_SCORES
from softteacher.model_folder import ModelFolder, sha256
from tests.evaluation.test_metrics import original
from tests.samples import write_json


@pytest.fixture(scope="module")
def evaluated(trained, digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "out"
    return out, evaluate(str(trained), str(digits / "annotations" / "instances_val.json"), str(out))


def test_files(evaluated, trained):
    out, metrics = evaluated
    assert {p.name for p in out.iterdir()} == {"metrics.json", "detections.json", "report.html"}
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "per_class"} <= set(metrics)
    assert set(metrics) >= {"teacher", "student", "weights"}
    assert metrics["weights"] == "teacher"
    assert all(metrics["teacher"][k] == metrics[k] for k in (*KEYS, "per_class"))
    trained_metrics = json.loads((trained / "metrics.json").read_text())
    more = {k: {key: value for key, value in metrics[k].items() if key != LOW_SCORES} for k in trained_metrics}
    assert more == trained_metrics


def test_pycocotools_says_the_same_about_the_detections(evaluated, digits):
    out, metrics = evaluated
    path = digits / "annotations" / "instances_val.json"
    results = json.loads((out / "detections.json").read_text())
    assert len(results) > 100
    assert {row["image_id"] for row in results} <= set(COCO(str(path)).imgs)
    assert [metrics[key] for key in KEYS] == pytest.approx(original(path, results).stats, abs=1e-9)


@pytest.mark.parametrize("weights", ["teacher", "student"])
def test_one_of_the_two(evaluated, trained, manifests, tmp_path, weights):
    metrics = evaluate(str(trained), str(manifests / "validation.json"), str(tmp_path / "out"), weights=weights)
    assert metrics["weights"] == weights
    assert {"teacher", "student"} & set(metrics) == {weights}
    assert metrics["AP"] == evaluated[1][weights]["AP"]


def test_what_is_found_can_be_set(evaluated, trained, manifests, tmp_path):
    """AP at another threshold than the model was trained with, on another device."""
    out = tmp_path / "out"
    chosen = ["detector.score_threshold=0.3"]
    evaluate(str(trained), str(manifests / "validation.json"), str(out), weights="teacher", overrides=chosen)
    rows, before = (json.loads((folder / "detections.json").read_text()) for folder in (out, evaluated[0]))
    key = str
    assert sorted(rows, key=key) == sorted((row for row in before if row["score"] > 0.3), key=key)
    assert len(rows) < len(before)
    assert json.loads((out / "metrics.json").read_text())["overrides"] == chosen
    with pytest.raises(UserError, match=r"training\.device = 'nowhere': not usable here .*--set training\.device=auto"):
        evaluate(*map(str, (trained, manifests / "validation.json", out)), overrides=["training.device=nowhere"])


def test_both_thresholds_of_the_papers(trained, manifests, tmp_path):
    """One look gives what two evaluations give."""
    arguments = str(trained), str(manifests / "validation.json")
    scores, rows = {}, {}
    for threshold in (0.001, 0.118):
        out = tmp_path / str(threshold)
        scores[threshold] = evaluate(*arguments, str(out), overrides=[f"detector.score_threshold={threshold}"])
        rows[threshold] = json.loads((out / "detections.json").read_text())
    low, high = scores.values()
    for weights in ("teacher", "student"):
        assert high[weights][LOW_SCORES] == low[weights][LOW_SCORES] == low[weights]["AP"]
    assert 0 < len(rows[0.118]) < len(rows[0.001])
    assert [row for row in rows[0.001] if row["score"] > 0.118] == rows[0.118]
    assert "AP with the detections that have a score from 0.001 on" in (tmp_path / "0.118" / "report.html").read_text()


def test_what_is_found_with_little_score_counts_in_one_of_the_two(manifests):
    dataset = load_coco(manifests / "validation.json")
    truth = {image.id: dataset.targets(n) for n, image in enumerate(dataset.images)}
    found = {i: Detections(boxes, np.full(len(labels), 0.01), labels) for i, (boxes, labels, *_) in truth.items()}
    metrics, results, _ = score_at_both_thresholds(dataset, found, Settings())
    assert metrics["AP"] == 0
    assert metrics[LOW_SCORES] == pytest.approx(1)
    assert results == []


def test_an_image_that_is_broken_is_left_out(trained, digits, tmp_path, capsys):
    shutil.copytree(digits, tmp_path / "set")
    (tmp_path / "set" / "images" / "000014.jpg").write_bytes(b"")
    data = str(tmp_path / "set" / "annotations" / "instances_val.json")
    evaluate(str(trained), data, str(tmp_path / "out"))
    assert "1 of 6 images are missing or broken and left out" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {row["image_id"] for row in results} == {13, 15, 16, 17, 18}
    (tmp_path / "set" / "images" / "000015.jpg").unlink()
    with pytest.raises(UserError, match="2 of 6 images are missing or broken, 1 allowed"):
        evaluate(str(trained), data, str(tmp_path / "out2"))
    assert not (tmp_path / "out2").exists()


def without(name):
    return lambda folder: (folder / name).unlink()


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:1000])


def replaced(name, content):
    return lambda folder: (folder / name).write_text(content)


class Harmful:
    path: str

    def __reduce__(self):
        return open, (self.path, "w")


def harmful(folder):
    torch.save({"a": Harmful()}, folder / "teacher.pt")


@pytest.mark.parametrize(
    ("damage", "signed", "message"),
    [
        *((without(f), False, f"{f}: missing or changed") for f in ("student.pt", "teacher.pt", "settings.yaml")),
        (without("provenance.json"), False, "is torn: no provenance.json"),
        (cut("teacher.pt"), False, "teacher.pt: missing or changed"),
        (cut("teacher.pt"), True, "teacher.pt: these are no weights for its settings"),
        (harmful, True, "teacher.pt: these are no weights for its settings"),
        (lambda folder: torch.save([1], folder / "teacher.pt"), True, "teacher.pt: these are no weights"),
        (replaced("settings.yaml", "data: {short_side: 96}"), False, "settings.yaml: missing or changed"),
        (replaced("settings.yaml", "data: {short_side: -1}"), True, "data.short_side = -1"),
        (replaced("settings.yaml", "[1"), True, "not valid YAML"),
        (replaced("settings.yaml", "detector: {fpn_channels: 8, norm: group}"), True, "no weights for its settings"),
        (replaced("classes.json", "5"), True, "classes.json is not ours"),
        (replaced("classes.json", '[{"id": NaN, "name": "x"}]'), True, "classes.json is not ours"),
        (replaced("classes.json", "[]"), True, "the class sets differ"),
        *((replaced("provenance.json", t), False, "provenance.json is not ours") for t in ("5", "{}", '{"sha256": 5}')),
        (replaced("provenance.json", "{"), False, "provenance.json: missing or broken json"),
        (replaced("provenance.json", '{"sha256": {}}'), False, "student.pt: missing or changed"),
    ],
)
def test_a_model_folder_that_is_torn_or_not_ours(trained, manifests, tmp_path, damage, signed, message):
    folder, trap = tmp_path / "model", tmp_path / "trap"
    Harmful.path = str(trap)
    shutil.copytree(trained, folder)
    damage(folder)
    if signed:  # somebody who can change the weights can change their digests, too
        facts = json.loads((folder / "provenance.json").read_text())
        facts["sha256"] = {name: sha256(folder / name) for name in facts["sha256"]}
        (folder / "provenance.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=message) as e:
        evaluate(str(folder), str(manifests / "validation.json"), str(tmp_path / "out"))
    assert len(str(e.value).splitlines()) == 1
    assert not trap.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [("/nowhere", "/nowhere: no such file or folder"), ("digits", "is no model folder: no provenance.json")],
)
def test_no_model_folder(manifests, digits, tmp_path, model, message):
    with pytest.raises(UserError, match=message):
        evaluate(str(digits) if model == "digits" else model, str(manifests / "validation.json"), str(tmp_path / "out"))


def test_errors_name_the_folder_that_the_user_gave(trained):
    with pytest.raises(UserError, match="s3://bucket/model: is no model folder"):
        ModelFolder("/tmp", "s3://bucket/model")


@pytest.mark.parametrize("command", [evaluate, analyze])
def test_the_models_own_metrics_are_not_replaced(trained, manifests, tmp_path, command):
    shutil.copytree(trained, tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    with pytest.raises(UserError, match=r"--out .*link: is the model itself, whose metrics\.json would be replaced"):
        command(str(tmp_path / "model"), str(manifests / "validation.json"), str(tmp_path / "link"))
    assert (tmp_path / "model" / "metrics.json").read_bytes() == (trained / "metrics.json").read_bytes()


def test_other_classes(trained, manifests, tmp_path):
    tree = json.loads((manifests / "validation.json").read_text())
    tree["categories"][0]["name"] = "nil"
    path = write_json(tmp_path / "v.json", tree)
    first = tree["categories"][0]["id"]
    odd = rf"\[\({first}, 'nil'\), \({first}, 'zero'\)\]"
    with pytest.raises(UserError, match=rf"v\.json and {trained}: the class sets differ \(e\.g\. {odd}\); use a data"):
        evaluate(str(trained), path, str(tmp_path / "out"))
