"""Every engine through the real Triton, and what it counts."""

import json
import re
import shutil
import urllib.request
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from softteacher.data.check import read_image
from softteacher.data.coco import load_coco
from softteacher.errors import UserError
from softteacher.serving import deploy as deploy_module
from softteacher.serving import engines
from softteacher.serving.client import Client
from softteacher.serving.connection import open_connection
from softteacher.serving.deploy import deploy
from softteacher.serving.repository import Runtime
from softteacher.serving.variants import quantize
from tests.conftest import TritonServer


@pytest.fixture(scope="module")
def folder(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An onnx folder with the quantized file, of which parity.json says that every engine is good."""
    folder = tmp_path_factory.mktemp("engines") / "onnx"
    shutil.copytree(exported, folder)
    images = np.load(folder / "smoke.npz")["images"]
    quantize(folder / "model.onnx", folder / "model.int8.onnx", images)
    parity = json.loads((folder / "parity.json").read_text())
    until = parity["engines"]["openvino-bf16"].get("fp32_until", "")
    parity["engines"] = {name: {} for name in ("openvino-fp32", "openvino-int8", "onnxruntime-int8")}
    parity["engines"]["openvino-bf16"] = {"fp32_until": until} if until else {}
    (folder / "parity.json").write_text(json.dumps(parity))
    return folder


@pytest.mark.parametrize("engine", ["openvino-fp32", "openvino-bf16", "onnxruntime-int8", "openvino-int8"])
def test_triton_answers_as_the_engine_does(engine: str, folder: Path, triton_server: TritonServer) -> None:
    runtime = Runtime("python", engine)
    if missing := engines.supported(engine.partition("-")[0], runtime.precision):
        pytest.skip(missing)
    facts = deploy(str(folder), triton_server.repository, triton_server.url, engine, runtime=runtime)
    assert facts["smoke"]["images"] == 4
    images = np.load(folder / "smoke.npz")["images"]
    until = json.loads((folder / "parity.json").read_text())["engines"][engine].get("fp32_until", "")
    run = engines.load(folder / runtime.onnx_file, engine.partition("-")[0], runtime.precision, fp32_until=until)
    expected = run(images)
    with closing(open_connection(triton_server.urls.grpc)) as connection:
        for _ in range(2):
            answer, _ = connection.infer(engine, images, 60)
            assert (answer["num_detections"] == expected["num_detections"]).all()
            np.testing.assert_allclose(answer["detection_scores"], expected["detection_scores"], atol=1e-3)
    validation = load_coco(str(folder / "validation.json"))
    with Client(triton_server.urls.grpc, engine) as client:
        assert len(client.predict([read_image(validation, 0)[0]])[0]) > 0


def test_an_engine_without_figures_is_not_deployed(exported: Path, triton_server: TritonServer) -> None:
    runtime = Runtime("python", "openvino-int8")
    with pytest.raises(UserError, match=r"openvino-int8 was not measured at export; add it to export\.engines"):
        deploy(str(exported), triton_server.repository, triton_server.url, "none", runtime=runtime)


FAULTY = """
_load = load
def load(*arguments, **options):
    run = _load(*arguments, **options)
    def faulty(images):
        if (images == 255).all():
            raise RuntimeError("white")
        return run(images)
    return faulty
"""


def test_what_fails_in_the_engine_is_counted(
    folder: Path, triton_server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton counts as a failure what it refuses itself, but not what its python backend answers with an error."""
    (tmp_path / "engines.py").write_text(Path(engines.__file__).read_text() + FAULTY)
    monkeypatch.setitem(deploy_module.PYTHON_FILES, "engines.py", tmp_path / "engines.py")
    deploy(str(folder), triton_server.repository, triton_server.url, "counted")

    def count() -> float:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(triton_server.urls.metrics) as answer:
            text = answer.read().decode()
        row = re.search(r'^softteacher_bad_requests_total{(?=.*model="counted")(?=.*version="1").*} (\S+)$', text, re.M)
        assert row
        return float(row[1])

    assert count() == 0
    images = np.load(folder / "smoke.npz")["images"]
    with closing(open_connection(triton_server.urls.grpc)) as connection:
        with pytest.raises(UserError, match="the engine failed: white"):
            connection.infer("counted", np.full_like(images, 255), 60)
        assert count() == 1
        connection.infer("counted", images, 60)  # healthy
        assert count() == 1
