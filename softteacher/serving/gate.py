"""The gate: is a new model better than the champion, is no class worse, is it fast enough?"""

from __future__ import annotations

import json
import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from softteacher import storage
from softteacher.choices import Bounds, check_name
from softteacher.console import say, track
from softteacher.data.check import read_image
from softteacher.data.coco import CocoDataset, load_coco
from softteacher.detections import Detections
from softteacher.errors import UserError
from softteacher.evaluation.bootstrap import MIN_IMAGES, RESAMPLES, SEED, Difference, compare
from softteacher.evaluation.metrics import Kind, coco_results
from softteacher.serving.decision import ClassChange, Comparison, Decision
from softteacher.serving.gate_report import write_report
from softteacher.serving.onnx_runtime import OnnxDetector
from softteacher.serving.outputs import to_detections
from softteacher.serving.repository import Champion, OnnxFolder, Runtime, read_champion, read_onnx_folder
from softteacher.serving.version_folder import open_version

MIN_TIMED = 30  # runs of each model that a latency is the median of
NAMED = 3  # classes in the reason


@dataclass(frozen=True)
class _Answers:
    """Of both models: detections by image id, in labels of the validation set, and milliseconds of each run."""

    found: tuple[dict[int, Detections], dict[int, Detections]]
    milliseconds: tuple[list[float], list[float]]


def gate(
    onnx: str,
    repository: str,
    name: str,
    *,
    bounds: Bounds = Bounds(),  # noqa: B008  it is frozen
    out: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Decision:
    """Decide whether a model goes live: better than the champion by delta, no class much worse, not much slower.

    Both ONNX files answer the new model's validation set on ONNX Runtime, image by image and in turn. Without a
    champion the model goes live. Classes that only one of the two knows are left out of the AP; one that the new model
    no longer knows speaks against it.

    Args:
        onnx: onnx folder of the new model, local or `s3://`.
        repository: Triton model repository, local or `s3://`.
        name: of the model in it.
        bounds: what the new model must keep to.
        out: folder for `gate.json` and `report.html`, local or `s3://`; none: no report.
        resamples: of the bootstrap over validation images.
        seed: of its draw.

    Raises:
        UserError: the onnx folder or the champion is torn, the two have no class in common that the validation set
            has boxes of, the name can't be served, or the repository can't be read, or its bucket or the folder
            around it isn't there.
    """
    check_name(name)
    with ExitStack() as stack:
        folder = stack.enter_context(storage.local_input(onnx))
        model, champion = read_onnx_folder(folder), read_champion(repository, name)
        report = Path(stack.enter_context(storage.output_folder(out))) if out else None
        if champion is None:
            decision = Decision(True, f"{name} has no champion yet", model.ap, None)
            page = write_report(decision, name)
        else:
            version = storage.join(repository, name, str(champion.version))
            try:
                old = stack.enter_context(open_version(version))[1] / "model.onnx"
            except UserError as e:
                raise UserError(
                    f"{e}; there is nothing to compare with. `softteacher rollback` to a version that is whole, or "
                    "`softteacher deploy` this one without the gate"
                ) from None
            decision, dataset, answers = _decide(model, champion, old, bounds, resamples, seed)
            page = write_report(decision, name, dataset, answers.found) if report else ""
        decision = replace(decision, onnx_sha256=model.sha256)
        if report:
            (report / "gate.json").write_text(json.dumps(asdict(decision), indent=1))
            (report / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")
    say(f"gate: {name}: {'goes live' if decision.deploy else 'the champion stays'}: {decision.reason}")
    return decision


def _decide(
    model: OnnxFolder, champion: Champion, old: Path, bounds: Bounds, resamples: int, seed: int
) -> tuple[Decision, CocoDataset, _Answers]:
    # a champion in int8 is an int8 file; the new model's is its like
    like = model.path / Runtime(engine=champion.engine).onnx_file
    # where it has one: a folder that was exported into before may hold that of another model
    measured = "refused" not in model.engines.get(champion.engine, {"refused": "not measured"})
    ours = OnnxDetector(like if measured and like.exists() else model.path / "model.onnx")
    theirs = OnnxDetector(old)
    dataset = load_coco(str(model.path / "validation.json"))
    if ours.categories != dataset.categories:
        raise UserError(f"{model.path}: model.onnx and validation.json have other classes; export again")
    known = {name for _, name in theirs.categories}
    shared = [label for label, name in enumerate(dataset.classes) if name in known]
    answers = _answers(ours, theirs, dataset)
    masks = [any(d.masks is not None for d in found.values()) for found in answers.found]
    kind: Kind = "segm" if all(masks) and dataset.annotations.segmentations else "bbox"
    results = [
        coco_results(dataset, found if kind == "segm" else {i: replace(d, masks=None) for i, d in found.items()})
        for found in answers.found
    ]
    gain, classes = compare(dataset, *results, labels=shared, kind=kind, resamples=resamples, seed=seed)
    if gain.ap is None or gain.other is None or gain.low is None or gain.high is None:
        raise UserError(
            f"{model.path}: no validation image has a box of a class that version {champion.version} knows, too; "
            "deploy it under another --name, or without the gate"
        )
    images, a = _images_by_class(dataset), dataset.annotations
    comparison = Comparison(
        version=champion.version,
        kind=kind,
        gain=gain,
        classes=[
            ClassChange(**asdict(d), name=name, images=images[name], fallen=_fallen(d, images[name], bounds))
            for name, d in classes.items()
        ],
        lost=sorted(known - set(dataset.classes)) + ["masks of objects"] * (masks == [False, True]),
        new=[name for name in dataset.classes if name not in known],
        latency_ms=statistics.median(answers.milliseconds[0]),
        champion_latency_ms=statistics.median(answers.milliseconds[1]),
        images=len(dataset),
        with_boxes=len(np.unique(a.image_index[np.isin(a.labels, shared) & ~a.crowd])),
        resamples=resamples,
        seed=seed,
        bounds=bounds,
    )
    rejections = _rejections(comparison, gain.ap, gain.other, gain.low)
    better = gain.ap > gain.other + bounds.delta
    reason = (
        f"{'mask ' * (kind == 'segm')}AP {gain.ap:.4f} {'>' if better else 'is not >'} {gain.other:.4f} of version "
        f"{champion.version} + {bounds.delta:g} (gain {gain.low:+.4f} to {gain.high:+.4f} with 95 %)"
    )
    reason = "; ".join([reason, *rejections[not better :]])
    return Decision(not rejections, reason, gain.ap, gain.other, rejections, comparison), dataset, answers


def _answers(ours: OnnxDetector, theirs: OnnxDetector, dataset: CocoDataset) -> _Answers:
    label = {name: n for n, name in enumerate(dataset.classes)}
    translate = np.array([label.get(name, -1) for _, name in theirs.categories])
    out = _Answers(({}, {}), ([], []))
    canvases: list[np.ndarray] = []

    def run(which: int) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        answer = (ours, theirs)[which].run(canvases[which])
        out.milliseconds[which].append(1000 * (time.perf_counter() - start))
        return answer

    for index, record in track(enumerate(dataset.images), "gate", len(dataset)):
        image = read_image(dataset, index)[0]
        (new, new_scale), (old, old_scale) = ours.letterbox(image), theirs.letterbox(image)
        canvases[:] = new[None], old[None]
        if not index:  # the first run of each takes longer
            ours.run(canvases[0])
            theirs.run(canvases[1])
        answers = {which: run(which) for which in ((0, 1) if index % 2 else (1, 0))}
        out.found[0][record.id] = to_detections(answers[0], 0, new_scale, image.size)
        found = to_detections(answers[1], 0, old_scale, image.size)
        found.labels = translate[found.labels]
        out.found[1][record.id] = found[found.labels >= 0]
    for turn in range(len(dataset), MIN_TIMED):
        for which in (0, 1) if turn % 2 else (1, 0):
            run(which)
    return out


def _rejections(c: Comparison, ap: float, champion_ap: float, low: float) -> tuple[str, ...]:
    found, bounds = [], c.bounds
    if not ap > champion_ap + bounds.delta:
        found.append(f"its AP {ap:.4f} is not over the {champion_ap:.4f} of version {c.version} by {bounds.delta:g}")
    if bounds.require_significant and low <= 0:
        found.append(f"the gain may be chance: its interval begins at {low:+.4f}")
    if bounds.require_significant and c.with_boxes < MIN_IMAGES:  # the interval of a single image is a point
        few = f"images with a box of a class that both know: {c.with_boxes}, at least {MIN_IMAGES} are needed"
        found.append(f"the gain may be chance; {few}")
    fallen = sorted((k for k in c.classes if k.fallen), key=lambda k: k.change)
    for k in fallen[:NAMED]:
        found.append(f"class {k.name} falls from {k.other:.4f} to {k.ap:.4f}, {bounds.max_class_drop:g} allowed")
    if len(fallen) > NAMED:
        found.append(f"and so do {len(fallen) - NAMED} more classes")
    if c.lost and bounds.max_class_drop < 1:
        found.append(f"it lacks what version {c.version} answers: {', '.join(c.lost)}")
    ratio = c.latency_ms / c.champion_latency_ms
    if ratio > bounds.max_latency_ratio:
        times = f"{c.latency_ms:.1f} ms an image, version {c.version} {c.champion_latency_ms:.1f} ms"
        found.append(f"it is {ratio:.2f} times as slow ({times}), {bounds.max_latency_ratio:g} allowed")
    return tuple(found)


def _fallen(d: Difference, images: int, bounds: Bounds) -> bool:
    sure = images >= MIN_IMAGES and d.high is not None and d.high < 0
    return sure and d.change < -bounds.max_class_drop


def _images_by_class(dataset: CocoDataset) -> dict[str, int]:
    a = dataset.annotations
    pairs = np.unique(np.stack([a.labels, a.image_index])[:, ~a.crowd], axis=1)
    counts = np.bincount(pairs[0], minlength=len(dataset.categories)).tolist()
    return dict(zip(dataset.classes, counts, strict=True))
