"""Seconds and memory of data sets of COCO's size and beyond: load, split, a million unlabelled images.

    python benchmarks/coco_scale.py
    python benchmarks/coco_scale.py --shrink 100        # a hundredth of everything: does it run?

Generated: a train json of 118,287 images and 860,001 boxes, a polygon of ten points each, 80 classes, 1 % crowds, and a
val json of 5,000 images. The image files are hard links to 16 real JPEG files of 640x480, so looking at images is real
decoding, but from a warm disk cache. The million unlabelled images are a generated listing (`storage.list_files` is
replaced); the steps read 16 real files under a thousand and a million records. Each part runs in a process of its own,
whose peak memory is told. Writes `results/coco_scale.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from common import peak_gb, write_result
from PIL import Image

from softteacher import storage
from softteacher.config import load_settings
from softteacher.data import split as splitting
from softteacher.data.coco import CocoDataset, load_coco
from softteacher.data.loader import batches

IMAGES, BOXES, CLASSES, VALIDATION, UNLABELED, FILES, STEPS = 118_287, 860_001, 80, 5_000, 1_000_000, 16, 40
WIDTH, HEIGHT = 640, 480


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](args.folder, args.shrink) | {"peak_gb": peak_gb()}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        generate(folder, args.shrink)
        figures: dict[str, Any] = {"shrink": args.shrink}
        for part in PARTS:
            command = [sys.executable, __file__, "--part", part, "--folder", scratch, "--shrink", str(args.shrink)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            figures[part] = json.loads(output.splitlines()[-1])
            print(f"{part}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures[part].items()), flush=True)
    write_result("coco_scale", figures)


class Laps:
    """Seconds by name of what was done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start
        return result


def generate(folder: Path, shrink: int) -> None:
    for part in ("annotations", "images", "few"):
        (folder / part).mkdir()
    rng = np.random.default_rng(0)
    for n in range(FILES):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        noisy = smooth + rng.normal(0, 4, (HEIGHT, WIDTH, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "few" / f"{n}.jpg", quality=85)
    for part, first, images in (("train", 0, IMAGES), ("val", IMAGES, VALIDATION)):
        tree = coco(rng, first // shrink, images // shrink, BOXES * images // IMAGES // shrink)
        for n, image in enumerate(tree["images"]):
            os.link(folder / "few" / f"{n % FILES}.jpg", folder / "images" / image["file_name"])
        (folder / "annotations" / f"instances_{part}.json").write_bytes(orjson.dumps(tree))


def coco(rng: np.random.Generator, first: int, images: int, boxes: int) -> dict[str, Any]:
    size = np.minimum(np.exp(rng.uniform(np.log(8), np.log(400), (boxes, 2))), [WIDTH, HEIGHT])
    corner = rng.random((boxes, 2)) * (np.array([WIDTH, HEIGHT]) - size)
    polygon = (corner[:, None] + rng.random((boxes, 10, 2)) * size[:, None]).reshape(boxes, 20).round(2).tolist()
    columns = (
        (rng.integers(0, images, boxes) + first + 1).tolist(),
        np.concatenate([corner, size], 1).round(2).tolist(),
        rng.integers(1, CLASSES + 1, boxes).tolist(),
        (size.prod(1) * 0.6).round(4).tolist(),
        (rng.random(boxes) < 0.01).astype(int).tolist(),
        polygon,
    )
    names = ("image_id", "bbox", "category_id", "area", "iscrowd")
    return {
        "images": [
            {
                "id": n,
                "file_name": f"{n:012d}.jpg",
                "width": WIDTH,
                "height": HEIGHT,
                "license": 1,
                "coco_url": "http://x",
            }
            for n in range(first + 1, first + images + 1)
        ],
        "annotations": [
            {"id": n, "segmentation": [points], **dict(zip(names, row, strict=True))}
            for n, (*row, points) in enumerate(zip(*columns, strict=True), start=1)
        ],
        "categories": [{"id": n, "name": f"class {n}"} for n in range(1, CLASSES + 1)],
    }


def split_part(folder: Path, shrink: int) -> dict[str, float]:
    """`split` of 10 %, and loading what it wrote. Of the split's time that of looking at images is told apart."""
    laps, look = Laps(), splitting.check_images
    splitting.check_images = lambda *args: laps("looking at images", lambda: look(*args))
    facts = laps("split", lambda: splitting.split(str(folder), str(folder / "out"), percent=10))
    seconds = laps.seconds
    seconds["split without looking at images"] = seconds["split"] - seconds["looking at images"]
    for name in ("labeled", "unlabeled"):
        laps(f"load {name}", lambda name=name: load_coco(folder / "out" / f"{name}.json", labeled=name == "labeled"))
    loaded = seconds["load labeled"] + seconds["load unlabeled"]
    return {
        "labeled": facts["labeled"]["images"],
        "unlabeled": facts["unlabeled"]["images"],
        **seconds,
        "split and load without looking at images": seconds["split without looking at images"] + loaded,
    }


def load_part(folder: Path, shrink: int) -> dict[str, float]:
    laps = Laps()
    data = laps("load", lambda: load_coco(folder / "annotations" / "instances_train.json"))
    return {"images": len(data), "boxes": len(data.annotations), **laps.seconds}


def million_part(folder: Path, shrink: int) -> dict[str, float]:
    laps, count = Laps(), UNLABELED // shrink
    listed = [storage.FileInfo(f"{n // 1000:04d}/{n % FILES}-{n:09d}.jpg", 100_000) for n in range(count)]
    splitting.storage.list_files = lambda _: iter(listed)
    more = laps("listing to data set", lambda: splitting.images_only(str(folder / "few")))
    base = load_coco(folder / "annotations" / "instances_val.json")
    everything = laps("merge", lambda: splitting.merge_images(base, more, base.images[-1].id + 1))
    laps("fingerprint", everything.fingerprint)
    laps("save", lambda: everything.save(folder / "million.json"))
    again = laps("load", lambda: load_coco(folder / "million.json", labeled=False))
    laps("select", lambda: again.select(np.arange(1, len(again))))
    return {"images": len(again), **laps.seconds, "megabytes": (folder / "million.json").stat().st_size / 2**20}


def steps_part(folder: Path, shrink: int) -> dict[str, float]:
    """Milliseconds of a batch (median) with a thousand unlabelled images, and with a million."""
    settings = load_settings(None, [f"training.iterations={STEPS}", "data.workers=0", "data.cache_mb=64"])
    labeled = load_coco(folder / "annotations" / "instances_val.json")
    found: dict[str, float] = {}
    for count in (1000, UNLABELED // shrink):
        images = [splitting.ImageRecord(n, f"{n % FILES}.jpg") for n in range(count)]
        unlabeled = CocoDataset(images, [], labeled.annotations.select(np.zeros(0, np.int64)), str(folder / "few"))
        iterator, laps = batches(labeled, unlabeled, settings, start=0), []
        for _ in range(STEPS):
            start = time.perf_counter()
            next(iterator)
            laps.append(1000 * (time.perf_counter() - start))
        found[f"first batch of {count}, ms"] = laps[0]
        found[f"batch of {count}, ms"] = statistics.median(laps[1:])
    return found


PARTS = {"load": load_part, "split": split_part, "million": million_part, "steps": steps_part}


if __name__ == "__main__":
    main()
