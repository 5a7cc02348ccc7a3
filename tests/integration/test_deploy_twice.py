"""Two deployments of one name, a second try of one, and one that comes too late, against a real Triton over real S3."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from softteacher import storage
from softteacher.errors import UserError
from softteacher.serving import claim as claim_module
from softteacher.serving import deployment as deploy_module
from softteacher.serving.claim import Claim, read_claim
from softteacher.serving.deploy import deploy, promote, rollback
from softteacher.serving.repository import read_onnx_folder, versions
from softteacher.serving.status import status
from softteacher.serving.version_folder import MANIFEST
from tests.conftest import TritonServer
from tests.helpers import answer, onnx_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Onnx folders that tell themselves apart by their score."""
    base = tmp_path_factory.mktemp("onnx")
    scores = {"first": 0.6, "second": 0.8, "third": 0.7}
    return {name: onnx_folder(base / name, score=score) for name, score in scores.items()}


@pytest.fixture
def live(triton_server: TritonServer, folders: dict[str, Path]) -> str:
    """A model that is live, and has no older version."""
    deploy(str(folders["first"]), triton_server.repository, triton_server.url, "contended")
    return "contended"


def test_two_deployments_of_one_name_do_not_mix(
    triton_server: TritonServer, live: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = f"{triton_server.repository}/{live}-candidate/claim.json"
    monkeypatch.setattr(claim_module, "LEASE", 1.0)
    with Claim(claim, live).renewed():
        with pytest.raises(UserError, match="has been deploying it"):
            deploy(str(folders["second"]), triton_server.repository, triton_server.url, live)
        assert storage.exists(claim)
    # a dead one doesn't block for ever
    storage.write_bytes(claim, json.dumps({"host": "other", "time": 4e9}).encode())
    with pytest.raises(UserError, match="no older version"):
        rollback(triton_server.repository, triton_server.url, live)
    assert not storage.exists(claim)


@pytest.mark.parametrize("at", ["check", "write_champion", "write_canary"])
def test_one_that_was_too_slow_leaves_the_work_of_the_other_alone(
    at: str, triton_server: TritonServer, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was frozen until its claim counted as dead; when it goes on, another deployment has been made."""
    name, (url, repository, _) = f"slow-{at}", triton_server
    deploy(str(folders["first"]), repository, url, name)
    share = 1e-9 if at == "write_canary" else None
    claim = f"{repository}/{name}-candidate/claim.json"

    def overtaken(*args: object) -> None:
        monkeypatch.undo()
        storage.remove(claim)
        deploy(str(folders["third"]), repository, url, name, canary=share)
        raise UserError("too slow")

    monkeypatch.setattr(Claim if at == "check" else deploy_module, at, overtaken)
    with pytest.raises(UserError, match="too slow"):
        deploy(str(folders["second"]), repository, url, name, canary=share)
    state = status(repository, url, name)
    assert (state["live"], state["canary"]) == ((1, {"version": 3, "share": share}) if share else (3, None))
    assert state["notes"] == []
    assert answer(url, name)[1] == (0.6 if share else 0.7)
    if share:
        assert answer(url, f"{name}-canary")[1] == 0.7
    assert 2 not in [v["version"] for v in state["versions"]]
    assert rollback(repository, url, name)["version"] == 1


def test_the_claim_is_renewed_until_the_end(
    triton_server: TritonServer, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while it cleans up, which may take as long as a dead one is waited for."""
    name, (url, repository, _) = "renewed", triton_server
    beats, clean_up = [], deploy_module.Deployment.clean_up

    def watched(self: deploy_module.Deployment) -> None:
        for _ in range(2):
            taken = read_claim(f"{repository}/{name}-candidate/claim.json")
            assert taken is not None
            beats.append(taken["beats"])
            time.sleep(0.5)
        clean_up(self)

    monkeypatch.setattr(claim_module, "RENEW", 0.05)
    monkeypatch.setattr(deploy_module.Deployment, "clean_up", watched)
    deploy(str(folders["first"]), repository, url, name)
    assert 0 < beats[0] < beats[1]
    assert not storage.exists(f"{repository}/{name}-candidate")


def test_a_step_that_is_tried_again(triton_server: TritonServer, folders: dict[str, Path]) -> None:
    """Kubeflow does so when a pod is lost, which may be after its work was done."""
    name, (url, repository, _) = "retried", triton_server
    deploy(str(folders["first"]), repository, url, name, run="monday")
    for _ in range(2):
        facts = deploy(str(folders["second"]), repository, url, name, canary=0.1, run="tuesday")
        assert (facts["version"], facts["previous"], facts["canary"], facts["smoke"]["detections"]) == (2, 1, 0.1, 4)
    with pytest.raises(UserError, match="version 2 is a canary"):  # not of this run
        deploy(str(folders["second"]), repository, url, name, canary=0.1, run="wednesday")
    assert promote(repository, url, name)["version"] == 2
    facts = deploy(str(folders["second"]), repository, url, name, canary=0.1, run="tuesday")
    assert (facts["version"], facts["previous"], facts["smoke"]["detections"]) == (2, 1, 4)
    assert versions(repository, name) == [1, 2]
    assert answer(url, name)[1] == 0.8
    assert rollback(repository, url, name)["version"] == 1
    with pytest.raises(UserError, match=r"has deployed it already, as version 2, and it was rolled back.*1 stays live"):
        deploy(str(folders["second"]), repository, url, name, run="tuesday")
    assert deploy(str(folders["second"]), repository, url, name, run="friday")["version"] == 3  # another run may


def test_what_the_gate_decided(triton_server: TritonServer, folders: dict[str, Path], tmp_path: Path) -> None:
    name, (url, repository, _) = "gated", triton_server

    def decided(version: int | None, yes: bool = True) -> str:
        facts = {"deploy": yes, "reason": "why", "comparison": version and {"version": version}, "onnx_sha256": ""}
        (tmp_path / "gate.json").write_text(json.dumps(facts))
        return str(tmp_path)

    def put(folder: str, decision: str, other: str | None = None) -> int:
        gate = json.loads((tmp_path / "gate.json").read_text())
        if "onnx_sha256" in gate:
            gate["onnx_sha256"] = read_onnx_folder(folders[other or folder]).sha256
            (tmp_path / "gate.json").write_text(json.dumps(gate))
        return int(deploy(str(folders[folder]), repository, url, name, decision=decision)["version"])

    with pytest.raises(UserError, match=r"compared with version 4, but now nothing is; run the gate again"):
        put("first", decided(4))
    assert put("first", decided(None)) == 1
    with pytest.raises(UserError, match=r"compared with nothing, as nothing was live, but now version 1 is live; run"):
        put("second", decided(None))
    with pytest.raises(UserError, match=r"gate\.json: the gate said no: why"):
        put("second", decided(1, yes=False))
    with pytest.raises(UserError, match=r"gate\.json: the gate judged another model .* run the gate again"):
        put("second", decided(1), "first")
    assert put("second", decided(1)) == 2
    with pytest.raises(UserError, match=r"compared with version 1, but now version 2 is live; run the gate again"):
        put("first", decided(1))
    assert answer(url, name)[1] == 0.8
    (tmp_path / "gate.json").write_text("{}")
    with pytest.raises(UserError, match=r"gate\.json: torn, or not of `softteacher gate`"):
        put("first", str(tmp_path))


def test_a_live_version_that_lost_its_manifest(
    triton_server: TritonServer, folders: dict[str, Path], tmp_path: Path
) -> None:
    """It serves, so a deployment that fails must leave it: there is nothing else to go back to."""
    name, (url, repository, _) = "bare", triton_server
    deploy(str(folders["first"]), repository, url, name)
    storage.remove(f"{repository}/{name}/1/{MANIFEST}")
    before = [file.name for file in storage.list_files(f"{repository}/{name}/1")]
    broken = shutil.copytree(folders["second"], tmp_path / "broken")
    with np.load(broken / "smoke.npz") as file:
        arrays = dict(file)
    np.savez(broken / "smoke.npz", **arrays | {"detection_boxes": arrays["detection_boxes"] + 9})
    with pytest.raises(UserError, match="version 1 stays live"):
        deploy(str(broken), repository, url, name)
    assert [file.name for file in storage.list_files(f"{repository}/{name}/1")] == before
    assert answer(url, name)[1] == 0.6
    assert deploy(str(folders["second"]), repository, url, name)["version"] > 1
