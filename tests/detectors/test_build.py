"""Every architecture and preset builds; weights come from files and S3, or are refused with a reason."""

import pickle

import pytest
import torch
import torchvision

from softteacher import storage
from softteacher.config import load_settings, presets
from softteacher.detectors.build import build
from softteacher.errors import UserError
from tests.helpers import SHARED

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2", "tiny"]


def settings(name="tiny", norm="group", *more):
    overrides = [f"detector.name=fasterrcnn_{name}_fpn", f"detector.norm={norm}", *more]
    return load_settings(None, ["detector.fpn_channels=16", "detector.head_channels=32", *overrides]).detector


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name):
    detector = build(settings(name), 3).eval()
    with torch.inference_mode():
        features = detector.features(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))
    assert [tuple(f.shape[1:]) for f in features] == [(16, 64 // s, 96 // s) for s in (4, 8, 16)] + [
        (16, 2, 3),
        (16, 1, 2),
    ]


@pytest.mark.parametrize("preset", presets())
def test_every_preset_builds(preset):
    overrides = ["detector.backbone_weights=none", "detector.norm=group"]
    chosen = load_settings(preset, [o.replace("none", "null") for o in overrides]).detector
    detector = build(chosen, 80)
    assert detector.head_logits.out_features == 81
    assert detector.fpn.layer_blocks[0][0].out_channels == chosen.fpn_channels


@pytest.mark.parametrize(("frozen", "name"), [(0, "resnet18"), (1, "resnet18"), (2, "mobilenet_v2"), (4, "resnet18")])
def test_frozen_stages(frozen, name, tmp_path):
    model = getattr(torchvision.models, name)()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    overrides = [f"detector.frozen_stages={frozen}", f"detector.backbone_weights={tmp_path / 'w.pth'}"]
    detector = build(settings(name, "auto", *overrides), 3)
    learning = [any(p.requires_grad for p in stage.parameters()) for stage in detector.backbone]
    assert learning == [n >= frozen for n in range(4)]
    assert all(p.requires_grad for p in detector.fpn.parameters())


def test_a_backbone_from_nothing_learns_as_a_whole(capsys):
    detector = build(settings("resnet18", "auto", "detector.frozen_stages=2"), 3)
    assert all(p.requires_grad for p in detector.backbone.parameters())
    assert any(isinstance(m, torch.nn.GroupNorm) for m in detector.backbone.modules())
    assert "learns from nothing" in capsys.readouterr().err


def test_frozen_batch_norm_is_torchvisions(tmp_path):
    torch.save(state(), tmp_path / "w.pth")
    ours = build(settings("resnet18", "auto", f"detector.backbone_weights={tmp_path / 'w.pth'}"), 3).backbone[0]
    theirs = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    theirs.load_state_dict({k: v for k, v in state().items() if "num_batches" not in k})
    x = torch.rand(2, 3, 32, 32)
    expected = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x)))))
    torch.testing.assert_close(ours(x), expected)


def state(prefix=""):
    torch.manual_seed(3)
    model = torchvision.models.resnet18()
    for buffer in model.buffers():
        if buffer.dtype == torch.float32:
            buffer.uniform_(0.5, 2)
    return {prefix + k: v for k, v in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_weights_from_a_file(tmp_path, prefix):
    file = tmp_path / "r18.pth"
    torch.save(state(prefix), file)
    detector = build(settings("resnet18", "frozen_batch", f"detector.backbone_weights={file}"), 3)
    assert torch.equal(detector.backbone[0][0].weight, state()["conv1.weight"])
    assert torch.equal(detector.backbone[3][1].conv2.norm.running_var, state()["layer4.1.bn2.running_var"])
    empty = build(settings("resnet18", "frozen_batch", f"detector.backbone_weights={file}"), 3, load_backbone=False)
    assert not torch.equal(empty.backbone[0][0].weight, state()["conv1.weight"])


def test_weights_from_s3(tmp_path, s3):
    torch.save(state(), tmp_path / "r18.pth")
    storage.copy(tmp_path / "r18.pth", f"{s3}/weights/r18.pth")
    detector = build(settings("resnet18", "frozen_batch", f"detector.backbone_weights={s3}/weights/r18.pth"), 3)
    assert torch.equal(detector.backbone[0][0].weight, state()["conv1.weight"])


def test_real_mobilenet_weights():
    file = SHARED / "weights" / "mobilenet_v2_imagenet_features.pth"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    detector = build(settings("mobilenet_v2", "frozen_batch", f"detector.backbone_weights={file}"), 3)
    weights = torch.load(file, weights_only=True)
    first = next(v for k, v in weights.items() if k.endswith("0.0.weight"))
    assert torch.equal(detector.backbone[0][0][0].weight, first)


class Harmful:
    """Would make a file if it were unpickled."""

    path: str

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no readable state dict"),
        (b"garbage", "no readable state dict"),
        ([1, 2], "no state dict in it"),
        ({1: 2}, "does not fit tiny"),
        ({"conv1.weight": torch.zeros(1)}, "does not fit tiny: .* missing or of another shape"),
        (Harmful(), "no readable state dict"),
    ],
)
def test_weights_that_are_none(tmp_path, content, message):
    file, trap = tmp_path / "x.pth", tmp_path / "trap"
    Harmful.path = str(trap)
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, Harmful):
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file)
    with pytest.raises(UserError, match=message) as e:
        build(settings("tiny", "group", f"detector.backbone_weights={file}"), 3)
    assert str(file) in str(e.value)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (("resnet18", "frozen_batch"), "frozen_batch can't learn without"),
        (("tiny", "group", "detector.backbone_weights=/nowhere.pth"), "/nowhere.pth: no such file"),
        (("tiny", "group", "detector.backbone_weights=IMAGENET1K_V1"), "has no torchvision weights"),
        (("resnet18", "group", "detector.backbone_weights=IMAGENET"), "resnet18 has IMAGENET1K_V1"),
    ],
)
def test_weights_that_are_not_there(chosen, message):
    with pytest.raises(UserError, match=message):
        build(settings(*chosen), 3)
