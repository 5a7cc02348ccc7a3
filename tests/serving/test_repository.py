"""The onnx folder, the config and the champion pointer, without servers."""

import json
import re
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from softteacher.errors import UserError
from softteacher.model_folder import sha256
from softteacher.serving.repository import (
    Champion,
    Runtime,
    config,
    read_champion,
    read_onnx_folder,
    versions,
    write_champion,
)
from tests.helpers import CATEGORIES, onnx_folder

CHAMPION = Champion("cards", 3, [2, 1], 0.41, "set-1", "ab12", "2026-01-02T03:04:05+00:00", "me@here", {"seed": 7})


def test_read_onnx_folder(tmp_path: Path) -> None:
    model = read_onnx_folder(onnx_folder(tmp_path, ap=0.25))
    assert (model.ap, model.validation_fingerprint, model.provenance) == (0.25, "set-1", {"seed": 7})
    assert (model.image_size, model.max_detections, model.categories) == ((64, 96), 5, CATEGORIES)


@pytest.mark.parametrize("name", ["model.onnx", "parity.json", "smoke.npz", "provenance.json", "validation.json"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    (onnx_folder(tmp_path) / name).unlink()
    with pytest.raises(UserError, match=f"no {name} in it"):
        read_onnx_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("parity.json", "{", "parity.json: broken JSON"),
        ("parity.json", "[]", "parity.json: not a JSON object"),
        ("parity.json", "{}", "sha256 differs"),
        ("validation.json", "{}", "lacks 'softteacher'"),
    ],
)
def test_torn_json_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (onnx_folder(tmp_path) / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_onnx_folder(tmp_path)


def test_another_smoke_file_is_named(tmp_path: Path) -> None:
    folder = onnx_folder(tmp_path)
    parity = json.loads((folder / "parity.json").read_text())
    (folder / "parity.json").write_text(json.dumps(parity | {"smoke_sha256": sha256(folder / "smoke.npz")}))
    read_onnx_folder(folder)
    (folder / "smoke.npz").write_bytes((folder / "smoke.npz").read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"smoke\.npz: is not the file that parity\.json was made for"):
        read_onnx_folder(folder)
    (folder / "parity.json").write_text(json.dumps(parity))  # of an older release
    read_onnx_folder(folder)


def test_weights_that_are_nan_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.onnx: its weights hold NaN \(margin\); train again"):
        read_onnx_folder(onnx_folder(tmp_path, margin=float("nan")))


def test_config(tmp_path: Path) -> None:
    """What Triton makes of it is seen in the integration tests; here, what goes in."""
    model = read_onnx_folder(onnx_folder(tmp_path))
    text = config(model, 7)
    assert 'backend: "python"' in text
    assert "versions: [ 7 ]" in text
    assert "KIND_CPU" in text
    assert "preferred_batch_size: [4, 8]" in text
    assert "dims: [ 64, 96, 3 ]" in text
    value = re.search(r'key: "classes" value { string_value: (".*") } }', text)
    assert value
    assert json.loads(json.loads(value[1])) == CATEGORIES
    text = config(model, 8, Runtime("onnxruntime", gpu=True), max_batch_size=1, queue_delay_us=0)
    assert 'backend: "onnxruntime"' in text
    assert "KIND_GPU" in text
    assert "max_batch_size: 1\n" in text
    assert "preferred_batch_size: [1]" in text


RUNTIMES = [
    Runtime(),
    Runtime("python", "openvino-bf16"),
    Runtime("python", "onnxruntime-int8"),
    Runtime("onnxruntime"),
    Runtime("onnxruntime", gpu=True),
    Runtime("onnxruntime", gpu=True, tensorrt=True),
    Runtime("openvino", "openvino-fp32"),
    Runtime("openvino", "openvino-bf16"),
]


def test_tensorrt_is_told_from_the_engine_that_it_replaces() -> None:
    """It answers in fp16, which the smoke test must know; the gate takes the same file."""
    served = Runtime("onnxruntime", gpu=True, tensorrt=True).served
    assert (served, Runtime("onnxruntime", gpu=True).served) == ("tensorrt-fp16", "onnxruntime-fp32")
    assert Runtime(engine=served).onnx_file == "model.onnx"


@pytest.mark.parametrize("runtime", RUNTIMES[1:], ids=str)
def test_every_runtime_has_the_same_interface(runtime: Runtime, tmp_path: Path) -> None:
    """By Triton's own message types: they refuse what Triton would not understand."""
    model = read_onnx_folder(onnx_folder(tmp_path))
    usual, other = (text_format.Parse(config(model, 7, r), ModelConfig()) for r in (Runtime(), runtime))
    assert other.backend == runtime.backend
    assert other.dynamic_batching.preferred_batch_size == usual.dynamic_batching.preferred_batch_size
    assert other.dynamic_batching.max_queue_delay_microseconds == (2000 if runtime.gpu else 0)
    for field in ("input", "output", "max_batch_size", "version_policy", "model_warmup"):
        assert getattr(other, field) == getattr(usual, field), field
    for key in ("classes", "preprocessing"):
        assert other.parameters[key] == usual.parameters[key]
    assert bool(other.optimization.execution_accelerators.gpu_execution_accelerator) == runtime.tensorrt
    assert ("HINT_BF16" in other.parameters) == (runtime.backend == "openvino" and runtime.precision == "bf16")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("openvino", "onnxruntime-fp32"), "--backend onnxruntime"),
        (("onnxruntime", "openvino-bf16"), "--backend openvino"),
        (("python", "openvino-fp32", True), "does not run on GPUs"),
        (("python", "onnxruntime-fp32", True, True), "--tensorrt"),
    ],
)
def test_runtimes_that_do_not_fit(parts: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Runtime(*parts)


def test_an_engine_has_to_be_measured_and_good(tmp_path: Path) -> None:
    folder = onnx_folder(tmp_path)
    parity = json.loads((folder / "parity.json").read_text())
    parity["engines"] = {
        "openvino-bf16": {"ap": 0.5, "fp32_until": "a"},
        "openvino-int8": {"ap": 0.1, "refused": "it loses 0.4 AP"},
    }
    (folder / "parity.json").write_text(json.dumps(parity))
    model = read_onnx_folder(folder)
    model.require(Runtime())
    model.require(Runtime("python", "openvino-bf16"))
    with pytest.raises(UserError, match="which Triton's own backend can't do; --backend python"):
        model.require(Runtime("openvino", "openvino-bf16"))
    with pytest.raises(UserError, match=r"must not serve this model: it loses 0\.4 AP"):
        model.require(Runtime("python", "openvino-int8"))
    with pytest.raises(UserError, match=r"was not measured at export; add it to export\.engines"):
        model.require(Runtime("python", "openvino-fp32"))


def test_champion_pointer(tmp_path: Path) -> None:
    repository = str(tmp_path)
    assert read_champion(repository, "cards") is None
    assert versions(repository, "cards") == []
    write_champion(repository, CHAMPION, "")
    assert read_champion(repository, "cards") == CHAMPION
    for file in ("2/smoke.npz", "10/model.onnx", "config.pbtxt"):
        (tmp_path / "cards" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "cards" / file).write_bytes(b"")
    assert versions(repository, "cards") == [2, 10]


def test_no_pointer_where_no_repository_can_be() -> None:
    """Or whoever mistypes it is told that nothing is live."""
    with pytest.raises(UserError, match="/nowhere/typo: no such folder"):
        read_champion("/nowhere/typo", "cards")


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "cards"}'])
def test_torn_champion(content: str, tmp_path: Path) -> None:
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "champion.json").write_text(content)
    with pytest.raises(UserError, match=r"champion\.json: torn, or not ours"):
        read_champion(str(tmp_path), "cards")
