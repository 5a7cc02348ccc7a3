"""Clients that ask while versions are switched and deployments are killed, here and in benchmarks/switching.py."""

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from softteacher import storage
from softteacher.serving.client import connect, infer
from softteacher.serving.repository import last_version, read_champion
from tests.helpers import OUTPUTS, onnx_folder, run_onnx, square_image


class Models:
    """Two onnx folders whose answers differ: one is deployed as every odd version, the other as every even one."""

    def __init__(self, base: Path) -> None:
        self.folders = [onnx_folder(base / name, score=score) for name, score in (("even", 0.8), ("odd", 0.6))]
        self._expected: dict[bytes, list[dict[str, np.ndarray]]] = {}

    def next(self, repository: str, name: str) -> tuple[int, str]:
        """The next version, and its onnx folder."""
        version = last_version(repository, name) + 1
        return version, str(self.folders[version % 2])

    def expected(self, images: np.ndarray, version: int) -> dict[str, np.ndarray]:
        """What a version has to answer, bit by bit."""
        key = images.tobytes()
        if key not in self._expected:
            self._expected[key] = [run_onnx(folder / "model.onnx", images) for folder in self.folders]
        return self._expected[key][version % 2]


@dataclass
class Answers:
    """What the clients got.

    Attributes:
        versions: number of answers of each version that were what it has to answer.
        failures: in words: requests that failed, and other answers.
    """

    versions: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return self.versions.total() + len(self.failures)


def ask(url: str, name: str, models: Models) -> int:
    """The version of one whole answer.

    Raises:
        UserError: the request failed.
        AssertionError: the answer isn't what the version that it names has to answer.
    """
    server = connect(url, 30)
    try:
        return _ask(server, url, name, models, np.stack([square_image((10, 20, 50, 44))]))
    finally:
        server.close()


@contextmanager
def clients(url: str, name: str, models: Models, number: int = 8) -> Iterator[Answers]:
    """Clients, each with a connection and an image of its own, ask without naming a version during the block."""
    answers, stop, lock = Answers(), threading.Event(), threading.Lock()
    images = [np.stack([square_image((3 + i, 10, 50 + i, 44))]) for i in range(number)]
    for one in images:
        models.expected(one, 0)  # made once, here

    def client(mine: np.ndarray) -> None:
        server = connect(url, 30)
        while not stop.is_set():
            try:
                version = _ask(server, url, name, models, mine)
                with lock:
                    answers.versions[version] += 1
            except Exception as e:
                with lock:
                    answers.failures.append(repr(e))
        server.close()

    threads = [threading.Thread(target=client, args=(one,)) for one in images]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


class Killer:
    """Runs `softteacher deploy` in a process of its own and kills it at a moment of its work."""

    def __init__(self, repository: str, url: str, name: str, models: Models, seed: int = 0) -> None:
        self.repository, self.url, self.name, self.models = repository, url, name, models
        self._random = random.Random(seed)
        self._seconds = 0.0

    def measure(self) -> None:
        """Deploy without a kill: how long its work takes, from the claim to the end, is the range of the kills."""
        process = self._start(self.models.next(self.repository, self.name)[1])
        started = time.monotonic()
        assert process.wait() == 0, "the deployment failed"
        self._seconds = time.monotonic() - started

    def kill(self, part: int, of: int) -> str:
        """Deploy, and kill that at a random moment of one of `of` parts of its work. Returns how far it had come."""
        while True:
            version, onnx = self.models.next(self.repository, self.name)
            process, started = self._start(onnx), time.monotonic()
            try:
                process.wait(self._seconds * (part + self._random.random()) / of)
                self._seconds = time.monotonic() - started  # it was done sooner than the one before: once more
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                break
        base = f"{self.repository}/{self.name}"
        champion = read_champion(self.repository, self.name)
        if champion and champion.version == version:
            return "pointer written"
        if storage.exists(f"{base}/config.pbtxt"):
            config = storage.read_bytes(f"{base}/config.pbtxt")
            if storage.exists(f"{base}/{version}") and f"versions: [ {version} ]".encode() in config:
                return "switching"
        left = {
            f"{base}/{version}/manifest.json": "copied",
            f"{base}/{version}": "copying",
            f"{base}-candidate/{version}/manifest.json": "uploaded",
            f"{base}-candidate/{version}": "uploading",
        }
        return next((step for path, step in left.items() if storage.exists(path)), "begun")

    def _start(self, onnx: str) -> subprocess.Popen[bytes]:
        """Start it and wait until it has taken the claim; one that a killed process left is another."""
        claim = f"{self.repository}/{self.name}-candidate/claim.json"
        before = storage.etag(claim)
        command = [sys.executable, "-m", "softteacher", "deploy", "--onnx", onnx, "--repository", self.repository]
        command += ["--triton", self.url, "--name", self.name]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
        while storage.etag(claim) in {"", before}:
            assert process.poll() is None, "the deployment ended before it began"
            time.sleep(0.01)
        return process


def _ask(server: object, url: str, name: str, models: Models, images: np.ndarray) -> int:
    outputs, version = infer(server, url, name, images)
    expected = models.expected(images, int(version))
    wrong = [key for key in OUTPUTS if not np.array_equal(expected[key], outputs.get(key))]
    assert not wrong, f"version {version} answered with other {', '.join(wrong)} than it has to"
    return int(version)
