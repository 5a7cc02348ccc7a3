"""What must never go live, with a real Triton over a real S3 store: the reason is said in one line, the old stays."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from softteacher import storage
from softteacher.demo.servers import TritonUrls, triton
from softteacher.errors import UserError
from softteacher.serving import deploy as deploy_module
from softteacher.serving.client import connect
from softteacher.serving.deploy import deploy, promote, rollback
from softteacher.serving.deployment import Deployment
from softteacher.serving.repository import read_champion, versions
from tests.conftest import TritonServer
from tests.helpers import answer, model_files, onnx_folder, ready

NAME = "guarded"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("onnx")
    return {name: onnx_folder(base / name, score=score) for name, score in {"first": 0.6, "second": 0.8}.items()}


@pytest.fixture(scope="module")
def live(triton_server: TritonServer, good: dict[str, Path]) -> TritonServer:
    """A server on which `guarded` is live with score 0.6, whatever the tests try with it."""
    deploy(str(good["first"]), triton_server.repository, triton_server.url, NAME)
    return triton_server


def assert_refused(server: TritonServer, folder: Path, message: str, timeout: float = 60) -> None:
    """The deployment fails with the message, and everything is as before."""
    before = model_files(server.repository, NAME)
    with pytest.raises(UserError, match=rf"{message}.*\({NAME}: version 1 stays live\)") as error:
        deploy(str(folder), server.repository, server.url, NAME, timeout=timeout)
    assert "\n" not in str(error.value)
    assert answer(server.url, NAME) == ("1", 0.6)
    assert model_files(server.repository, NAME) == before
    assert not storage.exists(f"{server.repository}/{NAME}-candidate")
    assert not ready(server.url, f"{NAME}-candidate")


def change_graph(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change the ONNX file, and let parity.json name what came out."""
    model = onnx.load(folder / "model.onnx")
    change(model)
    onnx.save(model, folder / "model.onnx")
    parity = json.loads((folder / "parity.json").read_text())
    parity["onnx_sha256"] = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    (folder / "parity.json").write_text(json.dumps(parity))


def set_constant(model: onnx.ModelProto, name: str, value: object) -> None:
    (weight,) = (w for w in model.graph.initializer if w.name == name)
    weight.CopyFrom(numpy_helper.from_array(np.asarray(value), name))


def flipped_weights(model: onnx.ModelProto) -> None:
    """A bit of each coordinate's exponent: still a valid file."""
    (weight,) = (w for w in model.graph.initializer if w.name == "x_low")
    weight.raw_data = bytes(byte ^ (0x40 if i % 4 == 2 else 0) for i, byte in enumerate(weight.raw_data))


def overflow(model: onnx.ModelProto) -> None:
    set_constant(model, "margin", np.float32([[np.inf] * 4]))


def not_a_number(model: onnx.ModelProto) -> None:
    """No weight is NaN, but the score is: the root of -1."""
    scores = next(node for node in model.graph.node if node.output[0] == "scores")
    model.graph.initializer.append(numpy_helper.from_array(np.float32(-1), "minus"))
    model.graph.node.insert(0, helper.make_node("Sqrt", ["minus"], ["nan"]))
    scores.input[1] = "nan"


def nothing_found(model: onnx.ModelProto) -> None:
    """What NaN weights often come to: no score is over the threshold."""
    set_constant(model, "threshold", np.float32(1e9))


def more_rows(model: onnx.ModelProto) -> None:
    set_constant(model, "pad_boxes", np.array([0, 0, 0, 0, 6, 0]))
    boxes = next(output for output in model.graph.output if output.name == "detection_boxes")
    boxes.type.tensor_type.shape.dim[1].dim_value = 7


def other_name(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["detection_scores"], ["confidences"]))
    scores = next(output for output in model.graph.output if output.name == "detection_scores")
    scores.name = "confidences"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flipped_weights, "smoke inference with guarded-candidate \\d+: of the 1 detections of image 0 "),
        (overflow, "smoke inference with guarded-candidate \\d+: detection_boxes holds NaN or infinite values"),
        (not_a_number, "smoke inference with guarded-candidate \\d+: detection_scores holds NaN or infinite values"),
        (nothing_found, "smoke inference with guarded-candidate \\d+: image 0 has 0 detections, 1 were recorded"),
        (more_rows, r"guarded-candidate \d+: detection_boxes has the shape \[4, 7, 4\], \[4, 5, 4\] was recorded"),
    ],
)
def test_a_file_that_answers_otherwise(
    change: Callable[[onnx.ModelProto], None], message: str, live: TritonServer, good: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(good["second"], tmp_path / "onnx")
    change_graph(folder, change)
    assert_refused(live, folder, message)


def test_a_file_that_is_refused_before_the_upload(live: TritonServer, good: dict[str, Path], tmp_path: Path) -> None:
    flipped, renamed = (shutil.copytree(good["second"], tmp_path / name) for name in ("flipped", "renamed"))
    data = bytearray((flipped / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (flipped / "model.onnx").write_bytes(data)
    change_graph(renamed, other_name)
    for folder, message in ((flipped, "sha256 differs"), (renamed, "needs the input images and the outputs")):
        with pytest.raises(UserError, match=message):
            deploy(str(folder), live.repository, live.url, NAME)
    assert answer(live.url, NAME) == ("1", 0.6)


def test_an_upload_that_the_store_changed(
    live: TritonServer, good: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = storage.copy

    def changing(source: Path | str, target: Path | str) -> None:
        copy(source, target)
        if f"{NAME}-candidate/" in str(target) and str(target).endswith("/model.onnx"):
            storage.write_bytes(target, storage.read_bytes(target)[:-1] + b"!")

    monkeypatch.setattr(storage, "copy", changing)
    assert_refused(live, good["second"], r"\d+: model.onnx is not what was deployed \(its sha256 differs")


def model_that(folder: Path, where: str, what: str) -> Path:
    """`model.py` with a line more at the start of one of its methods."""
    text = deploy_module.PYTHON_FILES["model.py"].read_text()
    head = f"    def {where}("
    assert head in text
    path = folder / "model.py"
    inner = f"""
_{where} = TritonPythonModel.{where}


def {where}(self, *args):
    import os, time
    {what}
    return _{where}(self, *args)


TritonPythonModel.{where} = {where}
"""
    path.write_text(text + inner)
    return path


@pytest.mark.parametrize(
    ("where", "what", "message"),
    [
        ("initialize", "time.sleep(9)", "did not answer in time"),
        ("execute", "time.sleep(9)", "did not answer in"),
        ("execute", "raise ValueError('no luck')", "refused: .*no luck"),
        ("initialize", "os.kill(os.getpid(), 9)", "refused"),
    ],
)
def test_a_version_that_hangs_or_dies(
    where: str,
    what: str,
    message: str,
    live: TritonServer,
    good: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While it loads, or at the smoke test."""
    monkeypatch.setitem(deploy_module.PYTHON_FILES, "model.py", model_that(tmp_path, where, what))
    assert_refused(live, good["second"], message, timeout=6 if "sleep" in what else 60)


@pytest.fixture
def mortal(s3: str, good: dict[str, Path], tmp_path: Path) -> Iterator[tuple[TritonUrls, str, ExitStack]]:
    """A Triton of the test's own that it may end by closing the stack; version 1 of the name is live."""
    with ExitStack() as stack:
        urls = stack.enter_context(triton(s3, tmp_path / "triton"))
        deploy(str(good["first"]), s3, urls.http, NAME)
        yield urls, s3, stack


@pytest.mark.parametrize("loading", [f"{NAME}-candidate", NAME])
def test_triton_dies_during_the_deployment(
    loading: str,
    mortal: tuple[TritonUrls, str, ExitStack],
    good: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    urls, repository, stack = mortal
    activate = Deployment.activate

    def dying(self: Deployment, model: str, *args: object) -> object:
        if model == loading:
            stack.close()
        return activate(self, model, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Deployment, "activate", dying)
    with pytest.raises(UserError, match="can't be reached"):
        deploy(str(good["second"]), repository, urls.http, NAME)
    assert versions(repository, NAME) == [1]
    monkeypatch.undo()
    with triton(repository, tmp_path / "again", load=[NAME], at=urls):
        assert answer(urls.http, NAME) == ("1", 0.6)
        assert deploy(str(good["second"]), repository, urls.http, NAME)["version"] == 3  # a failed one has had 2
        assert answer(urls.http, NAME) == ("3", 0.8)
        assert not ready(urls.http, f"{NAME}-candidate")


def test_a_version_that_is_not_whole_is_no_way_back(live: TritonServer, good: dict[str, Path]) -> None:
    name, (url, repository) = "halved", (live.url, live.repository)
    for folder in ("first", "second"):
        deploy(str(good[folder]), repository, url, name)
    manifest = storage.read_bytes(f"{repository}/{name}/1/manifest.json")
    whole = storage.read_bytes(f"{repository}/{name}/1/model.onnx")

    storage.write_bytes(f"{repository}/{name}/1/model.onnx", whole[:-1] + b"!")
    with pytest.raises(UserError, match=r"1: model.onnx is not what was deployed .*version 2 stays live"):
        rollback(repository, url, name)
    storage.write_bytes(f"{repository}/{name}/1/model.onnx", whole)
    storage.remove(f"{repository}/{name}/1/manifest.json")
    with pytest.raises(UserError, match=r"version 1 is not whole in s3://.*version 2 stays live"):
        rollback(repository, url, name)
    assert answer(url, name) == ("2", 0.8)
    assert versions(repository, name) == [2]  # what is not whole is removed
    assert json.loads(manifest)["record"]["version"] == 1


def test_what_a_killed_deployment_left_is_mended(live: TritonServer, good: dict[str, Path]) -> None:
    """Half a version, a candidate that is loaded, a canary without its state, and a switch without its pointer."""
    name, (url, repository) = "mended", (live.url, live.repository)
    for folder in ("first", "second"):
        deploy(str(good[folder]), repository, url, name)
    server = connect(url, 30)
    for kind in ("candidate", "canary"):
        storage.copy(f"{repository}/{name}/2", f"{repository}/{name}-{kind}/2")
        storage.copy(f"{repository}/{name}/2/config.pbtxt", f"{repository}/{name}-{kind}/config.pbtxt")
        server.load_model(f"{name}-{kind}")
    storage.copy(f"{repository}/{name}/2/smoke.npz", f"{repository}/{name}/9/smoke.npz")
    storage.copy(f"{repository}/{name}/1/config.pbtxt", f"{repository}/{name}/config.pbtxt")
    server.load_model(name)
    server.close()
    assert answer(url, name) == ("1", 0.6)

    with pytest.raises(UserError, match="there is no canary to promote; `softteacher deploy --canary 10%` starts one"):
        promote(repository, url, name)
    assert answer(url, name) == ("2", 0.8)
    assert versions(repository, name) == [1, 2]
    for kind in ("candidate", "canary"):
        assert not ready(url, f"{name}-{kind}")
        assert not storage.exists(f"{repository}/{name}-{kind}")


def test_a_first_deployment_killed_after_the_switch(live: TritonServer, good: dict[str, Path]) -> None:
    """It answers, but there is no pointer: it goes on answering until another version is live."""
    name, (url, repository) = "orphan", (live.url, live.repository)
    deploy(str(good["first"]), repository, url, name)
    storage.remove(f"{repository}/{name}/champion.json")
    broken = good["first"].parent / "broken"
    shutil.copytree(good["second"], broken)
    change_graph(broken, nothing_found)
    with pytest.raises(UserError, match=r"image 0 has 0 detections.*\(orphan: version 1 stays live\)"):
        deploy(str(broken), repository, url, name)
    assert answer(url, name) == ("1", 0.6)
    assert deploy(str(good["second"]), repository, url, name)["version"] == 3
    champion = read_champion(repository, name)
    assert champion is not None
    assert (champion.version, champion.previous) == (3, [])
    assert answer(url, name) == ("3", 0.8)
