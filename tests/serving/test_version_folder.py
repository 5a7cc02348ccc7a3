"""A version is whole if its manifest is there and its files fit it."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from softteacher import storage
from softteacher.errors import UserError
from softteacher.serving.repository import Champion
from softteacher.serving.version_folder import (
    copy_version,
    incomplete_versions,
    open_version,
    read_manifest,
    write_version,
)

RECORD = Champion("cards", 3, [2, 1], 0.41, "set-1", "ab12", "2026-01-02T03:04:05+00:00", "me@here", {"seed": 7})


@pytest.fixture
def written(tmp_path: Path) -> Path:
    (tmp_path / "in").write_bytes(b"weights")
    files: dict[str, Path | bytes] = {
        "model.onnx": tmp_path / "in",
        "config.pbtxt": b"versions",
        "smoke.npz": b"images",
    }
    write_version(str(tmp_path / "cards" / "3"), files, RECORD)
    return tmp_path / "cards" / "3"


def test_what_is_written_is_read_back(written: Path) -> None:
    with open_version(str(written)) as (manifest, folder):
        assert manifest.record == RECORD
        assert (folder / "model.onnx").read_bytes() == b"weights"
    assert manifest.files["model.onnx"] == {"sha256": hashlib.sha256(b"weights").hexdigest(), "size": 7}
    assert set(manifest.files) == {"model.onnx", "config.pbtxt", "smoke.npz"}


def test_the_manifest_is_written_last_and_the_smoke_images_first(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    copy = storage.copy
    monkeypatch.setattr(storage, "copy", lambda a, b: (order.append(Path(b).name), copy(a, b)))
    copy_version(str(written), str(tmp_path / "copy"))
    assert order == ["smoke.npz", "config.pbtxt", "model.onnx", "manifest.json"]
    with open_version(str(tmp_path / "copy")) as (manifest, _):
        assert manifest.record == RECORD


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "model.onnx").write_bytes(b"Weights"), "model.onnx is not what was deployed"),
        (lambda f: (f / "model.onnx").write_bytes(b"weights!"), "model.onnx is not what was deployed"),
        (lambda f: (f / "smoke.npz").unlink(), "smoke.npz is missing"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json, so the version is not whole"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: torn"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json: torn"),
        (lambda f: (f / "manifest.json").write_text('{"record": {}, "files": {}}'), "manifest.json: torn"),
    ],
)
def test_what_is_not_whole_is_not_opened(break_it: Callable[[Path], None], message: str, written: Path) -> None:
    break_it(written)
    with pytest.raises(UserError, match=message), open_version(str(written)):
        pass


def test_incomplete_versions(written: Path, tmp_path: Path) -> None:
    assert incomplete_versions(str(tmp_path), "cards") == []
    assert incomplete_versions(str(tmp_path), "other") == []
    copy_version(str(written), str(tmp_path / "cards" / "4"))
    (tmp_path / "cards" / "4" / "manifest.json").unlink()
    assert incomplete_versions(str(tmp_path), "cards") == [4]
    assert read_manifest(str(tmp_path / "cards" / "4")) is None
    (tmp_path / "cards" / "4" / "smoke.npz").unlink()
    with pytest.raises(UserError, match=r"did not put there \(version 4\); choose another --name"):
        incomplete_versions(str(tmp_path), "cards")
