"""The image of Triton: it takes the arguments of the manifests, turns healthy, serves what `deploy` uploads, and again
after a restart."""

import json
import re
import time
from pathlib import Path

import pytest
import yaml

from softteacher.demo.servers import TRITON_IMAGE, triton
from softteacher.serving.deploy import deploy
from softteacher.serving.repository import Runtime
from tests.docker.conftest import CONFINED
from tests.helpers import answer, onnx_folder

DEPLOYMENT = Path(__file__).parents[2] / "manifests/base/deployment.yaml"


@pytest.fixture
def arguments() -> list[str]:
    """Of the Deployment: with the word tritonserver, as NVIDIA's container wants it."""
    [container] = yaml.safe_load(DEPLOYMENT.read_text())["spec"]["template"]["spec"]["containers"]
    arguments = [
        text.replace("s3://$(AWS_ENDPOINT_URL_S3)/$(MODEL_REPOSITORY)", "/models") for text in container["args"]
    ]
    assert not any("$(" in text for text in arguments)
    return arguments


@pytest.mark.parametrize("word", [True, False])
def test_turns_healthy_with_the_arguments_of_the_manifests(engine, arguments, tmp_path, word):
    assert arguments[0] == "tritonserver"
    (tmp_path / "models").mkdir()
    volumes = {str(tmp_path / "models"): {"bind": "/models", "mode": "ro"}}
    # a network of its own, of loopback only: the health check asks at the usual port
    server = engine.containers.run(TRITON_IMAGE, arguments[not word :], detach=True, volumes=volumes, **CONFINED)
    try:
        deadline = time.monotonic() + 60
        while server.health != "healthy" and time.monotonic() < deadline:
            time.sleep(0.5)
            server.reload()
        assert server.health == "healthy", server.logs().decode()[-2000:]
        listening = re.findall(r"Started \w+(?: Service)? at [\d.]+:(\d+)", server.logs().decode())
        assert sorted(listening) == ["8000", "8001", "8002"]
        server.stop(timeout=20)
        assert server.wait()["StatusCode"] == 0  # it got the SIGTERM itself
    finally:
        server.remove(force=True)


def test_health_check_sees_a_server_that_is_not_ready(engine):
    check = engine.images.get(TRITON_IMAGE).attrs["Config"]["Healthcheck"]["Test"]
    asleep = engine.containers.run(TRITON_IMAGE, ["sleep", "60"], detach=True, **CONFINED)
    try:
        assert check[0] == "CMD"
        assert asleep.exec_run(check[1:]).exit_code == 1
    finally:
        asleep.remove(force=True)


def test_serves_from_s3_by_both_engines_and_again_after_a_restart(s3, tmp_path):
    repository, onnx = f"{s3}/models", onnx_folder(tmp_path / "onnx")
    parity = json.loads((onnx / "parity.json").read_text()) | {"engines": {"openvino-fp32": {}}}
    (onnx / "parity.json").write_text(json.dumps(parity))
    with triton(repository, tmp_path / "triton", image=TRITON_IMAGE) as urls:
        for name in ("onnxruntime-fp32", "openvino-fp32"):
            deploy(str(onnx), repository, urls.http, name, runtime=Runtime("python", name))
            assert answer(urls.http, name) == ("1", 0.9)
    with triton(repository, tmp_path / "triton", load=["*"], image=TRITON_IMAGE) as urls:
        for name in ("onnxruntime-fp32", "openvino-fp32"):
            assert answer(urls.http, name) == ("1", 0.9)
