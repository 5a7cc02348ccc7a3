"""The split: the same on every machine, without replacement, complete, and nothing is written when it fails."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from softteacher import storage
from softteacher.data import split as module
from softteacher.data.coco import load_coco
from softteacher.data.split import find_annotations, images_only, split
from softteacher.errors import UserError
from tests.samples import coco_tree, write_coco, write_json


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_coco(tmp_path_factory.mktemp("split") / "set", coco_tree(20)))


def parts(out):
    return [load_coco(storage.join(out, f"{n}.json"), labeled=False) for n in ("labeled", "unlabeled", "validation")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"percent": 25}, [6, 7, 17, 18, 20]),
        ({"percent": 25, "fold": 2}, [3, 5, 6, 19, 20]),
        ({"percent": 25, "seed": 1}, [6, 7, 14, 16, 18]),
        ({"percent": 5}, [17]),
        ({"percent": 25, "validation_fraction": 0.2}, [6, 7, 17, 18]),
    ],
)
def test_ids_are_the_same_on_every_machine(data, tmp_path, arguments, expected):
    facts = split(data, str(tmp_path / "out"), **arguments)
    assert facts["labeled"]["ids"] == expected
    assert [i.id for i in parts(tmp_path / "out")[0].images] == expected
    assert json.loads((tmp_path / "out" / "split.json").read_text()) == facts


@pytest.mark.parametrize("fraction", [None, 0.25])
def test_parts_are_disjoint_and_complete(data, tmp_path, fraction):
    facts = split(data, str(tmp_path / "a"), percent=30, validation_fraction=fraction)
    labeled, unlabeled, validation = ([i.id for i in part.images] for part in parts(tmp_path / "a"))
    train = labeled + unlabeled + (validation if fraction else [])
    assert sorted(train) == list(range(1, 21))
    assert len(labeled) == (4 if fraction else 6)
    assert len(validation) == (5 if fraction else 4)
    assert facts["unlabeled"]["boxes_per_class"] == {"cat": len(unlabeled), "dog": len(unlabeled)}
    split(data, str(tmp_path / "b"), percent=30, validation_fraction=fraction)
    for name in ("labeled.json", "unlabeled.json", "validation.json", "split.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_validation_images_are_not_trained_on(tmp_path, capsys):
    """A train json often lists all images; those of the val json are left out of it, labelled and unlabelled."""
    shared = write_coco(tmp_path / "set", coco_tree(20), coco_tree(4, first=3))
    split(str(shared), str(tmp_path / "out"), percent=50)
    labeled, unlabeled, validation = ([i.id for i in part.images] for part in parts(tmp_path / "out"))
    assert validation == [3, 4, 5, 6]
    assert sorted(labeled + unlabeled) == [1, 2, *range(7, 21)]
    assert "4 of its 20 images are in" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"all its images are in .*instances_val.json, too"):
        split(str(write_coco(tmp_path / "same", coco_tree(8), coco_tree(8))), str(tmp_path / "no"), percent=50)


def test_the_data_is_never_replaced(tmp_path):
    """A person's only annotations may have the name of a part, here behind a link."""
    folder = write_coco(tmp_path / "set", coco_tree(20))
    file = (folder / "annotations" / "instances_train.json").rename(folder / "labeled.json")
    (tmp_path / "link").symlink_to(folder)
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"--out .*link: a part would replace .*set/labeled\.json, .*another folder"):
        split(str(file), str(tmp_path / "link"), percent=20, validation_fraction=0.2)
    assert file.read_bytes() == before
    split(str(file), str(tmp_path / "out"), percent=20, validation_fraction=0.2)


def test_folds_differ_but_each_is_without_replacement(data, tmp_path):
    folds = [split(data, str(tmp_path / str(f)), percent=50, fold=f)["labeled"]["ids"] for f in range(1, 6)]
    assert len({tuple(ids) for ids in folds}) == 5
    assert all(len(set(ids)) == 10 for ids in folds)


@pytest.mark.parametrize(("percent", "count"), [(1, 1182), (5, 5914), (10, 11828)])
def test_coco_sized_counts(tmp_path, monkeypatch, percent, count):
    """1, 5 and 10 % of train2017, rounded down as everybody does."""
    images = [{"id": n * 7, "file_name": f"{n}.jpg", "width": 9, "height": 9} for n in range(1, 118_288)]
    annotations = [{"id": n, "image_id": n * 7, "category_id": 1, "bbox": [1, 1, 5, 5]} for n in range(1, 118_288)]
    tree = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    write_json(tmp_path / "annotations" / "instances_train2017.json", tree | {"softteacher": {"root": "/nowhere"}})
    small = coco_tree(2) | {"categories": tree["categories"], "softteacher": {"root": "/nowhere"}}
    small["annotations"] = [a | {"category_id": 1} for a in small["annotations"]]
    write_json(tmp_path / "annotations" / "instances_val2017.json", small)
    monkeypatch.setattr(module, "check_images", lambda dataset, *_: dataset)  # there are none to be looked at
    facts = split(str(tmp_path), str(tmp_path / "out"), percent=percent)
    assert facts["labeled"]["images"] == count
    assert facts["unlabeled"]["images"] == 118_287 - count
    if percent == 1:
        assert facts["labeled"]["ids_sha256"].startswith("f142500504")


@pytest.mark.parametrize("percent", [10, 15, 25])
def test_stratify_covers_every_class(tmp_path, percent):
    classes = [f"c{n}" for n in range(6)]
    tree = coco_tree(40, classes=classes)
    for row in tree["annotations"]:  # c1 .. c5 are on one or two images each, c0 is everywhere else
        row["category_id"] = {4: 2, 9: 2, 12: 3, 13: 4, 14: 5, 15: 6}.get(row["image_id"], 1)
    val = coco_tree(2, classes=classes, first=101)
    folder = str(write_coco(tmp_path / "set", tree, val))
    facts = split(folder, str(tmp_path / "s"), percent=percent, stratify=True)
    counts = facts["labeled"]["boxes_per_class"]
    assert facts["labeled"]["images"] == 40 * percent // 100
    assert sum(n > 0 for n in counts.values()) == min(6, facts["labeled"]["images"])
    plain = split(folder, str(tmp_path / "p"), percent=percent)["labeled"]["boxes_per_class"]
    assert sum(n > 0 for n in plain.values()) < sum(n > 0 for n in counts.values())


def test_missing_classes_are_named(data, tmp_path, capsys):
    tree = coco_tree(20)
    for row in tree["annotations"]:
        row["category_id"] = 2 if row["image_id"] == 2 else 1
    folder = write_coco(tmp_path / "set", tree)
    split(str(folder), str(tmp_path / "out"), percent=10)
    assert "warning: no labelled box of dog" in capsys.readouterr().err


@pytest.mark.parametrize(("bare", "told"), [(10, False), (11, True)])
def test_labelled_images_without_boxes_are_told(tmp_path, capsys, bare, told):
    tree = coco_tree(20)
    tree["annotations"] = [row for row in tree["annotations"] if row["image_id"] > bare]
    folder = write_coco(tmp_path / "set", tree)
    split(str(folder), str(tmp_path / "out"), percent=100, unlabeled=str(write_coco(tmp_path / "more") / "images"))
    said = " ".join(capsys.readouterr().err.split())
    assert (f"warning: {bare} of the 20 labelled images have no box" in said) is told


@pytest.mark.parametrize("where", ["local", "s3"])
def test_more_unlabelled_images(data, tmp_path, where, request, monkeypatch):
    more = tmp_path / "more"
    write_coco(more / "deep" / "deeper", coco_tree(3))
    shutil.rmtree(more / "deep" / "deeper" / "annotations")
    (more / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    folder, out = "more", str(tmp_path / "out")
    if where == "s3":
        s3 = request.getfixturevalue("s3")
        storage.copy(more, f"{s3}/more")
        storage.copy(data, f"{s3}/set")
        data, folder, out = f"{s3}/set", f"{s3}/more", f"{s3}/out"
    facts = split(data, out, percent=25, unlabeled=folder)
    _, unlabeled, _ = parts(out)
    assert facts["unlabeled"]["images"] == 15 + 7
    added = [i for i in unlabeled.images if i.root]
    assert [i.id for i in added] == list(range(105, 112))  # ids that no image of the data set has
    assert (added[0].width, added[0].height) == (32, 24)
    monkeypatch.chdir("/")  # manifests say where the images are, wherever they are read
    for index in range(len(unlabeled)):
        assert storage.read_bytes(unlabeled.uri(index))


def test_local_and_s3_give_the_same_split(data, tmp_path, s3):
    storage.copy(data, f"{s3}/set")
    here, there = split(data, str(tmp_path), percent=25), split(f"{s3}/set", f"{s3}/out", percent=25)
    for name in ("labeled", "unlabeled", "validation"):
        assert here[name] == there[name]
    assert sorted(f.name for f in storage.list_files(f"{s3}/out")) == sorted(
        ["labeled.json", "unlabeled.json", "validation.json", "split.json"]
    )


def test_broken_images_are_left_out(tmp_path, capsys):
    folder = write_coco(tmp_path / "set", coco_tree(20))
    (folder / "images" / "7.png").unlink()
    facts = split(str(folder), str(tmp_path / "out"), percent=50)
    assert facts["labeled"]["images"] + facts["unlabeled"]["images"] == 19
    assert 7 not in facts["labeled"]["ids"] + facts["unlabeled"]["ids"]
    said = capsys.readouterr().err
    assert "7.png: no such file" in said
    assert "1 of 20 images are missing or broken and left out" in said


def test_an_image_is_in_one_part_only(tmp_path, capsys, monkeypatch):
    """Of a folder of images some have labels; the folder is the unlabelled part, too, by whatever name."""
    folder = write_coco(tmp_path / "set", coco_tree(20))
    tree = json.loads((folder / "annotations" / "instances_train.json").read_text())
    kept = {i["id"] for i in tree["images"][:12]}
    tree["images"] = [i | {"file_name": f"./{i['file_name']}"} for i in tree["images"] if i["id"] in kept]
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] in kept]
    write_json(folder / "annotations" / "instances_train.json", tree)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    facts = split("set", "out", percent=100, unlabeled="link/images")
    files = [Path(part.uri(n)).resolve() for part in parts("out") for n in range(len(part))]
    assert len(files) == len(set(files)) == 24
    assert [facts[part]["images"] for part in ("labeled", "unlabeled", "validation")] == [12, 8, 4]
    assert "images: 16 of its 24 images are in set/annotations/instances_train.json and" in capsys.readouterr().err
    shutil.copytree("set/annotations", "twin/annotations")
    (tmp_path / "twin" / "images").symlink_to("../link/images")
    for file in (folder / "images").iterdir():
        if file in files[12:20]:  # the unlabelled ones
            file.unlink()
    with pytest.raises(UserError, match="link/images: all its images are in the data set; give others, or a lower"):
        split("twin", "out", percent=100, unlabeled="link/images")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({"percent": p}, "--percent .*: must be") for p in (0, -1, 101, np.nan, np.inf)),
        ({"percent": 100}, "--percent 100: leaves no unlabelled image"),
        *(({"percent": 5, "fold": f}, "--fold") for f in (0, -3)),
        *(({"percent": 5, "validation_fraction": f}, "--validation-fraction") for f in (0, 1, -1, np.nan, 0.99)),
        *(({"percent": 5, "max_bad_images": m}, "--max-bad-images") for m in (-1, 2, np.nan)),
        ({"percent": 5, "unlabeled": "/nowhere"}, "/nowhere: no such folder or prefix; check --unlabeled"),
        ({"percent": 5, "unlabeled": "/etc/hostname"}, "not a directory"),
    ],
)
def test_bad_arguments(data, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        split(data, str(tmp_path / "out"), **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "found", "message"),
    [
        (["instances_train.json", "instances_val.json"], ("instances_train.json", "instances_val.json"), ""),
        (["instances_train17.json", "captions_train17.json", "kp_val17.json"], ("instances_train17.json", None), ""),
        (["train.json", "val.json"], ("train.json", "val.json"), ""),
        (["i_Train.json", "i_Validation.json"], ("i_Train.json", "i_Validation.json"), ""),
        (["all.json"], ("all.json", None), ""),
        (["instances_val.json"], None, "found instances_val.json"),
        (["a.json", "b.json"], None, "found a.json, b.json"),
        (["train1.json", "train2.json"], None, "found train1.json, train2.json"),
        ([], None, "found no json"),
    ],
)  # fmt: skip
def test_find_annotations(tmp_path, files, found, message):
    for name in files:
        write_json(tmp_path / "annotations" / name, {})
    (tmp_path / "images").mkdir()
    if found:
        train, val = find_annotations(str(tmp_path))
        assert (train.rsplit("/", 1)[1], val and val.rsplit("/", 1)[1]) == found
    else:
        with pytest.raises(UserError, match=message):
            find_annotations(str(tmp_path))


def differing_classes(tree):
    tree["categories"].append({"id": 9, "name": "cow"})


def validation_without_boxes(tree):
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] == 1]


@pytest.mark.parametrize(
    ("edit", "arguments", "message"),
    [
        (differing_classes, {}, "class sets differ .*cow"),
        (validation_without_boxes, {"validation_fraction": 0.2}, "validation images have no boxes"),
        (validation_without_boxes, {"fold": 2}, "without one box"),
    ],
)
def test_bad_data(tmp_path, edit, arguments, message):
    tree = coco_tree(20)
    edit(tree)
    folder = str(write_coco(tmp_path / "set", tree))
    with pytest.raises(UserError, match=message):
        split(folder, str(tmp_path / "out"), percent=10, **arguments)
    assert not (tmp_path / "out").exists()


def test_images_only(tmp_path):
    assert len(images_only(str(tmp_path))) == 0
    for name in ("b.PNG", "a/z.jpeg", "c.txt", "ü.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = images_only(str(tmp_path))
    assert [(i.id, i.file_name) for i in found.images] == [(1, "a/z.jpeg"), (2, "b.PNG"), (3, "ü.webp")]


@pytest.mark.parametrize("name", ["2.png", ".//2.png"])
def test_a_file_under_two_ids(tmp_path, name):
    tree = coco_tree(8)
    tree["images"][2]["file_name"] = name
    write_coco(tmp_path / "set", tree)
    with pytest.raises(UserError, match=r"images 2 and 3 are one file, '.*2\.png', which could be labelled here"):
        split(str(tmp_path / "set"), str(tmp_path / "out"), percent=50)
    assert not (tmp_path / "out").exists()
