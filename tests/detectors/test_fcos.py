"""FCOS: which location learns which box, that it learns, and that its ONNX file answers as it does."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from softteacher.config import load_settings
from softteacher.data.loader import Views
from softteacher.detectors.build import build
from softteacher.detectors.fcos import FCOS, assign_locations, box_losses, dense_targets, focal_loss, grid
from softteacher.evaluation.evaluate import evaluate
from softteacher.model_folder import ModelFolder
from softteacher.serving import engines
from softteacher.serving.export import export
from softteacher.serving.graph import ServedDetector
from softteacher.serving.onnx_runtime import OnnxDetector
from softteacher.serving.outputs import OUTPUTS
from tests.samples import TINY, dataset, noise_views, write_coco

OVERRIDES = (*TINY, "detector.name=fcos_tiny_fpn", "detector.head_convs=1")
SIDES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]  # of the levels of an image of 64 x 96


def fresh(*overrides, classes=3):
    torch.manual_seed(0)
    return build(load_settings("demo", [*OVERRIDES, *overrides]).detector, classes)


@pytest.fixture(scope="module")
def opinionated():
    """A detector with something to say about noise, as training would give it."""
    detector = fresh("detector.max_detections=20", classes=2).eval()
    torch.nn.init.normal_(detector.head_logits.weight, std=0.15)
    torch.nn.init.normal_(detector.head_boxes.weight, std=0.05)
    torch.nn.init.constant_(detector.head_logits.bias, -1)
    return detector


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "swin_t", "mobilenet_v2", "mobilenet_v3_small", "tiny"])
def test_every_architecture(name):
    detector = fresh(f"detector.name=fcos_{name}_fpn", "detector.norm=group", "detector.finest_stride=4").eval()
    assert isinstance(detector, FCOS)
    with torch.inference_mode():
        features = detector.features(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))
        dense = detector.predict(features)
    assert [tuple(f.shape) for f in features] == [(1, 16, *side) for side in SIDES] * 2
    count = sum(h * w for h, w in SIDES)
    assert (dense.logits.shape, dense.boxes.shape, dense.centerness.shape) == ((1, count, 3), (1, count, 4), (1, count))
    assert dense.shapes == SIDES


@pytest.mark.parametrize("convs", [1, 4])
def test_the_head_has_the_depth_of_the_setting(convs):
    detector = fresh(f"detector.head_convs={convs}", "detector.fpn_channels=256")
    for tower in (detector.class_tower, detector.box_tower):
        assert sum(isinstance(m, torch.nn.Conv2d) for m in tower) == convs
        assert [m.num_groups for m in tower if isinstance(m, torch.nn.GroupNorm)] == [32] * convs
    scores = detector.predict(detector.features(noise_views().images)).logits.sigmoid()
    assert scores.mean().item() == pytest.approx(0.01, rel=0.3)


def test_locations():
    locations, strides = grid([(2, 3), (1, 2), (1, 1), (1, 1), (1, 1)], torch.device("cpu"))
    expected = [(4, 4), (12, 4), (20, 4), (4, 12), (12, 12), (20, 12), (8, 8), (24, 8), (16, 16), (32, 32), (64, 64)]
    assert [tuple(x) for x in locations.tolist()] == expected
    assert strides.tolist() == [8] * 6 + [16] * 2 + [32, 64, 128]


SMALL, LARGE = [20, 20, 60, 60], [0, 0, 100, 100]


@pytest.mark.parametrize(
    ("location", "stride", "boxes", "matched"),
    [
        ((40, 40), 8, [SMALL], 0),
        ((40, 40), 8, [], -1),
        ((51, 29), 8, [SMALL], 0),  # 11 pixels from the centre, 1.5 strides are 12
        ((53, 40), 8, [SMALL], -1),  # in the box, but too far from its centre
        ((40, 27), 8, [SMALL], -1),
        ((40, 40), 16, [SMALL], -1),  # the farthest side, 20, is too near for this level
        ((48, 44), 8, [[40, 40, 44, 48]], -1),  # near the centre, but outside the box
        ((42, 44), 8, [[40, 40, 44, 48]], 0),
        ((44, 44), 8, [[40, 40, 44, 48]], -1),  # on its edge
        ((50, 50), 8, [LARGE, SMALL], 1),  # the smaller box wins, wherever it stands
        ((50, 50), 8, [SMALL, LARGE], 0),
        ((59, 59), 8, [LARGE, SMALL], 0),  # too far from the centre of the smaller one
        # ranges: farthest side 64, 65, 128, 300, 600
        ((64, 64), 8, [[0, 0, 128, 128]], 0),
        ((65, 65), 8, [[0, 0, 130, 130]], -1),
        ((65, 65), 16, [[0, 0, 130, 130]], 0),
        ((128, 128), 16, [[0, 0, 256, 256]], 0),
        ((128, 128), 32, [[0, 0, 256, 256]], 0),
        ((300, 300), 32, [[0, 0, 600, 600]], -1),
        ((300, 300), 64, [[0, 0, 600, 600]], 0),
        ((600, 600), 64, [[0, 0, 1200, 1200]], -1),
        ((600, 600), 128, [[0, 0, 1200, 1200]], 0),
        ((4000, 4000), 128, [[0, 0, 8000, 8000]], 0),
        ((64, 20), 8, [[0, 0, 130, 40]], -1),  # one far side is enough
    ],
)
def test_assignment(location, stride, boxes, matched):
    where, strides = torch.tensor([location]).float(), torch.tensor([float(stride)])
    assert assign_locations(where, strides, torch.tensor(boxes).float().reshape(-1, 4)).tolist() == [matched]


def test_targets_and_losses_by_hand():
    """Two images, one with a box, one padded; the perfect box costs nothing, the padding neither."""
    locations, strides = grid([(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)], torch.device("cpu"))
    box = torch.tensor([[16.0, 16, 40, 40]])
    sizes = torch.tensor([[64, 64], [64, 30]])
    targets = dense_targets(locations, strides, sizes, [box, box[:0]], [torch.tensor([1]), torch.tensor([]).long()], 2)
    assert targets.used.sum(1).tolist() == [86 - 1, 4 * 8 + 2 * 4 + 2 * 1 + 0 + 0]  # 128 px: its centre is outside
    positive = (targets.labels[0] == 1).nonzero().flatten()
    assert sorted(map(tuple, locations[positive].tolist())) == [(x, y) for x in (20, 28, 36) for y in (20, 28, 36)]
    assert (targets.labels == 2).sum() == 2 * 86 - 9
    assert targets.positives == 9

    logits = torch.zeros(2, 86, 2)
    one = 0.25 * 0.25 * math.log(2) + 0.75 * 0.25 * math.log(2)  # focal loss at .5: alpha (1 - p)^2 CE
    none = 2 * 0.75 * 0.25 * math.log(2)
    used = 85 + 42 - 9
    assert focal_loss(logits, targets).item() == pytest.approx((9 * one + used * none) / 9, rel=1e-5)
    weights = torch.where(targets.labels == 2, 0.5, 1.0)
    assert focal_loss(logits, targets, weights).item() == pytest.approx((9 * one + 0.5 * used * none) / 9, rel=1e-5)

    dense = SimpleNamespace(
        logits=logits, boxes=box.expand(2, 86, 4), centerness=torch.zeros(2, 86), locations=locations
    )
    losses = box_losses(dense, targets)
    assert losses["box"].item() == pytest.approx(0, abs=1e-5)
    assert losses["centerness"].item() == pytest.approx(math.log(2), rel=1e-5)
    # at (20, 28): 4 of 20 pixels, 12 of 12
    certain = torch.full((2, 86), -100.0)
    dense.centerness = certain
    centerness = [math.sqrt(a * b) for a in (1, 0.2, 0.2) for b in (1, 0.2, 0.2)]
    assert box_losses(dense, targets)["centerness"].item() == pytest.approx(100 * sum(centerness) / 9, rel=1e-5)


def test_no_boxes_at_all():
    detector, views = fresh(), noise_views()
    views.boxes, views.labels = [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2
    losses = detector.losses(views)
    assert losses["cls"] > 0
    assert losses["box"] == losses["centerness"] == 0
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters())


def test_gradients_reach_every_parameter():
    """Also those of the levels whose objects are larger than the image: it is background to them."""
    detector, views = fresh(), noise_views(side=160)
    views.boxes = [torch.tensor([[0.0, 0, 160, 160], [8, 8, 30, 30]])] * 2
    views.labels = [torch.tensor([0, 2])] * 2
    torch.stack(list(detector.losses(views).values())).sum().backward()
    for key, p in detector.named_parameters():
        assert p.grad is not None, key
        assert p.grad.abs().sum() > 0, key


def coloured(boxes):
    """Grey images of 64 pixels, a box of an own colour in each: class n in image n."""
    images = torch.full((len(boxes), 3, 64, 64), 110, dtype=torch.uint8)
    for n, (x1, y1, x2, y2) in enumerate(boxes):
        images[n, :, y1:y2, x1:x2] = 0
        images[n, n, y1:y2, x1:x2] = 250
    count = len(boxes)
    matrices = torch.eye(3).double().repeat(count, 1, 1)
    truth = [torch.tensor([b]).float() for b in boxes]
    labels = [torch.tensor([n]) for n in range(count)]
    return Views(images, torch.full((count, 2), 64), matrices, truth, labels, list(range(count)))


def test_it_learns_two_images():
    detector, views = fresh(), coloured([(8, 10, 36, 34), (24, 20, 56, 60)])
    optimizer = torch.optim.AdamW(detector.parameters(), lr=5e-3)
    totals = []
    for _ in range(30):
        loss = torch.stack(list(detector.losses(views).values())).sum()
        totals.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert totals[15] < 0.6 * totals[0]
    assert totals[-1] < totals[15]
    with torch.inference_mode():
        found = detector.eval()(views.images, views.sizes)
    for n, d in enumerate(found):
        assert d.labels[0] == n
        assert d.scores[0] > 0.3
        torch.testing.assert_close(d.boxes[0], views.boxes[n][0], atol=5, rtol=0)


IMAGES = torch.randint(0, 256, (3, 3, 96, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
SIZES = torch.tensor([[96, 64], [80, 60], [33, 64]])


@torch.inference_mode()
def test_detections(opinionated):
    boxes, scores, labels = opinionated.detect(opinionated.features(IMAGES), SIZES)
    assert (boxes.shape, scores.shape, labels.shape) == ((3, 20, 4), (3, 20), (3, 20))
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert ((scores == 0) | (scores > 0.05)).all()
    assert (scores > 0).any(1).all()
    assert set(labels.unique().tolist()) == {0, 1}
    for box, score, (height, width) in zip(boxes, scores, SIZES.tolist(), strict=True):
        used = box[score > 0]
        assert (used >= 0).all()
        assert (used <= torch.tensor([width, height, width, height])).all()
        assert (used[:, 2:] > used[:, :2]).all()
    together = opinionated(IMAGES, SIZES)
    assert [len(d) for d in together] == (scores > 0).sum(1).tolist()
    for n in range(3):
        alone = opinionated(IMAGES[n : n + 1], SIZES[n : n + 1])[0]
        torch.testing.assert_close(alone.boxes, together[n].boxes, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(alone.scores, together[n].scores, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_scores_are_those_of_class_and_centerness(opinionated):
    features = opinionated.features(IMAGES)
    dense = opinionated.predict(features)
    product = dense.logits.sigmoid() * dense.centerness.sigmoid()[..., None]
    real = (dense.locations < SIZES.flip(1)[:, None]).all(-1)
    best = (product * real[..., None]).flatten(1).amax(1).sqrt()
    torch.testing.assert_close(opinionated.detect(features, SIZES)[1][:, 0], best)


@pytest.fixture(scope="module")
def folders(opinionated, tmp_path_factory):
    """A model folder of it with four validation images, and what `export` makes of that."""
    folder = tmp_path_factory.mktemp("fcos")
    validation = dataset(write_coco(folder / "data"), "val")
    settings = load_settings("demo", [*OVERRIDES, "detector.max_detections=20"])
    ModelFolder.write(folder / "model", opinionated, opinionated, settings, validation, {}, {})
    validation.save(folder / "validation.json")
    export(str(folder / "model"), str(folder / "onnx"))
    return folder


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_equals_pytorch(folders, opinionated, batch, engine):
    detector = OnnxDetector(folders / "onnx" / "model.onnx")
    served = ServedDetector(opinionated, detector.image_size).eval()
    shape = (batch, *detector.image_size, 3)
    canvases = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    ours, theirs = served.run(canvases), engines.load(folders / "onnx" / "model.onnx", engine)(canvases)
    assert (ours["num_detections"] > 5).all()
    for name in OUTPUTS:
        np.testing.assert_allclose(theirs[name], ours[name], atol=1e-3 if name == "detection_boxes" else 1e-5)


def test_evaluate_and_export_agree(folders):
    metrics = evaluate(str(folders / "model"), str(folders / "validation.json"), str(folders / "evaluation"))
    parity = json.loads((folders / "onnx" / "parity.json").read_text())
    assert parity["batch_4"]["matched"] == parity["batch_4"]["boxes"] > 20
    assert parity["ap"]["onnxruntime"] == pytest.approx(parity["ap"]["pytorch"], abs=1e-4)
    assert {"AP", "AP50"} <= set(metrics)
