"""`rank`: the order by hand with a detector whose answers are painted into the images, and a real run."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask
from PIL import Image
from torch import nn

from softteacher.data.coco import load_coco
from softteacher.errors import UserError
from softteacher.evaluation.observe import Observed
from softteacher.evaluation.rank import MOST_ENTROPY, _reason, choose, measure, rank
from softteacher.evaluation.shard import Shard
from tests.samples import coco_tree, write_coco, write_json

ONE, TWO = 1, 2  # labels
BOX = [8.0, 16.0, 24.0, 32.0]  # in the 64 x 64 pixels that the detector sees
# by the grey of an image: its boxes (score, variance, label), and its feature
PAINTED = {
    0: ([], [5, 0, 0]),
    50: ([(0.95, 0.01, ONE)], [0, 5, 0]),
    100: ([(0.5, 0.2, ONE)], [0, 0, 5]),
    150: ([(0.5, 0.2, TWO), (0.04, 9, ONE)], [-5, -5, 0]),
    200: ([(0.5, 0.2, TWO)], [-5, -5, 0.1]),
}
NAMES = dict(zip("abcde", PAINTED, strict=True))


class Painted(nn.Module):
    def __init__(self, *_):
        super().__init__()

    def forward(self, images, sizes):
        out = []
        for grey in images[:, 0, 5, 5].tolist():
            boxes, feature = PAINTED[grey]
            score, variance, label = np.array(boxes).reshape(-1, 3).T
            out.append(
                Observed(
                    np.array([BOX] * len(boxes), np.float32).reshape(-1, 4),
                    score.astype(np.float32),
                    label.astype(np.int64),
                    variance=variance,
                    feature=np.array(feature, np.float32),
                )
            )
        return out


@pytest.fixture
def painted(tmp_path, monkeypatch):
    monkeypatch.setattr("softteacher.evaluation.rank.Observer", Painted)
    folder = tmp_path / "images"
    folder.mkdir()
    for name, grey in NAMES.items():
        Image.new("RGB", (32, 32), (grey, grey, grey)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def labels(tmp_path, trained):
    """Labels of the digits: eight of one, none of two."""
    tree = coco_tree(4, classes=json.loads((trained / "classes.json").read_text()))
    tree["categories"] = json.loads((trained / "classes.json").read_text())
    for row in tree["annotations"]:
        row["category_id"] = tree["categories"][ONE]["id"]
    write_coco(tmp_path / "labels", tree)
    return str(tmp_path / "labels" / "annotations" / "instances_train.json")


def test_order_by_hand(trained, painted, labels, tmp_path, capsys):
    rows = rank(str(trained), str(painted), str(tmp_path / "out"), labeled=labels)
    assert labels in capsys.readouterr().err.replace("\n", "")
    # variance, entropy, shortage: the share of the others that is under it
    expected = {
        "d": (2 / 4, 2 / 4, 3 / 4),
        "c": (2 / 4, 2 / 4, 1 / 4),
        "b": (1 / 4, 0, 2 / 4),
        "a": (0, 0, 0),
        "e": (2 / 4, 2 / 4, 3 / 4),  # as good as d, but it looks like it
    }
    assert [r["file_name"] for r in rows] == [f"{name}.png" for name in expected]
    assert [r["rank"] for r in rows] == [1, 2, 3, 4, 5]
    for row, terms in zip(rows, expected.values(), strict=True):
        assert [row[k] for k in ("variance", "entropy", "shortage")] == pytest.approx(terms)
        assert row["score"] == pytest.approx(np.mean(terms), abs=1e-4)
    by_name = {r["file_name"][0]: r for r in rows}
    assert by_name["d"]["classes"] == ["two"]
    assert by_name["d"]["reason"] == "rare class two (0 labels)"
    assert by_name["c"]["reason"] == "box edges unsure, 1 box between yes and no"
    assert by_name["a"]["reason"] == "nothing found"
    assert by_name["c"]["uri"] == str(painted / "c.png")
    assert by_name["d"]["variance_max"] == 0.2  # a box under .05 says nothing


def test_files(trained, painted, labels, tmp_path):
    out = tmp_path / "out"
    rows = rank(str(trained), str(painted), str(out), labeled=labels, top=3)
    assert {p.name for p in out.iterdir()} == {"ranking.csv", "ranking.json", "to_label.json", "contact_sheet.jpg"}
    assert json.loads((out / "ranking.json").read_text()) == rows
    with (out / "ranking.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(r["rank"], r["file_name"], r["classes"]) for r in lines] == [
        ("1", "d.png", "two"),
        ("2", "c.png", "one"),
        ("3", "b.png", "one"),
    ]
    # a labelling tool gets what our own reader takes, too
    data = load_coco(out / "to_label.json")
    assert [i.file_name for i in data.images] == ["b.png", "c.png", "d.png"]
    assert {(i.width, i.height) for i in data.images} == {(32, 32)}
    assert [data.targets(n)[0].tolist() for n in range(3)] == [[[v / 2 for v in BOX]]] * 3
    assert [data.targets(n)[1].tolist() for n in range(3)] == [[ONE], [ONE], [TWO]]
    assert [r["score"] for r in json.loads((out / "to_label.json").read_text())["annotations"]] == [0.5, 0.5, 0.95]
    with Image.open(out / "contact_sheet.jpg") as sheet:
        assert sheet.size[0] == 3 * 492 + 12
        assert np.asarray(sheet.crop((0, sheet.height - 40, 480, sheet.height))).min() < 50  # words
    again = tmp_path / "again"
    rank(str(trained), str(painted), str(again), labeled=labels, top=3)
    assert all((again / p.name).read_bytes() == p.read_bytes() for p in out.iterdir())


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([], (0, 0, 0)),
        ([(0.04, 1, ONE)], (0, 0, 0)),
        ([(0.9, 0.1, ONE), (0.3, 0.5, ONE)], ((0.09 + 0.15) / 1.2, 0.8813, 0.9 / 2)),
        ([(0.5, 0.1, ONE), (0.5, 0.1, TWO)], (0.1, 2, 0.5 / 2 + 0.5)),
        ([(0.5, 0.1, TWO)] * 50, (0.1, MOST_ENTROPY, 0.5)),
        ([(1.0, 0.0, TWO)], (0, 0, 1)),
    ],
)
def test_measure(boxes, expected):
    score, variance, label = np.array(boxes, float).reshape(-1, 3).T
    d = Observed(np.zeros((len(boxes), 4)), score, label.astype(np.int64), variance=variance, feature=np.zeros(1))
    found = measure(d, np.array([1, 1 / 2, 1]))
    assert [found[k] for k in ("variance", "entropy", "shortage")] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("order", "top", "expected"),
    [
        ([0, 1, 2, 3], 2, ([0, 2], 1)),
        ([0, 1, 2, 3], 4, ([0, 2, 3, 1], 1)),
        ([1, 0, 2, 3], 3, ([1, 2, 3], 1)),
        ([2, 3, 0, 1], 2, ([2, 3], 0)),
    ],
)
def test_choose(order, top, expected):
    features = np.array([[100, 1, 0], [100, 1.001, 0], [100, -1, 1], [100, -1, -1]], np.float32)
    assert choose(order, features, top) == expected


def test_an_image_that_is_like_all_others_is_not_called_unsure():
    d = Observed(np.zeros((1, 4)), np.array([0.9]), np.array([0]), variance=np.zeros(1), feature=np.zeros(1))
    assert _reason(np.zeros(3), d, ["cat"], np.array([500])) == "nothing stands out"


def test_images_that_are_all_the_same_are_all_listed():
    assert choose([2, 0, 1], np.ones((3, 4), np.float32), 3)[0] == [2, 0, 1]
    assert choose([0], np.ones((1, 4), np.float32), 5)[0] == [0]


def test_a_real_run(trained, manifests, tmp_path, capsys):
    rows = rank(str(trained), str(manifests / "unlabeled.json"), str(tmp_path / "out"), top=4)
    assert f"counted in {manifests / 'labeled.json'}, which the model was trained on" in capsys.readouterr().err
    assert len(rows) == 4
    assert [r["score"] for r in rows] == sorted((r["score"] for r in rows), reverse=True)
    assert all(r["variance_mean"] > 0 for r in rows)
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    facts = json.loads((moved / "provenance.json").read_text())
    facts["data"]["labeled"]["source"] = "/nowhere/labeled.json"
    (moved / "provenance.json").write_text(json.dumps(facts))
    rank(str(moved), str(manifests / "unlabeled.json"), str(tmp_path / "out2"), top=4)
    assert "counted in the model's validation set" in capsys.readouterr().err


def test_odd_names_and_a_broken_image(trained, painted, labels, tmp_path, capsys):
    (painted / "b.png").write_bytes(b"")
    (painted / "c.png").rename(painted / "ü 方 <b>.png")
    odd = os.fsdecode(b"\xff.png")
    (painted / "d.png").rename(painted / odd)
    rows = rank(str(trained), str(painted), str(tmp_path / "out"), labeled=labels)
    assert "1 of 5 images are missing or broken and left out" in capsys.readouterr().err
    assert {r["file_name"] for r in rows} == {"a.png", "ü 方 <b>.png", odd, "e.png"}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no folder", "/nowhere: no such folder or prefix"),
        ("no images", "no images in it; give the images that might be labelled"),
        ("top", "--top 0: must be 1 or more"),
        ("classes", r"class sets differ \(e\.g\. .*give labels"),
    ],
)
def test_bad_input(trained, painted, tmp_path, what, message):
    (tmp_path / "empty").mkdir()
    other = write_coco(tmp_path / "other") / "annotations" / "instances_train.json"
    source = {"no folder": "/nowhere", "no images": str(tmp_path / "empty")}.get(what, str(painted))
    with pytest.raises(UserError, match=message):
        rank(
            str(trained),
            source,
            str(tmp_path / "out"),
            top=0 if what == "top" else 5,
            labeled=str(other) if what == "classes" else None,
        )
    assert not (tmp_path / "out").exists()


def test_an_unlabelled_json(trained, painted, labels, tmp_path):
    tree = {"images": [{"id": 7, "file_name": "c.png"}, {"id": 9, "file_name": "d.png"}]}
    source = write_json(painted.parent / "unlabeled.json", tree)
    rows = rank(str(trained), source, str(tmp_path / "out"), labeled=labels)
    assert [r["file_name"] for r in rows] == ["d.png", "c.png"]


def test_corrections_are_not_replaced(trained, painted, labels, tmp_path):
    """What nobody has touched may be, by other settings too, and so may what a tool has only written anew."""
    out, file = str(tmp_path / "out"), tmp_path / "out" / "to_label.json"
    rank(str(trained), str(painted), out, labeled=labels, top=3)
    file.write_text(json.dumps(json.loads(file.read_text()), indent=1, sort_keys=True))
    rank(str(trained), str(painted), out, labeled=labels, top=2)
    tree = json.loads(file.read_text())
    assert len(tree["images"]) == 2
    tree["annotations"].pop()
    for corrected in (tree, {key: tree[key] for key in ("images", "annotations", "categories")}, []):
        write_json(file, corrected)
        with pytest.raises(UserError, match=r"to_label\.json: is not as `softteacher rank` writes it"):
            rank(str(trained), str(painted), out, labeled=labels, top=2)
        assert json.loads(file.read_text()) == corrected


def test_only_masks_that_are_drawn_are_kept(trained, painted, labels, tmp_path, monkeypatch):
    """A mask is as large as all else of its box a hundred times; a shard writes what a run keeps in memory."""

    class WithMasks(Painted):
        def forward(self, images, sizes):
            out = super().forward(images, sizes)
            for d in out:
                faint = Observed(d.boxes, d.scores * 0.1, d.labels, variance=d.variance, feature=d.feature)
                for key in ("boxes", "scores", "labels", "variance"):
                    setattr(d, key, np.concatenate([getattr(d, key), *[getattr(faint, key)] * 50]))
                d.masks = np.ones((len(d), 28, 28), np.float16)
            return out

    monkeypatch.setattr("softteacher.evaluation.rank.Observer", WithMasks)
    whole = rank(str(trained), str(painted), str(tmp_path / "whole"), labeled=labels)
    tree = json.loads((tmp_path / "whole" / "to_label.json").read_text())
    assert [coco_mask.area(row["segmentation"]) for row in tree["annotations"]] == [64] * 4
    parts = [str(tmp_path / str(n)) for n in (1, 2)]
    for n, part in enumerate(parts, start=1):
        rank(str(trained), str(painted), part, labeled=labels, shard=Shard(n, 2))
    arrays = [dict(np.load(file)) for part in parts for file in (tmp_path / part).glob("*.npz")]
    assert sum(len(a["masks"]) for a in arrays if "masks" in a) == 4
    assert sum(len(a["scores"]) for a in arrays if "variance" in a) == 5 * 51
    assert rank(str(trained), str(painted), str(tmp_path / "joined"), labeled=labels, parts=parts) == whole
    assert (tmp_path / "joined" / "to_label.json").read_bytes() == (tmp_path / "whole" / "to_label.json").read_bytes()
