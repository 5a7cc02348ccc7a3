"""The batch of step t is a pure function of (seed, t)."""

import numpy as np
import pytest
import torch
from PIL import Image

from softteacher.config import load_settings
from softteacher.data.images import PAD
from softteacher.data.loader import batches, pad
from softteacher.data.split import images_only
from softteacher.data.views import project_boxes
from softteacher.errors import UserError
from tests.samples import TINY, coco_tree, dataset, write_coco


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("loader") / "set")


def settings(*overrides):
    return load_settings(None, [*TINY, *overrides])


def load(folder, start=0, overrides=(), burn_in=0, unlabeled=True):
    unlabeled = images_only(str(folder / "images")) if unlabeled else None
    return list(batches(dataset(folder), unlabeled, settings(*overrides), start, burn_in))


def same(a, b):
    for name in ("labeled", "weak", "strong"):
        x, y = getattr(a, name), getattr(b, name)
        for key in ("images", "sizes", "matrices"):
            if not torch.equal(getattr(x, key), getattr(y, key)):
                return False
        if not all(torch.equal(p, q) for p, q in zip([*x.boxes, *x.labels], [*y.boxes, *y.labels], strict=True)):
            return False
    return True


def test_a_batch_does_not_depend_on_start_and_workers(folder):
    first = load(folder)
    assert len(first) == 6
    for start, workers in ((4, 0), (1, 2)):
        again = load(folder, start, [f"data.workers={workers}"])
        assert len(again) == 6 - start
        assert all(same(a, b) for a, b in zip(first[start:], again, strict=True))
    assert not same(first[0], first[1])
    assert not same(first[0], load(folder, 5, ["training.seed=1"])[0])
    assert not any(same(a, b) for a, b in zip(first, load(folder, 0, ["training.seed=1"]), strict=True))


def test_what_is_in_a_batch(folder):
    batch = load(folder, 5, ["training.unlabeled_per_batch=3"])[0]
    for views, count in ((batch.labeled, 2), (batch.weak, 3), (batch.strong, 3)):
        assert views.images.shape[:2] == (count, 3)
        assert views.images.dtype == torch.uint8
        assert views.images.shape[2] % 32 == 0 == views.images.shape[3] % 32
        assert (views.sizes <= torch.tensor(views.images.shape[2:])).all()
        assert views.matrices.shape == (count, 3, 3)
        for image, (height, width) in zip(views.images, views.sizes.tolist(), strict=True):
            grey = torch.tensor(PAD)[:, None, None]
            assert (image[:, height:] == grey).all()
            assert (image[:, :, width:] == grey).all()
    assert batch.weak.boxes == batch.strong.boxes == []
    assert batch.broken == {}


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """Images with a square of a colour of its own somewhere, which is its one box; the class says which half it is in,
    and the level of red which image it is. The first image is broken."""
    folder, tree = tmp_path_factory.mktemp("marked"), coco_tree(8)
    tree["annotations"] = []
    for n, image in enumerate(tree["images"]):
        image |= {"width": 96, "height": 72}
        x, y = (8 + 3 * n, 8 + 2 * n) if n % 2 else (56 + 2 * n, 30 - 2 * n)
        row = {"id": n + 1, "image_id": image["id"], "category_id": 1 if n % 2 else 2, "bbox": [x, y, 20, 24]}
        tree["annotations"].append(row)
    write_coco(folder, tree, coco_tree(1))  # no other images
    for n, (image, row) in enumerate(zip(tree["images"], tree["annotations"], strict=True)):
        pixels = np.zeros((72, 96, 3), np.uint8)
        x, y, w, h = row["bbox"]
        pixels[y : y + h, x : x + w] = (80 + 20 * n, 0, 255)
        Image.fromarray(pixels).save(folder / "images" / image["file_name"])
    (folder / "images" / tree["images"][0]["file_name"]).write_bytes(b"broken")
    return folder


def blue(image):
    """The box around what is blue in a view, [3, H, W], and the red there: which image it is."""
    ys, xs = torch.nonzero((image[2] > 150) & (image[1] < 60), as_tuple=True)
    red = image[0, ys, xs].float().median()
    return torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float(), round((red.item() - 80) / 20)


def test_labelled_boxes_are_those_of_their_image(marked):
    """Each view's box is around its own square, of its own class; also where another image is in for a broken one."""
    overrides = ["data.labeled_color=false", "data.max_bad_images=0.5", "training.iterations=12"]
    seen = set()
    for batch in load(marked, overrides=overrides):
        for image, boxes, labels in zip(batch.labeled.images, batch.labeled.boxes, batch.labeled.labels, strict=True):
            box, n = blue(image)
            seen.add(n)
            torch.testing.assert_close(boxes, box[None], atol=1.5, rtol=0)
            assert labels.tolist() == [0 if n % 2 else 1]
    assert seen == set(range(1, 8))


def test_weak_and_strong_show_the_same_image(marked):
    """What the teacher sees at a place, the student sees where the matrices carry it."""
    plain = ["data.strong_color=false", "data.strong_erase=false", "data.max_rotation=0"]
    (marked / "images" / "1.png").write_bytes((marked / "images" / "2.png").read_bytes())
    seen = set()
    for batch in load(marked, overrides=[*plain, "training.iterations=12"]):
        to_strong = batch.strong.matrices @ torch.linalg.inv(batch.weak.matrices)
        for weak, strong, matrix, size in zip(
            batch.weak.images, batch.strong.images, to_strong, batch.strong.sizes, strict=True
        ):
            (box, n), (there, m) = blue(weak), blue(strong)
            seen.add(n)
            assert n == m
            torch.testing.assert_close(project_boxes(box[None], matrix, size)[0], there, atol=3, rtol=0)
    assert len(seen) > 5


def test_an_epoch_shows_every_image_once(tmp_path, monkeypatch):
    folder = write_coco(tmp_path, coco_tree(8))
    seen = []
    import softteacher.data.loader as module

    read = module.read_image
    monkeypatch.setattr(module, "read_image", lambda d, i, *r: seen.append(i) or read(d, i, *r))
    load(folder, overrides=["training.iterations=8"], unlabeled=False)
    assert sorted(seen[:8]) == sorted(seen[8:]) == list(range(8))
    assert seen[:8] != seen[8:]


def drawn(folder, monkeypatch, share, flags, *, start=0, rank=0, world_size=1, steps=20, per_batch=4):
    """Indices of the unlabelled images of each step."""
    import softteacher.data.loader as module

    unlabeled = images_only(str(folder / "images"))
    for image, new in zip(unlabeled.images, flags, strict=False):
        image.new = new
    labeled, seen, read = dataset(folder), [], module.read_image
    overrides = [
        f"training.new_share={share}",
        f"training.iterations={steps}",
        f"training.unlabeled_per_batch={per_batch}",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(module.distributed, "rank", lambda: rank)
        patch.setattr(module.distributed, "world_size", lambda: world_size)
        patch.setattr(module, "read_image", lambda d, i, *r: (d is labeled or seen.append(i), read(d, i, *r))[1])
        for _ in batches(labeled, unlabeled, settings(*overrides), start):
            pass
    return [seen[n : n + per_batch] for n in range(0, len(seen), per_batch)]


@pytest.mark.parametrize(("share", "each"), [(0.25, {1}), (0.5, {2}), (0.3, {1, 2}), (0, {0}), (1, {4})])
def test_the_share_of_new_images(folder, monkeypatch, share, each):
    flags = [n in (1, 4, 6) for n in range(12)]
    found = drawn(folder, monkeypatch, share, flags)
    new = [[i for i in batch if flags[i]] for batch in found]
    assert {len(batch) for batch in new} == each
    assert abs(sum(map(len, new)) - share * 80) < 1
    # of either kind every image once before any twice
    for of_kind in ([i for batch in new for i in batch], [i for b in found for i in b if not flags[i]]):
        pool = {i for i in range(12) if flags[i] == flags[of_kind[0]]} if of_kind else set()
        for start in range(0, len(of_kind) - len(pool), max(1, len(pool))):
            assert set(of_kind[start : start + len(pool)]) == pool
    # it goes on anywhere, and many processes share what one would see
    assert drawn(folder, monkeypatch, share, flags, start=7) == found[7:]
    parts = [drawn(folder, monkeypatch, share, flags, rank=r, world_size=2, per_batch=2) for r in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == found


@pytest.mark.parametrize("flags", [[], [True] * 12])
def test_a_share_of_one_kind_only(folder, monkeypatch, flags):
    assert drawn(folder, monkeypatch, 0.5, flags) == drawn(folder, monkeypatch, "none", flags)


def test_burn_in_and_no_unlabelled_images(folder):
    assert [b.weak is None for b in load(folder, burn_in=4)] == [True] * 4 + [False] * 2
    assert [b.strong is None for b in load(folder, burn_in=4)] == [True] * 4 + [False] * 2
    assert all(b.weak is None for b in load(folder, unlabeled=False))
    # burn-in changes nothing about the labelled half
    assert torch.equal(load(folder, burn_in=6)[3].labeled.images, load(folder)[3].labeled.images)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_replaced_and_named(tmp_path, workers):
    folder = write_coco(tmp_path)
    (folder / "images" / "3.png").write_bytes(b"x")
    (folder / "images" / "5.png").unlink()
    found = load(folder, overrides=[f"data.workers={workers}"])
    named = {line for b in found for line in b.broken.get("labeled", [])}
    assert len(named) == 2
    assert any("3.png: no image" in line for line in named)
    assert any("5.png: no such file" in line for line in named)
    assert all(len(b.labeled.images) == 2 for b in found)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_image(tmp_path, workers):
    folder = write_coco(tmp_path)
    for path in (folder / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="not one of its 8 images can be read"):
        load(folder, overrides=[f"data.workers={workers}"])


def test_an_image_without_boxes(tmp_path):
    tree = coco_tree(1)
    tree["annotations"][0]["iscrowd"] = 1
    tree["images"].append({"id": 2, "file_name": "2.png", "width": 32, "height": 24})
    folder = write_coco(tmp_path, tree)
    sizes = {len(b) for batch in load(folder, unlabeled=False) for b in batch.labeled.boxes}
    assert sizes == {0, 1}


def test_pad():
    batch = pad([np.full((10, 40, 3), 7, np.uint8), np.full((33, 5, 3), 9, np.uint8)])
    assert batch.shape == (2, 3, 64, 64)
    assert (batch[0, :, :10, :40] == 7).all()
    assert (batch[1, :, :33, :5] == 9).all()
    assert batch[0, :, 10, 0].tolist() == list(PAD)
