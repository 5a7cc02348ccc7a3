"""The servers start, serve, and never outlive who started them."""

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError

from softteacher.demo import servers
from softteacher.demo.servers import ObjectStore, seaweedfs, triton
from softteacher.errors import UserError

linux = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the servers come as wheels for Linux x86-64"
)

SCRIPT = """
import sys, time
from softteacher.demo.servers import ObjectStore, seaweedfs, triton
with seaweedfs(sys.argv[1] + "/s3") as store, triton(sys.argv[1] + "/repository", sys.argv[1] + "/triton") as urls:
    print("up", flush=True)
    time.sleep(60)
"""


def started_under(folder: Path) -> list[str]:
    """The command lines of the running processes that name `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in command and ("weed" in command or "triton" in command) and SCRIPT not in command:
            found.append(command)
    return found


@linux
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_parent(tmp_path: Path, how: signal.Signals) -> None:
    said = tmp_path / "stderr"
    with said.open("wb") as stderr:
        parent = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "up\n", said.read_text()
    assert len(started_under(tmp_path)) == 2
    parent.send_signal(how)
    parent.wait(timeout=20)
    deadline = time.monotonic() + 15
    while started_under(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert started_under(tmp_path) == []


@linux
def test_stopped_after_an_exception_and_data_kept(tmp_path: Path) -> None:
    def fail_while_it_runs(store: ObjectStore) -> None:
        store.create_bucket("kept")
        store.client().put_object(Bucket="kept", Key="a/b", Body=b"x" * 100_000)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), seaweedfs(tmp_path) as store:
        fail_while_it_runs(store)
    assert started_under(tmp_path) == []
    with seaweedfs(tmp_path) as again:
        assert again.endpoint.startswith("http://127.0.0.1:")
        assert again.secret_key != store.secret_key
        assert again.secret_key not in repr(again)
        assert len(again.client().get_object(Bucket="kept", Key="a/b")["Body"].read()) == 100_000
        stranger = boto3.client(
            "s3",
            endpoint_url=again.endpoint,
            aws_access_key_id="stranger",
            aws_secret_access_key="s" * 20,
            region_name="us-east-1",
        )
        with pytest.raises(ClientError, match="InvalidAccessKeyId"):
            stranger.get_object(Bucket="kept", Key="a/b")


@linux
def test_triton_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"Triton ended with code 1; .*triton\.log says: .*nope"),
        triton(str(tmp_path / "repository"), tmp_path, load=["nope"]),
    ):
        pass
    assert started_under(tmp_path) == []


@linux
def test_no_triton_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTTEACHER_TRITON_VENV", str(tmp_path / "nowhere"))
    with (
        pytest.raises(UserError, match="nowhere: Triton is not installed there; run `make venv`"),
        triton(str(tmp_path / "repository"), tmp_path),
    ):
        pass


@linux
def test_no_libpython(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the environment whose stub asks for a libpython that no machine has."""
    stub = next(servers._triton_venv().glob("lib/python3.*/site-packages/pytriton/tritonserver/python_backend_stubs"))
    version = stub.parents[3].name.removeprefix("python")
    package = tmp_path / "venv" / stub.parent.relative_to(servers._triton_venv())
    (package / "backends" / "python").mkdir(parents=True)
    (package.parents[1] / "nvidia_pytriton.libs").symlink_to(stub.parents[2] / "nvidia_pytriton.libs")
    binary = package / "python_backend_stubs" / version / "triton_python_backend_stub"
    binary.parent.mkdir(parents=True)
    shutil.copy(stub / version / "triton_python_backend_stub", binary)
    code = binary.read_bytes()
    assert b"libpython3" in code
    binary.write_bytes(code.replace(b"libpython3", b"libpython9"))
    (tmp_path / "venv" / "bin").mkdir()
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setenv("SOFTTEACHER_TRITON_VENV", str(tmp_path / "venv"))
    with (
        pytest.raises(UserError, match=rf"needs libpython9.*apt-get install libpython{version}"),
        triton(str(tmp_path / "repository"), tmp_path),
    ):
        pass


def test_ports_are_different_and_nobody_listens_on_them() -> None:
    hundred = 10_000 + os.getpid() % 100 * 100
    held = []
    with ExitStack() as listeners:
        for port in range(hundred, hundred + 100):
            listener = listeners.enter_context(closing(socket.socket()))
            with suppress(OSError):  # a server of another test is there
                listener.bind(("127.0.0.1", port))
                held.append(listener)
        left = [listener.getsockname()[1] for listener in held[-4:]]
        for listener in held[-4:]:
            listener.close()
        assert sorted(servers._free_ports(4)) == left


def test_other_platforms_are_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    with (
        pytest.raises(UserError, match="set TRITON_URL and AWS_ENDPOINT_URL_S3 to servers of your own"),
        triton(str(tmp_path / "repository"), tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        (None, "s3://bucket/models"),
        ("http://127.0.0.1:8333", "s3://http://127.0.0.1:8333/bucket/models"),
        ("https://s3.example.org/", "s3://https://s3.example.org:443/bucket/models"),
    ],
)
def test_repository_in_the_form_that_triton_takes(
    endpoint: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    else:
        monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    assert servers._for_triton("s3://bucket/models") == expected
    assert servers._for_triton("/srv/models") == "/srv/models"
