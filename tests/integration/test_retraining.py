"""Retraining as a user runs it: the pipelines in KFP's local runner, over a real S3 store and a real Triton."""

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from softteacher import storage
from softteacher.collecting.rounds import State
from softteacher.data.split import split
from softteacher.demo.digits import make_digits
from softteacher.serving.connection import connect
from softteacher.serving.deploy import deploy
from softteacher.serving.lineage import lineage, record
from tests.conftest import TritonServer

ROOT = Path(__file__).parents[2]
NAME = "numbers"
SETTINGS = ("data.short_side=96", "data.workers=0", "data.horizontal_flip=0", "training.device=cpu")
SETTINGS += ("training.unlabeled_per_batch=2", "method.ema_momentum=0.95", "export.engines=[]")
# validations on the way would keep the weights from before the poison
SETTINGS += ("training.evaluate_every=0",)
# ids of scenes: what the first model learns from; then those that arrive, the first ones with labels
FIRST, GOOD, POISONED, LAST = range(1, 41), range(41, 81), range(96, 106), 110


class Shop:
    """What a user has: a data set and a place where more arrives, both on S3, and a Triton."""

    def __init__(self, s3: str, server: TritonServer, folder: Path) -> None:
        self.s3, self.server, self.folder = s3, server, folder
        make_digits(folder / "scenes", train=LAST, val=24)
        self.tree = json.loads(self.scenes("annotations/instances_train.json").read_text())

    def scenes(self, name: str) -> Path:
        return self.folder / "scenes" / name

    def labels(self, *scenes: range, upside_down: bool = False) -> bytes:
        """A COCO json of some scenes; upside down: of the images turned by 180 degrees."""
        chosen = {number for some in scenes for number in some}
        boxes = [a for a in self.tree["annotations"] if a["image_id"] in chosen]
        images = {i["id"]: i for i in self.tree["images"] if i["id"] in chosen}
        if upside_down:
            for n, box in enumerate(boxes):
                (x, y, w, h), image = box["bbox"], images[box["image_id"]]
                boxes[n] = box | {"bbox": [image["width"] - x - w, image["height"] - y - h, w, h]}
        return json.dumps(self.tree | {"images": list(images.values()), "annotations": boxes}).encode()

    def put(self, where: str, scenes: range) -> None:
        for number in scenes:
            name = f"{number:06d}.jpg"
            storage.copy(self.scenes(f"images/{name}"), f"{self.s3}/{where}/{name}")

    def retrain(self, iterations: int) -> tuple[dict[str, Any], str]:
        """What each step of `pipeline.py run-local retraining` made, and what was printed."""
        outputs = self.folder / "outputs.json"
        places = {place: f"{self.s3}/{place}" for place in ("state", "base", "labels", "registry")}
        places |= {"source": f"{self.s3}/incoming", "repository": self.server.repository, "triton": self.server.url}
        command = [sys.executable, str(ROOT / "pipeline.py"), "run-local", "retraining", "--outputs", str(outputs)]
        command += ["--pipeline-root", str(self.folder / "runs"), "--preset", "demo", "--name", NAME, "--min-new", "5"]
        command += [part for name, place in places.items() for part in (f"--{name}", place)]
        for setting in (*SETTINGS, f"training.iterations={iterations}"):
            command += ["--set", setting]
        # other tests may run beside this one, and take time from one model or the other
        command += ["--max-latency-ratio", "1000"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(outputs.read_text()), done.stdout

    def live(self) -> list[str]:
        """The versions that Triton serves."""
        with closing(connect(self.server.url, 10)) as server:
            return list(server.get_model_metadata(NAME)["versions"])

    def rounds(self) -> list[dict[str, Any]]:
        return State.read(f"{self.s3}/state").rounds

    def versions(self) -> list[dict[str, Any]]:
        return lineage(NAME, self.server.repository, f"{self.s3}/registry")["versions"]


def a_first_model_is_live(shop: Shop, trained: Path, exported: Path) -> None:
    """One that hardly learnt, from other scenes."""
    validation = json.loads(shop.scenes("annotations/instances_val.json").read_text())
    shop.put("data/images", range(1, FIRST.stop))
    shop.put("data/images", range(LAST + 1, LAST + 1 + len(validation["images"])))
    storage.write_bytes(f"{shop.s3}/data/annotations/instances_train.json", shop.labels(FIRST))
    storage.write_bytes(f"{shop.s3}/data/annotations/instances_val.json", json.dumps(validation).encode())
    split(f"{shop.s3}/data", f"{shop.s3}/base", percent=40, stratify=True)
    deploy(str(exported), shop.server.repository, shop.server.url, NAME)
    record(str(trained), str(exported), shop.server.repository, NAME, f"{shop.s3}/registry")
    assert shop.live() == ["1"]
    [first] = shop.versions()
    assert first["parents"] == {"champion": None, "warm_start": None}


def images_and_labels_arrive_and_a_better_one_goes_live(shop: Shop) -> None:
    shop.put("incoming", range(GOOD.start, POISONED.start))
    storage.write_bytes(f"{shop.s3}/labels/2026-06.json", shop.labels(GOOD))
    made, text = shop.retrain(90)
    assert set(made) == {
        *("collect", "champion", "train", "evaluate", "export", "gate", "deploy", "record", "commit-accepted", "report")
    }
    assert made["champion"]["Output"] == f"{shop.s3}/registry/{NAME}/1/model"
    assert shop.live() == ["2"]
    gain = made["gate"]["decision"]
    assert gain["gain"] == pytest.approx(gain["ap"] - gain["champion_ap"])
    assert gain["gain"] > 0.01
    [ended] = shop.rounds()
    assert (ended["accepted"], ended["images"], ended["labeled"]) == (True, 15, 40)
    second, first = shop.versions()
    assert (second["version"], second["run_id"], second["gate"]["reason"]) == (2, ended["run"], gain["reason"])
    assert second["parents"]["champion"] == 1
    assert second["parents"]["warm_start"]["version"] == 1
    assert second["parents"]["warm_start"]["sha256"] == first["weights_sha256"]
    assert second["settings"]["training"]["new_share"] == 0.5
    assert [second["data"][part]["images"] for part in ("labeled", "unlabeled", "validation")] == [56, 39, 24]
    assert f"run {ended['run']} succeeded" in text


def a_poisoned_round_is_rejected(shop: Shop) -> None:
    before = shop.versions()
    shop.put("incoming", range(POISONED.start, LAST + 1))
    storage.write_bytes(f"{shop.s3}/incoming/broken.jpg", b"no picture")
    # as from a labelling tool that turned the pictures, of the good scenes, too
    storage.write_bytes(f"{shop.s3}/labels/2026-07.json", shop.labels(GOOD, POISONED, upside_down=True))
    made, text = shop.retrain(50)
    assert set(made) == {*("collect", "champion", "train", "evaluate", "export", "gate", "commit-rejected", "report")}
    assert made["champion"]["Output"] == f"{shop.s3}/registry/{NAME}/2/model"
    collected = json.loads(Path(made["collect"]["dataset"], "collect.json").read_text())
    assert collected["left_out"]["broken"] == {"images": 1, "first": [f"{shop.s3}/incoming/broken.jpg"]}
    assert (collected["new"], collected["new_labeled"]) == (5, 50)
    # the champion goes on, and the report and the state say why
    assert shop.live() == ["2"]
    assert shop.versions() == before
    decision = made["gate"]["decision"]
    assert decision["ap"] < decision["champion_ap"] / 2
    reason = decision["reason"]
    assert "is not >" in reason
    page = Path(made["gate"]["report"]).read_text()
    assert "Version 2 stays." in page
    assert f"the champion stays: {reason}" in " ".join(text.split())
    assert [r["accepted"] for r in shop.rounds()] == [True, False]
    assert [label["uri"] for label in shop.rounds()[1]["labels"]] == [f"{shop.s3}/labels/2026-07.json"]


def nothing_new_ends_early(shop: Shop) -> None:
    """What the rejected round brought is not new again."""
    before = shop.rounds()
    made, text = shop.retrain(60)
    assert set(made) == {"collect", "commit-nothing", "report"}
    assert "0 new images, 0 with new labels, 5 wanted: nothing to do" in " ".join(text.split())
    assert shop.rounds() == before
    assert shop.live() == ["2"]


@pytest.mark.timeout(1800)  # a minute or three, and much longer where others use the processors
def test_rounds_of_arriving_images(
    s3: str, triton_server: TritonServer, trained: Path, exported: Path, tmp_path: Path
) -> None:
    shop = Shop(s3, triton_server, tmp_path)
    a_first_model_is_live(shop, trained, exported)
    images_and_labels_arrive_and_a_better_one_goes_live(shop)
    a_poisoned_round_is_rejected(shop)
    nothing_new_ends_early(shop)
