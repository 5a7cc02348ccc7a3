"""Reading COCO json: what is refused and how it says so, what is repaired, what comes back out."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from softteacher import storage
from softteacher.data.coco import load_coco
from softteacher.errors import UserError
from tests.helpers import SHARED
from tests.samples import coco_tree, dataset, write_coco, write_json

MISSING = object()


def edited(path: tuple, value: object) -> dict:
    tree = coco_tree()
    place = tree
    for key in path[:-1]:
        place = place[key]
    if value is MISSING:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return tree


def image(key: str, value: object) -> dict:
    return edited(("images", 2, key), value)


def annotation(key: str, value: object) -> dict:
    return edited(("annotations", 4, key), value)


def category(key: str, value: object) -> dict:
    return edited(("categories", 1, key), value)


def grown(key: str, row: dict) -> dict:
    tree = coco_tree()
    tree[key].append(row)
    return tree


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "broken json"),
        (b'{"images": [', "broken json .*line 1 column 13"),
        (b"\xff\xfe\x00", "broken json"),
        (b"[" * 100_000, "broken json"),
        (b'{"images": ' + b"9" * 5000 + b"}", "broken json"),
        (b"[]", r"holds \[\]"),
        (b"null", "holds None"),
    ],
)
def test_no_coco_json(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=message) as e:
        load_coco(path)
    assert str(path) in str(e.value)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        *((edited((key,), MISSING), f"no key '{key}'") for key in ("images", "annotations", "categories")),
        *((edited((key,), None), f"'{key}' must be a list") for key in ("images", "annotations", "categories")),
        *((edited((key, 1), [5] * 99), f"'{key}' must be a list of obj") for key in ("images", "annotations")),
        (edited(("images",), []), "no images"),
        (edited(("categories",), []), "no categories"),
        (edited(("annotations",), []), "not one labelled box"),
        (edited(("annotations",), [{**coco_tree()["annotations"][0], "iscrowd": 1}]), "not one labelled box.*iscrowd"),
        *(
            (image("id", v), "image at position 2 .*'id' is .*must be an integer")
            for v in (MISSING, None, True, 1.0, "3", [1], {"a": 1}, 10**30, math.nan)
        ),
        *(
            (image("file_name", v), "image 3: file_name is")
            for v in (MISSING, None, 3, "", ["x"], "\ud800", "x" * 5000)
        ),
        *(
            (image("file_name", v), "image 3: file_name .* leaves the image folder")
            for v in ("../x.png", "/etc/passwd", "a/../../x", "C:\\x", "..\\x.png", "\\\\host\\x", "a\0b")
        ),
        *(
            (image(key, v), f"image 3: '{key}' is .*positive integer")
            for key in ("width", "height")
            for v in (MISSING, None, "32", 0, -5, True, 32.0, math.nan, 10**30)
        ),
        (image("new", "yes"), "image 3: 'new' is 'yes'; it must be true or false"),
        *((image("root", v), "image 3: 'root' is .*absolute") for v in ([1], "..", "", 5)),
        *((annotation("id", v), "annotation at position 4") for v in (MISSING, None, True, "3", [1], 10**30, 9.5)),
        *(
            (annotation("image_id", v), "annotation 6: .*image_id")
            for v in (MISSING, None, True, "3", [1], {}, 3.0, 99)
        ),
        *((annotation("category_id", v), "annotation 6: .*category_id") for v in (MISSING, None, "3", [1], {}, 99)),
        *(
            (annotation("bbox", v), "annotation 6: bbox is .*four finite numbers")
            for v in (MISSING, None, "1,2,3,4", [1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, True], {"x": 1}, [[1], 2, 3, 4])
        ),
        *((annotation("bbox", [1, 2, v, 4]), "bbox is") for v in (math.nan, math.inf, -math.inf, 10**400, 1e300)),
        *((annotation("iscrowd", v), "annotation 6: iscrowd is") for v in (2, "1", [], math.nan)),
        *((annotation("area", v), "annotation 6: area is") for v in ("1", [], True, math.nan, 10**400)),
        *((category("id", v), "category at position 1") for v in (MISSING, None, True, "3", [1], 10**30)),
        *((category("name", v), "category 2") for v in (MISSING, None, 3, [], "", "\ud800")),
        (grown("images", coco_tree()["images"][0]), "image id 1 occurs twice"),
        (grown("annotations", coco_tree()["annotations"][0]), "annotation id 2 occurs twice"),
        (grown("categories", {"id": 1, "name": "cow"}), "category id 1 occurs twice"),
        (grown("categories", {"id": 9, "name": "cat"}), "category name 'cat' occurs twice"),
        *(
            (edited(("softteacher",), v), "'softteacher' is")
            for v in (5, {}, {"root": 5}, {"root": "../.."}, {"root": ""})
        ),
    ],
)
def test_refused(tmp_path, tree, message):
    path = write_json(tmp_path / "a.json", tree)
    with pytest.raises(UserError, match=message) as e:
        load_coco(path)
    assert str(e.value).startswith(path)
    assert len(str(e.value).splitlines()) == 1
    assert len(str(e.value)) < 400 + len(path)


@pytest.mark.parametrize(
    ("bbox", "area", "expected", "new_area"),
    [
        ([2, 3, 8, 10], None, [2, 3, 8, 10], 80),
        ([2, 3, 8, 10], -1, [2, 3, 8, 10], 80),  # of a tool that doesn't know it
        ([-4, 3, 10, 10], None, [0, 3, 6, 10], 60),
        ([28, 20, 10, 10], None, [28, 20, 4, 4], 16),
        ([-4, 3, 10, 10], 33, [0, 3, 6, 10], 33),  # the area of a mask stays
        ([-0.5, 3, 10, 10], None, [-0.5, 3, 10, 10], 100),  # within what labelling tools round
        ([2, 3, 0, 10], None, None, None),
        ([2, 3, -1, 10], None, None, None),
        ([40, 3, 5, 5], None, None, None),
        ([2, -9, 5, 5], None, None, None),
    ],
)
def test_boxes_are_repaired_and_counted(tmp_path, capsys, bbox, area, expected, new_area):
    tree = coco_tree()
    tree["annotations"][3] |= {"bbox": bbox} | ({"area": area} if area else {})
    found = load_coco(write_json(tmp_path / "a.json", tree | {"softteacher": {"root": "/nowhere"}})).annotations
    said = capsys.readouterr().err
    if expected is None:
        assert 5 not in found.ids
        assert len(found) == 15
        assert "1 boxes without an area inside their image were dropped (ids 5)" in said
    else:
        row = found.ids.tolist().index(5)
        assert found.bbox[row].tolist() == expected
        assert found.area[row] == new_area
        assert ("1 boxes reached out of the image and were clipped (ids 5)" in said) == (expected != bbox)


def test_optional_keys_are_optional(tmp_path):
    plain = coco_tree()
    rich = coco_tree() | {"info": {"x": 1}, "licenses": None, "extra": 5}
    for row in rich["annotations"]:
        row |= {"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0, "segmentation": [], "extra": None}
    root = {"softteacher": {"root": "/nowhere"}}
    null = coco_tree()
    for row in null["annotations"]:
        row |= dict.fromkeys(("area", "iscrowd", "segmentation"))
    a, *others = (load_coco(write_json(tmp_path / f"{n}.json", t | root)) for n, t in enumerate((plain, rich, null)))
    assert [b.fingerprint() for b in others] == [a.fingerprint()] * 2


@pytest.mark.parametrize("value", [MISSING, None])
def test_an_image_without_boxes_needs_no_size(tmp_path, value):
    tree = image("width", value) | {"softteacher": {"root": "/nowhere"}}
    del tree["images"][2]["height"]
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] != 3]
    found = load_coco(write_json(tmp_path / "a.json", tree))
    assert [i.width for i in found.images[:4]] == [32, 32, 0, 32]
    found.save(tmp_path / "b.json")
    assert load_coco(tmp_path / "b.json").images == found.images


def test_folders_as_windows_writes_them(tmp_path):
    tree = image("file_name", "a\\b.png") | {"softteacher": {"root": "/nowhere"}}
    assert load_coco(write_json(tmp_path / "a.json", tree)).images[2].file_name == "a/b.png"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(0, "pets", "none"), (1, "cat", "pets"), (2, "dog", "pets")], [1, 2]),
        ([(0, "cat", "none"), (1, "cat", "cat"), (2, "dog", "cat")], [1, 2]),  # the project's name is a class's
        ([(1, "cat", "none"), (2, "dog", "cat"), (3, "cow", "cat")], [1, 2, 3]),  # boxes make it a class
        ([(0, "pets", "none"), (1, "cat", "none"), (2, "dog", "none")], [0, 1, 2]),  # nobody's parent
        ([(0, "cow", "cow"), (1, "cat", "cat"), (2, "dog", ["x"])], [0, 1, 2]),
    ],
)
def test_a_project_is_no_class(tmp_path, rows, expected):
    tree = coco_tree() | {"softteacher": {"root": "/nowhere"}}
    tree["categories"] = [{"id": i, "name": name, "supercategory": parent} for i, name, parent in rows]
    assert [i for i, _ in load_coco(write_json(tmp_path / "a.json", tree)).categories] == expected


def test_unlabelled_json_needs_images_only(tmp_path):
    tree = {"images": [{"id": 5, "file_name": "x.png"}], "softteacher": {"root": "/nowhere"}}
    path = write_json(tmp_path / "a.json", tree)
    found = load_coco(path, labeled=False)
    assert (len(found), found.categories, found.images[0].width) == (1, [], 0)
    with pytest.raises(UserError, match="no key 'annotations'"):
        load_coco(path)
    assert len(load_coco(write_json(tmp_path / "b.json", {"images": []}), labeled=False)) == 0


def test_save_and_load(tmp_path):
    tree = coco_tree(classes=("ä 方 <b>", 'q"\\'))
    tree["annotations"][1] |= {"iscrowd": 1, "segmentation": {"counts": "x", "size": [24, 32]}, "area": 7.25}
    tree["images"][0]["file_name"] = "ü/方.png"
    tree["images"][1]["new"] = True
    first = dataset(write_coco(tmp_path / "set", tree))
    assert [i.new for i in first.images] == [False, True] + [False] * 6
    first.save(tmp_path / "out" / "manifest.json")
    again = load_coco(tmp_path / "out" / "manifest.json")
    assert (again.images, again.categories, again.root) == (first.images, first.categories, first.root)
    assert again.fingerprint() == first.fingerprint()
    assert again.to_json() == first.to_json()
    for name in ("bbox", "labels", "area", "crowd", "ids", "image_index"):
        np.testing.assert_array_equal(getattr(again.annotations, name), getattr(first.annotations, name))
    assert Path(again.uri(0)).is_file()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_the_fast_parser_does_not_take(tmp_path, encoding):
    tree = coco_tree(classes=("ä 方", "dog")) | {"softteacher": {"root": "/nowhere"}, "info": [math.nan, math.inf]}
    tree["images"][0]["file_name"] = "\udcff.png"  # bytes that are no UTF-8, as os.listdir gives them
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps(tree, ensure_ascii=True).encode(encoding))
    first = load_coco(path)
    first.save(tmp_path / "b.json")
    again = load_coco(tmp_path / "b.json")
    assert again.images[0].file_name == "\udcff.png"
    assert again.to_json() == first.to_json()


def test_the_fingerprint_of_a_release_to_the_next(tmp_path):
    path = write_json(tmp_path / "a.json", coco_tree(classes=("ä 方", "dog")) | {"softteacher": {"root": "/nowhere"}})
    assert load_coco(path).fingerprint().startswith("d0eb38ef35d7")


def test_fingerprint_is_of_the_content(tmp_path):
    tree = coco_tree()
    shuffled = {key: list(reversed(tree[key])) for key in ("categories", "annotations", "images")}
    # boxes of one image keep the order of the file
    shuffled["annotations"] = sorted(shuffled["annotations"], key=lambda a: (-a["image_id"], a["id"]))
    prints = [
        load_coco(write_json(tmp_path / f"{n}.json", t | {"softteacher": {"root": root}})).fingerprint()
        for n, (t, root) in enumerate([(tree, "/a"), (tree, "s3://b"), (shuffled, "/a")])
    ]
    assert len(set(prints)) == 1
    for n, other in enumerate(
        (annotation("bbox", [2, 3, 8, 10.5]), category("name", "cow"), image("file_name", "z.png"))
    ):
        path = write_json(tmp_path / f"other-{n}.json", other | {"softteacher": {"root": "/a"}})
        assert load_coco(path).fingerprint() != prints[0]


def test_one_name_in_two_roots_is_two_files(tmp_path):
    tree = image("file_name", "2.png") | {"softteacher": {"root": "/a"}}
    tree["images"][2]["root"] = "/b"
    assert [load_coco(write_json(tmp_path / "a.json", tree)).uri(n) for n in (1, 2)] == ["/a/2.png", "/b/2.png"]


def test_targets_and_select(tmp_path):
    tree = coco_tree()
    tree["annotations"][5]["iscrowd"] = 1  # the second box of image 3
    found = dataset(write_coco(tmp_path, tree))
    boxes, labels = found.targets(2)
    assert boxes.tolist() == [[2, 3, 10, 13]]
    assert labels.tolist() == [1]
    assert found.class_counts() == {"cat": 7, "dog": 8}
    part = found.select([6, 2, 2])
    assert [i.id for i in part.images] == [3, 7]
    assert part.annotations.image_index.tolist() == [0, 0, 1, 1]
    assert part.targets(0)[0].tolist() == boxes.tolist()
    assert len(found.select([])) == 0


@pytest.mark.parametrize(
    ("json_place", "image_place"),
    [
        ("annotations/instances_train2017.json", "images/train2017"),
        ("annotations/instances_train.json", "images"),
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train.json", "."),
        ("instances.json", "images"),
        ("instances.json", "."),
    ],
)
def test_images_are_found_beside_the_json(tmp_path, monkeypatch, json_place, image_place):
    path = write_json(tmp_path / json_place, coco_tree())
    (tmp_path / image_place).mkdir(parents=True, exist_ok=True)
    (tmp_path / image_place / "2.png").touch()
    found = load_coco(path)
    assert Path(found.root).resolve() == (tmp_path / image_place).resolve()
    monkeypatch.chdir(tmp_path)
    assert Path(load_coco(json_place).root).is_absolute()
    monkeypatch.chdir(Path(path).parent)  # of which no name of a folder is left in the path
    for name in (Path(path).name, f"./{Path(path).name}", f"../{Path(path).parent.name}/{Path(path).name}"):
        assert load_coco(name).root == found.root


@pytest.mark.parametrize("there", [5, 30, 99])
def test_one_image_in_ten_is_enough_to_find_them(tmp_path, there):
    path = write_json(tmp_path / "annotations" / "instances_train.json", coco_tree(100))
    (tmp_path / "images").mkdir()
    for n in range(max(1, there - 9), there + 1):
        (tmp_path / "images" / f"{n}.png").touch()
    assert load_coco(path).root == str(tmp_path / "images")


def test_images_are_not_found(tmp_path):
    with pytest.raises(UserError, match=r"its images are not found .*put them into"):
        load_coco(write_json(tmp_path / "annotations" / "instances_train.json", coco_tree()))


def test_a_link_must_stay_inside(tmp_path):
    folder = write_coco(tmp_path / "set")
    images = folder / "images"
    (images / "1.png").rename(images / "real.png")
    (images / "1.png").symlink_to("real.png")
    (images / "2.png").rename(tmp_path / "outside.png")
    (images / "2.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "link").symlink_to(folder)  # a link to the whole data set is fine
    found = dataset(tmp_path / "link")
    assert Path(found.uri(0)).is_file()
    with pytest.raises(UserError, match=r"image 2: file_name '2\.png' leaves the image folder by a link"):
        found.uri(1)


def test_on_s3(s3, tmp_path):
    storage.copy(write_coco(tmp_path / "set"), f"{s3}/set")
    found = load_coco(f"{s3}/set/annotations/instances_train.json")
    assert found.uri(0) == f"{s3}/set/images/1.png"
    assert found.fingerprint() == dataset(tmp_path / "set").fingerprint()
    storage.write_bytes(f"{s3}/bad/instances.json", json.dumps(image("file_name", "../../x.png")).encode())
    with pytest.raises(UserError, match="leaves the image folder"):
        load_coco(f"{s3}/bad/instances.json")


def test_a_json_at_the_root_of_a_bucket(s3, tmp_path, monkeypatch):
    """Its images are in the bucket, whatever is called so in the working folder."""
    bucket = s3.removeprefix("s3://").split("/")[0]
    folder = write_coco(tmp_path / "set")
    storage.copy(folder / "annotations" / "instances_train.json", f"s3://{bucket}/rooted.json")
    storage.copy(folder / "images", f"s3://{bucket}/images")
    monkeypatch.chdir(folder)
    assert load_coco(f"s3://{bucket}/rooted.json").uri(0) == f"s3://{bucket}/images/1.png"
    for name in ("rooted.json", "images"):
        storage.remove(f"s3://{bucket}/{name}")


def test_real_coco_with_crowds_and_sparse_ids():
    file = SHARED / "datasets" / "coco80_mini" / "annotations" / "instances_val.json"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    ours, theirs = load_coco(file), COCO(str(file))
    assert [i.id for i in ours.images] == sorted(theirs.imgs)
    assert [i for i, _ in ours.categories] == sorted(theirs.cats)
    assert ours.categories[-1][0] == 90  # 80 classes
    assert int(ours.annotations.crowd.sum()) == sum(a["iscrowd"] for a in theirs.anns.values()) > 0
    for i, row in enumerate(ours.annotations.ids.tolist()):
        assert ours.annotations.bbox[i].tolist() == theirs.anns[row]["bbox"]
        assert ours.annotations.area[i] == theirs.anns[row]["area"]
        assert ours.categories[ours.annotations.labels[i]][0] == theirs.anns[row]["category_id"]
