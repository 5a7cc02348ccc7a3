"""A store that stumbles is asked again, one that stays broken told in one line; no wrong byte gets through."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from softteacher import s3 as module
from softteacher import storage
from softteacher.errors import UserError
from tests.faulty import FaultyProxy

DATA = os.urandom(300_000)
READ_FAULTS = ["500", "503", "reset", "truncate", "reset in the body", "corrupt", "stall"]
WRITE_FAULTS = ["500", "503", "reset", "corrupt upload", "answer lost"]


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy through which this test talks to the store, and less patience."""
    for name, value in (("PATIENCE", 0.5), ("START_PATIENCE", 1), ("BACKOFF", 0.01), ("READ_TIMEOUT", 0.3)):
        monkeypatch.setattr(module, name, value)
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL_S3"]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
        yield server


@pytest.mark.parametrize("fault", READ_FAULTS)
def test_reading_survives(proxy: FaultyProxy, s3: str, tmp_path: Path, fault: str) -> None:
    storage.write_bytes(f"{s3}/a", DATA)
    proxy.faults = [fault] * 2
    assert storage.read_bytes(f"{s3}/a") == DATA
    proxy.faults = [fault] * 2
    assert [f.name for f in storage.list_files(s3)] == ["a"]
    proxy.faults = ["", "", fault, fault]  # after the two listings of `copy`
    storage.copy(f"{s3}/a", tmp_path / "a")
    assert proxy.faults == []
    assert (tmp_path / "a").read_bytes() == DATA


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_writing_survives(
    proxy: FaultyProxy, s3: str, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 30)  # two faults are enough to survive, whatever the machine is busy with
    (tmp_path / "big").write_bytes(DATA * 40)
    proxy.faults = [fault] * 2
    storage.write_bytes(f"{s3}/a", DATA)
    proxy.faults = ["", fault, fault]
    storage.copy(tmp_path / "big", f"{s3}/big")
    assert proxy.faults == []
    assert storage.read_bytes(f"{s3}/a") == DATA
    assert storage.read_bytes(f"{s3}/big") == DATA * 40


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("500", "answers 500, even when asked again; try again later"),
        ("503", "answers SlowDown, even when asked again; try again later"),
        ("reset", "can't be reached; check AWS_ENDPOINT_URL_S3"),
        ("truncate", "breaks off in the middle, even when asked again"),
        ("reset in the body", "breaks off in the middle, even when asked again"),
        ("corrupt", "sends other bytes than were stored, even when asked again"),
        ("stall", "stalls, even when asked again"),
    ],
)
def test_a_store_that_stays_broken(proxy: FaultyProxy, s3: str, tmp_path: Path, fault: str, message: str) -> None:
    storage.write_bytes(f"{s3}/a", DATA)
    storage.write_bytes(tmp_path / "a", b"what was there")
    proxy.faults, proxy.always = ["", ""], fault
    for call in (lambda: storage.copy(f"{s3}/a", tmp_path / "a"), lambda: storage.read_bytes(f"{s3}/a")):
        with pytest.raises(UserError, match=f"{s3}/a: S3 at {proxy.url} {message}") as error:
            call()
        assert len(str(error.value).splitlines()) == 1
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"what was there")]


@pytest.mark.parametrize("fault", ["503", "reset", "corrupt upload"])
def test_a_store_that_takes_nothing(proxy: FaultyProxy, s3: str, fault: str) -> None:
    proxy.always = fault
    with pytest.raises(UserError, match=f"{s3}/a: S3 at "):
        storage.write_bytes(f"{s3}/a", DATA)
    proxy.always = ""
    assert not storage.exists(f"{s3}/a")


def test_what_stays_wrong_is_not_asked_again(proxy: FaultyProxy, s3: str) -> None:
    with pytest.raises(storage.MissingFile):
        storage.read_bytes(f"{s3}/missing")
    assert len(proxy.seen) == 1


def test_a_wrong_endpoint_is_told_soon_and_a_restarting_store_waited_for(
    proxy: FaultyProxy, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 20)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        start = time.monotonic()
        with pytest.raises(UserError, match="can't be reached"):
            storage.exists(s3)
        assert time.monotonic() - start < 10
    storage.write_bytes(f"{s3}/a", DATA)
    proxy.faults = ["reset"] * 12  # far more than START_PATIENCE has time for
    assert storage.read_bytes(f"{s3}/a") == DATA


def test_a_conditional_write_whose_answer_got_lost(proxy: FaultyProxy, s3: str) -> None:
    proxy.faults = ["answer lost"]
    storage.write_bytes(f"{s3}/claim", b"mine", if_match="")
    proxy.faults = ["reset"]
    with pytest.raises(storage.Conflict):
        storage.write_bytes(f"{s3}/claim", b"yours", if_match="")
    assert storage.read_bytes(f"{s3}/claim") == b"mine"


def test_an_object_that_has_not_changed_is_not_sent_again(s3: str) -> None:
    storage.write_bytes(f"{s3}/a", b"1")
    data, etag = storage.read_unless(f"{s3}/a", "")
    assert data == b"1"
    assert storage.read_unless(f"{s3}/a", etag) == (None, etag)
    storage.write_bytes(f"{s3}/a", b"2")
    assert storage.read_unless(f"{s3}/a", etag)[0] == b"2"
    with pytest.raises(storage.MissingFile):
        storage.read_unless(f"{s3}/b", etag)
