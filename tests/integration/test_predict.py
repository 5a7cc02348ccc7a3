"""`softteacher predict` against a real Triton: what goes in, what comes out, and what is broken."""

import csv
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softteacher import cli, storage
from softteacher.data.coco import load_coco
from softteacher.errors import UserError
from softteacher.serving.predict import predict, predict_files
from softteacher.watching.profile import TrafficProfile
from tests.hand_server import HandServer
from tests.helpers import CATEGORIES, square_image

BOX = (60, 30, 240, 150)
CLASS = CATEGORIES[1]["name"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hand_triton: HandServer) -> Run:
    """Run `softteacher predict`; returns exit code, standard output and standard error without progress."""

    def call(*arguments: object, name: str = "squares") -> tuple[int, str, str]:
        base = ["softteacher", "predict", "--triton", hand_triton.urls.grpc, "--name", name]
        monkeypatch.setattr(sys, "argv", [*base, *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as e:
            code = int(e.code or 0)
        out, err = capsys.readouterr()
        return code, out, "\n".join(line for line in err.splitlines() if "[###" not in line)

    return call


def encoded(image: np.ndarray, form: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, quality=95)
    return file.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Five good images, two of the same name and two that differ in the suffix only."""
    image = square_image(BOX, width=300, height=200)
    folder = tmp_path / "tree"
    for name in ("one.jpg", "sub/one.jpg", "sub/one.png", "dark.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(image * (name != "dark.png"), name[-3:].upper().replace("JPG", "JPEG")))
    # twelve megapixels: decoded, and drawn, smaller
    (folder / "photo.jpg").write_bytes(encoded(np.kron(image, np.ones((14, 14, 1), np.uint8))))
    return folder


@pytest.mark.parametrize("form", ["json", "coco", "csv"])
def test_shards_give_the_answers_of_one_run(run: Run, tree: Path, tmp_path: Path, form: str) -> None:
    (tree / "broken.png").write_bytes(b"x")
    assert run(tree, "--format", form, "--output", tmp_path / "whole")[0] == 2
    parts = [str(tmp_path / f"{n}.json") for n in (1, 2, 3)]
    codes = [run(tree, "--shard", f"{n}/3", "--format", "json", "--output", parts[n - 1])[0] for n in (1, 2, 3)]
    assert sorted(codes) == [0, 0, 2]
    join = [option for part in parts for option in ("--join", part)]
    # without a Triton, which only a COCO json needs, for its classes
    dead = [] if form == "coco" else ["--triton", "http://127.0.0.1:9"]
    assert run(tree, *join, "--format", form, "--output", tmp_path / "joined", *dead)[0] == 2
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "whole").read_bytes()
    code, _, err = run(tree, *join[2:], "--format", form)
    assert code == 2
    assert "is not in any part; give the same images and all parts" in err
    code, _, err = run(tree, *join, "--shard", "1/2", "--format", form)
    assert code == 2
    assert "first run every shard" in err
    if form != "json":
        code, _, err = run(tree, "--shard", "1/2", "--format", form)
        assert (code, err) == (2, "error: --shard 1/2: only JSON can be joined; add --format json --output FILE")


def test_pictures_and_answers_in_the_pixels_of_the_originals(run: Run, tree: Path, tmp_path: Path) -> None:
    code, out, err = run(tree, "--format", "json", "--out", tmp_path / "pictures")
    assert (code, err) == (0, "")
    answers = {a["file_name"]: a for a in json.loads(out)}
    assert list(answers) == ["dark.png", "one.jpg", "photo.jpg", "sub/one.jpg", "sub/one.png"]
    assert answers.pop("dark.png")["detections"] == []
    for name, answer in answers.items():
        scale = 14 if name == "photo.jpg" else 1
        assert answer["image"] == str(tree / name)
        assert (answer["width"], answer["height"]) == (300 * scale, 200 * scale)
        (found,) = answer["detections"]
        assert (found["class"], found["category_id"], found["score"]) == (CLASS, 7, 0.6)
        np.testing.assert_allclose(found["box"], np.array(BOX) * scale, atol=4 * scale)
    pictures = sorted(p.relative_to(tmp_path / "pictures").as_posix() for p in (tmp_path / "pictures").rglob("*.*"))
    assert pictures == ["dark.png.jpg", "one.jpg", "photo.jpg", "sub/one.jpg", "sub/one.png.jpg"]
    for name in pictures[1:]:
        with Image.open(tmp_path / "pictures" / name) as picture:
            assert max(picture.size) <= 1600
            pixels = np.asarray(picture).astype(int)
            scale = picture.width / 300
        coloured = pixels.max(2) - pixels.min(2) > 100  # the frame, and the name above it
        rows, columns = np.nonzero(coloured)
        edges = np.array([columns.min(), columns.max(), rows.max()]) / scale
        np.testing.assert_allclose(edges, [BOX[0], BOX[2], BOX[3]], atol=6)


def test_a_broken_image_is_told_at_the_end(run: Run, tree: Path, tmp_path: Path) -> None:
    (tree / "sub" / "broken.jpg").write_bytes(encoded(square_image(BOX, 300, 200))[:900])
    for form in ("json", "csv", "coco"):
        code, out, err = run(tree, "--format", form, "--output", tmp_path / f"found.{form}", "--out", tmp_path / "p")
        assert (code, out) == (2, "")
        assert err.startswith(f"error: 1 of 6 images could not be read; the first: {tree}/sub/broken.jpg: broken image")
        assert len(err.splitlines()) == 1
    answers = json.loads((tmp_path / "found.json").read_text())
    assert [len(a.get("detections", "error")) for a in answers] == [0, 1, 1, 5, 1, 1]
    assert "broken image" in answers[3]["error"]
    rows = list(csv.DictReader((tmp_path / "found.csv").open(encoding="utf-8")))
    assert [r["class"] for r in rows] == ["", CLASS, CLASS, "", CLASS, CLASS]
    dataset = load_coco(tmp_path / "found.coco", root=str(tree))
    assert [i.file_name for i in dataset.images] == [a["file_name"] for a in answers if "error" not in a]
    assert dataset.categories == [(c["id"], c["name"]) for c in CATEGORIES]
    # the only one
    code, out, err = run(tree / "sub" / "broken.jpg", "--output", tmp_path / "none.json", "--format", "json")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {tree}/sub/broken.jpg: broken image")
    assert not (tmp_path / "none.json").exists()


def test_s3_in_and_out(run: Run, tree: Path, s3: str) -> None:
    storage.copy(tree, f"{s3}/in")
    storage.write_bytes(f"{s3}/in/broken.jpg", b"")
    arguments = ["--format", "coco", "--output", f"{s3}/found.json", "--out", f"{s3}/pictures"]
    code, _, err = run(f"{s3}/in", *arguments)
    assert (code, err.splitlines()) == (
        2,
        [f"error: 1 of 6 images could not be read; the first: {s3}/in/broken.jpg: empty file; replace or remove it"],
    )
    assert len(json.loads(storage.read_bytes(f"{s3}/found.json"))["images"]) == 5
    assert [f.name for f in storage.list_files(f"{s3}/pictures")] == [
        "dark.png.jpg", "one.jpg", "photo.jpg", "sub/one.jpg", "sub/one.png.jpg"
    ]  # fmt: skip


def test_no_picture_replaces_an_image(
    run: Run, tree: Path, tmp_path: Path, s3: str, hand_triton: HandServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.copy(tree, f"{s3}/in")
    (tmp_path / "link").symlink_to(tree)
    monkeypatch.chdir(tree)
    photographs = {file: file.read_bytes() for file in tree.rglob("*.*")}
    in_store = list(storage.list_files(f"{s3}/in"))
    for images, out in ((tree, tree), (tree, tmp_path / "link"), ("one.jpg", "."), (f"{s3}/in", f"{s3}/in/")):
        for shard in ((), ("--shard", "1/2", "--format", "json")):  # whose share is dark.png, photo.jpg and sub/one.png
            code, stdout, err = run(images, "--out", out, *shard)
            assert (code, stdout) == (2, "")
            assert "one.jpg is one of the images, a picture would replace it; choose another" in err
    with pytest.raises(UserError, match=r"one.jpg is one of the images"):
        predict([str(tree)], hand_triton.urls.http, "squares", out=str(tree))
    assert {file: file.read_bytes() for file in tree.rglob("*.*")} == photographs
    assert list(storage.list_files(f"{s3}/in")) == in_store


def test_each_image_has_a_picture_of_its_own(run: Run, tmp_path: Path) -> None:
    for name, box in (("a.png", (0, 0, 0, 0)), ("a.png.jpg", BOX)):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(encoded(square_image(box, 300, 200)))
    assert run(tmp_path / "in", "--out", tmp_path / "out")[0] == 0
    brightest = {}
    for file in (tmp_path / "out").iterdir():
        with Image.open(file) as picture:
            brightest[file.name] = int(np.asarray(picture).max())
    assert {name: value > 200 for name, value in brightest.items()} == {"a.png.jpg": True, "a.png.jpg.jpg": False}


@pytest.mark.parametrize("form", ["table", "json", "csv", "coco"])
def test_names_that_are_no_utf_8(
    form: str, tmp_path: Path, hand_triton: HandServer, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """On a screen that, as most are, is strictly UTF-8: the bytes of the name, like in a file."""
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(encoded(square_image(BOX, 300, 200)))
    assert (sys.stdout.encoding, sys.stdout.errors) == ("UTF-8", "strict")
    predict_files([str(tmp_path)], hand_triton.urls.http, "squares", form=form)
    written = capsysbinary.readouterr().out
    assert (os.fsencode(name) if form in {"table", "csv"} else b"caf\\udce9.png") in written


def test_answers_are_recorded_for_watch(run: Run, tree: Path, tmp_path: Path) -> None:
    code, out, _ = run(tree, "--format", "json", "--score", "0.9", "--record", tmp_path / "traffic")
    assert (code, [a["detections"] for a in json.loads(out)]) == (0, [[]] * 5)
    (file,) = (tmp_path / "traffic").rglob("*.json")
    profile = TrafficProfile.read(str(file))
    assert (profile.images, profile.classes) == (5, tuple(c["name"] for c in CATEGORIES))
    assert profile.histograms["score"].sum() == 4  # also those that were not asked for
    assert profile.histograms["count"].tolist()[:2] == [1, 4]


def test_table_score_and_canary(run: Run, hand_triton: HandServer, tree: Path) -> None:
    hand_triton.put("two", score=0.6)
    hand_triton.put("two-canary", 1, {"share": 1, "version": 2}, score=0.8)
    code, out, err = run(tree / "one.jpg", tree / "sub/one.jpg", tree / "dark.png", name="two")
    assert code == 0
    assert out.count("0.800") == 2
    assert "(nothing)" in out
    assert err.startswith("canary of two, version 2: asked in 1 request; boxes live 2, candidate 2, matched 2")
    assert len(err.splitlines()) == 1
    code, out, _ = run(tree / "one.jpg", "--score", "0.7")
    assert code == 0
    assert out.count("(nothing)") == 1


def test_what_is_wrong_around_it(run: Run, tree: Path, tmp_path: Path, hand_triton: HandServer) -> None:
    assert run(tmp_path / "nowhere")[0] == 2
    code, _, err = run(tree, "--output", tmp_path / "x.json")
    assert code == 2
    assert "add --format json, coco or csv" in err
    (tmp_path / "file").write_text("x")
    code, _, err = run(tree, "--out", tmp_path / "file")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert str(tmp_path / "file") in err
    # the library's function answers all or raises
    assert [len(a["detections"]) for a in predict([str(tree / "sub")], hand_triton.urls.http, "squares")] == [1, 1]
    (tree / "sub" / "bad.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"bad.jpg: empty file"):
        predict([str(tree / "sub")], hand_triton.urls.http, "squares")
