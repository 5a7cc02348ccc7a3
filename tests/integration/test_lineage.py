"""A round of retraining, step by step: start from the champion, gate, canary, record; then where it came from."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from softteacher import cli, storage
from softteacher.choices import Bounds
from softteacher.config import load_settings
from softteacher.model_folder import ModelFolder
from softteacher.serving.deploy import deploy, promote
from softteacher.serving.gate import gate
from softteacher.serving.lineage import champion_model, record
from softteacher.training.train import train
from tests.conftest import TritonServer
from tests.samples import TINY


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """Exit code and standard output of a command."""
    monkeypatch.setattr(sys, "argv", ["softteacher", *arguments])
    capsys.readouterr()
    try:
        cli.main()
        code = 0
    except SystemExit as e:
        code = int(e.code or 0)
    return code, capsys.readouterr().out


def test_a_second_model_from_the_first(
    triton_server: TritonServer,
    trained: Path,
    exported: Path,
    manifests: Path,
    s3: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, registry, (url, repository, _) = "kept", f"{s3}/registry", triton_server
    assert champion_model(repository, registry, name) == ""
    assert gate(str(exported), repository, name, out=str(tmp_path / "gate-1")).deploy
    deploy(str(exported), repository, url, name)
    record(str(trained), str(exported), repository, name, registry, gate=str(tmp_path / "gate-1"), run="run-1")

    start = champion_model(repository, registry, name)
    assert start == f"{registry}/{name}/1/model"
    monkeypatch.setenv("SOFTTEACHER_IMAGE", "r.example/train@sha256:ab")
    monkeypatch.setenv("SOFTTEACHER_RUN", "run-2")
    parts = (str(manifests / f"{part}.json") for part in ("labeled", "unlabeled", "validation"))
    chosen = ["training.iterations=2", f"detector.init_from={start}"]
    train(*parts, str(tmp_path / "model"), load_settings("demo", [*TINY, *chosen]))
    # what is exported is the first one's file, as an export takes long
    shutil.copytree(exported, tmp_path / "onnx")
    ModelFolder(tmp_path / "model").copy_provenance(tmp_path / "onnx")
    provenance = json.loads((tmp_path / "model" / "provenance.json").read_text())
    first = json.loads(storage.read_bytes(f"{registry}/{name}/1/lineage.json"))
    assert provenance["parent"] == {"source": start, "sha256": first["weights_sha256"]}
    assert (provenance["image"], provenance["run_id"]) == ("r.example/train@sha256:ab", "run-2")

    where = ["--repository", repository, "--name", name]
    onnx = ["--onnx", str(tmp_path / "onnx")]
    asked = ["--delta", "0.9", "--max-latency-ratio", "1000", "--exit-code", "--out", f"{s3}/gate"]
    code, out = run(capsys, monkeypatch, "gate", *onnx, *where, *asked)
    facts = json.loads(out.splitlines()[-1])
    assert code == 3
    assert facts["deploy"] is False
    assert facts["champion_ap"] == pytest.approx(first["metrics"]["onnx"]["AP"])
    assert facts["gain_low"] <= facts["gain"] <= facts["gain_high"]
    assert b"Version 1 stays." in storage.read_bytes(f"{s3}/gate/report.html")

    decision = gate(str(tmp_path / "onnx"), repository, name, bounds=Bounds(-1, 1, 1000), out=f"{s3}/gate")
    assert decision.deploy
    deploy(str(tmp_path / "onnx"), repository, url, name, canary=0.1)
    sources = ["--model", str(tmp_path / "model"), *onnx, "--gate", f"{s3}/gate"]
    code, out = run(capsys, monkeypatch, "record", *sources, *where, "--registry", registry)
    assert code == 0
    assert json.loads(out.splitlines()[-1])["version"] == 2

    promote(repository, url, name)
    assert champion_model(repository, registry, name) == f"{registry}/{name}/2/model"
    asked = ["lineage", name, "--repository", repository, "--registry", registry]
    code, out = run(capsys, monkeypatch, *asked, "--format", "json")
    second, before = json.loads(out)["versions"]
    assert (second["version"], before["version"]) == (2, 1)
    assert second["parents"] == {"champion": 1, "warm_start": provenance["parent"] | {"name": name, "version": 1}}
    assert second["data"]["validation"]["fingerprint"] == before["data"]["validation"]["fingerprint"]
    assert second["gate"]["reason"] == decision.reason
    assert (second["image"], second["run_id"], before["run_id"]) == ("r.example/train@sha256:ab", "run-2", "run-1")
    code, out = run(capsys, monkeypatch, *asked)
    assert f"{name} version 2 (live)" in out
    assert f"started from {name} version 1" in out
    assert provenance["data"]["labeled"]["fingerprint"] in out
    assert "r.example/train@sha256:ab" in out
