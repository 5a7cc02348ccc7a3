"""Training end to end, on a few digits: what is in the model folder, and that the same seed gives the same bits."""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from softteacher import storage
from softteacher.config import load_settings, read_settings
from softteacher.data.coco import load_coco
from softteacher.errors import UserError
from softteacher.evaluation.inference import Scored
from softteacher.model_folder import ModelFolder, sha256
from softteacher.training.train import for_batch, train
from tests.faulty import FaultyProxy
from tests.samples import TINY, write_json

TERMS = {"rpn_cls", "rpn_box", "cls", "box"}
DIAGNOSTICS = {"reliability", "unsup_over_sup", "pseudo_precision", "pseudo_recall"}
DIAGNOSTICS |= {f"teacher_scores/0.{n}" for n in range(10)}


def run(manifests, out, *overrides, labeled=None, unlabeled=None, validation=None):
    sources = [
        given or str(manifests / f"{name}.json")
        for name, given in (("labeled", labeled), ("unlabeled", unlabeled), ("validation", validation))
    ]
    if unlabeled is False:
        sources[1] = None
    settings = load_settings("demo", [*TINY, "training.iterations=4", "method.burn_in=0.5", *overrides])
    return train(*sources, str(out), settings)


def weights(folder, name="student"):
    return torch.load(folder / f"{name}.pt", weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def log(folder):
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def test_files(trained):
    names = {p.name for p in trained.iterdir()}
    events = {n for n in names if n.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {
        *("student.pt", "teacher.pt", "settings.yaml", "classes.json", "validation.json"),
        *("training.jsonl", "metrics.json", "provenance.json"),
    }


def test_training_log(trained):
    rows = log(trained)
    assert [row["step"] for row in rows] == [2, 4, 6]
    pseudo = {f"pseudo_boxes_{use}" for use in ("pool", "rpn", "cls", "reg")}
    always = {"step", "loss", "lr", "images_per_second", "skipped", *TERMS}
    assert set(rows[0]) == always  # burn-in
    for row in rows[1:]:
        assert set(row) == always | {f"unsup_{t}" for t in TERMS} | pseudo | DIAGNOSTICS
        assert row["pseudo_boxes_pool"] >= row["pseudo_boxes_cls"] > 0
        assert row["loss"] == pytest.approx(
            sum(v for k, v in row.items() if k.removeprefix("unsup_") in TERMS), rel=1e-3
        )
        assert 0 <= row["reliability"] <= 1
    assert all(np.isfinite(v) for row in rows for v in row.values())


@pytest.mark.parametrize("name", ["soft_teacher", "mean_teacher"])
def test_hidden_labels_are_never_trained_on(manifests, tmp_path, name):
    """The weights are the same bits whether the unlabelled json has boxes or not; only the diagnostics differ."""
    tree = json.loads((manifests / "unlabeled.json").read_text())
    bare = write_json(tmp_path / "bare.json", {**tree, "annotations": [], "categories": []})
    low = [f"method.{key}_threshold=0.06" for key in ("pool", "rpn", "cls")]
    chosen = [f"method.name={name}", "training.log_every=4", *low]
    run(manifests, tmp_path / "with", *chosen)
    run(manifests, tmp_path / "without", *chosen, unlabeled=bare)
    assert equal(weights(tmp_path / "with"), weights(tmp_path / "without"))
    assert equal(weights(tmp_path / "with", "teacher"), weights(tmp_path / "without", "teacher"))
    assert "pseudo_recall" in log(tmp_path / "with")[-1]
    assert "pseudo_recall" not in log(tmp_path / "without")[-1]


def test_tensorboard_events(trained):
    events = EventAccumulator(str(trained))
    events.Reload()
    rows = log(trained)
    assert set(events.Tags()["scalars"]) == set(rows[-1]) - {"step"}
    scalars = events.Scalars("loss")
    assert [s.step for s in scalars] == [2, 4, 6]
    assert [s.value for s in scalars] == pytest.approx([row["loss"] for row in rows], rel=1e-4)


def test_settings_round_trip(trained):
    low = [f"method.{key}_threshold=0.06" for key in ("pool", "rpn", "cls")]
    asked = load_settings("demo", [*TINY, *low, "method.reg_variance_threshold=9", "method.burn_in=0.34"])
    assert read_settings(trained / "settings.yaml") == asked


def test_classes_metrics_and_provenance(trained, manifests):
    classes = json.loads((trained / "classes.json").read_text())
    assert classes == json.loads((manifests / "labeled.json").read_text())["categories"]
    metrics = json.loads((trained / "metrics.json").read_text())
    assert set(metrics) == {"teacher", "student"}
    for numbers in metrics.values():
        assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "per_class"} <= set(numbers)
        assert set(numbers["per_class"]) == {c["name"] for c in classes}
    facts = json.loads((trained / "provenance.json").read_text())
    assert facts["method"] == "soft_teacher"
    assert facts["seed"] == 0
    assert {"softteacher", "torch", "torchvision", "python", "numpy"} <= set(facts["versions"])
    for name in ("labeled", "unlabeled", "validation"):
        source = load_coco(manifests / f"{name}.json", labeled=name != "unlabeled")
        assert facts["data"][name]["fingerprint"] == source.fingerprint()
        assert facts["data"][name]["images"] == 6
    assert facts["sha256"]["teacher.pt"] == sha256(trained / "teacher.pt")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:
        assert facts["git_sha"].removesuffix("-dirty") == head.stdout.strip()


def test_model_folder_opens(trained):
    folder = ModelFolder(trained)
    assert folder.classes[3] == "three"
    assert len(folder.validation()) == 6
    student, teacher = folder.detector("student"), folder.detector("teacher")
    assert not student.training
    assert equal(student.state_dict(), weights(trained))
    assert not equal(student.state_dict(), teacher.state_dict())


def test_the_same_seed_gives_the_same_bits(manifests, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(manifests, tmp_path / name, f"training.seed={seed}")
    for name in ("student", "teacher"):
        assert equal(weights(tmp_path / "a", name), weights(tmp_path / "b", name))
        assert not equal(weights(tmp_path / "a", name), weights(tmp_path / "c", name))
    assert (tmp_path / "a" / "metrics.json").read_text() == (tmp_path / "b" / "metrics.json").read_text()


def test_what_is_written_are_the_best_weights_of_both(manifests, tmp_path, monkeypatch):
    written, best = [], 1
    for answers in ([0.1, 0.4, 0.2, 0.3, 0.25], [0.1, 0.2, 0.3, 0.4, 0.25]):  # the teacher's four, then the student's
        scored = []

        def score(detector, *_, scored=scored, answers=answers):
            scored.append({k: v.clone() for k, v in detector.state_dict().items()})
            return Scored({"AP": answers[len(scored) - 1]}, [], None)

        monkeypatch.setattr("softteacher.training.train.score", score)
        out = tmp_path / f"best-{best}"
        metrics = run(manifests, out, "training.evaluate_every=1", "method.guard=false")
        teacher, student = weights(out, "teacher"), weights(out, "student")
        assert equal(teacher, scored[best])
        assert equal(student, scored[4])
        assert {name: metrics[name]["AP"] for name in ("teacher", "student")} == {"teacher": 0.4, "student": 0.25}
        written.append(student)
        best = 3
    assert not equal(*written)  # the student of step 2, and that of step 4


def test_after_the_first_step_the_teacher_is_the_student(manifests, tmp_path):
    run(manifests, tmp_path / "m", "training.iterations=1")
    assert equal(weights(tmp_path / "m", "teacher"), weights(tmp_path / "m", "student"))


@pytest.mark.parametrize("overrides", [["method.burn_in=1"], ["method.unsup_weight=0", "method.burn_in=0"]])
def test_soft_teacher_without_its_second_half_is_the_baseline(manifests, tmp_path, overrides):
    run(manifests, tmp_path / "ours", *overrides)
    run(manifests, tmp_path / "baseline", "method.name=supervised")
    assert equal(weights(tmp_path / "ours"), weights(tmp_path / "baseline"))
    assert equal(weights(tmp_path / "ours", "teacher"), weights(tmp_path / "baseline", "teacher"))


@pytest.mark.parametrize(
    ("preset", "images", "lr", "iterations"),
    [
        ("coco-10pct", 40, 0.01, 180_000),
        ("coco-10pct", 5, 0.00125, 1_440_000),
        ("coco-10pct", 80, 0.02, 90_000),
        ("coco-10pct", 15, 0.00375, 480_000),
        ("coco-10pct", 7, 0.00175, 1_028_571),
        ("coco-full", 64, 0.01, 720_000),
        ("coco-full-r101", 32, 0.005, 2_160_000),
        ("coco-full-swin", 8, 0.0000125, 5_760_000),
        ("coco-1pct+demo", 20, 0.0005, 1_400),
        ("coco-1pct+demo", 10**6, 25.0, 1),
        ("demo", 5, 0.001, 700),
    ],
)
def test_lr_and_iterations_follow_the_batch(preset, images, lr, iterations):
    asked = load_settings(preset)
    found = for_batch(asked, images)
    assert (found.training.lr, found.training.iterations) == (pytest.approx(lr, rel=1e-12), iterations)
    assert found.training.reference_batch == (images if asked.training.reference_batch else None)
    every = asked.training.evaluate_every * iterations / asked.training.iterations
    assert found.training.evaluate_every == (max(1, round(every)) if every else 0)
    kept = {"lr", "iterations", "reference_batch", "evaluate_every"}
    assert found.training.model_dump(exclude=kept) == asked.training.model_dump(exclude=kept)
    assert found.model_dump(exclude={"training"}) == asked.model_dump(exclude={"training"})
    assert for_batch(found, images) == found


def test_what_follows_is_said_trained_and_kept(manifests, tmp_path, capsys):
    """A run that was cut off derives the same again, and so does one with the settings of the model."""
    chosen = ["training.reference_batch=6", "training.lr=0.003", "training.log_every=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "softteacher.training.train.ModelFolder.write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            run(manifests, tmp_path / "m", *chosen)
    said = capsys.readouterr().err
    assert "train: lr 0.003 -> 0.002, iterations 4 -> 6: 4 images a step, training.reference_batch is 6" in said
    run(manifests, tmp_path / "m", *chosen)
    assert "goes on at step 6 of 6" in capsys.readouterr().err
    kept = read_settings(tmp_path / "m" / "settings.yaml").training
    assert (kept.lr, kept.iterations, kept.reference_batch) == (0.002, 6, 4)
    assert [row["step"] for row in log(tmp_path / "m")] == list(range(1, 7))
    assert log(tmp_path / "m")[-1]["lr"] < 0.002
    for again in (chosen, ["training.reference_batch=4", "training.lr=0.002", "training.iterations=6"]):
        run(manifests, tmp_path / "m", *again)
        said = capsys.readouterr().err
        assert "nothing to do" in said
        assert "->" not in said


@pytest.mark.parametrize("kind", ["none", "empty folder", "empty json"])
def test_no_unlabelled_images(manifests, tmp_path, capsys, kind):
    (tmp_path / "empty").mkdir()
    given = {"none": False, "empty folder": str(tmp_path / "empty")}.get(kind)
    if kind == "empty json":
        given = write_json(tmp_path / "empty.json", {"images": []})
    run(manifests, tmp_path / "m", unlabeled=given)
    assert "warning: no unlabelled images" in capsys.readouterr().err
    assert not any(key.startswith("unsup") for row in log(tmp_path / "m") for key in row)


@pytest.mark.parametrize("kind", ["json", "folder", "s3"])
def test_unlabelled_images_from_anywhere(manifests, digits, tmp_path, kind, request):
    if kind == "json":
        images = json.loads((manifests / "unlabeled.json").read_text())["images"]
        bare = [{"id": i["id"], "file_name": i["file_name"]} for i in images]
        given = write_json(tmp_path / "annotations" / "bare.json", {"images": bare})
        (tmp_path / "images").symlink_to(digits / "images")
    elif kind == "folder":
        (tmp_path / "in" / "deep").mkdir(parents=True)
        for path in list((digits / "images").iterdir())[:5]:
            (tmp_path / "in" / "deep" / f"ü {path.name}").write_bytes(path.read_bytes())
        given = str(tmp_path / "in")
    else:
        given = f"{request.getfixturevalue('s3')}/images"
        storage.copy(digits / "images", given)
    run(manifests, tmp_path / "m", unlabeled=given)
    assert "unsup_cls" in log(tmp_path / "m")[-1]
    facts = json.loads((tmp_path / "m" / "provenance.json").read_text())
    assert facts["data"]["unlabeled"]["images"] == {"json": 6, "folder": 5, "s3": 18}[kind]


def test_from_s3_to_s3(digits, tmp_path, s3):
    from softteacher.data.split import split
    from softteacher.evaluation.evaluate import evaluate
    from softteacher.evaluation.metrics import LOW_SCORES

    storage.copy(digits, f"{s3}/digits")
    split(f"{s3}/digits", f"{s3}/split", percent=50)
    names = [f"{s3}/split/{n}.json" for n in ("labeled", "unlabeled", "validation")]
    settings = load_settings("demo", [*TINY, "training.iterations=2", "data.workers=1"])
    metrics = train(*names, f"{s3}/model", settings)
    assert "provenance.json" in {f.name for f in storage.list_files(f"{s3}/model")}
    again = evaluate(f"{s3}/model", names[2], f"{s3}/report")
    assert again["teacher"] == metrics["teacher"] | {LOW_SCORES: again["teacher"][LOW_SCORES]}
    assert {f.name for f in storage.list_files(f"{s3}/report")} == {"metrics.json", "detections.json", "report.html"}


def test_validation_images_are_fetched_once(manifests, digits, tmp_path, s3, monkeypatch):
    storage.copy(digits / "images", f"{s3}/images")
    tree = json.loads((manifests / "validation.json").read_text())
    tree["softteacher"]["root"] = f"{s3}/images"
    validation = write_json(tmp_path / "validation.json", tree)
    chosen = ["method.name=supervised", "training.evaluate_every=2", f"data.cache_dir={tmp_path}/cache"]
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL_S3"]) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", store.url)
        run(manifests, tmp_path / "m", *chosen, validation=validation)
    assert len(store.seen) == 6  # of 24 times that an image is looked at


def test_a_short_run_and_a_long_warm_up(manifests, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("softteacher.training.train.run_training", lambda *_: None)
    for warmup in (4, 3):
        run(manifests, tmp_path / str(warmup), "method.name=supervised", f"training.warmup_iterations={warmup}")
        told = (
            "warmup_iterations = 4, but there are 4 iterations: lr never comes up to 0.001" in capsys.readouterr().err
        )
        assert told == (warmup == 4)


def other_classes(tree):
    tree["categories"][2]["name"] = "zwei"


def nowhere(tree):
    tree["softteacher"]["root"] = "/nowhere"


@pytest.mark.parametrize(
    ("part", "edit", "message"),
    [
        ("validation", other_classes, "class sets differ .*zwei"),
        ("unlabeled", other_classes, "class sets differ .*zwei"),
        ("validation", nowhere, "6 of 6 images are missing or broken"),
        ("labeled", nowhere, "not one of its 6 images can be read"),
        ("unlabeled", nowhere, "not one of its 6 images can be read"),
    ],
)
def test_bad_data(manifests, tmp_path, part, edit, message):
    tree = json.loads((manifests / f"{part}.json").read_text())
    edit(tree)
    path = write_json(tmp_path / "bad.json", tree)
    with pytest.raises(UserError, match=message) as e:
        run(manifests, tmp_path / "m", "method.burn_in=0", **{part: path})
    assert path in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.json"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.unlabeled_per_batch=0"], "training.unlabeled_per_batch = 0"),
        (["training.device=cuda:77"], "training.device = 'cuda:77': not usable here"),
        (["training.device=meta"], "training.device = 'meta': not usable here"),
        (["training.device=abacus"], "training.device = 'abacus': not usable here"),
        (["detector.norm=frozen_batch", "detector.name=fasterrcnn_resnet18_fpn"], "can't learn without"),
    ],
)
def test_bad_settings(manifests, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        run(manifests, tmp_path / "m", *overrides)
    assert list(tmp_path.iterdir()) == []


def test_labelled_images_to_validate_on(manifests, tmp_path, capsys, monkeypatch):
    """They are told and kept, by whatever path they are known."""
    monkeypatch.setattr("softteacher.training.train.run_training", lambda *_: None)
    (tmp_path / "link").symlink_to(Path(load_coco(manifests / "labeled.json").root).parent)
    tree = json.loads((manifests / "labeled.json").read_text())
    tree["softteacher"]["root"] = f"{tmp_path}/link/images"
    same = write_json(tmp_path / "same.json", tree)
    run(manifests, tmp_path / "all", "method.name=supervised", validation=same)
    assert re.search(r"same\.json: 6 of its 6 images are in .*labeled\.json, too: they are", capsys.readouterr().err)
    root = load_coco(manifests / "validation.json").root
    tree["images"][2:] = [
        row | {"root": root} for row in json.loads((manifests / "validation.json").read_text())["images"]
    ]
    ids = {row["id"] for row in tree["images"]}
    tree["annotations"] = [row for row in tree["annotations"] if row["image_id"] in ids]
    some = write_json(tmp_path / "some.json", tree)
    run(manifests, tmp_path / "m", "method.name=supervised", validation=some)
    assert f"some.json: 2 of its 8 images are in {manifests}/labeled.json, too" in capsys.readouterr().err
    facts = json.loads((tmp_path / "m" / "provenance.json").read_text())
    assert [facts["data"][part]["images"] for part in ("labeled", "validation")] == [6, 8]
    run(manifests, tmp_path / "other", "method.name=supervised")
    assert "are in" not in capsys.readouterr().err


def test_a_store_that_is_not_there_is_told_before_the_training(manifests, s3, monkeypatch):
    monkeypatch.setattr("softteacher.training.train.run_training", lambda *_: pytest.fail("it trained"))
    with pytest.raises(UserError, match="no such bucket"):
        run(manifests, "s3://no-such-bucket-here/model")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="S3 refused access"):
        run(manifests, f"{s3}/model")


def test_what_starts_from_a_detector_that_learnt_from_nothing_has_its_norm(manifests, tmp_path):
    chosen = ("detector.name=fasterrcnn_resnet18_fpn", "training.iterations=1", "method.name=supervised")
    for name, parent in (("second", "first"), ("third", "second")):
        if name == "second":
            run(manifests, tmp_path / parent, *chosen)
        run(manifests, tmp_path / name, *chosen, f"detector.init_from={tmp_path / parent}")
    models = [ModelFolder(tmp_path / name) for name in ("first", "second", "third")]
    assert [model.settings.detector.norm for model in models] == ["auto", "group", "group"]
    assert models[2].provenance["parent"]["sha256"] == models[1].provenance["sha256"]["teacher.pt"]
