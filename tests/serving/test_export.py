"""`export`: the ONNX file answers as PyTorch does at any batch, and says itself how to use it."""

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from softteacher.data.check import read_image
from softteacher.data.coco import load_coco
from softteacher.errors import UserError
from softteacher.evaluation.evaluate import evaluate
from softteacher.model_folder import ModelFolder, sha256
from softteacher.serving import export as module
from softteacher.serving.export import ServedDetector, canvas_size, compare, export
from softteacher.serving.onnx_runtime import OnnxDetector, evaluate_onnx
from softteacher.serving.outputs import OUTPUTS
from softteacher.serving.repository import read_onnx_folder


def test_files(exported, trained):
    names = {"model.onnx", "parity.json", "smoke.npz", "provenance.json", "validation.json"}
    assert {p.name for p in exported.iterdir()} == names
    for name in ("provenance.json", "validation.json"):
        assert (exported / name).read_bytes() == (trained / name).read_bytes()
    folder = read_onnx_folder(exported)  # what a deployment asks for
    assert [c["name"] for c in folder.categories] == ModelFolder(trained).classes


def test_graph(exported):
    graph = onnx.load(exported / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [64, 64, 3])
    assert isinstance(given.shape[0], str)  # dynamic
    answers = {o.name: (o.type, o.shape[1:]) for o in session.get_outputs()}
    assert answers == {
        "num_detections": ("tensor(int32)", [1]),
        "detection_boxes": ("tensor(float)", [100, 4]),
        "detection_scores": ("tensor(float)", [100]),
        "detection_classes": ("tensor(int32)", [100]),
    }


def test_metadata(exported, trained):
    graph = onnx.load(exported / "model.onnx")
    facts = {p.key: p.value for p in graph.metadata_props}
    assert json.loads(facts["classes"]) == json.loads((trained / "classes.json").read_text())
    assert json.loads(facts["preprocessing"]) == {
        "image_size": [64, 64], "short_side": 64, "long_side": 107, "pad": [124, 116, 104],
    }  # fmt: skip
    assert facts["max_detections"] == "100"


@pytest.fixture(scope="module")
def both(exported, trained):
    """The exported and the PyTorch detector, and real images on the canvas."""
    folder = ModelFolder(trained)
    detector = OnnxDetector(exported / "model.onnx")
    validation = folder.validation()
    canvases = np.stack([detector.letterbox(read_image(validation, i)[0])[0] for i in range(6)])
    return detector, ServedDetector(folder.detector("teacher"), detector.image_size).eval(), canvases


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_onnx_equals_pytorch(both, batch):
    detector, served, canvases = both
    ours, theirs = served.run(canvases[:batch]), detector.run(canvases[:batch])
    np.testing.assert_array_equal(ours["num_detections"], theirs["num_detections"])
    assert (ours["num_detections"] > 10).all()
    for n, count in enumerate(ours["num_detections"][:, 0]):
        np.testing.assert_allclose(
            theirs["detection_scores"][n, :count], ours["detection_scores"][n, :count], atol=1e-5
        )
        assert (theirs["detection_scores"][n, count:] == 0).all()
        # boxes of all but equal scores may stand in another order
        distance = np.abs(ours["detection_boxes"][n, :count, None] - theirs["detection_boxes"][n, None, :count]).max(-1)
        other_class = ours["detection_classes"][n, :count, None] != theirs["detection_classes"][n, None, :count]
        assert (distance + 1e3 * other_class).min(1).max() < 1e-2


def test_an_answer_does_not_depend_on_the_batch(both):
    detector, _, canvases = both
    whole = detector.run(canvases)
    for n in range(6):
        alone = detector.run(canvases[n : n + 1])
        for name in OUTPUTS:
            np.testing.assert_allclose(alone[name][0], whole[name][n], atol=1e-4)


def test_extreme_canvases(both):
    detector, served, canvases = both
    noise = np.random.default_rng(0).integers(0, 256, canvases.shape, np.uint8)
    for images in (np.zeros_like(canvases), np.full_like(canvases, 255), noise):
        np.testing.assert_array_equal(detector.run(images)["num_detections"], served.run(images)["num_detections"])


def test_parity(exported, trained):
    parity = json.loads((exported / "parity.json").read_text())
    for batch in ("batch_1", "batch_4"):
        facts = parity[batch]
        assert facts["images"] == 6
        assert facts["boxes"] > 100
        assert facts["matched"] == facts["boxes"]
        assert facts["score_difference"] < 1e-4
        assert facts["box_difference"] < 1e-2
    assert parity["ap"]["onnxruntime"] == pytest.approx(parity["ap"]["pytorch"], abs=1e-4)
    assert parity["onnx_sha256"] == sha256(exported / "model.onnx")
    assert parity["validation_fingerprint"] == ModelFolder(trained).validation().fingerprint()
    assert parity["ap"]["onnxruntime"] == evaluate_onnx(exported / "model.onnx", exported / "validation.json")["AP"]


def test_what_is_exported_is_what_was_scored(exported, trained, manifests, tmp_path):
    """Every image fills this canvas, so that the graph's AP is the evaluation's."""
    metrics = evaluate(str(trained), str(manifests / "validation.json"), str(tmp_path / "e"), weights="teacher")
    parity = json.loads((exported / "parity.json").read_text())
    assert parity["ap"]["pytorch"] == pytest.approx(metrics["AP"], abs=1e-4)


def test_smoke_samples(exported, both):
    smoke = np.load(exported / "smoke.npz", allow_pickle=False)
    assert set(smoke.files) == {"images", *OUTPUTS}
    assert smoke["images"].shape == (4, 64, 64, 3)
    again = both[0].run(smoke["images"])
    for name in OUTPUTS:
        np.testing.assert_array_equal(smoke[name], again[name])


def test_compare_notices_other_weights(both, trained):
    detector, _, canvases = both
    student = ServedDetector(ModelFolder(trained).detector("student"), detector.image_size).eval()
    with torch.no_grad():
        for p in student.detector.head_logits.parameters():
            p.mul_(3)
    facts = compare(student, detector, canvases, 4)
    assert facts["score_difference"] > 1e-3 or facts["matched"] < facts["boxes"]


def test_an_export_that_loses_accuracy_is_refused(exported, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(
        module, "write_onnx", lambda served, source, size, file: shutil.copy(exported / "model.onnx", file)
    )
    monkeypatch.setattr(module, "score_canvases", lambda *_: {"AP": 0.5})
    with pytest.raises(UserError, match=r"the ONNX file loses 0\.\d+ AP, 0.005 allowed .*not exported"):
        export(str(trained), str(tmp_path / "onnx"))
    assert not (tmp_path / "onnx").exists()


def test_an_export_that_answers_otherwise_is_refused(exported, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(
        module, "write_onnx", lambda served, source, size, file: shutil.copy(exported / "model.onnx", file)
    )
    shutil.copytree(trained, tmp_path / "model")
    folder = ModelFolder(tmp_path / "model")
    teacher = folder.detector("teacher")
    with torch.no_grad():
        teacher.head_logits.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    facts = {k: v for k, v in folder.provenance.items() if k != "sha256"}
    ModelFolder.write(folder.path, teacher, teacher, folder.settings, folder.validation(), {}, facts)
    with pytest.raises(UserError, match=r"at batch 1 the ONNX file finds \d+ of PyTorch's \d+ boxes; not exported"):
        export(str(tmp_path / "model"), str(tmp_path / "onnx"))
    assert not (tmp_path / "onnx").exists()


def test_canvas_size(trained, manifests):
    class Source:
        settings = ModelFolder(trained).settings

    data = load_coco(manifests / "validation.json")
    for size, expected in (((128, 128), (64, 64)), ((200, 100), (64, 128)), ((1000, 100), (32, 128))):
        for image in data.images:
            image.width, image.height = size
        assert canvas_size(Source, data) == expected


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_no_onnx_file(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(UserError, match="not an ONNX file of `softteacher export`"):
        OnnxDetector(tmp_path / "model.onnx")
