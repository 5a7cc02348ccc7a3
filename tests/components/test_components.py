"""Each component called as Python: what it hands to the library, and what it makes of the answer."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock, create_autospec

import pytest
from kfp import dsl

from components import (
    champion,
    collect,
    commit,
    deploy,
    evaluate,
    export,
    fingerprint,
    gate,
    record,
    report,
    shards,
    split,
    train,
    train_nodes,
)
from softteacher.config import load_settings
from softteacher.serving.repository import Runtime

COLLECTING = [collect.collect, collect.plan_collect, collect.hash_images, collect.merge_collect, commit.commit]
SHARDED = [shards.evaluate_shard, shards.join_evaluation, shards.rank_shard, shards.join_ranking]
SHARDED += [shards.predict_shard, shards.join_predictions]
STEPS = [
    *COLLECTING,
    *SHARDED,
    *(fingerprint.fingerprint, split.split, train.train, train_nodes.train_nodes, evaluate.evaluate, export.export),
    *(gate.gate, deploy.deploy, record.record, champion.champion, report.report),
]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Mock]:
    """Replace a library function by a double that refuses calls that the real one would refuse."""

    def replace(path: str, answer: object, writes: dict[str, str] | None = None, out: int = 0) -> Mock:
        def run(*arguments: object, **_: object) -> object:
            for name, text in (writes or {}).items():
                Path(str(arguments[out]), name).parent.mkdir(parents=True, exist_ok=True)
                Path(str(arguments[out]), name).write_text(text)
            return answer

        module, name = path.rsplit(".", 1)
        double = create_autospec(getattr(importlib.import_module(module), name), side_effect=run)
        monkeypatch.setattr(f"{path}", double)
        return double

    return replace


def artifact(kind: type, folder: Path, name: str) -> dsl.Artifact:
    return kind(name=name, uri=str(folder / name), metadata={})


def facts(capsys: pytest.CaptureFixture[str]) -> dict:
    """The last line that a component prints."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_docstring_names_every_input_and_output(step):
    text = step.python_func.__doc__
    names = [*step.component_spec.inputs, *(step.component_spec.outputs or {})]
    assert [name for name in names if f"    {name}: " not in text] == []


def test_steps_of_the_tools_image_need_nothing_that_it_lacks():
    dockerfile = Path(__file__).parents[2] / "images" / "tools.Dockerfile"
    lacking = sorted(ast.literal_eval(re.search(r"training = (\{.*?\})", dockerfile.read_text())[1]))
    assert "torch" in lacking
    script = f"""if True:
        import sys
        sys.modules.update(dict.fromkeys({lacking}))  # an import of these fails from here on
        import softteacher.data.split, softteacher.collecting.collect
        import softteacher.serving.gate, softteacher.serving.deploy
        import softteacher.serving.lineage
        import softteacher.serving.predict
        import softteacher.serving.onnx_runtime  # the gate's, where the champion has to be scored again
        import components.ending, components.trainjob
        import softteacher.data.fingerprint
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("unlabeled", "passed"), [("s3://b/more", "s3://b/more"), ("", None)])
def test_fingerprint(library, capsys, unlabeled, passed):
    double = library("softteacher.data.fingerprint.fingerprint", "f1")
    assert fingerprint.fingerprint.python_func("s3://b/data", unlabeled) == "f1"
    double.assert_called_once_with("s3://b/data", passed)
    assert facts(capsys) == {"step": "fingerprint", "data": "s3://b/data", "fingerprint": "f1"}


def test_report(library, monkeypatch):
    double = library("components.ending.tell_ending", "a line")
    monkeypatch.setenv("SOFTTEACHER_WEBHOOK", "https://chat.example/hook")
    status = dsl.PipelineTaskFinalStatus("FAILED", "job", "exit-handler-1", 1, None)
    report.report.python_func(status, "training-pipeline", "0a1b", "http://api", "https://ui")
    double.assert_called_once_with(
        *("FAILED", "", "training-pipeline", "0a1b"),
        kfp_api="http://api",
        kfp_ui="https://ui",
        webhook="https://chat.example/hook",
    )


def test_split_of_a_real_data_set(tmp_path: Path, capsys):
    from PIL import Image

    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    for part, first in (("train", 1), ("val", 11)):
        images = [{"id": i, "file_name": f"{i}.png", "width": 32, "height": 32} for i in range(first, first + 10)]
        for image in images:
            Image.new("RGB", (32, 32)).save(tmp_path / "images" / image["file_name"])
        boxes = [{"id": i["id"], "image_id": i["id"], "category_id": 1, "bbox": [1, 1, 9, 9]} for i in images]
        coco = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "one"}]}
        (tmp_path / "annotations" / f"instances_{part}.json").write_text(json.dumps(coco))
    dataset = artifact(dsl.Dataset, tmp_path, "dataset")

    split.split.python_func(str(tmp_path), 20.0, 1, False, 0.0, "", "f1", dataset)

    assert {p.name for p in Path(dataset.path).iterdir()} == {
        *("labeled.json", "unlabeled.json", "validation.json", "split.json")
    }
    counts = {part: dataset.metadata[f"{part}_images"] for part in ("labeled", "unlabeled", "validation")}
    assert counts == {"labeled": 2, "unlabeled": 8, "validation": 10}
    assert dataset.metadata["data_fingerprint"] == "f1"
    assert facts(capsys) == {"step": "split", **dataset.metadata}


@pytest.mark.parametrize(
    ("fraction", "more", "expected"), [(0.0, "", (None, None)), (0.2, "s3://b/more", (0.2, "s3://b/more"))]
)
def test_split_passes_what_was_asked_for(library, tmp_path: Path, fraction, more, expected):
    part = {"images": 3, "fingerprint": "f"}
    double = library("softteacher.data.split.split", {"labeled": part, "unlabeled": part, "validation": part})
    dataset = artifact(dsl.Dataset, tmp_path, "dataset")

    split.split.python_func("s3://b/data", 5.0, 2, True, fraction, more, "f1", dataset)

    assert double.call_args.args == ("s3://b/data", dataset.path)
    assert double.call_args.kwargs == {
        **{"percent": 5.0, "fold": 2, "stratify": True},
        **{"validation_fraction": expected[0], "unlabeled": expected[1]},
    }


@pytest.mark.parametrize(
    ("checkpoints", "expected", "init", "new_share"),
    [("s3://b/ck/", "s3://b/ck/0a1b/train-baseline/checkpoints", "", 0), ("", None, "s3://b/cards/3/model", 0.4)],
)
def test_train(library, tmp_path: Path, capsys, monkeypatch, checkpoints, expected, init, new_share):
    monkeypatch.setenv("SOFTTEACHER_RUN", "")
    answer = {"teacher": {"AP": 0.5, "curve": [1.0] * 101}}
    double = library("softteacher.training.launch.launch", answer)
    dataset, model = artifact(dsl.Dataset, tmp_path, "dataset"), artifact(dsl.Model, tmp_path, "model")

    chosen = ("supervised", "demo", ["training.seed=7"])
    train.train.python_func(dataset, *chosen, checkpoints, "0a1b", "train-baseline", init, new_share, 4, model)

    manifests = [str(tmp_path / "dataset" / f"{name}.json") for name in ("labeled", "unlabeled", "validation")]
    settings = ["training.seed=7", "method.name=supervised", f"detector.init_from={init or 'none'}"]
    settings.append(f"training.new_share={new_share or 'none'}")
    double.assert_called_once_with(
        *(*manifests, model.path, load_settings("demo", settings)),
        checkpoints=expected,
        processes=4,
    )
    assert model.metadata["metrics"] == {"teacher": {"AP": 0.5}}
    assert facts(capsys)["method"] == "supervised"
    assert os.environ["SOFTTEACHER_RUN"] == "0a1b"


def test_train_nodes(library, tmp_path: Path, capsys, monkeypatch):
    double = library("components.trainjob.train_on_nodes", {"teacher": {"AP": 0.5, "curve": [1.0] * 101}})
    client = Mock()
    monkeypatch.setattr("kubeflow.trainer.TrainerClient", client)
    dataset, model = artifact(dsl.Dataset, tmp_path, "dataset"), artifact(dsl.Model, tmp_path, "model")
    secret = {"name": "AWS_ACCESS_KEY_ID", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "id"}}}
    tools = {"name": "SOFTTEACHER_IMAGE", "value": "r.example/tools:1"}
    monkeypatch.setenv("SOFTTEACHER_POD", "train-pod-7")
    monkeypatch.setenv("SOFTTEACHER_POD_UID", "0-1-2")
    pod = {"name": "SOFTTEACHER_POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}
    task = dsl.TaskConfig(node_selector={"pool": "gpu"}, env=[secret, tools, pod])
    settings = ("soft_teacher", "demo", ["training.seed=7"])
    chosen = ("training.seed=7", "method.name=soft_teacher", "detector.init_from=s3://b/m", "training.new_share=0.4")
    place = ("s3://b/ck", "0a1b", "train", "s3://b/m", 0.4, 8, 2, "r.example/train:1", "16Gi", 3600)

    train_nodes.train_nodes.python_func(dataset, *settings, *place, ["registry"], task, model)

    double.assert_called_once_with(
        *(client.return_value, dataset.path, model.path, "s3://b/ck/0a1b/train"),
        ["--preset", "demo", *(part for setting in chosen for part in ("--set", setting))],
        image="r.example/train:1",
        nodes=2,
        processes=8,
        shm="16Gi",
        task=task,
        deadline=3600,
        owner={"name": "train-pod-7", "uid": "0-1-2"},
        pull_secrets=["registry"],
    )
    assert model.metadata["metrics"] == {"teacher": {"AP": 0.5}}
    assert task.env == [
        secret,
        {"name": "SOFTTEACHER_RUN", "value": "0a1b"},
        {"name": "SOFTTEACHER_IMAGE", "value": "r.example/train:1"},
    ]
    assert facts(capsys)["step"] == "train"


@pytest.mark.parametrize("classes", [2, 80])
def test_evaluate(library, tmp_path: Path, capsys, classes):
    names = [*map(str, range(classes)), "background"]
    roc = {"fpr": [0.0, 1.0], "tpr": [0.0, 1.0], "threshold": [1.0, 0.0]}
    found = {"classes": names, "matrix": [[n] * len(names) for n in range(len(names))], "above": 0.5, "roc": roc}
    scores = {"AP": 0.5, "AP50": 0.7, "per_class": {"ace": 0.5}}
    answer = {**scores, "confusion": found, "teacher": scores, "student": {**scores, "AP": 0.25}}
    double = library("softteacher.evaluation.evaluate.evaluate", answer, {"report.html": "<html>real</html>"}, out=2)
    dataset, model = artifact(dsl.Dataset, tmp_path, "dataset"), artifact(dsl.Model, tmp_path, "model")
    metrics, report = artifact(dsl.Metrics, tmp_path, "metrics"), artifact(dsl.HTML, tmp_path, "report")
    detections = artifact(dsl.ClassificationMetrics, tmp_path, "detections")
    results = artifact(dsl.Artifact, tmp_path, "results")

    evaluate.evaluate.python_func(dataset, model, metrics, detections, report, results)

    paths = (tmp_path / "model", tmp_path / "dataset" / "validation.json", tmp_path / "results")
    assert double.call_args.args == tuple(map(str, paths))
    expected = {"teacher_AP": 0.5, "teacher_AP50": 0.7, "student_AP": 0.25, "student_AP50": 0.7}
    assert metrics.metadata == expected
    assert Path(report.path).read_text() == "<html>real</html>"
    assert [point["recall"] for point in detections.metadata["confidenceMetrics"]] == [0.0, 1.0]
    if classes == 2:
        shown = detections.metadata["confusionMatrix"]
        assert [spec["displayName"] for spec in shown["annotationSpecs"]] == names
        assert shown["rows"] == [{"row": [n] * 3} for n in range(3)]
    else:
        assert "confusionMatrix" not in detections.metadata
    assert facts(capsys) == {"step": "evaluate", **expected}


def test_export(library, tmp_path: Path, capsys):
    batch = {"matched": 40, "max_score_difference": 1e-6}
    answer = {"ap": {"onnxruntime": 0.5, "pytorch": 0.51}, "batch_1": batch, "batch_4": batch, "onnx_sha256": "aa"}
    double = library("softteacher.serving.export.export", answer)
    model, onnx = artifact(dsl.Model, tmp_path, "model"), artifact(dsl.Model, tmp_path, "onnx")
    parity = artifact(dsl.Metrics, tmp_path, "parity")

    export.export.python_func(model, onnx, parity)

    double.assert_called_once_with(model.path, onnx.path)
    assert onnx.metadata["onnx_sha256"] == "aa"
    assert parity.metadata["ap_onnxruntime"] == 0.5
    assert parity.metadata["batch_4_matched"] == 40
    assert facts(capsys) == {"step": "export", **parity.metadata}


@pytest.mark.parametrize(("champion_ap", "shown"), [(None, {}), (0.4, {"champion_ap": 0.4})])
def test_gate(library, tmp_path: Path, capsys, champion_ap, shown):
    from softteacher.choices import Bounds
    from softteacher.serving.decision import Decision

    answer = Decision(deploy=True, reason="better", ap=0.5, champion_ap=champion_ap)

    def decide(*_: object, out: str, **__: object) -> Decision:
        Path(out).mkdir()
        Path(out, "report.html").write_text("<html>real</html>")
        return answer

    double = library("softteacher.serving.gate.gate", answer)
    double.side_effect = decide
    onnx, decision = artifact(dsl.Model, tmp_path, "onnx"), artifact(dsl.Metrics, tmp_path, "decision")
    report, results = artifact(dsl.HTML, tmp_path, "report"), artifact(dsl.Artifact, tmp_path, "results")
    bounds = (0.01, 0.1, 2.0, True)

    assert gate.gate.python_func(onnx, "s3://b/models", "cards", *bounds, decision, report, results) is True
    double.assert_called_once_with(onnx.path, "s3://b/models", "cards", bounds=Bounds(*bounds), out=results.path)
    assert decision.metadata == {"ap": 0.5, **shown, "reason": "better"}
    assert Path(report.path).read_text() == "<html>real</html>"
    assert facts(capsys) == {"step": "gate", "deploy": True, **decision.metadata}


@pytest.mark.parametrize(("canary", "expected"), [(0.0, None), (0.1, 0.1)])
def test_deploy(library, tmp_path: Path, capsys, canary, expected):
    double = library("softteacher.serving.deploy.deploy", {"name": "cards", "version": 3})
    onnx, results = artifact(dsl.Model, tmp_path, "onnx"), artifact(dsl.Artifact, tmp_path, "results")
    where = ("s3://b/models", "http://t:8000", "cards")

    served = ("python", "openvino-bf16", False, canary)
    assert deploy.deploy.python_func(onnx, results, *where, *served, "0a1b") == ({"name": "cards", "version": 3},)
    options = {"runtime": Runtime(*served[:2]), "canary": expected, "decision": results.path, "run": "0a1b"}
    double.assert_called_once_with(onnx.path, *where, **options)
    assert facts(capsys) == {"step": "deploy", "name": "cards", "version": 3}


def test_record(library, tmp_path: Path, capsys):
    double = library("softteacher.serving.lineage.record", {"version": 3, "run_id": "0a1b"})
    entry = {"version": 3, "parents": {"champion": None, "warm_start": None}}
    chain = library("softteacher.serving.lineage.lineage", {"name": "cards", "live": 3, "versions": [entry]})
    model, onnx = artifact(dsl.Model, tmp_path, "model"), artifact(dsl.Model, tmp_path, "onnx")
    results, lineage = artifact(dsl.Artifact, tmp_path, "results"), artifact(dsl.Markdown, tmp_path, "lineage")

    record.record.python_func(model, onnx, results, "s3://b/models", "s3://b/registry", "cards", "0a1b", lineage)

    where = (model.path, onnx.path, "s3://b/models", "cards", "s3://b/registry")
    double.assert_called_once_with(*where, gate=results.path, run="0a1b")
    chain.assert_called_once_with("cards", "s3://b/models", "s3://b/registry", 3)
    assert Path(lineage.path).read_text().startswith("```\ncards version 3 (live)")
    assert facts(capsys) == {"step": "record", "name": "cards", "version": 3, "run": "0a1b"}


def test_champion(library, capsys):
    double = library("softteacher.serving.lineage.champion_model", "s3://b/registry/cards/3/model")
    where = ("s3://b/models", "s3://b/registry", "cards")
    assert champion.champion.python_func(*where) == "s3://b/registry/cards/3/model"
    double.assert_called_once_with(*where)
    assert facts(capsys) == {"step": "champion", "model": "s3://b/registry/cards/3/model"}
