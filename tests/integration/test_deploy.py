"""Deploy, rollback and the client, against a real Triton over a real S3 store."""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softteacher import storage
from softteacher.demo.servers import triton
from softteacher.errors import UserError
from softteacher.serving import deployment as deploy_module
from softteacher.serving.client import Client, connect, infer
from softteacher.serving.deploy import deploy, rollback
from softteacher.serving.repository import parse_config, read_champion, versions
from softteacher.serving.status import status
from tests.conftest import TritonServer
from tests.helpers import CATEGORIES, SIZE, model_files, onnx_folder, square_detector, square_image

IMAGES = np.stack([square_image((10, 20, 50, 44))])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Onnx folders that tell themselves apart by their score; the third wants another input and means other classes."""
    base = tmp_path_factory.mktemp("onnx")
    return {
        "first": onnx_folder(base / "first", score=0.6, ap=0.4),
        "second": onnx_folder(base / "second", score=0.8, ap=0.5),
        "third": onnx_folder(base / "third", score=0.7, size=(48, 80), margin=8, categories=[*CATEGORIES[::-1]]),
    }


def live_score(server: TritonServer, name: str) -> float:
    """The score by which the test knows which model answers."""
    with Client(server.url, name) as client:
        return round(float(client.predict([IMAGES[0]])[0].scores[0]), 3)


def assert_no_candidate(server: TritonServer, name: str) -> None:
    assert not storage.exists(f"{server.repository}/{name}-candidate")
    triton_client = connect(server.url, 10)
    assert not triton_client.is_model_ready(f"{name}-candidate")
    triton_client.close()


@contextmanager
def asked_all_the_time(server: TritonServer, name: str) -> Iterator[list[tuple[str, float]]]:
    """Requests that name no version, one after the other, during the block. Yields (version, score) of the answers."""
    answers: list[tuple[str, float]] = []
    failures: list[Exception] = []
    stop = threading.Event()

    def ask() -> None:
        connection = connect(server.url, 10)
        try:
            while not stop.is_set():
                outputs, version = infer(connection, server.url, name, IMAGES)
                answers.append((version, round(float(outputs["detection_scores"][0, 0]), 3)))
                time.sleep(0.01)
        except Exception as e:
            failures.append(e)
        connection.close()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert len(answers) > 2  # each takes as long as the machine lets it


def test_deploy_switch_rollback_restart(triton_server: TritonServer, folders: dict[str, Path], tmp_path: Path) -> None:
    url, repository = triton_server.url, triton_server.repository
    name = "main"
    facts = deploy(str(folders["first"]), repository, url, name)
    assert (facts["name"], facts["version"], facts["previous"]) == (name, 1, None)
    assert facts["smoke"] == {"images": 4, "detections": 4, "max_box_difference": 0.0, "max_score_difference": 0.0}
    assert live_score(triton_server, name) == 0.6
    with pytest.raises(UserError, match="no older version to go back to"):
        rollback(repository, url, name)

    with asked_all_the_time(triton_server, name) as answers:
        facts = deploy(str(folders["second"]), repository, url, name)
    assert (facts["version"], facts["previous"]) == (2, 1)
    assert set(answers) == {("1", 0.6), ("2", 0.8)}
    assert answers == sorted(answers)  # one switch, never back
    assert_no_candidate(triton_server, name)
    champion = read_champion(repository, name)
    assert champion is not None
    assert (champion.version, champion.previous, champion.ap) == (2, [1], 0.5)
    assert champion.provenance == {"seed": 7}
    assert champion.onnx_sha256 == json.loads((folders["second"] / "parity.json").read_text())["onnx_sha256"]

    # Triton loads nothing by itself after a restart; asked for the model, it serves the live version
    with triton(repository, tmp_path / "restarted", load=[name]) as again:
        assert live_score(TritonServer(again.http, repository, again), name) == 0.8

    with Client(url, name) as client:  # it follows the model
        facts = rollback(repository, url, name)
        assert (facts["version"], facts["previous"]) == (1, 2)
        assert round(float(client.predict([IMAGES[0]])[0].scores[0]), 3) == 0.6
        champion = read_champion(repository, name)
        assert champion is not None
        assert (champion.version, champion.previous, champion.ap) == (1, [], 0.4)

        # numbers are never used twice, and `keep` bounds what stays
        facts = deploy(str(folders["third"]), repository, url, name, keep=2)
        assert (facts["version"], facts["previous"]) == (3, 1)
        assert versions(repository, name) == [1, 3]
        found = client.predict([np.full((300, 200, 3), 255, np.uint8)])[0]
        assert round(float(found.scores[0]), 3) == 0.7
        assert client.classes == [c["name"] for c in CATEGORIES[::-1]]
        np.testing.assert_allclose(found.boxes, [[0, 0, 200, 300]], atol=1e-4)  # clipped to the image


@pytest.fixture(scope="module")
def live(triton_server: TritonServer, folders: dict[str, Path]) -> str:
    """A model that is live with score 0.6, whatever the tests try with it."""
    deploy(str(folders["first"]), triton_server.repository, triton_server.url, "steady")
    return "steady"


def torn_onnx(folder: Path) -> None:
    data = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(data[: len(data) // 2])


def no_onnx_at_all(folder: Path) -> None:
    (folder / "model.onnx").write_text("<html>not found</html>")
    _sign(folder)


def missing_smoke(folder: Path) -> None:
    (folder / "smoke.npz").unlink()


def torn_smoke(folder: Path) -> None:
    (folder / "smoke.npz").write_bytes((folder / "smoke.npz").read_bytes()[:1000])


def other_boxes(folder: Path) -> None:
    with np.load(folder / "smoke.npz") as file:
        arrays = dict(file)
    arrays["detection_boxes"] = arrays["detection_boxes"] + 1
    np.savez(folder / "smoke.npz", **arrays)


def other_count(folder: Path) -> None:
    with np.load(folder / "smoke.npz") as file:
        arrays = dict(file)
    arrays["num_detections"][2] = 0
    np.savez(folder / "smoke.npz", **arrays)


def not_loadable(folder: Path) -> None:
    square_detector(folder / "model.onnx", foreign_op=True)
    _sign(folder)


def _sign(folder: Path) -> None:
    """Let parity.json name the ONNX file that is there."""
    parity = json.loads((folder / "parity.json").read_text())
    parity["onnx_sha256"] = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    (folder / "parity.json").write_text(json.dumps(parity))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (torn_onnx, "is not the file that parity.json was made for"),
        (no_onnx_at_all, "not a valid ONNX file"),
        (missing_smoke, "no smoke.npz in it"),
        (torn_smoke, "smoke.npz: torn"),
        (other_boxes, "of the 1 detections of image 0 .* the like of 0.*version 1 stays live"),
        (other_count, "image 2 has 1 detections, 0 were recorded.*version 1 stays live"),
        (not_loadable, "refused: .*Conjure.*version 1 stays live"),
    ],
)
def test_a_bad_model_is_refused_and_the_old_stays_live(
    break_it: Callable[[Path], None],
    message: str,
    triton_server: TritonServer,
    live: str,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    broken = shutil.copytree(folders["second"], tmp_path / "broken")
    break_it(broken)
    files = model_files(triton_server.repository, live)
    with asked_all_the_time(triton_server, live) as answers:
        with pytest.raises(UserError, match=message):
            deploy(str(broken), triton_server.repository, triton_server.url, live)
        time.sleep(0.3)
    assert set(answers) == {("1", 0.6)}
    assert model_files(triton_server.repository, live) == files
    assert_no_candidate(triton_server, live)


def test_a_champion_written_meanwhile_brings_the_old_version_back(
    triton_server: TritonServer, live: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conditional write is the last step: the switch is undone."""
    pointer = f"{triton_server.repository}/{live}/champion.json"
    before = storage.read_bytes(pointer)
    write = deploy_module.write_champion

    def overtaken(*args: object) -> None:
        storage.write_bytes(pointer, before + b"\n")
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(deploy_module, "write_champion", overtaken)
    with pytest.raises(UserError, match=r"somebody else wrote it meanwhile.*version 1 stays live"):
        deploy(str(folders["second"]), triton_server.repository, triton_server.url, live)
    assert live_score(triton_server, live) == 0.6
    assert versions(triton_server.repository, live) == [1]
    assert_no_candidate(triton_server, live)


def test_interrupted_after_the_last_step(
    triton_server: TritonServer, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pointer says that it is live: it stays so."""
    name, (url, repository, _) = "hasty", triton_server
    deploy(str(folders["first"]), repository, url, name)
    write = deploy_module.write_champion

    def interrupted(*args: object) -> None:
        write(*args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(deploy_module, "write_champion", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deploy(str(folders["second"]), repository, url, name)
    assert live_score(triton_server, name) == 0.8
    assert versions(repository, name) == [1, 2]
    assert status(repository, url, name)["notes"] == []
    assert_no_candidate(triton_server, name)


def test_the_first_deployment_fails_to_nothing(
    triton_server: TritonServer, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise UserError("the store is full")

    monkeypatch.setattr(deploy_module, "write_champion", full)
    with pytest.raises(UserError, match=r"the store is full \(stillborn: nothing is live\)"):
        deploy(str(folders["first"]), triton_server.repository, triton_server.url, "stillborn")
    assert not storage.exists(f"{triton_server.repository}/stillborn")
    with pytest.raises(UserError, match="serves no model stillborn"):
        Client(triton_server.url, "stillborn")


def test_what_is_wrong_around_it(triton_server: TritonServer, folders: dict[str, Path], s3: str) -> None:
    url, repository = triton_server.url, triton_server.repository
    good = str(folders["first"])
    with pytest.raises(UserError, match=r"--name a/b: only letters"):
        deploy(good, repository, url, "a/b")
    with pytest.raises(UserError, match=r"--name a-canary: names with that ending are taken"):
        deploy(good, repository, url, "a-canary")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 can't be reached"):
        deploy(good, s3, "http://127.0.0.1:9", "lost")
    with pytest.raises(UserError, match=r"ftp://x: not a URL of Triton"):
        deploy(good, s3, "ftp://x", "lost")
    with pytest.raises(UserError, match="not a Triton server"):
        deploy(good, s3, os.environ["AWS_ENDPOINT_URL_S3"], "lost")
    with pytest.raises(UserError, match="no such bucket"):
        deploy(good, "s3://no-such-bucket/models", url, "lost")
    with pytest.raises(UserError, match=rf"\(which has to serve {s3}\) refused: .*lost: nothing is live"):
        deploy(good, s3, url, "lost")  # this Triton serves another repository
    assert list(storage.list_files(s3)) == []
    with pytest.raises(UserError, match="nothing is deployed there"):
        rollback(repository, url, "never")
    storage.write_bytes(f"{repository}/foreign/1/model.onnx", b"by hand")
    with pytest.raises(UserError, match=r"did not put there \(version 1\); choose another --name"):
        deploy(good, repository, url, "foreign")
    assert storage.read_bytes(f"{repository}/foreign/1/model.onnx") == b"by hand"


def test_client_answers_in_the_pixels_of_each_image(triton_server: TritonServer, live: str, tmp_path: Path) -> None:
    box = (60, 30, 240, 150)
    large = square_image(box, width=300, height=200)  # scaled by 0.32
    Image.fromarray(large).save(tmp_path / "large.png")
    Image.fromarray(large[..., 0]).save(tmp_path / "grey.png")
    whole = np.full((500, 250, 3), 255, np.uint8)
    images = [
        tmp_path / "large.png",
        str(tmp_path / "grey.png"),
        Image.fromarray(large).convert("L"),
        large,
        square_image((10, 20, 50, 44)),
        whole,
        np.zeros((70, 70, 3), np.uint8),
        *[square_image((5 + i, 6, 60, 50)) for i in range(14)],  # over two batches in all
    ]
    with Client(triton_server.url, live) as client:
        assert client.classes == [c["name"] for c in CATEGORIES]
        found = client.predict(images)
        assert client.predict([]) == []
        with pytest.raises(UserError, match="is no image; give uint8 RGB"):
            client.predict([np.zeros((5, 5))])
        with pytest.raises(UserError, match="no such file"):
            client.predict([tmp_path / "missing.jpg"])
    assert len(found) == len(images)
    for one in found[:4]:
        np.testing.assert_allclose(one.boxes, [box], atol=1 / 0.32 + 0.01)  # a pixel of the input
        assert one.labels.tolist() == [1]
        assert one.labels.dtype == np.int64
        assert one.scores.tolist() == [pytest.approx(0.6)]
    np.testing.assert_allclose(found[4].boxes, [[10, 20, 50, 44]], atol=1e-4)
    np.testing.assert_allclose(found[5].boxes, [[0, 0, 250, 500]], atol=1e-3)
    assert found[5].boxes.max() <= 500
    assert found[5].boxes[0, 2] <= 250
    assert len(found[6]) == 0
    assert found[6].boxes.shape == (0, 4)
    for i, one in enumerate(found[7:]):
        np.testing.assert_allclose(one.boxes, [[5 + i, 6, 60, 50]], atol=1e-4)


def test_requests_gathered_in_one_batch_get_their_own_answers(triton_server: TritonServer, live: str) -> None:
    wrong: list[str] = []

    def ask(i: int) -> None:
        connection = connect(triton_server.url, 10)
        for j in range(10):
            images = np.stack([square_image((i + k, j + k, 60 + i, 50)) for k in range(1 + i % 3)])
            outputs, _ = infer(connection, triton_server.url, live, images)
            expected = [[i + k, j + k, 60 + i, 50] for k in range(len(images))]
            if outputs["detection_boxes"][:, 0].tolist() != expected:
                wrong.append(f"{outputs['detection_boxes'][:, 0].tolist()} instead of {expected}")
        connection.close()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_client_errors(triton_server: TritonServer, live: str) -> None:
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 can't be reached"):
        Client("http://127.0.0.1:9", live)
    with pytest.raises(UserError, match=rf"serves no model unknown; it serves .*{live}"):
        Client(triton_server.url, "unknown")
    connection = connect(triton_server.url, 10)
    with pytest.raises(UserError, match=r"refused: .*\[-1,64,96,3\].*\[1,10,10,3\]"):
        infer(connection, triton_server.url, live, np.zeros((1, 10, 10, 3), np.uint8))
    with pytest.raises(UserError, match=r"refused: .*<= 8"):
        infer(connection, triton_server.url, live, np.zeros((9, *SIZE, 3), np.uint8))
    connection.close()


def test_only_what_has_passed_is_warmed_up(
    triton_server: TritonServer, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm-up request that fails may crash Triton with all its models."""
    seen, go_live = [], deploy_module.Deployment.go_live
    place = f"{triton_server.repository}/cold"

    def looking(self: deploy_module.Deployment, *arguments: object) -> object:
        seen.append(parse_config(storage.read_bytes(f"{place}-candidate/config.pbtxt")))
        return go_live(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(deploy_module.Deployment, "go_live", looking)
    deploy(str(folders["first"]), triton_server.repository, triton_server.url, "cold")
    live = parse_config(storage.read_bytes(f"{place}/config.pbtxt"))
    assert live.model_warmup
    del live.model_warmup[:]
    assert seen == [live]
