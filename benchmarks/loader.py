"""Images a second of one loader process, from disk and from S3, against a plain loader and against the training.

    python benchmarks/loader.py                 # photographs are made: smooth noise, 640x480 and 4000x3000
    python benchmarks/loader.py --steps 5       # does it run?

Soft Teacher batches of 1 labelled and 4 unlabelled images, that is, 9 views of 5 images. The plain loader does the same
with PIL and torchvision.transforms, and decodes an image for each view. S3 is SeaweedFS on this machine: "cold" with an
empty cache, "warm" in the second epoch of a run, "new run" with the cache of an earlier one. The training is timed as
the difference of a longer and a shorter `softteacher train`. Writes `results/loader.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_result
from PIL import Image
from torchvision.transforms import v2

from softteacher import storage
from softteacher.config import Settings, load_settings
from softteacher.data.coco import CocoDataset, load_coco
from softteacher.data.images import PAD
from softteacher.data.loader import STRIDE, batches
from softteacher.demo.servers import seaweedfs

LABELED, UNLABELED = 1, 4
PER_STEP = LABELED + UNLABELED


def make_set(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """A COCO data set of `count` photographs with two boxes each."""
    rng = np.random.default_rng(0)
    tree: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    width, height = size
    for n in range(count):
        path = folder / "images" / f"{n}.jpg"
        if n < 40:
            coarse = Image.fromarray(rng.integers(0, 256, (height // 20, width // 20, 3), np.uint8))
            picture = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)
            noisy = picture + rng.normal(0, 4, (height, width, 1)).astype(np.float32)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=85)
        else:  # the same again, under another name
            shutil.copyfile(folder / "images" / f"{n % 40}.jpg", path)
        tree["images"].append({"id": n, "file_name": path.name, "width": width, "height": height})
        for k in range(2):
            box = [0.1 * width, (0.1 + 0.4 * k) * height, 0.3 * width, 0.3 * height]
            tree["annotations"].append({"id": 2 * n + k + 1, "image_id": n, "category_id": 1, "bbox": box})
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(tree))
    return folder


def parts(folder: Path, root: str | None = None) -> tuple[CocoDataset, CocoDataset]:
    """The labelled and the unlabelled images of a set, at `root` if they are elsewhere."""
    data = load_coco(folder / "annotations" / "instances_train.json")
    data.root = root or data.root
    first = len(data) * LABELED // PER_STEP
    return data.select(np.arange(first)), data.select(np.arange(first, len(data)))


def settings_for(preset: str, steps: int, cache: Path) -> Settings:
    """A preset with our batch, in this process."""
    return load_settings(
        preset,
        [
            f"training.labeled_per_batch={LABELED}",
            f"training.unlabeled_per_batch={UNLABELED}",
            f"training.iterations={steps}",
            "data.workers=0",
            f"data.cache_dir={cache}",
        ],
    )


def rates(source: Iterable[object], steps: int) -> list[float]:
    """Images a second of each `steps` batches of a source."""
    found, start = [], time.perf_counter()
    for n, _ in enumerate(source, 1):
        if n % steps == 0:
            now = time.perf_counter()
            found.append(round(steps * PER_STEP / (now - start), 2))
            start = now
    return found


def plain(folder: Path, settings: Settings, steps: int) -> Iterator[list[torch.Tensor]]:
    """The same batches, written with PIL and torchvision.transforms as one does."""
    data = settings.data
    shorts = (data.short_side * np.linspace(*data.scale_jitter, 51)).round().astype(int).tolist()
    weak = [v2.RandomShortestSize(shorts, max_size=data.max_long_side), v2.RandomHorizontalFlip(data.horizontal_flip)]
    color = v2.RandomChoice(
        [
            v2.Identity(),
            v2.RandomAutocontrast(1),
            v2.RandomEqualize(1),
            v2.RandomSolarize(128, 1),
            v2.ColorJitter(saturation=0.72),
            v2.ColorJitter(contrast=0.72),
            v2.ColorJitter(brightness=0.72),
            v2.RandomAdjustSharpness(1.7, 1),
            v2.RandomPosterize(3, 1),
        ]
    )
    bilinear, angle, share = v2.InterpolationMode.BILINEAR, data.max_rotation, data.max_translation
    geometry = v2.RandomChoice(
        [
            v2.RandomAffine(0, translate=(share, 0), interpolation=bilinear, fill=PAD),
            v2.RandomAffine(0, translate=(0, share), interpolation=bilinear, fill=PAD),
            v2.RandomAffine(angle, interpolation=bilinear, fill=PAD),
            v2.RandomAffine(0, shear=(-angle, angle, -angle, angle), interpolation=bilinear, fill=PAD),
        ]
    )
    erasing = [v2.RandomErasing(0.5, (0.0001, 0.04), value=list(PAD)) for _ in range(5)]
    pipelines = {
        "labeled": v2.Compose([*weak, *([color] if data.labeled_color else []), v2.PILToTensor()]),
        "weak": v2.Compose([*weak, v2.PILToTensor()]),
        "strong": v2.Compose([*weak, v2.RandomOrder([color, geometry]), v2.PILToTensor(), *erasing]),
    }
    files = sorted((folder / "images").iterdir(), key=lambda p: int(p.stem))
    first = len(files) * LABELED // PER_STEP

    def batch(kind: str, chosen: list[Path]) -> torch.Tensor:
        views = [pipelines[kind](Image.open(path).convert("RGB")) for path in chosen]
        height, width = (max(-(-v.shape[axis] // STRIDE) * STRIDE for v in views) for axis in (1, 2))
        padded = torch.tensor(PAD, dtype=torch.uint8)[None, :, None, None].repeat(len(views), 1, height, width)
        for row, view in zip(padded, views, strict=True):
            row[:, : view.shape[1], : view.shape[2]] = view
        return padded

    for step in range(steps):
        labeled = files[:first][step * LABELED : (step + 1) * LABELED]
        unlabeled = files[first:][step * UNLABELED : (step + 1) * UNLABELED]
        yield [batch("labeled", labeled), batch("weak", unlabeled), batch("strong", unlabeled)]


def from_s3(folder: Path, preset: str, steps: int, scratch: Path) -> dict[str, float]:
    """Rates with an empty, a warm, and an older cache."""
    with seaweedfs(scratch / "store") as store:
        os.environ.update(store.env)
        root = f"{store.create_bucket('benchmark')}/images"
        storage.copy(folder / "images", root)
        cache = scratch / f"cache-{preset}"
        data = parts(folder, root)
        cold, warm = rates(batches(*data, settings_for(preset, 2 * steps, cache), 0), steps)
        (again,) = rates(batches(*data, settings_for(preset, steps, cache), 0), steps)
    return {"s3_cold": cold, "s3_warm": warm, "s3_new_run": again}


def training_rate(folder: Path, preset: str, scratch: Path) -> float:
    """Images a second that the training takes, on all cores."""
    command = [str(Path(sys.executable).with_name("softteacher"))]
    out = scratch / "splits"
    split = [*command, "split", "--data", str(folder), "--percent", "20", "--validation-fraction", "0.05"]
    subprocess.run([*split, "--out", str(out)], check=True)
    seconds = []
    for steps in (2, 8):
        train = [*command, "train", "--preset", preset, "--out", str(scratch / f"model-{steps}")]
        for name in ("labeled", "unlabeled", "validation"):
            train += [f"--{name}", str(out / f"{name}.json")]
        values = ("detector.backbone_weights=null", "method.burn_in=0", f"training.iterations={steps}")
        values += (f"training.labeled_per_batch={LABELED}", f"training.unlabeled_per_batch={UNLABELED}")
        for value in values:
            train += ["--set", value]
        start = time.perf_counter()
        subprocess.run(train, check=True)
        seconds.append(time.perf_counter() - start)
    return round(6 * PER_STEP / (seconds[1] - seconds[0]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="batches of each measurement")
    parser.add_argument("--no-training", action="store_true", help="without the speed of the training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for preset, size, steps, s3 in (
            ("coco-10pct", (640, 480), args.steps, True),
            ("small", (640, 480), args.steps, True),
            ("small", (4000, 3000), max(1, args.steps // 4), False),
        ):
            data = scratch / f"{size[0]}-{steps}"
            data = data if data.exists() else make_set(data, steps * PER_STEP, size)
            settings = settings_for(preset, steps, scratch)
            row: dict[str, Any] = {"preset": preset, "size": "x".join(map(str, size))}
            (row["plain"],) = rates(plain(data, settings, steps), steps)
            (row["disk"],) = rates(batches(*parts(data), settings, 0), steps)
            row |= from_s3(data, preset, steps, scratch / f"s3-{preset}") if s3 else {}
            row["ratio_plain"] = round(row["disk"] / row["plain"], 2)
            if preset == "small" and s3 and not args.no_training:
                row["training"] = training_rate(data, preset, scratch / "training")
                row["ratio_training"] = round(row["disk"] / row["training"], 1)
            rows.append(row)
    columns = ("preset", "size", "plain", "disk", "s3_cold", "s3_warm", "s3_new_run", "training", "ratio_plain")
    for line in [dict(zip(columns, columns, strict=True)), *rows]:
        print("".join(str(line.get(name, "")).ljust(13) for name in columns))
    write_result("loader", {"images_per_second": rows})


if __name__ == "__main__":
    main()
