"""The client by both protocols against a real Triton while what it asks changes: restarts, swaps and canaries."""

import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from softteacher.demo.servers import triton
from softteacher.errors import UserError
from softteacher.serving.client import Client
from tests.faulty import FaultyProxy
from tests.hand_server import HandServer
from tests.helpers import CATEGORIES, SIZE, square_image

BOX = (10, 20, 50, 44)
IMAGE = square_image(BOX)
NAMES = [c["name"] for c in CATEGORIES]


def test_a_restart_is_waited_for(hand_triton: HandServer, tmp_path: Path) -> None:
    """Requests of four threads, half of them by gRPC, go on while Triton is away."""
    shutil.copytree(hand_triton.repository / "squares", tmp_path / "models" / "squares")
    with triton(str(tmp_path / "models"), tmp_path, load=["squares"]) as urls:
        clients = [Client(url, "squares", timeout=60) for url in (urls.http, urls.grpc)]
        for client in clients:
            assert len(client.predict([IMAGE])) == 1
    found: list[Any] = []
    threads = [threading.Thread(target=lambda c=c: found.append(c.predict([IMAGE])[0])) for c in clients * 2]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    assert not found
    with triton(str(tmp_path / "models"), tmp_path, load=["squares"], at=urls):
        for thread in threads:
            thread.join()
        for client in clients:
            client.close()
    assert [d.boxes.tolist() for d in found] == [[[*BOX]]] * 4


def test_it_follows_the_model_while_many_ask(hand_triton: HandServer) -> None:
    """Versions differ in size, in what the labels mean, or in both; every answer has the right class and box."""
    other = {"categories": CATEGORIES[::-1], "label": 0}
    versions = [{"size": (48, 80), **other}, {"size": SIZE, "label": 1}, {"size": SIZE, **other}]
    hand_triton.put("swapped", 1, **versions[1])
    stop, wrong, sizes = threading.Event(), [], set()
    image = square_image((20, 40, 100, 88), width=192, height=128)

    def ask(client: Client) -> None:
        while not stop.is_set():
            try:
                for answer in client.stream([image] * 10):
                    d = answer.detections
                    names = [answer.categories[label][1] for label in d.labels]
                    sizes.add(client._model.image_size)
                    if names != NAMES[1:] or np.abs(d.boxes - [[20, 40, 100, 88]]).max() > 128 / 48:
                        wrong.append((names, d.boxes))
            except Exception as e:
                wrong.append(e)

    with Client(hand_triton.urls.http, "swapped") as by_http, Client(hand_triton.urls.grpc, "swapped") as by_grpc:
        threads = [threading.Thread(target=ask, args=(client,)) for client in (by_http, by_grpc) * 2]
        for thread in threads:
            thread.start()
        for version in range(2, 6):
            hand_triton.put("swapped", version, **versions[version % 3])
            time.sleep(0.3)
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert sizes == {(48, 80), SIZE}


def test_a_model_that_is_away_for_a_moment_is_waited_for(hand_triton: HandServer) -> None:
    hand_triton.put("away")
    with Client(hand_triton.urls.http, "away") as client, Client(hand_triton.urls.grpc, "away", timeout=0.3) as hasty:
        hand_triton.load("away", unload=True)
        with pytest.raises(UserError, match=r"refused: .*away"):
            hasty.predict([IMAGE])
        timer = threading.Timer(0.5, hand_triton.load, ["away"])
        timer.start()
        assert client.predict([IMAGE])[0].boxes.tolist() == [[*BOX]]
        timer.join()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_canary_gets_its_share_and_is_compared(protocol: str, hand_triton: HandServer) -> None:
    """It has another input size, and its classes in another order."""
    name = f"mine-{protocol}"
    hand_triton.put(name, 3, score=0.6)
    candidate = {"size": (128, 192), "categories": CATEGORIES[::-1], "label": 0, "score": 0.8, "margin": 1}
    hand_triton.put(f"{name}-canary", 1, {"share": 0.5, "version": 7}, **candidate)
    url = hand_triton.url(protocol)

    def scores() -> tuple[list[float], Any]:
        with Client(url, name, seed=5) as client:
            found = [client.predict([IMAGE, square_image((0, 0, 0, 0))]) for _ in range(12)]
            assert all(client.classes[d.labels[0]] == NAMES[1] for d, _ in found)
            assert all(np.abs(d.boxes - [BOX]).max() < 1.1 for d, _ in found)
            return [round(float(d.scores[0]), 3) for d, _ in found], client.canary

    seen, canary = scores()
    assert set(seen) == {0.6, 0.8}
    assert scores()[0] == seen  # the draw is repeatable
    asked = seen.count(0.8)
    assert (canary.version, canary.share, canary.requests, canary.failures) == (7, 0.5, asked, 0)
    assert (canary.images, canary.boxes_live, canary.boxes_candidate) == (2 * asked, asked, asked)
    assert canary.matched == asked
    assert canary.score_difference == pytest.approx(0.2)
    assert canary.seconds_live > 0
    assert canary.seconds_candidate > 0
    assert f"version 7: asked in {asked} requests; boxes live {asked}" in str(canary)


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ({"score": 5.0}, "answers nonsense: .* scores outside 0 to 1"),
        ({"label": 9}, "answers nonsense: labels outside its 2 classes"),
        ({"score": float("inf")}, "answers nonsense"),
        ({"categories": [CATEGORIES[0], {"id": 7, "name": "cat"}]}, "its classes are not those of version 1: .*cat"),
    ],
)
def test_a_canary_never_fails_a_request(candidate: dict, message: str, hand_triton: HandServer) -> None:
    hand_triton.put("safe", score=0.6)
    hand_triton.put("safe-canary", 1, {"share": 1, "version": 2}, **candidate)
    with Client(hand_triton.urls.http, "safe") as client:
        for _ in range(3):
            assert client.predict([IMAGE])[0].scores.tolist() == [pytest.approx(0.6)]
        canary = client.canary
    assert canary is not None
    assert (canary.requests, canary.failures, canary.images) == (3, 3, 0)
    assert re.search(message, canary.last_error)
    assert "3 failures, the last: " in str(canary)


def test_a_canary_has_the_time_that_the_live_model_has_left(hand_triton: HandServer) -> None:
    hand_triton.put("brisk", score=0.6)
    hand_triton.put("brisk-canary", 1, {"share": 1, "version": 2}, score=0.8)
    with FaultyProxy(hand_triton.urls.http) as proxy, Client(proxy.url, "brisk", timeout=1) as client:
        proxy.seen.clear()
        proxy.faults += ["", "stall"]
        started = time.monotonic()
        live = client.predict([IMAGE])
        assert time.monotonic() - started < 1.5
        assert live[0].scores.tolist() == [pytest.approx(0.6)]
        assert proxy.seen == [f"POST /v2/models/{name}/infer" for name in ("brisk", "brisk-canary")]
        # with less left than the live model took it isn't asked: a failure would say nothing of it
        candidate, images = client._canary.draw(), [Image.fromarray(IMAGE)]
        assert candidate is not None
        for left, scores in ((-0.1, None), (0.8, None), (30, [pytest.approx(0.8)])):
            found = client._canary.ask(candidate, images, client._model, live, 0.9, time.monotonic() + left)
            assert (found and found[0].scores.tolist()) == scores
        canary = client.canary
        assert canary is not None
        assert (canary.requests, canary.failures) == (2, 1)
        assert "did not answer in time" in canary.last_error


def test_a_canary_comes_goes_and_is_followed_by_the_next(hand_triton: HandServer) -> None:
    hand_triton.put("watched", score=0.6)

    def score() -> float:
        return round(float(client.predict([IMAGE])[0].scores[0]), 3)

    with Client(hand_triton.urls.grpc, "watched", canary_poll=0) as client:
        assert (score(), client.canary) == (0.6, None)
        hand_triton.put("watched-canary", 1, {"share": 1, "version": 2}, score=0.7)
        assert score() == 0.7
        hand_triton.load("watched-canary", unload=True)  # rolled back
        assert score() == 0.6
        canary = client.canary
        assert canary is not None
        assert (canary.version, canary.requests, canary.failures) == (2, 1, 0)  # still known
        hand_triton.put("watched-canary", 2, {"share": 1, "version": 3}, score=0.8)
        assert score() == 0.8
        canary = client.canary
        assert canary is not None
        assert (canary.version, canary.requests) == (3, 1)
    # one that vanishes between two looks
    with Client(hand_triton.urls.http, "watched", canary_poll=1e6) as client:
        assert score() == 0.8
        hand_triton.load("watched-canary", unload=True)
        assert [score(), score()] == [0.6, 0.6]
        canary = client.canary
        assert canary is not None
        assert (canary.requests, canary.failures) == (1, 0)
