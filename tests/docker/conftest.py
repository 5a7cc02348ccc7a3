"""A real Docker Engine with the project's images: `make test-docker` builds them and asks for these tests."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from components import TOOLS_IMAGE, TRAIN_IMAGE
from softteacher.demo.servers import TRITON_IMAGE

IMAGES = {"train": TRAIN_IMAGE, "tools": TOOLS_IMAGE, "triton": TRITON_IMAGE}
# as the manifests confine them
CONFINED = {
    **{"read_only": True, "tmpfs": {"/tmp": ""}, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges"]},
    **{"network_mode": "none"},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("SOFTTEACHER_TEST_DOCKER"):
        for item in items:
            if "tests/docker/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="needs a Docker Engine and the images: make test-docker"))


@pytest.fixture(scope="session")
def engine() -> Iterator[Any]:
    """A client of the engine."""
    import docker

    client = docker.from_env()
    yield client
    client.close()
