"""No request is lost while versions are switched and deployments killed. benchmarks/switching.py does it in full."""

import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from softteacher import storage
from softteacher.demo.servers import TritonUrls, triton
from softteacher.errors import UserError
from softteacher.serving.deploy import deploy, rollback
from softteacher.serving.repository import read_champion
from tests.load import Killer, Models, ask, clients

NAME = "switched"


@pytest.fixture
def own_triton(s3: str, tmp_path: Path) -> Iterator[tuple[TritonUrls, ExitStack]]:
    """A Triton that serves the bucket; the test may end it by closing the stack."""
    with ExitStack() as stack:
        yield stack.enter_context(triton(s3, tmp_path / "triton")), stack


def test_switches_under_load(s3: str, own_triton: tuple[TritonUrls, ExitStack], tmp_path: Path) -> None:
    (urls, _), models = own_triton, Models(tmp_path)
    deploy(models.next(s3, NAME)[1], s3, urls.http, NAME)
    with clients(urls.http, NAME, models, 8) as answers:
        live = [deploy(models.next(s3, NAME)[1], s3, urls.http, NAME)["version"]]
        live += [rollback(s3, urls.http, NAME)["version"]]
        live += [deploy(models.next(s3, NAME)[1], s3, urls.http, NAME)["version"]]
    assert live == [2, 1, 3]
    assert answers.failures == []
    assert set(answers.versions) == {1, 2, 3}


def test_killed_deployments(s3: str, own_triton: tuple[TritonUrls, ExitStack], tmp_path: Path) -> None:
    (urls, server), models = own_triton, Models(tmp_path)
    deploy(models.next(s3, NAME)[1], s3, urls.http, NAME)
    killer = Killer(s3, urls.http, NAME, models, seed=5)
    with clients(urls.http, NAME, models, 2):
        killer.measure()
    for i in range(3):
        with clients(urls.http, NAME, models, 2) as answers:
            killer.kill(i, 3)
        assert answers.failures == []
        if i == 1:  # a restart in the middle of it: what was live comes back, whatever else lies there
            storage.write_bytes(f"{s3}/{NAME}-candidate/99/smoke.npz", b"half")
            server.close()
            server.enter_context(triton(s3, tmp_path / "again", load=["*"], at=urls))
        version = ask(urls.http, NAME, models)
        champion = read_champion(s3, NAME)
        assert champion is not None
        assert version in {champion.version, champion.version + 1}  # the second, if it died between switch and pointer
        facts = deploy(models.next(s3, NAME)[1], s3, urls.http, NAME)
        assert ask(urls.http, NAME, models) == facts["version"]
        assert not storage.exists(f"{s3}/{NAME}-candidate")


def test_two_deployments_at_once(s3: str, own_triton: tuple[TritonUrls, ExitStack], tmp_path: Path) -> None:
    """One wins, the other is told."""
    (urls, _), models = own_triton, Models(tmp_path)
    onnx, outcomes = models.next(s3, NAME)[1], []
    together = threading.Barrier(2)

    def one() -> None:
        together.wait()
        try:
            outcomes.append(deploy(onnx, s3, urls.http, NAME)["version"])
        except UserError as e:
            outcomes.append(str(e))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (told,) = (outcome for outcome in outcomes if isinstance(outcome, str))
    assert 1 in outcomes
    assert re.search("switched: somebody else has just begun to deploy it|switched: .* has been deploying it for", told)
    assert ask(urls.http, NAME, models) == 1
