"""A detector that starts from another: what fits is taken over, the rest is named; what can't be used is refused."""

import pytest
import torch

from softteacher import storage
from softteacher.config import load_settings
from softteacher.detectors.build import build
from softteacher.errors import UserError
from softteacher.model_folder import ModelFolder

SMALL = ("detector.fpn_channels=16", "detector.head_channels=32")


def settings(name="tiny", *more):
    return load_settings(None, [*SMALL, f"detector.name=fasterrcnn_{name}_fpn", *more]).detector


def source(classes=5, name="tiny", *more):
    """The state of a detector of other classes, no tensor of which is as a fresh one's."""
    torch.manual_seed(7)
    detector = build(settings(name, *more), classes)
    return {k: torch.rand(v.shape) if v.is_floating_point() else v for k, v in detector.state_dict().items()}


HEADS = {"head_logits.weight", "head_logits.bias", "head_deltas.weight", "head_deltas.bias"}


@pytest.mark.parametrize("name", ["tiny", "mobilenet_v3_small"])
@pytest.mark.parametrize("place", ["folder", "file"])
def test_other_classes(tmp_path, capsys, name, place):
    given, file = source(5, name, "detector.norm=group"), tmp_path / "teacher.pt"
    torch.save(given, file)
    chosen = settings(name, f"detector.init_from={tmp_path if place == 'folder' else file}", "detector.norm=group")
    state = build(chosen, 3).state_dict()
    assert {k for k, v in state.items() if not torch.equal(v, given[k])} == HEADS
    (said,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert f"{len(state) - 4} of {len(state)} tensors from " in said
    assert "head_logits.weight 4x32, there 6x32; head_logits.bias 4, there 6; head_deltas.weight 12x32" in said
    again = build(chosen, 3, load_backbone=False).state_dict()
    assert not torch.equal(again["rpn_conv.weight"], given["rpn_conv.weight"])


@pytest.mark.parametrize(
    ("kind", "heads"), [("fasterrcnn", HEADS), ("fcos", {"head_logits.weight", "head_logits.bias"})]
)
def test_as_many_classes_but_others(tmp_path, capsys, kind, heads):
    chosen = settings("tiny", f"detector.name={kind}_tiny_fpn", f"detector.init_from={tmp_path}")
    torch.manual_seed(7)
    given = build(chosen.model_copy(update={"init_from": None}), 3).state_dict()
    torch.save(
        {k: torch.rand(v.shape) if v.is_floating_point() else v for k, v in given.items()}, tmp_path / "teacher.pt"
    )
    (tmp_path / "classes.json").write_text(
        '[{"id": 1, "name": "ace"}, {"id": 4, "name": "king"}, {"id": 7, "name": "ten"}]'
    )
    given = torch.load(tmp_path / "teacher.pt")

    def fresh(*names):
        state = build(chosen, 3, names=names).state_dict()
        return {k for k, v in state.items() if not torch.equal(v, given[k])}

    assert fresh("ace", "king", "ten") == set()
    capsys.readouterr()
    assert fresh("king", "ace", "ten") == heads
    assert "; the classes there are ace, king, ten" in capsys.readouterr().err
    chosen = chosen.model_copy(update={"init_from": f"{tmp_path}/teacher.pt"})
    assert fresh("king", "ace", "ten") == set()
    assert "; it does not tell its classes: they are taken for the same" in capsys.readouterr().err
    chosen = chosen.model_copy(update={"init_from": str(tmp_path)})
    assert "taken for the same" not in capsys.readouterr().err
    (tmp_path / "classes.json").write_text("[1]")
    with pytest.raises(UserError, match=r"classes\.json is not ours"):
        fresh("ace", "king", "ten")


def test_the_same_classes_of_s3(tmp_path, capsys, s3):
    torch.save(source(3), tmp_path / "teacher.pt")
    storage.copy(tmp_path, f"{s3}/model")
    state = build(settings("tiny", f"detector.init_from={s3}/model"), 3).state_dict()
    assert all(torch.equal(v, source(3)[k]) for k, v in state.items())
    assert capsys.readouterr().err.strip() == f"detector: {len(state)} of {len(state)} tensors from {s3}/model"


def test_a_trained_model(trained):
    """Its teacher is what the new detector starts from, the first stage frozen as loaded weights are."""
    folder = ModelFolder(trained)
    chosen = folder.settings.detector.model_copy(update={"init_from": str(trained)})
    detector = build(chosen, len(folder.classes))
    teacher = folder.detector("teacher").state_dict()
    assert all(torch.equal(v, teacher[k]) for k, v in detector.state_dict().items())
    assert [any(p.requires_grad for p in s.parameters()) for s in detector.backbone] == [False, True, True, True]


def test_a_long_list_is_cut(tmp_path, capsys):
    torch.save({"rpn_conv.bias": torch.ones(16)}, tmp_path / "w.pt")
    detector = build(settings("tiny", f"detector.init_from={tmp_path / 'w.pt'}", "detector.frozen_stages=0"), 3)
    assert torch.equal(detector.rpn_conv.bias, torch.ones(16))
    said = capsys.readouterr().err
    rest = len(detector.state_dict()) - 11
    assert f"; and {rest} more" in said
    assert said.count("backbone.") == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "teacher.pt: no such file"),
        (b"garbage", "no readable state dict"),
        ([1], "no state dict in it"),
        ({}, "has no tensor of fasterrcnn_resnet18_fpn"),
        ({"rpn_conv.bias": torch.zeros(5)}, "has no tensor of fasterrcnn_resnet18_fpn"),
        ({"rpn_conv.bias": torch.zeros(16)}, "has no backbone.0.0.weight of .* frozen and would never learn"),
        ("group", r"has no backbone.0.0.norm.weight of .* frozen .* set detector.norm=group"),
    ],
)
def test_refused(tmp_path, content, message):
    if isinstance(content, bytes):
        (tmp_path / "teacher.pt").write_bytes(content)
    elif content is not None:
        content = source(3, "resnet18") if content == "group" else content
        torch.save(content, tmp_path / "teacher.pt")
    with pytest.raises(UserError, match=message) as e:
        build(settings("resnet18", f"detector.init_from={tmp_path}"), 3)
    assert str(tmp_path) in str(e.value)
    assert len(str(e.value).splitlines()) == 1
