"""One deployment at a time; a dead one doesn't block the next."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softteacher import storage
from softteacher.errors import UserError
from softteacher.serving import claim as claim_module
from softteacher.serving.claim import Claim, read_claim

TAKE = """
import sys, time
from softteacher.serving.claim import Claim
Claim(sys.argv[1], "cards")
print("taken", flush=True)
time.sleep(60)
"""


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim_module, "RENEW", 0.2)
    monkeypatch.setattr(claim_module, "LEASE", 2.0)


def test_take_check_release(s3: str) -> None:
    uri = f"{s3}/claim.json"
    assert read_claim(uri) is None
    claim = Claim(uri, "cards")
    taken = read_claim(uri)
    assert taken is not None
    assert time.time() - 60 < taken["time"] <= time.time()
    claim.check()
    with pytest.raises(
        UserError, match=r"cards: .* has been deploying it for \d+ s; wait for that run, or remove s3://"
    ):
        Claim(uri, "cards")
    claim.release()
    assert read_claim(uri) is None
    Claim(uri, "cards")


def test_a_claim_that_was_taken_over_is_not_ours_any_more(s3: str) -> None:
    uri = f"{s3}/claim.json"
    slow = Claim(uri, "cards")
    storage.write_bytes(uri, json.dumps({"host": "other", "time": time.time()}).encode())
    with pytest.raises(UserError, match="cards: another deployment took over"):
        slow.check()
    slow.release()
    taken = read_claim(uri)
    assert taken is not None
    assert taken["host"] == "other"


def test_two_at_the_same_moment(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other comes between our look and our write: the write is conditional."""
    uri = f"{s3}/claim.json"

    def overtaken(uri: str) -> None:
        storage.write_bytes(uri, json.dumps({"host": "other", "time": 0}).encode())

    monkeypatch.setattr(claim_module, "read_claim", overtaken)
    with pytest.raises(UserError, match="somebody else has just begun to deploy it"):
        Claim(uri, "cards")


def test_a_killed_process_is_known_to_be_dead_on_its_own_host(s3: str) -> None:
    uri = f"{s3}/claim.json"
    process = subprocess.Popen([sys.executable, "-c", TAKE, uri], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    with pytest.raises(UserError, match="has been deploying it"):
        Claim(uri, "cards")
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "Z":  # dead, and nobody has asked yet
        assert time.monotonic() < deadline
        time.sleep(0.01)
    claim = Claim(uri, "cards")
    process.wait()
    claim.check()


ELSEWHERE = {"machine": "other"}  # who knows what runs there


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({}, False),
        ({"started": "1"}, True),  # the number went to another process
        ({"pid": 2**22 + 1}, True),  # larger than any
        (ELSEWHERE, True),
        (ELSEWHERE | {"pid": 2**22 + 1, "time": 4e9}, True),  # their clock tells nothing
    ],
)
def test_who_counts_as_dead(
    changes: dict, free: bool, tmp_path: Path, hasty: None, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = tmp_path / "claim.json"
    Claim(str(uri), "cards")
    uri.write_text(json.dumps(json.loads(uri.read_text()) | changes))
    started = time.monotonic()
    if free:
        Claim(str(uri), "cards").check()
    else:
        with pytest.raises(UserError, match="has been deploying it"):
            Claim(str(uri), "cards")
    waited = "machine" in changes
    assert (time.monotonic() - started >= 2) == waited
    assert ("is deploying it, or was killed; waiting for a sign of life" in capsys.readouterr().err) == waited


def test_one_that_shows_signs_of_life_is_left_alone(
    s3: str, hasty: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"{s3}/claim.json"
    running = claim_module._running
    monkeypatch.setattr(claim_module, "_running", lambda pid: {"machine": "other", "started": "1"})
    theirs = Claim(uri, "cards")
    monkeypatch.setattr(claim_module, "_running", running)
    with theirs.renewed():
        with pytest.raises(UserError, match="has been deploying it"):
            Claim(uri, "cards")
        theirs.check()
    Claim(uri, "cards").check()  # the signs have ended
    with pytest.raises(UserError, match="another deployment took over"):
        theirs.check()
    with theirs.renewed():  # a renewal takes nothing back
        time.sleep(0.5)
    with pytest.raises(UserError, match="another deployment took over"):
        theirs.check()


def test_a_torn_claim(tmp_path: Path) -> None:
    (tmp_path / "claim.json").write_text("{")
    with pytest.raises(UserError, match=r"claim\.json: torn, or not ours; remove it"):
        Claim(str(tmp_path / "claim.json"), "cards")
