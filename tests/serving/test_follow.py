"""When a replica counts as up to date; what it does then is tested on real servers, in `tests/integration`."""

import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from softteacher.errors import UserError
from softteacher.serving import follow as module
from softteacher.serving.follow import catch_up, follow


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


def test_a_pod_whose_repository_is_not_there_is_not_ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stop, told = threading.Event(), []

    def say(text: str) -> None:
        told.append(text)
        stop.set()

    monkeypatch.setattr(module, "say", say)
    follow("/nowhere/typo", "http://127.0.0.1:9", ready_file=str(tmp_path / "ready"), stop=stop)
    assert told == ["/nowhere/typo: no such folder, nor one around it; check --repository"]
    assert not (tmp_path / "ready").exists()


def test_a_url_that_can_be_none_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="grpc://localhost:8001: not a URL of Triton; write http://host:port"):
        follow(str(tmp_path), "grpc://localhost:8001")


@pytest.mark.parametrize("serving", [True, False])
def test_a_config_that_is_not_the_champions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, serving: bool) -> None:
    """A deployment is at work on this Triton, or was killed; only in the second case may nothing be served."""
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "champion.json").touch()
    (tmp_path / "cards" / "config.pbtxt").write_text("of version 2")
    loaded: list[object] = []
    ready = {("cards", ""): serving}
    server = SimpleNamespace(close=lambda: None, is_model_ready=lambda *key: ready.get((*key, "")[:2], False))
    monkeypatch.setattr(module, "connect", lambda *_: server)
    monkeypatch.setattr(module, "explained", lambda _: nullcontext())
    monkeypatch.setattr(module, "_live", lambda *_: [("cards", 1, b"of version 1")])
    monkeypatch.setattr(module, "_load", lambda *a: loaded.append(a[2:]))
    assert catch_up(str(tmp_path), "http://localhost:8000") == {}
    assert loaded == ([] if serving else [("cards", 1, b"of version 1")])
