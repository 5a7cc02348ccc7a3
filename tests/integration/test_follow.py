"""Two real Tritons over one repository: a deployment speaks to one of them, `follow` brings the other along."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from softteacher import storage
from softteacher.demo.servers import ObjectStore, TritonUrls, triton
from softteacher.errors import UserError
from softteacher.serving.connection import addresses, connect
from softteacher.serving.deploy import deploy, promote, rollback
from softteacher.serving.follow import catch_up, follow
from tests.helpers import ready
from tests.load import Models, ask, clients

SERVICE = "triton-pods.models"


class Replicas:
    """Two Tritons on one port of two loopback addresses, as the pods behind a headless service."""

    def __init__(self, stack: ExitStack, repository: str, folder: Path) -> None:
        self.stack, self.repository, self.folder = stack, repository, folder
        self.first = stack.enter_context(triton(repository, folder / "first", load=["*"]))
        ports = (urlsplit(url) for url in (self.first.http, self.first.grpc, self.first.metrics))
        second = (f"{p.scheme}://127.0.0.2:{p.port}{p.path}" for p in ports)
        self.server = ExitStack()
        self.second = self.server.enter_context(
            triton(repository, folder / "second", load=["*"], at=TritonUrls(*second))
        )
        self.service = self.first.http.replace("127.0.0.1", SERVICE)

    def restart_second(self) -> None:
        self.server.close()
        self.server.enter_context(triton(self.repository, self.folder / "again", load=["*"], at=self.second))


@pytest.fixture(scope="module")
def replicas(object_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    resolve = socket.getaddrinfo

    def with_service(host: Any, port: Any, *rest: Any, **more: Any) -> Any:
        """The cluster's name server, for the one name that it would know."""
        if host != SERVICE:
            return resolve(host, port, *rest, **more)
        return [a for pod in ("127.0.0.2", "127.0.0.1") for a in resolve(pod, port, *rest, **more)]

    with ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(socket, "getaddrinfo", with_service)
        repository = f"{object_store.create_bucket('followed')}/models"
        both = Replicas(stack, repository, tmp_path_factory.mktemp("replicas"))
        stack.callback(both.server.close)
        yield both


def following(stack: ExitStack, repository: str, url: str, **options: Any) -> None:
    """`follow` in a thread until the stack ends."""
    stop = threading.Event()
    options = {"every": 0.2, "stop": stop} | options
    thread = threading.Thread(target=follow, args=(repository, url), kwargs=options)
    thread.start()
    stack.callback(thread.join)
    stack.callback(stop.set)


@pytest.fixture
def name(request: pytest.FixtureRequest, replicas: Replicas) -> Iterator[str]:
    """A model of the test's own."""
    yield request.node.name
    storage.remove(f"{replicas.repository}/{request.node.name}")


def eventually(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_addresses(replicas: Replicas) -> None:
    port = urlsplit(replicas.service).port
    assert addresses(replicas.service) == [f"http://127.0.0.1:{port}", f"http://127.0.0.2:{port}"]
    for alone in (
        "http://localhost:8000",
        "localhost:8000",
        "http://127.0.0.1:8000",
        f"https://{SERVICE}:443",
        "nowhere",
    ):
        assert addresses(alone) == [alone]


def test_replicas_follow_and_no_request_is_lost(replicas: Replicas, name: str, tmp_path: Path) -> None:
    """Deployments and rollbacks under load on both replicas, followed by both: each answer is of a whole version."""
    s3, models = replicas.repository, Models(tmp_path)
    with ExitStack() as stack:
        for url in (replicas.first.http, replicas.second.http):
            following(stack, s3, url)
        facts = deploy(models.next(s3, name)[1], s3, replicas.service, name)
        assert facts["replicas"] == {"serving": 2, "of": 2}
        with (
            clients(replicas.first.http, name, models, 2) as one,
            clients(replicas.second.http, name, models, 2) as two,
        ):
            for change in (deploy, rollback):
                onnx = [models.next(s3, name)[1]] if change is deploy else []
                facts = change(*onnx, s3, replicas.service, name)
                assert facts["replicas"] == {"serving": 2, "of": 2}
                assert ask(replicas.second.http, name, models) == facts["version"]
    assert (one.failures, two.failures) == ([], [])
    assert set(one.versions) == set(two.versions) == {1, 2}


def test_a_replica_that_was_away(
    replicas: Replicas, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    s3, models = replicas.repository, Models(tmp_path)
    deploy(models.next(s3, name)[1], s3, replicas.first.http, name)
    assert not ready(replicas.second.http, name)
    assert catch_up(s3, replicas.second.http) == {}
    assert ask(replicas.second.http, name, models) == 1
    # the config went to and fro, and it changes nothing where nothing has to be changed
    deploy(models.next(s3, name)[1], s3, replicas.first.http, name)
    rollback(s3, replicas.first.http, name)
    capsys.readouterr()
    assert catch_up(s3, replicas.second.http) == {}
    assert capsys.readouterr().err == ""
    # a switch that was killed before it moved the pointer: nobody else goes there
    config = storage.read_bytes(f"{s3}/{name}/2/config.pbtxt")
    storage.write_bytes(f"{s3}/{name}/config.pbtxt", config)
    assert catch_up(s3, replicas.second.http) == {}
    assert ask(replicas.second.http, name, models) == 1
    # and one that serves nothing, as it was started since, loads what the pointer says, whatever that config says
    with closing(connect(replicas.second.http, 30)) as server:
        server.unload_model(name)
    eventually(lambda: not ready(replicas.second.http, name))
    assert catch_up(s3, replicas.second.http) == {}
    assert ask(replicas.second.http, name, models) == 1
    facts = deploy(models.next(s3, name)[1], s3, replicas.first.http, name)
    assert catch_up(s3, replicas.second.http) == {}
    assert ask(replicas.second.http, name, models) == facts["version"]
    # and the next deployments may speak to it
    facts = deploy(models.next(s3, name)[1], s3, replicas.second.http, name)
    assert ask(replicas.second.http, name, models) == facts["version"]
    facts = rollback(s3, replicas.second.http, name)
    assert ask(replicas.second.http, name, models) == facts["version"]
    assert catch_up(s3, replicas.first.http) == {}
    assert ask(replicas.first.http, name, models) == facts["version"]


def test_canaries_come_and_go(replicas: Replicas, name: str, tmp_path: Path) -> None:
    s3, models, canary = replicas.repository, Models(tmp_path), f"{name}-canary"
    deploy(models.next(s3, name)[1], s3, replicas.first.http, name)
    deploy(models.next(s3, name)[1], s3, replicas.first.http, name, canary=0.2)
    assert catch_up(s3, replicas.second.http) == {}
    with closing(connect(replicas.second.http, 30)) as server:
        assert server.get_model_config(canary)["parameters"]["canary"]["string_value"] == '{"share": 0.2, "version": 2}'
    promote(s3, replicas.first.http, name)
    assert ready(replicas.second.http, canary)
    assert catch_up(s3, replicas.second.http) == {}
    eventually(lambda: not ready(replicas.second.http, canary))
    assert ask(replicas.second.http, name, models) == 2


def test_a_replica_that_starts_amid_a_deployment(replicas: Replicas, name: str, tmp_path: Path) -> None:
    """It loads the candidate too, which stays while the deployment runs and goes when that is over."""
    s3, models, candidate = replicas.repository, Models(tmp_path), f"{name}-candidate"
    deploy(models.next(s3, name)[1], s3, replicas.first.http, name)
    for file in storage.list_files(f"{s3}/{name}"):
        storage.copy(f"{s3}/{name}/{file.name}", f"{s3}/{candidate}/{file.name}")
    storage.write_bytes(f"{s3}/{candidate}/claim.json", b'{"host": "elsewhere", "time": 1}')
    storage.remove(f"{s3}/{candidate}/champion.json")
    replicas.restart_second()
    assert ready(replicas.second.http, candidate)
    assert catch_up(s3, replicas.second.http) == {}
    assert ready(replicas.second.http, candidate)
    storage.remove(f"{s3}/{candidate}")
    assert catch_up(s3, replicas.second.http) == {}
    eventually(lambda: not ready(replicas.second.http, candidate))
    assert ask(replicas.second.http, name, models) == 1


def test_the_command(replicas: Replicas, name: str, tmp_path: Path) -> None:
    """Ready when it has caught up; a broken version is told once and stops nothing; SIGTERM ends it at once."""
    s3, models, ready_file = replicas.repository, Models(tmp_path), tmp_path / "ready"
    deploy(models.next(s3, name)[1], s3, replicas.first.http, name)
    deploy(models.next(s3, "broken")[1], s3, replicas.first.http, "broken")
    storage.write_bytes(f"{s3}/broken/1/model.onnx", b"no model")
    command = [sys.executable, "-m", "softteacher", "follow", "--repository", s3, "--triton", replicas.second.http]
    command += ["--every", "0.2", "--ready-file", str(ready_file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            eventually(ready_file.exists)
            assert ask(replicas.second.http, name, models) == 1
            before = ready_file.stat().st_mtime_ns
            eventually(lambda: ready_file.stat().st_mtime_ns > before)
        finally:
            process.send_signal(signal.SIGTERM)
        lines = process.communicate(timeout=10)[1].splitlines()
    assert process.returncode == 0
    assert [line.split(" at ")[0] for line in sorted(lines)] == ["broken: Triton", f"{name}: version 1 loaded"]


def test_without_store_or_triton(s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop, ready_file = threading.Event(), tmp_path / "ready"
    timer = threading.Timer(1, stop.set)
    timer.start()
    follow(s3, "http://127.0.0.1:9", every=0.1, ready_file=str(ready_file), stop=stop)
    assert not ready_file.exists()
    [line] = capsys.readouterr().err.splitlines()  # said once, not each time
    assert "http://127.0.0.1:9 can't be reached" in line


def test_a_ready_file_that_cannot_be_written(replicas: Replicas) -> None:
    with pytest.raises(UserError, match=r"^--ready-file /nowhere/ready: can't be written: No such file or directory$"):
        follow(replicas.repository, replicas.first.http, ready_file="/nowhere/ready")
