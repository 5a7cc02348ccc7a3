"""`export`: the ONNX file answers as PyTorch does at any batch, and says itself how to use it."""

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from softteacher.config import ExportSettings
from softteacher.data.check import read_image
from softteacher.data.coco import load_coco
from softteacher.detections import pairwise_iou
from softteacher.errors import UserError
from softteacher.evaluation.evaluate import evaluate
from softteacher.model_folder import ModelFolder, sha256
from softteacher.serving import engines, variants
from softteacher.serving import export as module
from softteacher.serving.export import canvas_size, compare, export
from softteacher.serving.graph import ServedDetector
from softteacher.serving.onnx_runtime import OnnxDetector, detect_canvases, score_canvases
from softteacher.serving.outputs import OUTPUTS, to_detections
from softteacher.serving.repository import read_onnx_folder
from softteacher.serving.variants import measure_engines
from softteacher.watching.profile import TrafficProfile


def test_files(exported, trained):
    names = {"model.onnx", "parity.json", "smoke.npz", "profile.json", "provenance.json", "validation.json"}
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


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16])
def test_onnx_equals_pytorch(both, batch):
    detector, served, canvases = both
    canvases = canvases[np.arange(16) % len(canvases)]
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


@pytest.mark.parametrize("engine", ["openvino-fp32", "onnxruntime-fp32"])
def test_engines_agree_on_every_batch(both, exported, engine):
    _, served, canvases = both
    run = engines.load(exported / "model.onnx", *engine.split("-"))
    crowded = np.concatenate([canvases, canvases[:, ::-1], np.zeros_like(canvases[:1])])  # the last one is empty
    for batch in (1, 2, 4, 8, 13):
        ours, theirs = served.run(crowded[:batch]), run(crowded[:batch])
        for n in range(batch):
            a, b = (to_detections(x, n, (1, 1), (64, 64)) for x in (ours, theirs))
            a, b = a[a.scores > 0.06], b[b.scores > 0.05]
            iou = pairwise_iou(a, b) * (a.labels[:, None] == b.labels[None])
            assert (iou.max(1, initial=0) > 0.98).all()
            assert np.abs(a.scores - b.scores[iou.argmax(1)]).max(initial=0) < 1e-3


def test_more_objects_than_places(both, exported, trained):
    """Of a crowd, the 100 best are kept, as by PyTorch."""
    _, served, canvases = both
    noise = np.random.default_rng(0).integers(0, 256, canvases.shape, dtype=np.uint8)
    network = ModelFolder(trained).detector("teacher")
    network.settings = network.settings.model_copy(update={"max_detections": 300})
    assert (ServedDetector(network, (64, 64)).eval().run(noise)["num_detections"] > 100).all()
    ours = served.run(noise)
    assert (ours["num_detections"] == 100).all()
    for engine in ("onnxruntime", "openvino"):
        theirs = engines.load(exported / "model.onnx", engine)(noise)
        assert (theirs["num_detections"] == 100).all()
        np.testing.assert_allclose(theirs["detection_scores"], ours["detection_scores"], atol=1e-3)


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
    assert parity["smoke_sha256"] == sha256(exported / "smoke.npz")
    assert parity["validation_fingerprint"] == ModelFolder(trained).validation().fingerprint()
    detector, validation = OnnxDetector(exported / "model.onnx"), load_coco(exported / "validation.json")
    assert parity["ap"]["onnxruntime"] == score_canvases(detector.run, detector, validation, "again")["AP"]


def test_the_parity_report_tells_of_the_engines(exported):
    found = json.loads((exported / "parity.json").read_text())["engines"]
    assert {"pytorch-fp32", "onnxruntime-fp32", "openvino-bf16"} == set(found)
    for facts in found.values():
        if "images_per_second" in facts:
            assert all(facts["images_per_second"][batch] > 0 for batch in ("1", "8"))
        else:  # a processor without it
            assert "bf16" in facts["refused"]
    assert found["onnxruntime-fp32"]["ap_loss"] == pytest.approx(0, abs=1e-3)


def test_int8_is_a_file_of_its_own_and_refused_if_it_loses_too_much(exported, both, tmp_path):
    detector, served, canvases = both
    shutil.copy(exported / "model.onnx", tmp_path)
    validation = load_coco(str(exported / "validation.json"))
    ap = {"pytorch": 0.5, "onnxruntime": 0.5}  # far more than the model has
    settings = ExportSettings(engines=["onnxruntime-int8", "openvino-int8"], max_ap_loss=1)
    found = measure_engines(tmp_path, served.run, detector, validation, canvases, settings, ap)
    quantized = tmp_path / "model.int8.onnx"
    assert quantized.stat().st_size < 0.9 * (tmp_path / "model.onnx").stat().st_size
    assert OnnxDetector(quantized).categories == detector.categories
    for name in settings.engines:
        assert found[name]["ap_loss"] == 0.5 - found[name]["ap"] > 0.1
        assert "refused" not in found[name]
    # it had lost far too much, so the backbone is not quantized in the end
    assert found["onnxruntime-int8"]["fp32_backbone"]
    weights = {node.input[1] for node in onnx.load(quantized).graph.node if node.op_type == "Conv"}
    plain = {name for name in weights if not name.endswith("_DequantizeLinear_Output")}
    assert plain
    assert all(name.startswith("detector.backbone.") for name in plain)
    assert not any(name.startswith("detector.backbone.") for name in weights - plain)
    quantized.unlink()
    settings = ExportSettings(engines=["onnxruntime-int8"], max_ap_loss=0.01)
    found = measure_engines(tmp_path, served.run, detector, validation, canvases, settings, ap)
    assert "AP, 0.01 allowed" in found["onnxruntime-int8"]["refused"]
    assert not quantized.exists()


def test_the_first_layers_may_stay_in_fp32(both, exported):
    """Cut in two, the graph answers the same; in bf16 it then comes closer to fp32."""
    detector, served, canvases = both
    assert detector.finest_map
    file, exact = exported / "model.onnx", served.run(canvases)
    if missing := engines.supported("openvino", "bf16"):
        pytest.skip(missing)
    differences = []
    for until in ("", detector.finest_map):
        answer = engines.load(file, "openvino", "bf16", fp32_until=until)(canvases)
        assert set(answer) == set(OUTPUTS)
        difference = 0.0
        for n in range(len(canvases)):
            a, b = (to_detections(x, n, (1, 1), (64, 64)) for x in (exact, answer))
            iou = pairwise_iou(a, b) * (a.labels[:, None] == b.labels[None])
            difference += float(np.abs(a.scores - b.scores[iou.argmax(1)]).mean())
        differences.append(difference / len(canvases))
    assert 0 < differences[1] < differences[0] < 0.02


@pytest.mark.parametrize(("loss", "until"), [(0.001, False), (0.02, True)])
def test_bf16_keeps_the_first_layers_in_fp32_where_it_loses_too_much(
    exported, both, tmp_path, monkeypatch, loss, until
):
    detector, served, canvases = both
    loaded = []

    def load(path, engine="onnxruntime", precision="fp32", *, fp32_until="", threads=0):
        loaded.append(fp32_until)
        return served.run

    aps = iter([0.5 - loss, 0.5])
    monkeypatch.setattr(engines, "load", load)
    monkeypatch.setattr(engines, "supported", lambda engine, precision: "")
    monkeypatch.setattr(variants, "score_canvases", lambda *_: {"AP": next(aps)})
    ap = {"pytorch": 0.5, "onnxruntime": 0.5}
    validation = load_coco(str(exported / "validation.json"))
    found = measure_engines(tmp_path, served.run, detector, validation, canvases, ExportSettings(), ap)
    facts = found["openvino-bf16"]
    assert (facts.get("fp32_until"), facts["ap_loss"]) == (
        (detector.finest_map, 0) if until else (None, pytest.approx(loss))
    )


def test_an_engine_that_is_not_there_is_left_out(exported, both, tmp_path, monkeypatch):
    detector, served, canvases = both
    shutil.copy(exported / "model.onnx", tmp_path)
    monkeypatch.setattr(engines, "supported", lambda engine, precision: f"{engine} is not installed")
    validation, ap = load_coco(str(exported / "validation.json")), {"pytorch": 0.0, "onnxruntime": 0.0}
    found = measure_engines(tmp_path, served.run, detector, validation, canvases, ExportSettings(), ap)
    assert found["openvino-bf16"] == {"refused": "openvino is not installed"}


def test_profile_is_of_the_validation_set(exported, both):
    profile = TrafficProfile.read(str(exported / "profile.json"))
    validation = load_coco(str(exported / "validation.json"))
    assert (profile.images, profile.classes) == (len(validation), tuple(validation.classes))
    answers = detect_canvases(both[0].run, OnnxDetector(exported / "model.onnx"), validation, "pytorch")
    assert profile.histograms["score"].sum() == sum(map(len, answers.values())) > 0


def test_what_is_exported_is_what_was_scored(exported, trained, manifests, tmp_path):
    """Every image fills this canvas, so that the graph's AP is the evaluation's."""
    metrics = evaluate(str(trained), str(manifests / "validation.json"), str(tmp_path / "e"), weights="teacher")
    parity = json.loads((exported / "parity.json").read_text())
    assert parity["ap"]["pytorch"] == pytest.approx(metrics["AP"], abs=1e-4)


def test_the_student_on_another_canvas_with_refined_boxes(trained, tmp_path):
    """The last is a switch for a model that is trained already: the graph goes over the boxes, as PyTorch does."""
    settings = ["detector.refine_boxes=true", "export.engines=[]", "export.image_size=[64,96]"]
    parity = export(str(trained), str(tmp_path / "onnx"), weights="student", overrides=settings)
    detector, plain = OnnxDetector(tmp_path / "onnx" / "model.onnx"), ModelFolder(trained)
    assert (parity["weights"], parity["image_size"], detector.image_size) == ("student", (64, 96), (64, 96))
    canvases = np.stack([detector.letterbox(read_image(plain.validation(), i)[0])[0] for i in range(3)])
    ours, before, teachers = (
        ServedDetector(folder.detector(weights), (64, 96)).eval().run(canvases)
        for folder, weights in (
            (ModelFolder(trained, overrides=settings), "student"), (plain, "student"), (plain, "teacher")
        )
    )  # fmt: skip
    theirs = detector.run(canvases)
    np.testing.assert_allclose(theirs["detection_scores"], before["detection_scores"], atol=1e-5)
    assert np.abs(theirs["detection_scores"] - teachers["detection_scores"]).max() > 1e-3
    for n in range(3):
        a, b, c = (to_detections(x, n, (1, 1), (96, 64)) for x in (ours, theirs, before))
        iou = pairwise_iou(a, b) * (a.labels[:, None] == b.labels[None])
        assert (iou.max(1) > 0.99).all()
        assert np.median(np.abs(b.boxes - c.boxes).max(1)) > 1e-3  # of the image's size


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
