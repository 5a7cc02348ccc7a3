"""Each component called as Python: what it hands to the library, and what it makes of the answer."""

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock, create_autospec

import pytest
from kfp import dsl

from components import deploy, evaluate, export, gate, split, train, train_nodes
from softteacher.config import load_settings

STEPS = [split.split, train.train, train_nodes.train_nodes, evaluate.evaluate, export.export, gate.gate, deploy.deploy]


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
        import softteacher.data.split, softteacher.serving.gate, softteacher.serving.deploy
        import softteacher.serving.onnx_runtime  # the gate's, where the champion has to be scored again
        import components.trainjob
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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

    split.split.python_func(str(tmp_path), 20.0, 1, False, 0.0, "", dataset)

    assert {p.name for p in Path(dataset.path).iterdir()} == {
        *("labeled.json", "unlabeled.json", "validation.json", "split.json")
    }
    counts = {part: dataset.metadata[f"{part}_images"] for part in ("labeled", "unlabeled", "validation")}
    assert counts == {"labeled": 2, "unlabeled": 8, "validation": 10}
    assert facts(capsys) == {"step": "split", **dataset.metadata}


@pytest.mark.parametrize(
    ("fraction", "more", "expected"), [(0.0, "", (None, None)), (0.2, "s3://b/more", (0.2, "s3://b/more"))]
)
def test_split_passes_what_was_asked_for(library, tmp_path: Path, fraction, more, expected):
    part = {"images": 3, "fingerprint": "f"}
    double = library("softteacher.data.split.split", {"labeled": part, "unlabeled": part, "validation": part})
    dataset = artifact(dsl.Dataset, tmp_path, "dataset")

    split.split.python_func("s3://b/data", 5.0, 2, True, fraction, more, dataset)

    assert double.call_args.args == ("s3://b/data", dataset.path)
    assert double.call_args.kwargs == {
        **{"percent": 5.0, "fold": 2, "stratify": True},
        **{"validation_fraction": expected[0], "unlabeled": expected[1]},
    }


@pytest.mark.parametrize(
    ("checkpoints", "expected"),
    [("s3://b/ck/", "s3://b/ck/0a1b/train-baseline/checkpoints"), ("", None)],
)
def test_train(library, tmp_path: Path, capsys, checkpoints, expected):
    answer = {"teacher": {"AP": 0.5, "curve": [1.0] * 101}}
    double = library("softteacher.training.launch.launch", answer)
    dataset, model = artifact(dsl.Dataset, tmp_path, "dataset"), artifact(dsl.Model, tmp_path, "model")

    train.train.python_func(
        dataset, "supervised", "demo", ["training.seed=7"], checkpoints, "0a1b", "train-baseline", 4, model
    )

    manifests = [str(tmp_path / "dataset" / f"{name}.json") for name in ("labeled", "unlabeled", "validation")]
    double.assert_called_once_with(
        *(*manifests, model.path, load_settings("demo", ["training.seed=7", "method.name=supervised"])),
        checkpoints=expected,
        processes=4,
    )
    assert model.metadata["metrics"] == {"teacher": {"AP": 0.5}}
    assert facts(capsys)["method"] == "supervised"


def test_train_nodes(library, tmp_path: Path, capsys, monkeypatch):
    double = library("components.trainjob.train_on_nodes", {"teacher": {"AP": 0.5, "curve": [1.0] * 101}})
    client = Mock()
    monkeypatch.setattr("kubeflow.trainer.TrainerClient", client)
    dataset, model = artifact(dsl.Dataset, tmp_path, "dataset"), artifact(dsl.Model, tmp_path, "model")
    task = dsl.TaskConfig(node_selector={"pool": "gpu"})
    settings = ("soft_teacher", "demo", ["training.seed=7"])
    place = ("s3://b/ck", "0a1b", "train", 8, 2, "r.example/train:1", "16Gi", task)

    train_nodes.train_nodes.python_func(dataset, *settings, *place, model)

    double.assert_called_once_with(
        *(client.return_value, dataset.path, model.path, "s3://b/ck/0a1b/train"),
        ["--preset", "demo", "--set", "training.seed=7", "--set", "method.name=soft_teacher"],
        image="r.example/train:1",
        nodes=2,
        processes=8,
        shm="16Gi",
        task=task,
    )
    assert model.metadata["metrics"] == {"teacher": {"AP": 0.5}}
    assert facts(capsys)["step"] == "train"


def test_evaluate(library, tmp_path: Path, capsys):
    scores = {"AP": 0.5, "AP50": 0.7, "per_class": {"ace": 0.5}}
    answer = {**scores, "teacher": scores, "student": {**scores, "AP": 0.25}}
    double = library("softteacher.evaluation.evaluate.evaluate", answer, {"report.html": "<html>real</html>"}, out=2)
    dataset, model = artifact(dsl.Dataset, tmp_path, "dataset"), artifact(dsl.Model, tmp_path, "model")
    metrics, report = artifact(dsl.Metrics, tmp_path, "metrics"), artifact(dsl.HTML, tmp_path, "report")

    evaluate.evaluate.python_func(dataset, model, metrics, report, artifact(dsl.Artifact, tmp_path, "results"))

    paths = (tmp_path / "model", tmp_path / "dataset" / "validation.json", tmp_path / "results")
    assert double.call_args.args == tuple(map(str, paths))
    expected = {"teacher_AP": 0.5, "teacher_AP50": 0.7, "student_AP": 0.25, "student_AP50": 0.7}
    assert metrics.metadata == expected
    assert Path(report.path).read_text() == "<html>real</html>"
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


@pytest.mark.parametrize(("champion", "shown"), [(None, {}), (0.4, {"champion_ap": 0.4})])
def test_gate(library, tmp_path: Path, capsys, champion, shown):
    from softteacher.serving.gate import Decision

    answer = Decision(deploy=True, reason="better", ap=0.5, champion_ap=champion)
    double = library("softteacher.serving.gate.gate", answer)
    onnx, decision = artifact(dsl.Model, tmp_path, "onnx"), artifact(dsl.Metrics, tmp_path, "decision")

    assert gate.gate.python_func(onnx, "s3://b/models", "cards", 0.01, decision) is True
    double.assert_called_once_with(onnx.path, "s3://b/models", "cards", delta=0.01)
    assert decision.metadata == {"ap": 0.5, **shown, "reason": "better"}
    assert facts(capsys) == {"step": "gate", "deploy": True, **decision.metadata}


def test_deploy(library, tmp_path: Path, capsys):
    double = library("softteacher.serving.deploy.deploy", {"name": "cards", "version": 3})
    onnx = artifact(dsl.Model, tmp_path, "onnx")

    assert deploy.deploy.python_func(onnx, "s3://b/models", "http://t:8000", "cards", "python", True) == (
        {"name": "cards", "version": 3},
    )
    double.assert_called_once_with(onnx.path, "s3://b/models", "http://t:8000", "cards", backend="python", gpu=True)
    assert facts(capsys) == {"step": "deploy", "name": "cards", "version": 3}
