"""The pipeline in the images, with S3 and Triton's image beside it, as a user runs it; and steps that fail there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.local import run_local
from pipeline import build_training_pipeline
from softteacher import storage
from softteacher.demo.digits import make_digits
from softteacher.errors import UserError
from tests.docker.conftest import IMAGES

ROOT = Path(__file__).parents[2]
PARAMETERS = {"repository": "s3://nowhere/models", "triton": "http://127.0.0.1:1", "preset": "demo"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder, train=24, val=6)
    return folder


def demo(out: Path, *options: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "softteacher", "demo", "--runner", "docker", "--out", str(out), *options]
    env = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | environment
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.timeout(1200)
def test_demo_in_containers_serves_what_it_trained(engine, data, tmp_path):
    run = demo(tmp_path, "--data", str(data), "--preset", "demo", "--percent", "30", "--set", "training.iterations=4")
    seen = {}  # image: how its containers are confined
    lines = []
    for line in run.stdout:
        lines.append(line)
        for container in project_containers(engine):
            host = container.attrs["HostConfig"]
            confined = host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["Privileged"]
            seen[container.attrs["Config"]["Image"]] = (container.attrs["Config"]["User"], confined)
    output = "".join(lines)
    assert run.wait() == 0, output
    assert set(seen) == set(IMAGES.values())
    assert all(confined and not user.startswith("0:") for user, confined in seen.values())

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["deployed"]
    steps = (
        "fingerprint",
        "split",
        "train",
        "evaluate",
        "export",
        "gate",
        "deploy",
        "train-baseline",
        "evaluate-baseline",
    )
    assert all(summary["seconds"][step] > 0 for step in steps)
    assert set(summary["ap"]) == {"supervised", "student", "teacher"}
    for place in ("report", "model", "onnx", "pictures"):
        assert Path(summary["places"][place]).exists()
    settings = Path(summary["places"]["model"], "settings.yaml").read_text()
    assert "iterations: 4" in settings
    assert summary["answer"][0]["image"].startswith("s3://")
    outputs = json.loads((tmp_path / "outputs.json").read_text())
    assert outputs["deploy"]["facts"]["version"] == 1
    assert left_behind(engine) == []
    assert "AWS_SECRET" not in output


def project_containers(engine) -> list:
    """The containers of the project's images, stopped ones too."""
    found = engine.containers.list(all=True, ignore_removed=True)
    return [container for container in found if container.attrs["Config"]["Image"] in IMAGES.values()]


def left_behind(engine) -> list:
    """Containers that are still there after the seconds that the engine needs to remove them."""
    deadline = time.monotonic() + 10
    while (found := project_containers(engine)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def test_interrupted_demo_leaves_no_container(engine, data, tmp_path):
    run = demo(tmp_path, "--data", str(data), "--preset", "demo", "--percent", "30")
    lines = []
    for line in run.stdout:
        lines.append(line)
        if line.startswith("[train]"):
            break
    assert project_containers(engine), "".join(lines)
    run.send_signal(signal.SIGTERM)
    rest = run.communicate(timeout=90)[0]
    assert run.returncode == 143, "".join(lines) + rest
    assert "Traceback" not in rest
    assert left_behind(engine) == []


def test_what_steps_write_belongs_to_the_caller_who_is_not_root(engine, s3, digits, tmp_path, monkeypatch):
    for file in storage.list_files(str(digits)):
        storage.copy(storage.join(str(digits), file.name), storage.join(f"{s3}/data", file.name))
    uid, root = os.getuid() or 12345, tmp_path / "root"
    root.mkdir()
    if os.getuid() == 0:
        os.chown(root, uid, uid)
        monkeypatch.setattr(os, "getuid", lambda: uid)
        monkeypatch.setattr(os, "getgid", lambda: uid)
    parameters = {"data": f"{s3}/data", "method": "nonsense", **PARAMETERS}
    with pytest.raises(UserError, match=r"^step train: .*method\.name"):  # split has written
        run_local(build_training_pipeline(), parameters, str(root), "docker")
    [manifest] = root.glob("*/split/dataset/labeled.json")
    assert manifest.stat().st_uid == manifest.parent.stat().st_uid == uid


def test_a_bad_input_is_one_line(engine, tmp_path, capfd):
    with pytest.raises(UserError, match=r"^step fingerprint: /nowhere"):
        run_local(build_training_pipeline(), {"data": "/nowhere", **PARAMETERS}, str(tmp_path), "docker")
    assert "Traceback" not in capfd.readouterr().out
    assert left_behind(engine) == []


@pytest.mark.parametrize("earlier", [False, True], ids=["first run", "after another"])
def test_a_step_that_kfp_takes_for_a_success_has_failed(engine, tmp_path, monkeypatch, capfd, earlier):
    """A real container fails, and the engine has removed it before KFP asks for its exit code."""
    import docker

    if earlier:  # what another run wrote is not this one's
        wrote = tmp_path / "training-pipeline-2026-01-01" / "fingerprint" / "executor_output.json"
        wrote.parent.mkdir(parents=True)
        wrote.write_text("{}")
    asked = []

    def gone(container) -> None:
        asked.append(container)
        raise docker.errors.NotFound("No such container")

    monkeypatch.setattr(docker.models.containers.Container, "wait", gone)
    with pytest.raises(UserError, match=r"^step fingerprint: /nowhere"):
        run_local(build_training_pipeline(), {"data": "/nowhere", **PARAMETERS}, str(tmp_path), "docker")
    assert len(asked) >= 1


def test_no_engine_is_one_line(tmp_path):
    nowhere = f"unix://{tmp_path}/docker.sock"
    run = demo(tmp_path / "out", DOCKER_HOST=nowhere)
    output = run.communicate(timeout=120)[0]
    assert (run.returncode, output.count("\n")) == (2, 1)
    assert nowhere in output
    command = [sys.executable, "pipeline.py", "run-local", "training", "--runner", "docker", "--data", "s3://a/b"]
    command += ["--repository", "s3://a/c", "--triton", "http://127.0.0.1:1", "--pipeline-root", str(tmp_path / "root")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"DOCKER_HOST": nowhere}, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"no Docker Engine answers at {nowhere}" in done.stderr


def test_a_missing_image_is_one_line(engine, tmp_path, monkeypatch):
    from components import split

    monkeypatch.setattr(split.split.component_spec.implementation.container, "image", "softteacher/none:1")
    with pytest.raises(UserError, match=r"softteacher/none:1: the Docker Engine doesn't have it; .*`make images`"):
        run_local(build_training_pipeline(), {"data": "/nowhere", **PARAMETERS}, str(tmp_path), "docker")
