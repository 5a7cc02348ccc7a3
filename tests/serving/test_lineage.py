"""The registry: whole model folders, records that stay, and the chain from the live version to the first."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from softteacher import storage
from softteacher.errors import UserError
from softteacher.model_folder import ModelFolder, origin
from softteacher.serving.canary_state import Canary, canary_folder, write_canary
from softteacher.serving.lineage import champion_model, lineage, record, table
from softteacher.serving.repository import Champion, read_onnx_folder, write_champion
from softteacher.serving.version_folder import write_version
from tests.helpers import onnx_folder


class World(NamedTuple):
    """A repository and a registry, and how to deploy another model."""

    repository: str
    registry: str
    deploy: Callable[..., tuple[str, str]]


EVERYWHERE = pytest.mark.parametrize("root", ["local", "s3"], indirect=True)


@pytest.fixture
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    on_s3 = getattr(request, "param", "local") == "s3"
    return request.getfixturevalue("s3") if on_s3 else str(tmp_path)


@pytest.fixture
def world(root: str, trained: Path, tmp_path: Path) -> World:
    repository = f"{root}/triton"

    def deploy(version: int, previous: tuple[int, ...] = (), canary: bool = False, **came: Any) -> tuple[str, str]:
        """A model folder of its own, and the onnx folder made from it, both as if deployed as a version."""
        model, onnx = tmp_path / f"model-{version}-{len(came)}", tmp_path / f"onnx-{version}-{len(came)}"
        shutil.copytree(trained, model)
        provenance = json.loads((model / "provenance.json").read_text()) | {"seed": version} | came
        (model / "provenance.json").write_text(json.dumps(provenance))
        onnx_folder(onnx, ap=version / 10, score=0.3 + version / 100 + len(came) / 1000)
        shutil.copy(model / "provenance.json", onnx)
        sha256 = json.loads((onnx / "parity.json").read_text())["onnx_sha256"]
        champion = Champion(
            "cards",
            version,
            list(previous),
            version / 10,
            "set-1",
            sha256,
            f"2026-01-0{version}",
            "me@here",
            provenance,
        )
        kind = "-canary" if canary else ""
        files: dict[str, Path | bytes] = {"model.onnx": onnx / "model.onnx", "smoke.npz": b"images"}
        write_version(f"{repository}/cards{kind}/{version}", files, champion)
        if canary:
            storage.remove(canary_folder(repository, "cards", "canary.json"))
            write_canary(repository, "cards", Canary(version, 0.1))
        else:
            write_champion(repository, champion, storage.etag(f"{repository}/cards/champion.json"))
        return str(model), str(onnx)

    return World(repository, f"{root}/registry", deploy)


@EVERYWHERE
def test_record(world: World, tmp_path: Path) -> None:
    model, onnx = world.deploy(1, image="r.example/train@sha256:ab", run_id="0a1b", git_sha="cd34")
    decision = {"deploy": True, "reason": "cards has no champion yet", "ap": 0.1, "onnx_sha256": "of another model"}
    (tmp_path / "gate").mkdir()
    (tmp_path / "gate" / "gate.json").write_text(json.dumps(decision))
    with pytest.raises(UserError, match="is the decision on another model"):
        record(model, onnx, world.repository, "cards", world.registry, gate=str(tmp_path / "gate"))
    decision["onnx_sha256"] = read_onnx_folder(Path(onnx)).sha256
    (tmp_path / "gate" / "gate.json").write_text(json.dumps(decision))
    facts = record(model, onnx, world.repository, "cards", world.registry, gate=str(tmp_path / "gate"))
    place = f"{world.registry}/cards/1"
    assert json.loads(storage.read_bytes(f"{place}/lineage.json")) == facts
    source = ModelFolder(model)
    assert facts["data"] == source.provenance["data"]
    assert {"labeled", "unlabeled", "validation"} == set(facts["data"])
    assert facts["settings"] == source.settings.model_dump(mode="json")
    assert facts["metrics"]["teacher"]["AP50"] == source.metrics()["teacher"]["AP50"]
    assert facts["metrics"]["onnx"] == {"AP": 0.1}
    assert facts["gate"] == decision
    assert (facts["image"], facts["run_id"], facts["git_sha"]) == ("r.example/train@sha256:ab", "0a1b", "cd34")
    assert facts["weights_sha256"] == source.provenance["sha256"]["teacher.pt"]
    assert facts["parents"] == {"champion": None, "warm_start": None}
    with storage.local_input(f"{place}/model") as kept:
        assert ModelFolder(kept).provenance == source.provenance
    assert champion_model(world.repository, world.registry, "cards") == f"{place}/model"
    parity = json.loads(Path(onnx, "parity.json").read_text()) | {"overrides": ["detector.score_threshold=0.3"]}
    Path(onnx, "parity.json").write_text(json.dumps(parity))
    again = record(model, onnx, world.repository, "cards", world.registry, gate=str(tmp_path / "gate"), run="ffff")
    assert again["run_id"] == "ffff"
    assert again["settings"]["detector"]["score_threshold"] == 0.3  # as it was exported


@EVERYWHERE
def test_chain(world: World) -> None:
    """Version 3 started from version 2's weights; version 2 was deployed by hand, and nobody recorded it."""
    record(*world.deploy(1), world.repository, "cards", world.registry)
    world.deploy(2, previous=(1,))
    start = f"{world.registry}/cards/1/model"
    model, onnx = world.deploy(3, previous=(2, 1), parent=origin(start))
    record(model, onnx, world.repository, "cards", world.registry)
    chain = lineage("cards", world.repository, world.registry)
    assert chain["live"] == 3
    assert [(v["version"], v["recorded"], v["parents"]["champion"]) for v in chain["versions"]] == [
        (3, True, 2),
        (2, False, 1),
        (1, True, None),
    ]
    third, second, first = chain["versions"]
    assert third["parents"]["warm_start"] == {**origin(start), "name": "cards", "version": 1}
    assert third["parents"]["warm_start"]["sha256"] == first["weights_sha256"]
    assert second["data"] == third["data"]
    assert (second["model"], first["model"]) == (None, start)
    assert [v["version"] for v in lineage("cards", world.repository, world.registry, 2)["versions"]] == [2, 1]
    text = table(chain)
    assert "cards version 3 (live), deployed 2026-01-03 by me@here" in text
    assert "replaced version 2" in text
    assert f"started from cards version 1, {start}" in " ".join(text.split())  # however it was broken into lines
    assert "method.pool_threshold=0.06" in text
    assert all(facts["fingerprint"] in text for facts in third["data"].values())
    assert all(len(line) <= 120 or " " not in line.strip() for line in text.splitlines())


def test_what_is_pruned_keeps_its_record(world: World) -> None:
    """The two newest folders stay, and that of the live version, to which a rollback went."""
    for version in (1, 2, 3, 4):
        previous = tuple(range(version - 1, 0, -1))
        record(*world.deploy(version, previous), world.repository, "cards", world.registry, keep=2)
    kept = [v["model"] is not None for v in lineage("cards", world.repository, world.registry)["versions"]]
    assert kept == [True, True, False, False]
    storage.remove(f"{world.repository}/cards/1")  # and the repository forgets it, too
    assert [v["version"] for v in lineage("cards", world.repository, world.registry)["versions"]] == [4, 3, 2, 1]
    back = json.loads(storage.read_bytes(f"{world.repository}/cards/3/manifest.json"))["record"]
    write_champion(world.repository, Champion(**back), storage.etag(f"{world.repository}/cards/champion.json"))
    assert champion_model(world.repository, world.registry, "cards") == f"{world.registry}/cards/3/model"
    for version in (5, 6):
        model, onnx = world.deploy(version, (3,), canary=True)
        record(model, onnx, world.repository, "cards", world.registry, keep=1)
    storage.remove(canary_folder(world.repository, "cards"))
    assert champion_model(world.repository, world.registry, "cards") == f"{world.registry}/cards/3/model"


@EVERYWHERE
def test_a_canary_that_was_ended(world: World) -> None:
    record(*world.deploy(1), world.repository, "cards", world.registry)
    assert record(*world.deploy(2, (1,), canary=True), world.repository, "cards", world.registry)["canary"]
    with pytest.raises(UserError, match="cards: version 2 is a canary; `softteacher promote` makes it live"):
        champion_model(world.repository, world.registry, "cards")
    storage.remove(canary_folder(world.repository, "cards"))
    assert champion_model(world.repository, world.registry, "cards") == f"{world.registry}/cards/1/model"
    model, onnx = world.deploy(2, (1,), image="another")  # by a release that gave the number again
    facts = record(model, onnx, world.repository, "cards", world.registry)
    assert (facts["version"], facts["canary"], facts["image"]) == (2, False, "another")
    with storage.local_input(f"{world.registry}/cards/2/model") as kept:
        assert ModelFolder(kept).provenance["image"] == "another"
    other = world.deploy(2, (1,), image="a third", run_id="of another repository")
    with pytest.raises(UserError, match="cards/2: is the record of another model; a new repository needs"):
        record(*other, world.repository, "cards", world.registry)


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_nothing_to_start_from(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert champion_model(world.repository, world.registry, "cards") == ""
    assert "nothing is live as cards; a training starts from what its settings say" in told(capsys)
    with pytest.raises(UserError, match="cards: nothing is live there"):
        lineage("cards", world.repository, world.registry)
    world.deploy(1)
    assert champion_model(world.repository, world.registry, "cards") == ""
    assert "version 1 of cards is live, but its model folder is not in" in told(capsys)
    with pytest.raises(UserError, match="cards: there is no version 7, neither in"):
        lineage("cards", world.repository, world.registry, 7)
    with pytest.raises(UserError, match="cards: there is no version 0, neither in"):
        lineage("cards", world.repository, world.registry, 0)


def test_a_version_that_all_have_forgotten(world: World) -> None:
    record(*world.deploy(2, previous=(1,)), world.repository, "cards", world.registry)
    chain = lineage("cards", world.repository, world.registry)
    assert chain["versions"][1] == {
        **{"version": 1, "parents": {"champion": None, "warm_start": None}, "recorded": False, "model": None}
    }
    assert "cards version 1: no record, and the repository has forgotten it" in table(chain)


def test_what_record_refuses(world: World, tmp_path: Path) -> None:
    model, onnx = world.deploy(1)
    with pytest.raises(UserError, match=r"--registry .*: is in Triton's repository"):
        record(model, onnx, world.repository, "cards", f"{world.repository}/registry")
    for name in ("a/b", "cards-canary"):
        with pytest.raises(UserError, match=f"--name {name}: "):
            record(model, onnx, world.repository, name, world.registry)
        with pytest.raises(UserError, match=f"--name {name}: "):
            lineage(name, world.repository, world.registry)
    (tmp_path / "gate").mkdir()
    for torn in ('{"deploy": tr', "[1]", "7", "{}"):
        (tmp_path / "gate" / "gate.json").write_text(torn)
        with pytest.raises(UserError, match=r"gate/gate\.json: torn, or not of `softteacher gate`"):
            record(model, onnx, world.repository, "cards", world.registry, gate=str(tmp_path / "gate"))
    other, _ = world.deploy(2, (1,))
    with pytest.raises(UserError, match=r"onnx-1-0: was not exported from .*model-2-0"):
        record(other, onnx, world.repository, "cards", world.registry)
    with pytest.raises(UserError, match="dogs: this model is not deployed there; run `softteacher deploy`"):
        record(model, onnx, world.repository, "dogs", world.registry)
    Path(model, "teacher.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"teacher\.pt: missing or changed"):
        record(model, onnx, world.repository, "cards", world.registry)
    assert not storage.exists(f"{world.registry}/cards")


@EVERYWHERE
def test_a_killed_record_is_none(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever file was the last one: there is no record, no model to start from, and the next try succeeds."""
    model, onnx = world.deploy(1)
    files = sorted(f.name for f in Path(model).iterdir() if f.is_file())
    copied: list[str] = []

    def copy(source: str | Path, target: str, real: Callable[..., None] = storage.copy) -> None:
        if len(copied) == len(files) - 1:
            raise KeyboardInterrupt
        copied.append(Path(source).name)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "copy", copy)
        with pytest.raises(KeyboardInterrupt):
            record(model, onnx, world.repository, "cards", world.registry)
    assert "provenance.json" not in copied
    assert champion_model(world.repository, world.registry, "cards") == ""
    assert lineage("cards", world.repository, world.registry)["versions"][0]["recorded"] is False
    record(model, onnx, world.repository, "cards", world.registry)
    assert champion_model(world.repository, world.registry, "cards") != ""


def test_a_torn_record_is_named(world: World) -> None:
    facts = record(*world.deploy(1), world.repository, "cards", world.registry)
    lacking = [{k: v for k, v in facts.items() if k != key} for key in ("version", "versions", "onnx_sha256")]
    for torn in ({}, [], *lacking, facts | {"parents": {"champion": None}}):
        storage.write_bytes(f"{world.registry}/cards/1/lineage.json", json.dumps(torn).encode())
        with pytest.raises(UserError, match=r"cards/1/lineage\.json: torn, or not ours"):
            lineage("cards", world.repository, world.registry)
