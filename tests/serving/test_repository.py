"""The onnx folder, the config and the champion pointer, without servers."""

import json
import re
from pathlib import Path

import pytest

from softteacher.errors import UserError
from softteacher.serving.repository import (
    Champion,
    config,
    read_champion,
    read_onnx_folder,
    read_record,
    versions,
    write_champion,
)
from tests.helpers import CATEGORIES, onnx_folder

CHAMPION = Champion("cards", 3, [2, 1], 0.41, "set-1", "ab12", "2026-01-02T03:04:05+00:00", {"seed": 7})


def test_read_onnx_folder(tmp_path: Path) -> None:
    model = read_onnx_folder(onnx_folder(tmp_path, ap=0.25))
    assert (model.ap, model.validation_fingerprint, model.provenance) == (0.25, "set-1", {"seed": 7})
    assert (model.image_size, model.max_detections, model.categories) == ((64, 96), 5, CATEGORIES)


@pytest.mark.parametrize("name", ["model.onnx", "parity.json", "smoke.npz", "provenance.json", "validation.json"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    (onnx_folder(tmp_path) / name).unlink()
    with pytest.raises(UserError, match=f"no {name} in it"):
        read_onnx_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("parity.json", "{", "parity.json: broken JSON"),
        ("parity.json", "[]", "parity.json: not a JSON object"),
        ("parity.json", "{}", "sha256 differs"),
        ("validation.json", "{}", "lacks 'softteacher'"),
    ],
)
def test_torn_json_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (onnx_folder(tmp_path) / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_onnx_folder(tmp_path)


def test_config(tmp_path: Path) -> None:
    """What Triton makes of it is seen in the integration tests; here, what goes in."""
    model = read_onnx_folder(onnx_folder(tmp_path))
    text = config(model, 7)
    assert 'backend: "python"' in text
    assert "versions: [ 7 ]" in text
    assert "KIND_CPU" in text
    assert "preferred_batch_size: [4, 8]" in text
    assert "dims: [ 64, 96, 3 ]" in text
    value = re.search(r'key: "classes" value { string_value: (".*") } }', text)
    assert value
    assert json.loads(json.loads(value[1])) == CATEGORIES
    text = config(model, 8, backend="onnxruntime", gpu=True, max_batch_size=1, queue_delay_us=0)
    assert 'backend: "onnxruntime"' in text
    assert "KIND_GPU" in text
    assert "max_batch_size: 1\n" in text
    assert "preferred_batch_size: [1]" in text


def test_champion_pointer(tmp_path: Path) -> None:
    repository = str(tmp_path)
    assert read_champion(repository, "cards") is None
    assert versions(repository, "cards") == []
    write_champion(repository, CHAMPION, "")
    assert read_champion(repository, "cards") == CHAMPION
    assert read_record(repository, "cards", 2) is None
    for file in ("2/record.json", "10/model.onnx", "config.pbtxt"):
        (tmp_path / "cards" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "cards" / file).write_bytes(CHAMPION.to_json())
    assert read_record(repository, "cards", 2) == CHAMPION
    assert versions(repository, "cards") == [2, 10]


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "cards"}'])
def test_torn_champion(content: str, tmp_path: Path) -> None:
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "champion.json").write_text(content)
    with pytest.raises(UserError, match=r"champion\.json: torn, or not ours"):
        read_champion(str(tmp_path), "cards")
