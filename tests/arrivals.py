"""A small data set beside a place where images arrive: what tests of collecting share."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from softteacher import storage
from softteacher.collecting.collect import collect, commit
from softteacher.data.coco import CocoDataset, load_coco

CLASSES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
SIZE = (128, 96)


def picture(seed: int, form: str = "PNG", scale: float = 1, **options: object) -> bytes:
    """An image file of blocks in random colours; other forms of the same seed are the same picture."""
    blocks = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    image = Image.fromarray(blocks).resize(SIZE, Image.Resampling.BICUBIC)
    image = image.resize((round(SIZE[0] * scale), round(SIZE[1] * scale)))
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def tree(names: list[str], first: int = 1, root: str | None = None, category: int = 1) -> bytes:
    """A COCO json with a box in each image; a manifest if there is a root."""
    images = [{"id": first + n, "file_name": name, "width": 128, "height": 96} for n, name in enumerate(names)]
    boxes = [{"id": i["id"], "image_id": i["id"], "category_id": category, "bbox": [5, 5, 20, 30]} for i in images]
    about = {"softteacher": {"root": root}} if root else {}
    return json.dumps(about | {"images": images, "annotations": boxes, "categories": CLASSES}).encode()


class Place:
    """A data set with 2 labelled, 3 unlabelled and 2 validation images, a folder where images arrive, and a state."""

    def __init__(self, root: str, out: Path) -> None:
        self.root, self.out, self.runs = root, out, 0
        self.source, self.state = f"{root}/incoming", f"{root}/state"
        self.base = storage.join(root, "base")
        for n in range(7):
            storage.write_bytes(f"{root}/images/{n}.png", picture(n))
        for part, numbers in (("labeled", (0, 1)), ("unlabeled", (2, 3, 4)), ("validation", (5, 6))):
            names = [f"{n}.png" for n in numbers]
            storage.write_bytes(f"{self.base}/{part}.json", tree(names, numbers[0] + 1, f"{root}/images"))

    def put(self, name: str, data: bytes) -> None:
        storage.write_bytes(f"{self.source}/{name}", data)

    def collect(self, **options: object) -> dict:
        self.runs += 1
        self.pending = str(self.out / str(self.runs))
        return collect(self.source, self.state, self.pending, base=self.base, **options)

    def commit(self, accepted: bool = True, run: str = "") -> dict:
        return commit(self.state, self.pending, accepted=accepted, run=run)

    def part(self, name: str) -> CocoDataset:
        """A part that the last `collect` wrote."""
        return load_coco(f"{self.pending}/{name}.json", labeled=name != "unlabeled")

    def names(self, new: bool | None = None, part: str = "unlabeled") -> list[str]:
        """The images of a part: all, only new, or only known ones."""
        return [i.file_name for i in self.part(part).images if new in (None, i.new)]
