"""Small COCO data sets for tests, and settings that train in a second."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from softteacher.data.coco import CocoDataset, load_coco
from softteacher.data.loader import Views

TINY = (
    "data.short_side=64",
    "data.workers=0",
    "detector.fpn_channels=16",
    "detector.head_channels=32",
    "detector.anchor_scale=4",
    "training.device=cpu",
    "training.iterations=6",
    "training.evaluate_every=0",
    "training.labeled_per_batch=2",
    "training.log_every=2",
    "training.unlabeled_per_batch=2",
)


MASK_TINY = (*TINY, "detector.name=maskrcnn_tiny_fpn", "detector.mask_channels=16")


def coco_tree(count: int = 8, classes: Sequence[str] = ("cat", "dog"), first: int = 1) -> dict[str, Any]:
    """A COCO json of `count` images of 32 x 24 pixels, two boxes in each, ids from `first`."""
    images = [{"id": n, "file_name": f"{n}.png", "width": 32, "height": 24} for n in range(first, first + count)]
    annotations = [
        {"id": 2 * n + k, "image_id": n, "category_id": (n + k) % len(classes) + 1, "bbox": [2 + 9 * k, 3, 8, 10]}
        for n in range(first, first + count)
        for k in (0, 1)
    ]
    categories = [{"id": n + 1, "name": name} for n, name in enumerate(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


def polygon_tree(count: int = 8, first: int = 1) -> dict[str, Any]:
    """`coco_tree` whose boxes have masks that fill them, as polygons."""
    tree = coco_tree(count, first=first)
    for row in tree["annotations"]:
        x, y, w, h = row["bbox"]
        row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return tree


def write_json(path: Path, tree: object) -> str:
    """Write a json, its folder too; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))
    return str(path)


def write_coco(folder: Path, train: dict[str, Any] | None = None, val: dict[str, Any] | None = None) -> Path:
    """A data set on disk: `annotations/instances_{train,val}.json` and noise for images."""
    train, val = train or coco_tree(), val or coco_tree(4, first=101)
    rng = np.random.default_rng(0)
    for part, tree in (("train", train), ("val", val)):
        write_json(folder / "annotations" / f"instances_{part}.json", tree)
        for image in tree["images"]:
            path = folder / "images" / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (image["height"], image["width"], 3), np.uint8)).save(path)
    return folder


def dataset(folder: Path, part: str = "train") -> CocoDataset:
    """A part of what `write_coco` wrote."""
    return load_coco(folder / "annotations" / f"instances_{part}.json")


def shape_views() -> Views:
    """Two views of 64 x 64: a bright disc (class 0) and a bright diamond (class 1) on dark noise, with masks."""
    views = noise_views(2)
    y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    disc, diamond = (x - 24) ** 2 + (y - 24) ** 2 < 16**2, (x - 24).abs() + (y - 24).abs() < 16
    images = views.images // 4 + 160 * torch.stack([disc, diamond]).to(torch.uint8)[:, None]
    return replace(
        views, images=images, labels=[torch.tensor([0]), torch.tensor([1])], masks=[disc[None], diamond[None]]
    )


def noise_views(count: int = 2, side: int = 64, seed: int = 0) -> Views:
    """Views of noise with the identity as matrix and one box of class 0 in each."""
    images = torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    sizes = torch.full((count, 2), side)
    boxes = [torch.tensor([[8.0, 8.0, 40.0, 40.0]]) for _ in range(count)]
    return Views(
        images, sizes, torch.eye(3).double().repeat(count, 1, 1), boxes, [torch.tensor([0])] * count, list(range(count))
    )
