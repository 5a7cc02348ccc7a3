"""Checkpoints: whole or not there, refused when torn or foreign, the last few kept, on disk and on S3."""

import pytest
import torch

from softteacher import storage
from softteacher.errors import UserError
from softteacher.training.checkpoint import Checkpoints

RUN = {"training.seed": 3, "batch": "1 + 4 images"}


def place(kind, request, tmp_path):
    return str(tmp_path / "c") if kind == "disk" else f"{request.getfixturevalue('s3')}/c"


def state(value):
    return {"student": {"w": torch.full((3,), float(value))}, "progress": {"step": value, "log": ["{}"], "best": None}}


def names(uri):
    return sorted(f.name for f in storage.list_files(uri))


def test_a_torn_one_does_not_push_out_what_is_written_after_it(tmp_path):
    """A power cut left it, and the run went on from an earlier step."""
    storage.write_bytes(tmp_path / "c" / f"step-000000020-{'f' * 16}.pt", b"")
    Checkpoints(str(tmp_path / "c"), RUN, keep=1).save(15, state(15), wait=True)
    assert [name[:14] for name in names(tmp_path / "c")] == ["step-000000015"]
    assert Checkpoints(str(tmp_path / "c"), RUN, keep=1).load()["step"] == 15


@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_the_newest_comes_back_and_the_last_few_stay(kind, request, tmp_path):
    uri = place(kind, request, tmp_path)
    checkpoints = Checkpoints(uri, RUN, keep=2)
    assert checkpoints.load() is None
    for step in (5, 10, 15):
        checkpoints.save(step, state(step))
    checkpoints.finish()
    assert [name[:14] for name in names(uri)] == ["step-000000010", "step-000000015"]
    found = Checkpoints(uri, RUN, keep=2).load()
    assert found["step"] == 15
    assert torch.equal(found["student"]["w"], torch.full((3,), 15.0))
    assert found["progress"] == {"step": 15, "log": ["{}"], "best": None}
    checkpoints.remove()
    assert names(uri) == []
    assert not (tmp_path / "c").exists()


def torn(data):
    return data[: len(data) // 2]


def flipped(data):
    return data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]


@pytest.mark.parametrize("damage", [torn, flipped, lambda data: b"", lambda data: b"no checkpoint at all"])
def test_a_broken_one_is_refused_and_the_one_before_it_used(tmp_path, capsys, damage):
    checkpoints = Checkpoints(str(tmp_path), RUN, keep=3)
    for step in (1, 2):
        checkpoints.save(step, state(step))
    newest = max(tmp_path.iterdir())
    newest.write_bytes(damage(newest.read_bytes()))
    assert checkpoints.load()["step"] == 1
    said = capsys.readouterr().err
    assert f"{newest}: not used, it is torn: its sha256 is not that of its name" in said
    assert said.count("\n") == 1


class Evil:
    def __reduce__(self):
        return print, ("pwned",)


@pytest.mark.parametrize("content", [{"some": "dict"}, [1, 2], Evil(), {"format": 1, "run": 7}])
def test_a_foreign_one_is_refused(tmp_path, capsys, content):
    """Even one whose name is right; and nothing in it is executed."""
    import hashlib

    Checkpoints(str(tmp_path), RUN, keep=3).save(1, state(1))
    torch.save(content, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").rename(tmp_path / f"step-000000002-{hashlib.sha256(data).hexdigest()[:16]}.pt")
    assert Checkpoints(str(tmp_path), RUN, keep=3).load()["step"] == 1
    out, said = capsys.readouterr()
    assert "not used" in said
    assert "pwned" not in out + said


def test_one_of_another_run_is_an_error(tmp_path):
    Checkpoints(str(tmp_path), RUN, keep=2).save(4, state(4))
    with pytest.raises(UserError, match=r"another run \(training.seed is 4, there it was 3\)"):
        Checkpoints(str(tmp_path), RUN | {"training.seed": 4}, keep=2).load()
    assert len(names(tmp_path)) == 1


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    checkpoints = Checkpoints(str(tmp_path), RUN, keep=1)
    for step in (1, 2):
        checkpoints.save(step, state(step))
    checkpoints.remove()
    assert names(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("strict", [False, True])
def test_a_store_that_fails(tmp_path, capsys, monkeypatch, strict):
    """Training goes on without a checkpoint, and keeps the one before; at SIGTERM the failure is an error."""
    checkpoints = Checkpoints(str(tmp_path), RUN, keep=1)
    checkpoints.save(1, state(1))

    def full(*_):
        raise UserError("the disk is full; free some space")

    monkeypatch.setattr(storage, "write_bytes", full)
    if strict:
        with pytest.raises(UserError, match="disk is full"):
            checkpoints.save(2, state(2), wait=True)
    else:
        checkpoints.save(2, state(2))
        assert "warning: no checkpoint: the disk is full" in capsys.readouterr().err
    assert Checkpoints(str(tmp_path), RUN, keep=1).load()["step"] == 1
