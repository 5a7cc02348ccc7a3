"""Every backbone is a pyramid that learns; weights come from files and S3, or are refused with a reason."""

import pickle

import pytest
import torch
import torchvision

from softteacher import storage
from softteacher.config import load_settings
from softteacher.detectors.build import build
from softteacher.errors import UserError
from tests.helpers import SHARED

NAMES = [
    *("resnet18", "resnet34", "resnet50", "resnet101", "swin_t", "swin_s", "swin_b"),
    *("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "tiny"),
]


def settings(name="tiny", norm="group", *more):
    overrides = [f"detector.name=fasterrcnn_{name}_fpn", f"detector.norm={norm}", *more]
    return load_settings(None, ["detector.fpn_channels=16", "detector.head_channels=32", *overrides]).detector


@pytest.mark.parametrize("name", NAMES)
def test_every_backbone(name):
    """The levels at a size that divides by 32 and no more, in training as in evaluation; all of it learns."""
    torch.manual_seed(0)
    detector = build(settings(name), 3)
    images = torch.randint(0, 256, (1, 3, 96, 160), dtype=torch.uint8)
    features = detector.features(images)
    assert [tuple(f.shape[1:]) for f in features] == [(16, 96 // s, 160 // s) for s in (4, 8, 16, 32)] + [(16, 2, 3)]
    sum(f.square().sum() for f in features[:4]).backward()
    parameters = [*detector.backbone.named_parameters(), *detector.fpn.named_parameters()]
    assert [key for key, p in parameters if p.grad is None or not p.grad.abs().sum() > 0] == []
    with torch.no_grad():
        again = detector.eval().features(images)
    assert all(torch.equal(a, b) for a, b in zip(again, features, strict=True))


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"])
@pytest.mark.parametrize("part", ["model", "features"])
def test_the_features_are_torchvisions(tmp_path, name, part):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().eval()
    for key, buffer in model.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 2)
    resnet = name == "resnet18"
    theirs = torch.nn.Sequential(*list(model.children())[:-2]) if resnet else model.features
    torch.save((model if part == "model" or resnet else theirs).state_dict(), tmp_path / "w.pth")
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = theirs(x)
        for stage in build(settings(name, "auto", f"detector.backbone_weights={tmp_path / 'w.pth'}"), 3).backbone:
            x = stage(x)
    torch.testing.assert_close(x, expected.permute(0, 3, 1, 2) if name == "swin_t" else expected)


def test_the_levels_of_swin_are_normalised():
    """Each by a layer norm of its own; what goes on to the next stage is not."""
    detector = build(settings("swin_t", "auto", "detector.finest_stride=8"), 3)
    norms = [block[0] for block in detector.fpn.inner_blocks]
    assert [n.normalized_shape for n in norms] == [(192,), (384,), (768,)]
    maps = norms[0](torch.rand(1, 192, 4, 4) * 9 + 5)
    torch.testing.assert_close(maps.mean(1), torch.zeros(1, 4, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("frozen", "name"), [(0, "resnet18"), (1, "resnet18"), (2, "mobilenet_v2"), (2, "swin_t"), (4, "resnet18")]
)
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


def test_images_are_normalised_as_the_weights_were_trained(monkeypatch):
    """The first stage gets what torchvision's own preprocessing makes of an RGB image."""
    detector, seen = build(settings(), 3), []
    detector.backbone[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    detector.features(images)
    usual = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms(crop_size=32, resize_size=32)
    torch.testing.assert_close(seen[0], usual(images), atol=1e-5, rtol=1e-5)


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
