"""When a replica counts as up to date; what it does then is tested on real servers, in `tests/integration`."""

import threading
from pathlib import Path

import pytest

from softteacher.serving import follow as module
from softteacher.serving.follow import follow


@pytest.mark.parametrize(
    ("problems", "ready"),
    [({}, True), ({"cards": "out of memory"}, True), ({"cards": "out of memory", "signs": "out of memory"}, False)],
)
def test_a_pod_that_serves_nothing_is_not_ready(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, problems: dict[str, str], ready: bool
) -> None:
    """Or a rollout would put it in the place of one that does."""
    stop = threading.Event()
    looks = iter([problems, {}])

    def look(*_: object) -> dict[str, str]:
        if problems is not (found := next(looks)):
            assert (tmp_path / "ready").exists() == ready
            stop.set()
        return found

    monkeypatch.setattr(module, "catch_up", look)
    monkeypatch.setattr(module, "_deployed", lambda repository: ["cards", "signs"])
    follow("s3://models/triton", "http://localhost:8000", every=0.01, ready_file=str(tmp_path / "ready"), stop=stop)
    assert (tmp_path / "ready").exists()  # in the end all is well
