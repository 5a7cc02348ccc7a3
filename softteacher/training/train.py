"""Step 2: `train`, from manifests to a model folder."""

from __future__ import annotations

import contextlib
import copy
import shutil
from pathlib import Path
from typing import Any

import torch

from softteacher import distributed, storage
from softteacher.config import Settings, read_settings
from softteacher.console import console, say
from softteacher.data.cache import ImageCache
from softteacher.data.check import check_images
from softteacher.data.coco import CocoDataset, load_coco, require_same_classes
from softteacher.data.loader import batches
from softteacher.data.masks import require_masks
from softteacher.data.split import in_others, load_unlabeled, without
from softteacher.detectors.build import build
from softteacher.device import find_device, find_precision, keep_memory, set_threads
from softteacher.errors import UserError
from softteacher.evaluation.inference import score
from softteacher.methods import build_method
from softteacher.model_folder import ModelFolder, origin
from softteacher.storage import join
from softteacher.training.checkpoint import Checkpoints
from softteacher.training.identity import batch_of, burn_in_of, finished, flat, identity
from softteacher.training.log import log_files
from softteacher.training.provenance import surroundings
from softteacher.training.self_label import self_label
from softteacher.training.trainer import Trainer, run_training


def train(
    labeled: str, unlabeled: str | None, validation: str, out: str, settings: Settings, checkpoints: str | None = None
) -> dict[str, Any]:
    """Train a detector and write its model folder. A run that was cut off goes on from its last checkpoint.

    Under torchrun the processes share the work, see `softteacher.distributed`.

    Args:
        labeled: manifest or COCO json with boxes.
        unlabeled: manifest, COCO json, folder or `s3://` prefix of images; none for supervised training.
        validation: manifest or COCO json; scored at the end, and handed on in the model folder.
        out: the model folder, local or `s3://`. In a local one the log is in `log` as long as training goes on.
        settings: everything else.
        checkpoints: folder or `s3://` prefix of the checkpoints, and of STAC's labelling model; none: `checkpoints` and
            `labeler` in `out`. Checkpoints are removed when the model is there.

    Returns:
        `metrics.json`: AP and more of teacher and student.

    Raises:
        UserError: bad input; nothing is left at `out` then but the log, once training has begun, and checkpoints (STAC:
            and the model that labels, once it is there).
        Stopped: the process was told to end; a checkpoint is written.
    """
    device = find_device(settings.training.device)
    if device.type == "cpu":
        keep_memory()
    with distributed.process_group(device):
        console.quiet = distributed.rank() > 0
        try:
            place = checkpoints or join(out, "checkpoints")
            if settings.method.name == "stac" and not settings.method.label_model:
                # where a retry in another pod finds it, if there is such a place
                labeler = join(checkpoints, "labeler-model") if checkpoints else join(out, "labeler")
                first = _with_method(settings, name="supervised")
                _train(labeled, None, validation, labeler, first, join(place, "labeler"), device)
                settings = _with_method(settings, label_model=labeler)
            return _train(labeled, unlabeled, validation, out, settings, place, device)
        finally:
            console.quiet = False


def _train(
    labeled: str, unlabeled: str | None, validation: str, out: str, settings: Settings, place: str, device: torch.device
) -> dict[str, Any]:
    asked = settings.training
    images = asked.accumulate * (asked.labeled_per_batch + asked.unlabeled_per_batch)
    settings = _like_parent(for_batch(settings, distributed.world_size() * images))
    main, s = distributed.rank() == 0, settings.training
    train_set, val_set = load_coco(labeled), load_coco(validation)
    require_same_classes(train_set, val_set)
    if learnt := len(in_others(val_set, train_set)):
        say(
            f"warning: {validation}: {learnt} of its {len(val_set)} images are in {labeled}, too: they are trained on, "
            "and every AP comes out too high"
        )
    if settings.detector.masks:
        require_masks(train_set)
        require_masks(val_set)
    extra = _unlabeled(unlabeled, train_set, val_set, settings)
    sets = {"labeled": train_set} | ({"unlabeled": extra} if extra else {})
    run = identity(settings, {**sets, "validation": val_set})
    if done := distributed.once(lambda: finished(out, run)):
        say(f"train: {out} holds the model of this very run; nothing to do")
        return done
    if s != asked:
        often = f", evaluate_every {asked.evaluate_every} -> {s.evaluate_every}" if s.evaluate_every else ""
        say(
            f"train: lr {asked.lr:g} -> {s.lr:g}, iterations {asked.iterations} -> {s.iterations}{often}: "
            f"{s.reference_batch} images a step, training.reference_batch is {asked.reference_batch} (none would leave "
            "them as they are)"
        )
    # broken images are not found out after days of training
    read = ImageCache(settings.data.cache_mb, settings.data.cache_dir).read  # a run validates many times
    val_set = distributed.once(lambda: check_images(val_set, settings.data.max_bad_images, "check val", read))
    set_threads(s.threads)
    torch.manual_seed(s.seed)
    student = build(settings.detector, len(train_set.classes), names=train_set.classes).to(device)
    start = settings.detector.init_from
    parent = distributed.once(lambda: origin(start)) if start else None
    student.to(memory_format=torch.channels_last)
    student.precision = find_precision(s.precision, device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    frequency = {name: count / len(train_set) for name, count in train_set.class_counts().items()}
    method = build_method(settings, student, teacher, frequency)
    trainer = Trainer(student, teacher, method, settings, device)
    labeled_images = distributed.world_size() * s.accumulate * s.labeled_per_batch
    say(
        f"train: {settings.method.name}, {settings.detector.name}, {len(train_set.categories)} classes, "
        f"{len(train_set)} labelled and {len(extra or ())} unlabelled images, {s.iterations} iterations of "
        f"{batch_of(settings) if extra else f'{labeled_images} images'}, lr {s.lr:g}, "
        f"{distributed.world_size()} x {device}, "
        f"{str(student.precision).removeprefix('torch.')}"
    )
    if s.warmup_iterations >= s.iterations:
        say(
            f"warning: training.warmup_iterations = {s.warmup_iterations}, but there are {s.iterations} iterations: lr "
            f"never comes up to {s.lr:g}; set less"
        )
    usual = flat(Settings())
    other = [f"{key}={value}" for key, value in flat(settings).items() if value != usual[key]]
    say(f"train: settings that are not the default: {', '.join(other) or 'none'}")
    if method.seen is not None and settings.method.guard and not (settings.burn_in_steps and s.evaluate_every):
        say(
            "train: nothing guards against pseudo labels that do harm: that takes method.burn_in and "
            "training.evaluate_every, to compare with the AP before them"
        )

    if settings.method.name == "stac" and settings.method.label_model and extra is not None:
        extra = self_label(settings.method.label_model, extra, train_set.categories, settings, device)

    def validate(*names: str) -> dict[str, dict[str, Any]]:
        detectors = {"teacher": teacher, "student": student}
        return {name: score(detectors[name], val_set, settings, device, read).metrics for name in names}

    with storage.output_folder(out) if main else contextlib.nullcontext() as folder:
        # where it can be looked at while training goes on, and after a run that was stopped
        log = Path(out, "log") if main and not storage.is_s3(out) else None
        if log:
            say(f"train: the log is in {log}; look at it: tensorboard --logdir {log}")
        checkpoints = Checkpoints(place, run, s.keep_checkpoints)
        cache = settings.method.burn_in_cache if settings.burn_in_steps else None
        burn_in = Checkpoints(cache, burn_in_of(run), keep=1) if cache else None
        state = distributed.once(checkpoints.load)
        if not state and burn_in and (state := distributed.once(burn_in.load)):
            state |= {"method": method.state()}  # the methods differ from here on
            place, burn_in = str(cache), None
        if state:
            trainer.load_state(state)
            say(f"train: goes on at step {trainer.progress.step} of {s.iterations}, from {place}")
        parts = batches(train_set, extra, settings, start=trainer.progress.step, burn_in=settings.burn_in_steps)
        # the student is scored at the end only, which halves what validations cost
        teacher_only = (lambda: validate("teacher")) if s.evaluate_every else None
        run_training(
            trainer,
            parts,
            sets,
            log or folder,
            checkpoints if main else None,
            teacher_only,
            burn_in if main else None,
        )
        if folder and log:
            for file in log_files(log):
                shutil.copy(file, folder)
        best = trainer.progress.best
        if best:
            teacher.load_state_dict(best["teacher"])
            student.load_state_dict(best["student"])
        metrics = best["metrics"] | validate("student") if best else validate("teacher", "student")
        if folder:
            facts = {
                "method": settings.method.name,
                "seed": s.seed,
                "run": run,
                "data": {
                    name: {"source": d.source, "root": d.root, "images": len(d), "fingerprint": d.fingerprint()}
                    for name, d in {**sets, "validation": val_set}.items()
                },
                "parent": parent,
                "training": trainer.progress.facts(),
            }
            provenance = facts | surroundings(device, student.precision)
            ModelFolder.write(folder, student, teacher, settings, val_set, metrics, provenance)
    if main:
        checkpoints.remove()
        if log:  # the model folder has it now
            for file in log_files(log):
                file.unlink()
            with contextlib.suppress(OSError):
                log.rmdir()
    of = f" at step {best['step']}, the best" if best else ""
    if best:
        say(f"train: {trainer.progress.facts()['evaluation_share']:.0%} of the time went into validations")
    say(f"train: teacher AP {metrics['teacher']['AP']:.3f}, student AP {metrics['student']['AP']:.3f}{of} -> {out}")
    return metrics


def _with_method(settings: Settings, **changes: str) -> Settings:
    return settings.model_copy(update={"method": settings.method.model_copy(update=changes)})


def for_batch(settings: Settings, images: int) -> Settings:
    """The settings for a step of so many images: what was meant for `training.reference_batch` images follows.

    lr goes with the batch (the linear scaling rule, arXiv 1706.02677), iterations and `evaluate_every` against it, so
    that as many images are seen, also between validations; the warm-up stays. `reference_batch` becomes `images`, so
    that nothing is scaled twice. Without a `reference_batch` nothing changes.

    Example:
        >>> for_batch(load_settings("coco-10pct"), 5).training.iterations
        1440000
    """
    s = settings.training
    if s.reference_batch in {None, images}:
        return settings
    follows = {
        "lr": s.lr * images / s.reference_batch,
        "iterations": max(1, round(s.iterations * s.reference_batch / images)),
        "reference_batch": images,
    }
    if s.evaluate_every:
        follows["evaluate_every"] = max(1, round(s.evaluate_every * s.reference_batch / images))
    return settings.model_copy(update={"training": s.model_copy(update=follows)})


def _like_parent(settings: Settings) -> Settings:
    """The settings with the norm of the model folder that the training starts from, where `auto` leaves it open."""
    new = settings.detector
    if new.init_from is None or new.norm != "auto" or new.backbone_weights is not None:
        return settings
    try:
        with storage.local_input(join(new.init_from, "settings.yaml")) as path:
            old = read_settings(path).detector
    except storage.MissingFile:  # a state dict; or `build` says what is missing
        return settings
    # a parent that learnt from nothing has group norm, and so have all that start from it
    from_nothing = old.norm == "auto" and old.backbone_weights is None and old.init_from is None
    norm = "group" if from_nothing else old.norm
    return settings.model_copy(update={"detector": new.model_copy(update={"norm": norm})})


def _unlabeled(
    unlabeled: str | None, train_set: CocoDataset, val_set: CocoDataset, settings: Settings
) -> CocoDataset | None:
    if settings.method.name == "supervised":
        return None
    found = without(load_unlabeled(unlabeled), val_set) if unlabeled is not None else None
    if not found:
        say(f"warning: no unlabelled images ({unlabeled or 'no --unlabeled'}): this is supervised training then")
        return None
    if found.categories:
        require_same_classes(train_set, found)
    if not settings.training.unlabeled_per_batch:
        raise UserError(
            "training.unlabeled_per_batch = 0: no unlabelled image would be used; set it, or use supervised"
        )
    return found
