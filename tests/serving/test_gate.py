"""The gate: better than the champion by delta, no class much worse, not much slower, on the same validation set."""

import ast
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from softteacher.choices import Bounds
from softteacher.data.coco import load_coco
from softteacher.errors import UserError
from softteacher.serving import gate as module
from softteacher.serving.decision import ClassChange, Decision
from softteacher.serving.gate import gate
from softteacher.serving.repository import Champion, write_champion
from softteacher.serving.version_folder import write_version
from tests.helpers import CATEGORIES, onnx_folder, square_detector, square_image

WHITE = CATEGORIES[1]["name"]
GREY = (0, 0.0)  # label and margin with which a detector is right about grey squares
ANY_SPEED = Bounds(max_latency_ratio=1000)  # these detectors take .2 ms; what else runs here may slow down either


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A validation manifest over 24 images with one square each: twelve white ones and twelve grey ones (`dark`)."""
    folder = tmp_path_factory.mktemp("validation")
    (folder / "images").mkdir()
    images, annotations = [], []
    for i in range(24):
        x1, y1, x2, y2 = box = (10 + i, 8, 40 + 2 * i, 40 + i % 9)
        brightness, category = (255, 7) if i % 2 else (190, 3)
        Image.fromarray(square_image(box, brightness=brightness)).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 96, "height": 64})
        row = {"id": i + 1, "image_id": i, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        annotations.append(row | {"segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]], "iscrowd": 0})
    source = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "val.json").write_text(json.dumps(source))
    manifest = folder / "validation.json"
    load_coco(str(folder / "val.json"), str(folder / "images")).save(manifest)
    return manifest


@pytest.fixture
def decide(validation: Path, tmp_path: Path) -> Callable[..., Decision]:
    """The gate's decision on a new detector against the champion's, each by what `square_detector` takes."""

    def run(new: dict[str, Any], champion: dict[str, Any], bounds: Bounds = ANY_SPEED, **options: Any) -> Decision:
        deployed(tmp_path / "repository", champion)
        folder = onnx_folder(tmp_path / "onnx", validation=validation, **new)
        return gate(str(folder), str(tmp_path / "repository"), "cards", bounds=bounds, resamples=200, **options)

    return run


def deployed(repository: Path, detector: dict[str, Any], engine: str = "onnxruntime-fp32") -> Path:
    """Version 4 of cards, as a deployment leaves it; its folder."""
    file = square_detector(repository / "in.onnx", **detector)
    record = Champion("cards", 4, [], 0.40, "an older set", "ab12", "2026-01-02", "me@here", {}, engine)
    write_version(str(repository / "cards" / "4"), {"model.onnx": file, "smoke.npz": b"images"}, record)
    write_champion(str(repository), record, "")
    return repository / "cards" / "4"


def test_no_champion(tmp_path: Path) -> None:
    folder, out = onnx_folder(tmp_path / "onnx", ap=0.01), tmp_path / "out"
    decision = gate(str(folder), str(tmp_path / "repository"), "cards", out=str(out))
    assert decision.deploy
    assert (decision.ap, decision.champion_ap, decision.comparison) == (0.01, None, None)
    assert "no champion" in decision.reason
    written = json.loads((out / "gate.json").read_text())
    assert written["deploy"] is True
    assert written["onnx_sha256"] == hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    assert "cards has no champion yet" in (out / "report.html").read_text()


def test_no_champion_is_not_no_repository(tmp_path: Path, s3: str) -> None:
    folder = str(onnx_folder(tmp_path / "onnx"))
    for repository, message in (("/nowhere/typo", "no such folder"), ("s3://no-such-bucket/models", "no such bucket")):
        with pytest.raises(UserError, match=f"{repository}: {message}"):
            gate(folder, repository, "cards")
    assert gate(folder, f"{s3}/models", "cards").deploy
    with pytest.raises(UserError, match=r"--name cards\.v2: only letters"):
        gate(folder, f"{s3}/models", "cards.v2")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bound", ["delta", "max_class_drop", "max_latency_ratio"])
def test_bounds_are_numbers(bound: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"--{bound.replace('_', '-')} {value}: must be a finite number"):
        Bounds(**{bound: value})


def test_a_better_model_goes_live(decide: Callable[..., Decision]) -> None:
    decision = decide({"grey": GREY}, {"grey": GREY, "margin": 6})
    assert decision.deploy
    assert decision.rejections == ()
    assert decision.ap == pytest.approx(1)
    comparison = decision.comparison
    assert (comparison.gain.ap, comparison.gain.other) == (decision.ap, decision.champion_ap)
    assert 0 < comparison.gain.low <= comparison.gain.change <= comparison.gain.high
    assert (comparison.version, comparison.kind, comparison.images) == (4, "bbox", 24)
    assert [(k.name, k.images, k.fallen) for k in comparison.classes] == [("dark", 12, False), (WHITE, 12, False)]
    assert comparison.classes[0].change == pytest.approx(0)
    assert comparison.classes[1].change == pytest.approx(2 * comparison.gain.change)
    assert decision.reason.startswith(f"AP {decision.ap:.4f} > {decision.champion_ap:.4f} of version 4 + 0 (gain +")


def test_the_int8_file_of_an_earlier_export_is_not_judged(validation: Path, tmp_path: Path) -> None:
    """A champion in int8 asks for one, but export leaves files alone that it doesn't write."""
    deployed(tmp_path / "repository", {"grey": GREY, "margin": 4}, "onnxruntime-int8")
    folder = onnx_folder(tmp_path / "onnx", validation=validation, grey=GREY)
    square_detector(folder / "model.int8.onnx", grey=GREY, margin=8)

    def ap(engines: dict[str, Any]) -> float:
        parity = json.loads((folder / "parity.json").read_text()) | {"engines": engines}
        (folder / "parity.json").write_text(json.dumps(parity))
        return gate(str(folder), str(tmp_path / "repository"), "cards", bounds=ANY_SPEED, resamples=200).ap

    assert ap({}) == ap({"onnxruntime-int8": {"refused": "it loses AP"}}) == pytest.approx(1)
    assert ap({"onnxruntime-int8": {}}) < 0.9


def test_the_same_model_is_not_better(decide: Callable[..., Decision]) -> None:
    decision = decide({"margin": 2}, {"margin": 2})
    assert not decision.deploy
    assert (decision.comparison.gain.low, decision.comparison.gain.high) == (0, 0)
    assert " is not > " in decision.reason
    assert decision.reason.count(";") == 0


@pytest.mark.parametrize(("off", "deploy"), [(-0.001, True), (0.001, False)])
def test_delta(off: float, deploy: bool, decide: Callable[..., Decision]) -> None:
    """A hair under and over the true gain; with the sides changed the gain is negative."""
    better, worse = {"grey": GREY}, {"grey": GREY, "margin": 3}
    gain = decide(better, worse).comparison.gain.change
    assert gain > 0.1
    assert decide(better, worse, Bounds(gain + off, 0.05, 1000)).deploy is deploy
    assert decide(worse, better, Bounds(-gain + off, 1, 1000)).deploy is deploy


def test_a_gain_that_may_be_chance(decide: Callable[..., Decision]) -> None:
    """A model that gains as much on one class as it loses on the other, and a little more."""
    sides = {"margin": 2.0, "grey": (0, 2.9)}, {"margin": 3.0, "grey": (0, 2.0)}
    decision = decide(*sides, Bounds(max_class_drop=1, max_latency_ratio=1000))
    low = decision.comparison.gain.low
    assert low <= 0 < decision.comparison.gain.change
    assert decision.deploy
    decision = decide(*sides, Bounds(max_class_drop=1, max_latency_ratio=1000, require_significant=True))
    assert not decision.deploy
    assert decision.rejections == (f"the gain may be chance: its interval begins at {low:+.4f}",)


def test_a_gain_on_a_handful_of_images_may_be_chance(
    decide: Callable[..., Decision], validation: Path, tmp_path: Path
) -> None:
    """On nine images with a class that both know, and more with another: the interval is narrow, and says nothing."""
    significant = Bounds(max_latency_ratio=1000, require_significant=True)
    only = [{"id": 7, "name": WHITE}]
    load_coco(validation).select([*range(0, 24, 2), *range(1, 19, 2)]).save(tmp_path / "few.json")
    deployed(tmp_path / "repository", {"categories": only, "label": 0, "margin": 6})
    folder = onnx_folder(tmp_path / "onnx", validation=tmp_path / "few.json", grey=GREY)
    decision = gate(str(folder), str(tmp_path / "repository"), "cards", bounds=significant, resamples=200)
    assert decision.comparison.gain.low > 0
    few = "the gain may be chance; images with a box of a class that both know: 9, at least 10 are needed"
    assert decision.rejections == (few,)
    assert not decision.deploy
    assert gate(str(folder), str(tmp_path / "repository"), "cards", bounds=ANY_SPEED, resamples=200).deploy
    assert decide({"grey": GREY}, {"categories": only, "label": 0, "margin": 6}, significant).deploy  # on twelve


def test_a_class_that_falls(decide: Callable[..., Decision]) -> None:
    """The AP rises, but grey squares are found less well than before."""
    sides = {"grey": (0, 2.0)}, {"grey": GREY, "margin": 6}
    decision = decide(*sides)
    assert decision.ap > decision.champion_ap
    assert not decision.deploy
    (dark, white) = decision.comparison.classes
    assert dark.fallen
    assert not white.fallen
    (why,) = decision.rejections
    assert re.fullmatch(r"class dark falls from 1\.0000 to 0\.\d{4}, 0\.05 allowed", why)
    assert decision.reason.endswith(f"; {why}")
    assert decide(*sides, Bounds(max_class_drop=-dark.change + 0.01, max_latency_ratio=1000)).deploy


def test_a_fall_on_few_images_is_shown_but_does_not_count(
    decide: Callable[..., Decision], validation: Path, tmp_path: Path
) -> None:
    few = load_coco(validation).select([0, 2, *range(1, 24, 2)])  # two of `dark`
    few.save(tmp_path / "few.json")
    deployed(tmp_path / "repository", {"grey": GREY, "margin": 6})
    folder = onnx_folder(tmp_path / "onnx", validation=tmp_path / "few.json", grey=(0, 2.0))
    decision = gate(str(folder), str(tmp_path / "repository"), "cards", bounds=ANY_SPEED, resamples=50)
    dark = decision.comparison.classes[0]
    assert (dark.images, dark.fallen) == (2, False)
    assert dark.change < -0.05
    assert decision.deploy


def test_a_fall_that_may_be_chance_does_not_count(decide: Callable[..., Decision]) -> None:
    """Only the smallest of the twelve grey squares is found less well: a third of the resamples don't have it."""
    bounds = Bounds(max_class_drop=0.01, max_latency_ratio=1000)
    decision = decide({"grey": (0, 0.415)}, {"grey": GREY, "margin": 6}, bounds)
    dark = decision.comparison.classes[0]
    assert dark.images == 12
    assert dark.change < -0.01
    assert dark.low < dark.high == 0
    assert not dark.fallen
    assert decision.deploy


@pytest.mark.parametrize(("fallen", "more"), [(3, ()), (5, ("and so do 2 more classes",))])
def test_of_many_classes_that_fall_the_worst_are_named(
    decide: Callable[..., Decision], fallen: int, more: tuple[str, ...]
) -> None:
    comparison = decide({"grey": GREY}, {"grey": GREY, "margin": 6}).comparison
    classes = [ClassChange(0.8 - n / 10, 0.9, -0.3, -0.1, f"c{n}", 12, fallen=n < fallen) for n in range(6)]
    found = module._rejections(replace(comparison, classes=classes), 0.5, 0.4, 0.1)
    worst = range(fallen - 1, fallen - 4, -1)
    named = [f"class c{n} falls from 0.9000 to {0.8 - n / 10:.4f}, 0.05 allowed" for n in worst]
    assert found == (*named, *more)


def test_a_class_without_boxes_in_the_validation_set(validation: Path, tmp_path: Path) -> None:
    load_coco(validation).select(range(1, 24, 2)).save(tmp_path / "white.json")
    deployed(tmp_path / "repository", {"margin": 6})
    folder = onnx_folder(tmp_path / "onnx", validation=tmp_path / "white.json")
    out = tmp_path / "out"
    decision = gate(str(folder), str(tmp_path / "repository"), "cards", bounds=ANY_SPEED, out=str(out), resamples=20)
    dark, white = decision.comparison.classes
    assert (dark.images, dark.ap, dark.low) == (0, None, None)
    assert (decision.ap, decision.champion_ap) == (white.ap, white.other)
    assert decision.deploy
    assert "dark" in (out / "report.html").read_text()


def test_a_slower_model(decide: Callable[..., Decision]) -> None:
    sides = {"grey": GREY, "slow": 300}, {"grey": GREY, "margin": 6}
    decision = decide(*sides, Bounds(max_latency_ratio=3))
    assert not decision.deploy
    assert decision.comparison.latency_ms > 3 * decision.comparison.champion_latency_ms
    (why,) = decision.rejections
    assert re.fullmatch(r"it is [\d.]+ times as slow \([\d.]+ ms an image, version 4 [\d.]+ ms\), 3 allowed", why)
    assert decide(*sides).deploy


def test_classes_are_met_by_name(decide: Callable[..., Decision]) -> None:
    """The champion has the same classes under other ids and in another order."""
    turned = [{"id": 1, "name": WHITE}, {"id": 2, "name": "dark"}]
    decision = decide({"grey": GREY, "margin": 1}, {"categories": turned, "label": 0, "grey": (1, 0.0)})
    assert decision.champion_ap == pytest.approx(1)
    assert not decision.deploy


def test_a_class_that_the_champion_does_not_know(decide: Callable[..., Decision]) -> None:
    only = [{"id": 7, "name": WHITE}]
    decision = decide({"grey": GREY}, {"categories": only, "label": 0, "margin": 6})
    assert decision.deploy
    assert decision.comparison.new == ["dark"]
    assert [k.name for k in decision.comparison.classes] == [WHITE]
    assert decision.ap == pytest.approx(1)


def test_a_class_that_only_the_champion_knows(decide: Callable[..., Decision]) -> None:
    more = [*CATEGORIES, {"id": 9, "name": "joker"}]
    sides = {"grey": GREY}, {"categories": more, "grey": GREY, "margin": 6}
    decision = decide(*sides)
    assert decision.rejections == ("it lacks what version 4 answers: joker",)
    assert not decision.deploy
    assert decide(*sides, Bounds(max_class_drop=1, max_latency_ratio=1000)).deploy


def test_no_class_in_common(decide: Callable[..., Decision]) -> None:
    with pytest.raises(UserError, match="no validation image has a box of a class that version 4 knows, too"):
        decide({}, {"categories": [{"id": 1, "name": "joker"}], "label": 0})


def test_of_models_with_masks_the_masks_count(decide: Callable[..., Decision]) -> None:
    """The new model's boxes are better, its masks are not."""
    decision = decide({"grey": GREY, "masks": 0.8}, {"grey": (0, 1.0), "margin": 1, "masks": 1.0})
    assert decision.comparison.kind == "segm"
    assert not decision.deploy
    assert decision.reason.startswith("mask AP 0.")
    decision = decide({"grey": GREY, "masks": 0.8}, {"grey": (0, 1.0), "margin": 1})
    assert decision.comparison.kind == "bbox"
    assert decision.deploy


def test_a_model_without_masks_does_not_follow_one_with(decide: Callable[..., Decision]) -> None:
    decision = decide({"grey": GREY}, {"grey": GREY, "margin": 6, "masks": 1.0})
    assert decision.rejections == ("it lacks what version 4 answers: masks of objects",)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "model.onnx").unlink(), r"model\.onnx is missing"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"torn"), r"model\.onnx is not what was deployed"),
        (lambda folder: (folder / "manifest.json").unlink(), "the version is not whole"),
    ],
)
def test_a_champion_that_is_not_whole(
    harm: Callable[[Path], object], message: str, validation: Path, tmp_path: Path
) -> None:
    harm(deployed(tmp_path / "repository", {}))
    folder, out = onnx_folder(tmp_path / "onnx", validation=validation), tmp_path / "out"
    with pytest.raises(UserError, match=rf"cards/4: .*{message}.*; there is nothing to compare with\. `softteacher"):
        gate(str(folder), str(tmp_path / "repository"), "cards", out=str(out))
    assert not out.exists()


def test_report(decide: Callable[..., Decision], tmp_path: Path) -> None:
    out = tmp_path / "out"
    decision = decide({"grey": (0, 2.0)}, {"grey": GREY, "margin": 6}, out=str(out))
    written = json.loads((out / "gate.json").read_text())
    assert written["reason"] == decision.reason
    assert written["comparison"]["gain"]["low"] == decision.comparison.gain.low
    assert written["comparison"]["bounds"]["max_class_drop"] == 0.05
    assert written["comparison"]["classes"][0]["fallen"] is True
    page = (out / "report.html").read_text()
    assert "Version 4 stays." in page
    assert "class dark falls from 1.0000" in page
    assert "200 resamples of the 24 validation images (seed 0)" in page
    assert "&#34;white&#34;" in page  # a class name is text, not markup
    assert page.count("<svg") == 3
    assert "Where the new model is better" in page
    assert "Where the champion is better" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_from_s3(decide: Callable[..., Decision], validation: Path, s3: str, tmp_path: Path) -> None:
    from softteacher import storage

    deployed(tmp_path / "repository", {"grey": GREY, "margin": 6})
    onnx_folder(tmp_path / "onnx", validation=validation, grey=GREY)
    for part in ("repository/cards", "onnx"):
        storage.copy(tmp_path / part, f"{s3}/{part}")
    decision = gate(f"{s3}/onnx", f"{s3}/repository", "cards", bounds=ANY_SPEED, out=f"{s3}/out", resamples=20)
    assert decision.deploy
    assert json.loads(storage.read_bytes(f"{s3}/out/gate.json"))["deploy"] is True


def test_it_needs_no_pytorch(decide: Callable[..., Decision], tmp_path: Path) -> None:
    """What the image of this step lacks can't be imported."""
    decide({"grey": GREY}, {"grey": GREY, "margin": 6})
    dockerfile = (Path(__file__).parents[2] / "images" / "tools.Dockerfile").read_text()
    lacking = sorted(ast.literal_eval(re.search(r"training = (\{.*?\})", dockerfile)[1]))
    arguments = f"{str(tmp_path / 'onnx')!r}, {str(tmp_path / 'repository')!r}, 'cards', out={str(tmp_path / 'out')!r}"
    script = f"""if True:
        import sys
        sys.modules.update(dict.fromkeys({lacking}))  # an import of these fails from here on
        from softteacher.serving.gate import gate
        gate({arguments}, resamples=20)
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").exists()
