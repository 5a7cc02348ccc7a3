"""The real servers, for every test that asks for them: started once, on loopback."""

import platform
import secrets
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from softteacher.demo.servers import ObjectStore, seaweedfs, triton


class TritonServer(NamedTuple):
    url: str
    repository: str


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
def s3(object_store: ObjectStore) -> str:
    """A fresh bucket: `s3://test-...`."""
    return object_store.create_bucket(f"test-{secrets.token_hex(6)}")


@pytest.fixture(scope="session")
def triton_server(object_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Triton over a model repository in S3."""
    if platform.machine() != "x86_64":
        pytest.skip("Triton comes as a wheel for Linux x86-64 only")
    repository = f"{object_store.create_bucket('triton')}/models"
    with triton(repository, tmp_path_factory.mktemp("triton")) as url:
        yield TritonServer(url, repository)
