"""Every image is looked at: broken ones are named, counted and left out, odd ones counted."""

import re
import shutil
import time

import pytest
from PIL import Image

from softteacher.data.check import check_images
from softteacher.data.coco import load_coco
from softteacher.data.split import images_only
from softteacher.errors import UserError
from tests.samples import coco_tree, dataset, write_coco, write_json


@pytest.fixture
def folder(tmp_path):
    return write_coco(tmp_path / "set", coco_tree(8))


def truncate(path):
    path.write_bytes(path.read_bytes()[:600])


def other_size(path):
    Image.new("RGB", (31, 24)).save(path)


def directory(path):
    path.unlink()
    path.mkdir()


def loop(path):
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(b""), "empty file"),
        (lambda path: path.write_bytes(b"<html>not found</html>"), "no image"),
        (truncate, "broken image"),
        (other_size, "is 31 x 24, but image 3 of .* says 32 x 24"),
        (directory, "is a directory"),
        (loop, "symbolic links"),
    ],
)
def test_a_broken_image_is_named_and_left_out(folder, capsys, damage, message):
    path = folder / "images" / "3.png"
    damage(path)
    found = check_images(dataset(folder), 0.01)
    assert [i.id for i in found.images] == [1, 2, 4, 5, 6, 7, 8]
    assert len(found.annotations) == 14
    lines = capsys.readouterr().err.splitlines()
    assert [bool(re.search(message, x)) for x in lines if str(path) in x] == [True]
    assert sum("1 of 8 images are missing or broken and left out" in x for x in lines) == 1


@pytest.mark.parametrize(
    ("broken", "allowed", "survives"),
    [(0, 0, True), (1, 0, True), (2, 0.01, False), (2, 0.25, True), (3, 0.25, False), (8, 1, False), (7, 1, True)],
)
def test_the_share_that_is_survived(folder, capsys, broken, allowed, survives):
    for n in range(1, broken + 1):
        (folder / "images" / f"{n}.png").write_bytes(b"x")
    if survives:
        assert len(check_images(dataset(folder), allowed)) == 8 - broken
        said = capsys.readouterr().err
        assert all(f"{n}.png" in said for n in range(1, broken + 1))
    else:
        with pytest.raises(UserError, match=f"{broken} of 8 images are missing or broken, .* allowed; first: .*1.png"):
            check_images(dataset(folder), allowed)


def test_of_a_large_set_a_sample_is_looked_at(folder, capsys, monkeypatch):
    monkeypatch.setattr("softteacher.data.check.MOST", 4)
    plain = images_only(str(folder / "images"))  # 12 of unknown size
    found = check_images(plain, 0)
    looked_at = [n for n, i in enumerate(found.images) if i.width]
    assert len(found) == 12
    assert len(looked_at) == 4
    assert "4 of its 12 images are looked at now" in capsys.readouterr().err
    assert [n for n, i in enumerate(check_images(plain, 0).images) if i.width] == looked_at
    paths = [folder / "images" / i.file_name for i in plain.images]
    for n in set(range(12)) - set(looked_at):
        paths[n].write_bytes(b"x")
    assert len(check_images(plain, 0)) == 12  # nobody looked
    for n in looked_at[:2]:
        paths[n].write_bytes(b"x")
    left = check_images(plain, 0.5)
    assert [i.id for i in left.images] == [i.id for n, i in enumerate(plain.images) if n not in looked_at[:2]]
    assert "2 of 4 images are missing or broken and left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="2 of 4 images are missing or broken, 1 allowed"):
        check_images(plain, 0.49)


def test_sizes_of_a_labelled_set_are_always_looked_at(folder, monkeypatch):
    monkeypatch.setattr("softteacher.data.check.MOST", 2)
    found = dataset(folder)
    for record in found.images[::3]:
        record.width = record.height = 0
    assert all(i.width == 32 for i in check_images(found, 0).images)


def test_odd_images_are_counted(folder, capsys):
    exif = Image.Exif()
    exif[0x112] = 6
    plain = Image.new("RGB", (32, 24))
    for n, mode in enumerate(("CMYK", "L", "L", "RGB"), start=1):
        plain.convert(mode).save(folder / "images" / f"{n}.png", "JPEG", exif=exif if mode == "RGB" else b"")
    assert len(check_images(dataset(folder), 0)) == 8
    said = capsys.readouterr().err
    assert "3 images are converted to 8-bit RGB (1 CMYK, 2 L)" in said
    assert "1 images have an EXIF rotation; it is ignored" in said


def test_labelled_as_the_exif_rotation_shows_it(folder, capsys):
    exif = Image.Exif()
    exif[0x112] = 6
    for n, size in ((1, (24, 32)), (2, (24, 31))):  # the second is wrong in another way
        Image.new("RGB", size).save(folder / "images" / f"{n}.png", "JPEG", exif=exif)
    check_images(dataset(folder), 0.5)
    said = capsys.readouterr().err
    assert len(re.findall(r"1\.png: is 24 x 32, .* says 32 x 24; .* turn the pixels", said)) == 1
    assert said.count("turn the pixels") == 1


def test_sizes_are_filled_in(folder):
    for n, path in enumerate(sorted((folder / "images").iterdir())):
        Image.new("RGB", (32, 24)).save(path, "JPEG" if n % 2 else "PNG")
    found = check_images(images_only(str(folder / "images")), 0)
    assert {(i.width, i.height) for i in found.images} == {(32, 24)}


def test_a_link_out_ends_it(folder, tmp_path):
    shutil.move(folder / "images" / "3.png", tmp_path / "3.png")
    (folder / "images" / "3.png").symlink_to(tmp_path / "3.png")
    with pytest.raises(UserError, match=r"image 3: .*leaves the image folder by a link"):
        check_images(dataset(folder), 1)


def test_a_store_that_is_gone_is_asked_for_few_images(tmp_path, monkeypatch):
    tree = coco_tree(200) | {"softteacher": {"root": "s3://bucket/images"}}
    asked = []

    def unreachable(dataset, index, **_):
        asked.append(index)
        time.sleep(0.01)
        raise UserError("S3 can't be reached")

    found = load_coco(write_json(tmp_path / "a.json", tree))
    monkeypatch.setattr("softteacher.data.check.read_image", unreachable)
    with pytest.raises(UserError, match="can't be reached"):
        check_images(found, 1)
    assert len(asked) < 100
