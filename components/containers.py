"""A local run with each step in a container of its image: a real Docker Engine, and nothing left running on it."""

import os
import secrets
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from kfp import local

from softteacher.errors import UserError

UID = 10001  # of the images
# what the steps need of this process's environment; the values go to the engine and to no log
PASSED_ON = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"),
)


@contextmanager
def docker_runner(root: Path, images: Iterable[str]) -> Iterator[local.DockerRunner]:
    """KFP's runner with the steps confined as on a cluster: no root, no capabilities, only /tmp and `root` writable.

    The steps share the host's network, to reach servers on it. They run as the caller; for root, as the images' own
    user, whom the folder is then given to. At the end of the block, at SIGTERM too, running steps are removed.

    Args:
        root: The pipeline root; made if need be.
        images: That the steps run in.

    Raises:
        UserError: No engine answers, or an image is missing.
    """
    try:
        import docker
        from docker.errors import APIError, DockerException, ImageNotFound
    except ImportError:
        raise UserError("--runner docker needs Docker's SDK for Python: pip install 'softteacher[demo]'") from None
    try:
        engine = docker.from_env()
        engine.ping()
    except DockerException:
        at = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        raise UserError(
            f"no Docker Engine answers at {at}; start it or set DOCKER_HOST, or leave out --runner docker"
        ) from None
    for image in sorted(images):
        try:
            engine.images.get(image)
        except ImageNotFound:
            raise UserError(f"image {image}: the Docker Engine doesn't have it; build it with `make images`") from None
    root.mkdir(parents=True, exist_ok=True)
    if os.getuid() == 0:
        os.chown(root, UID, UID)
    mark = {"softteacher.run": secrets.token_hex(8)}
    runner = local.DockerRunner(
        network_mode="host",
        environment={name: os.environ[name] for name in PASSED_ON if name in os.environ},
        user=f"{os.getuid()}:{os.getgid()}" if os.getuid() else f"{UID}:{UID}",
        read_only=True,
        tmpfs={"/tmp": ""},
        shm_size="1g",  # the loader's workers; a container's own is 64 MB
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        labels=mark,
    )
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield runner
    finally:
        signal.signal(signal.SIGTERM, before)
        marks = [f"{key}={value}" for key, value in mark.items()]
        for step in engine.containers.list(all=True, filters={"label": marks}, ignore_removed=True):
            with suppress(APIError):  # the engine was removing it
                step.remove(force=True)
        engine.close()


def _end(number: int, _: FrameType | None) -> Any:
    sys.exit(128 + number)
