"""What tests share, made once: the real servers on loopback, and a model from the embedded data set."""

import inspect
import os
import platform
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock

from softteacher import cli
from softteacher.config import load_settings
from softteacher.data.split import split
from softteacher.demo.digits import make_digits
from softteacher.demo.servers import ObjectStore, TritonUrls, seaweedfs, triton
from softteacher.serving.export import export
from softteacher.training.train import train
from tests.hand_server import HandServer, hand_server
from tests.samples import TINY

Shared = Callable[[str, Callable[[Path], object]], Path]
Command = Callable[..., tuple[int, str, list[str]]]


class TritonServer(NamedTuple):
    url: str
    repository: str
    urls: TritonUrls


@pytest.fixture(scope="session", autouse=True)
def _stacks_without_source() -> Iterator[None]:
    """To know who called it kfp reads the source of the whole stack; under pytest that is most of a compilation."""
    stack = inspect.stack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "stack", lambda context=1: stack(0))
        yield


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """SeaweedFS; the AWS variables name it for the rest of the session."""
    if platform.system() != "Linux":
        pytest.skip("SeaweedFS comes as a wheel for Linux only")
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.env.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture
def s3(object_store: ObjectStore) -> Iterator[str]:
    """A fresh bucket: `s3://test-...`; it is removed, as each holds volumes of the store, which has only so many."""
    name = f"test-{secrets.token_hex(6)}"
    yield object_store.create_bucket(name)
    client = object_store.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
        for entry in page.get("Contents", []):
            client.delete_object(Bucket=name, Key=entry["Key"])
    client.delete_bucket(Bucket=name)


@pytest.fixture(params=["local", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place to work in."""
    return f"{request.getfixturevalue('s3')}/base" if request.param == "s3" else str(tmp_path / "base")


@pytest.fixture(scope="session")
def triton_server(object_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Triton over a model repository in S3."""
    if platform.machine() != "x86_64":
        pytest.skip("Triton comes as a wheel for Linux x86-64 only")
    repository = f"{object_store.create_bucket('triton')}/models"
    with triton(repository, tmp_path_factory.mktemp("triton")) as urls:
        yield TritonServer(urls.http, repository, urls)


@pytest.fixture(scope="module")
def hand_triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HandServer]:
    """Triton with the model `squares`; tests put more into it."""
    with hand_server(tmp_path_factory.mktemp("hand")) as server:
        server.put("squares", score=0.6)
        yield server


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """A folder that is made once for all processes of the run, by the first that needs it; nothing is changed in it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        path, made = base / f"shared-{name}", base / f"shared-{name}.made"
        with FileLock(f"{path}.lock"):
            if not made.exists():
                make(path)
                made.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def digits(shared: Shared) -> Path:
    """12 training and 6 validation scenes of the embedded data set."""
    return shared("digits", lambda folder: make_digits(folder, train=12, val=6))


@pytest.fixture(scope="session")
def manifests(digits: Path, shared: Shared) -> Path:
    """A split of the digits: 6 labelled, 6 unlabelled, 6 validation images."""
    return shared("manifests", lambda folder: split(str(digits), str(folder), percent=50, stratify=True))


@pytest.fixture(scope="session")
def trained(manifests: Path, shared: Shared) -> Path:
    """A model folder after a few steps of Soft Teacher, with a teacher that believes nearly anything."""
    low = [f"method.{key}_threshold=0.06" for key in ("pool", "rpn", "cls")]
    settings = load_settings("demo", [*TINY, *low, "method.reg_variance_threshold=9", "method.burn_in=0.34"])
    data = [str(manifests / f"{name}.json") for name in ("labeled", "unlabeled", "validation")]
    return shared("trained", lambda folder: train(*data, str(folder), settings))


@pytest.fixture(scope="session")
def exported(trained: Path, shared: Shared) -> Path:
    """The onnx folder of `trained`."""
    return shared("exported", lambda folder: export(str(trained), str(folder)))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command of the command line; returns exit code, standard output and the lines of standard error."""

    def call(*arguments: object) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["softteacher", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as e:
            code = e.code or 0
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if "[###" not in line]

    return call
