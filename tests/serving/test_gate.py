"""The gate: strictly better than the champion by delta, both on the same validation set."""

import json
from pathlib import Path

import pytest
from PIL import Image

from softteacher.data.coco import load_coco
from softteacher.errors import UserError
from softteacher.serving.gate import gate
from softteacher.serving.repository import Champion, write_champion
from tests.helpers import CATEGORIES, onnx_folder, square_detector, square_image


def champion(repository: Path, ap: float, fingerprint: str = "set-1") -> None:
    write_champion(str(repository), Champion("cards", 4, [], ap, fingerprint, "ab12", "2026-01-02", {}), "")


def test_no_champion(tmp_path: Path) -> None:
    decision = gate(str(onnx_folder(tmp_path / "onnx", ap=0.01)), str(tmp_path / "repository"), "cards")
    assert decision.deploy
    assert (decision.ap, decision.champion_ap) == (0.01, None)
    assert "no champion" in decision.reason


@pytest.mark.parametrize(
    ("ap", "delta", "deploy"),
    [
        (0.41, 0.0, True),
        (0.40, 0.0, False),
        (0.39, 0.0, False),
        (0.41, 0.01, False),
        (0.42, 0.01, True),
        (0.39, -0.02, True),
        (0.38, -0.02, False),
    ],
)
def test_same_validation_set(ap: float, delta: float, deploy: bool, tmp_path: Path) -> None:
    champion(tmp_path / "repository", 0.40)
    decision = gate(str(onnx_folder(tmp_path / "onnx", ap=ap)), str(tmp_path / "repository"), "cards", delta=delta)
    assert (decision.deploy, decision.ap, decision.champion_ap) == (deploy, ap, 0.40)
    assert "of version 4" in decision.reason


@pytest.fixture
def validation(tmp_path: Path) -> Path:
    """A validation manifest over three images with one white square each."""
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for i in range(3):
        x1, y1, x2, y2 = box = (10 + i, 8, 50 + 10 * i, 40 + i)
        Image.fromarray(square_image(box)).save(tmp_path / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 96, "height": 64})
        bbox = [x1, y1, x2 - x1, y2 - y1]
        row = {"id": i + 1, "image_id": i, "category_id": 7, "bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": 0}
        annotations.append(row)
    source = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (tmp_path / "val.json").write_text(json.dumps(source))
    manifest = tmp_path / "validation.json"
    load_coco(str(tmp_path / "val.json"), str(tmp_path / "images")).save(manifest)
    return manifest


@pytest.mark.parametrize(("label", "champion_ap", "deploy"), [(1, 1.0, False), (0, 0.0, True)])
def test_on_another_validation_set_the_champion_is_scored_anew(
    label: int, champion_ap: float, deploy: bool, validation: Path, tmp_path: Path
) -> None:
    """A champion that finds every square keeps its place, one that takes them for the wrong class loses it."""
    champion(tmp_path / "repository", 0.40, "an older set")
    square_detector(tmp_path / "repository" / "cards" / "4" / "model.onnx", label=label)
    new = onnx_folder(tmp_path / "onnx", ap=0.7, validation=validation)
    decision = gate(str(new), str(tmp_path / "repository"), "cards")
    assert decision.champion_ap == pytest.approx(champion_ap, abs=1e-6)
    assert decision.deploy is deploy


def test_the_champions_file_is_gone(validation: Path, tmp_path: Path) -> None:
    champion(tmp_path / "repository", 0.40, "an older set")
    new = onnx_folder(tmp_path / "onnx", validation=validation)
    with pytest.raises(UserError, match=r"cards/4/model\.onnx: no such file"):
        gate(str(new), str(tmp_path / "repository"), "cards")
