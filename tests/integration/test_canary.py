"""Canary, promotion, and what `status` says all the way, with a real Triton over a real S3 store."""

import json
from pathlib import Path

import pytest

from softteacher import storage
from softteacher.demo.servers import triton
from softteacher.errors import UserError
from softteacher.serving.canary_state import Canary, read_canary
from softteacher.serving.client import connect
from softteacher.serving.deploy import deploy, promote, rollback
from softteacher.serving.repository import read_champion, versions
from softteacher.serving.status import status, table
from tests.conftest import TritonServer
from tests.helpers import answer, onnx_folder, ready


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("onnx")
    made = {name: onnx_folder(base / name, score=score) for name, score in {"first": 0.6, "second": 0.8}.items()}
    provenance = {"git_sha": "0123456789abcdef", "data": {"labeled": {"fingerprint": "fedcba9876543210"}}}
    (made["second"] / "provenance.json").write_text(json.dumps(provenance))
    return made


def test_canary_promote_rollback(
    triton_server: TritonServer, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, (url, repository, _) = "sung", triton_server
    facts = deploy(str(folders["first"]), repository, url, name, canary=0.1)
    assert "no version of sung is live yet to compare a canary with" in " ".join(capsys.readouterr().err.split())
    assert "canary" not in facts
    assert read_canary(repository, name) is None

    facts = deploy(str(folders["second"]), repository, url, name, canary=0.1)
    assert (facts["version"], facts["previous"], facts["canary"]) == (2, 1, 0.1)
    assert facts["smoke"]["detections"] == 4
    assert read_canary(repository, name) == Canary(2, 0.1)
    assert answer(url, name) == ("1", 0.6)
    assert answer(url, f"{name}-canary") == ("2", 0.8)
    server = connect(url, 10)
    config = server.get_model_config(f"{name}-canary")
    assert json.loads(config["parameters"]["canary"]["string_value"]) == {"share": 0.1, "version": 2}
    assert "canary" not in server.get_model_config(name)["parameters"]
    server.close()
    assert not storage.exists(f"{repository}/{name}-candidate")

    with pytest.raises(UserError, match=r"version 2 is a canary; `softteacher promote` .*version 1 stays live"):
        deploy(str(folders["second"]), repository, url, name)
    assert answer(url, f"{name}-canary") == ("2", 0.8)

    # started again with all there is, Triton serves both again
    with triton(repository, tmp_path / "restarted", load=["*"]) as again:
        assert answer(again.http, name) == ("1", 0.6)
        assert answer(again.http, f"{name}-canary") == ("2", 0.8)

    # a canary whose file changed is not promoted
    whole = storage.read_bytes(f"{repository}/{name}-canary/2/model.onnx")
    storage.write_bytes(f"{repository}/{name}-canary/2/model.onnx", whole[:-1] + b"!")
    with pytest.raises(UserError, match=r"canary/2: model.onnx is not what was deployed.*version 1 stays live"):
        promote(repository, url, name)
    assert read_canary(repository, name) == Canary(2, 0.1)
    storage.write_bytes(f"{repository}/{name}-canary/2/model.onnx", whole)

    facts = promote(repository, url, name)
    assert (facts["version"], facts["previous"]) == (2, 1)
    assert answer(url, name) == ("2", 0.8)
    champion = read_champion(repository, name)
    assert champion is not None
    assert (champion.version, champion.previous) == (2, [1])
    assert read_canary(repository, name) is None
    assert not storage.exists(f"{repository}/{name}-canary")
    assert not ready(url, f"{name}-canary")

    # the next canary is ended; only the rollback after it goes back a version
    deploy(str(folders["first"]), repository, url, name, canary=0.5)
    facts = rollback(repository, url, name)
    assert (facts["version"], facts["ended_canary"]) == (2, 3)
    assert answer(url, name) == ("2", 0.8)
    assert not ready(url, f"{name}-canary")
    assert not storage.exists(f"{repository}/{name}-canary")
    # a number that was served is not given again: a replica that missed the end would take the next for that canary
    deploy(str(folders["first"]), repository, url, name, canary=0.5)
    assert read_canary(repository, name) == Canary(4, 0.5)
    rollback(repository, url, name)
    facts = rollback(repository, url, name)
    assert (facts["version"], facts["previous"]) == (1, 2)
    assert answer(url, name) == ("1", 0.6)


def test_a_canary_that_fails_leaves_nothing(
    triton_server: TritonServer, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, (url, repository, _) = "hoarse", triton_server
    deploy(str(folders["first"]), repository, url, name)

    def full(*args: object) -> None:
        raise UserError("the store is full")

    monkeypatch.setattr("softteacher.serving.deployment.write_canary", full)
    with pytest.raises(UserError, match=r"the store is full \(hoarse: version 1 stays live\)"):
        deploy(str(folders["second"]), repository, url, name, canary=0.1)
    for kind in ("candidate", "canary"):
        assert not storage.exists(f"{repository}/{name}-{kind}")
        assert not ready(url, f"{name}-{kind}")
    assert versions(repository, name) == [1]


def test_status(triton_server: TritonServer, folders: dict[str, Path], s3: str, tmp_path: Path) -> None:
    name, (url, repository, urls) = "watched", triton_server
    state = status(repository, url, name)
    assert (state["live"], state["canary"], state["versions"], state["served"]) == (None, None, [], [])
    assert state["notes"] == [f"nothing is deployed as watched in {repository}; check --repository and --name"]

    deploy(str(folders["second"]), repository, url, name)
    deploy(str(folders["first"]), repository, url, name)
    deploy(str(folders["second"]), repository, url, name, canary=0.25)
    storage.write_bytes(f"{repository}/{name}/7/smoke.npz", b"a deployment was killed")
    (before,) = (row["requests"] for row in status(repository, url, name)["served"] if row["model"] == name)
    for _ in range(3):
        answer(url, name)
    state = status(repository, url, name, urls.metrics)
    assert (state["live"], state["canary"], state["notes"]) == (2, {"version": 3, "share": 0.25}, [])
    assert [(v["version"], v["state"]) for v in state["versions"]] == [
        *((1, "previous"), (2, "live"), (7, "incomplete"), (3, "canary"))
    ]
    first = state["versions"][0]
    assert (first["ap"], first["git_sha"], first["data_fingerprint"]) == (0.5, "0123456789abcdef", "fedcba9876543210")
    assert first["deployed_by"].count("@") == 1
    assert first["deployed_at"].endswith("+00:00")
    served = {(row["model"], row["version"]): row for row in state["served"] if row["ready"]}
    assert set(served) == {(name, 2), (f"{name}-canary", 3)}
    row = served[(name, 2)]
    assert (row["requests"], row["failures"]) == (before + 3, 0)
    assert row["queue_ms"] > 0
    assert row["compute_ms"] > 0
    counters = {(c["metric"], c["model"], c["version"]): c["value"] for c in state["metrics"]}
    assert counters["nv_inference_request_success", name, "2"] == before + 3
    assert counters["nv_inference_request_duration_us", name, "2"] > 0
    assert {model for _, model, _ in counters} == {name, f"{name}-canary"}
    assert json.loads(json.dumps(state)) == state
    text = table(state)
    for part in ("canary 25%", "previous", "incomplete", "0123456789 ", "fedcba9876 ", "0.5000", f"{name}-canary"):
        assert part in text

    # the pointer and Triton disagree
    server = connect(url, 10)
    storage.copy(f"{repository}/{name}/1/config.pbtxt", f"{repository}/{name}/config.pbtxt")
    server.load_model(name)
    server.unload_model(f"{name}-canary")
    server.close()
    disagree, missing = status(repository, url, name)["notes"]
    assert disagree.startswith("Triton serves version 1 of watched, the repository says 2: a deployment runs, or was")
    assert missing.startswith("Triton serves no watched-canary, version 3 should be: it was started without --load-mod")

    # Triton restarted without the model; no Triton, no metrics; then another repository
    with triton(repository, tmp_path / "empty") as empty:
        notes = status(repository, empty.http, name)["notes"]
        assert notes[0].startswith("Triton serves no watched, version 2 should be: it was started without --load-model")
    state = status(repository, "http://127.0.0.1:9", name, "http://127.0.0.1:9/metrics")
    assert len(state["versions"]) == 4
    assert ["can't be reached" in state["notes"][0], "no metrics of Triton there" in state["notes"][1]] == [True, True]
    assert "! Triton at http://127.0.0.1:9" in table(state)
    notes = status(s3, url, name)["notes"]
    assert notes[-1].startswith("Triton serves watched, which the repository doesn't know")


def test_status_shows_counters_of_the_model_itself(tmp_path: Path) -> None:
    """Those of the python backend name their model by a label, like Triton's own."""
    page = tmp_path / "metrics"
    page.write_text(
        "# HELP softteacher_bad_requests_total Requests refused\n# TYPE softteacher_bad_requests_total counter\n"
        'softteacher_bad_requests_total{model="cards",version="2"} 5\n'
        'softteacher_bad_requests_total{model="others",version="1"} 9\n'
        'nv_gpu_power_usage{gpu_uuid="x"} 50\n'
    )
    state = status(str(tmp_path), "http://127.0.0.1:9", "cards", page.as_uri())
    assert state["metrics"] == [
        {"metric": "softteacher_bad_requests_total", "model": "cards", "version": "2", "value": 5.0}
    ]
    page.write_text("<html>")
    assert (
        "no metrics of Triton there" in status(str(tmp_path), "http://127.0.0.1:9", "cards", page.as_uri())["notes"][-1]
    )
