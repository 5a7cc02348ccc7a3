"""COCO exports of labelling tools, in the form and layout in which they write them, are split as they come."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from softteacher.data.coco import load_coco
from softteacher.data.split import split
from tests.samples import coco_tree, polygon_tree, write_json

Files = list[tuple[str, str, dict[str, Any]]]  # path of the json, folder that its `file_name`s are relative to, json


def cvat() -> Files:
    """Subsets are named by the user, unknown fields are zeros, boxes have an empty segmentation and polygons one."""
    files = []
    for part, first in (("Train", 1), ("Validation", 101)):
        tree = polygon_tree(10, first=first)
        tree["annotations"][0]["segmentation"] = []
        for row in tree["annotations"]:
            row |= {"iscrowd": 0, "area": 80.0, "attributes": {"occluded": False, "rotation": 0.0}}
        for row in tree["images"]:
            row |= {"license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0}
        tree["licenses"] = [{"name": "", "id": 0, "url": ""}]
        files.append((f"annotations/instances_{part}.json", f"images/{part}", tree))
    return files


def roboflow() -> Files:
    """Ids from 0, the project among the classes, a folder for each part with images and json."""
    files = []
    for part in ("train", "valid", "test"):
        tree = coco_tree(10, first=0)
        for n, row in enumerate(tree["annotations"]):
            row |= {"id": n, "area": 80, "segmentation": [], "iscrowd": 0}
        tree["categories"] = [{"id": 0, "name": "pets", "supercategory": "none"}] + [
            row | {"supercategory": "pets"} for row in tree["categories"]
        ]
        files.append((f"{part}/_annotations.coco.json", part, tree))
    return files


def label_studio() -> Files:
    """From Windows: ids from 0, backslashes, no size of an image without boxes."""
    tree = coco_tree(20, first=0)
    for row in tree["images"]:
        row["file_name"] = f"images\\{row['file_name']}"
    tree["images"][3] |= {"width": None, "height": None}
    tree["annotations"] = [a | {"ignore": 0, "iscrowd": 0} for a in tree["annotations"] if a["image_id"] != 3]
    for row in (*tree["annotations"], *tree["categories"]):
        row["id" if "name" in row else "category_id"] -= 1
    return [("result.json", "", tree)]


def via() -> Files:
    """A rectangle is a polygon, the class attribute is the supercategory."""
    tree = polygon_tree(20)
    for row in tree["categories"]:
        row["supercategory"] = "type"
    return [("via_export_coco.json", "", tree)]


@pytest.mark.parametrize("export", [cvat, roboflow, label_studio, via])
def test_export(tmp_path: Path, export: Callable[[], Files]) -> None:
    files = export()
    for name, folder, tree in files:
        write_json(tmp_path / name, tree)
        for row in tree["images"]:
            path = tmp_path / folder / row["file_name"].replace("\\", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 24)).save(path)
    whole = len(files) > 1  # training and validation part
    data = str(tmp_path if whole else tmp_path / files[0][0])
    facts = split(data, str(tmp_path / "out"), percent=50, validation_fraction=None if whole else 0.5)
    assert [facts[part]["images"] for part in ("labeled", "unlabeled", "validation")] == [5, 5, 10]
    assert list(facts["labeled"]["boxes_per_class"]) == ["cat", "dog"]
    assert all(i.width == 32 for i in load_coco(tmp_path / "out" / "unlabeled.json").images)
