"""The main job on one machine: S3 store and Triton started, the pipeline run, the endpoint asked, all stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from softteacher import s3, storage
from softteacher.choices import Runner, check_percent
from softteacher.config import load_settings
from softteacher.console import say, track
from softteacher.data.coco import load_coco
from softteacher.data.split import find_annotations
from softteacher.demo.digits import make_digits
from softteacher.demo.servers import TRITON_IMAGE, check_image, seaweedfs, triton
from softteacher.errors import UserError
from softteacher.serving import lineage
from softteacher.serving.predict import predict, table
from softteacher.serving.repository import parse_config, read_champion

PIPELINE = Path(__file__).parents[2] / "pipeline.py"
BUCKET = "softteacher"
QUESTIONS = 4  # images that the endpoint is asked about
DIGITS = ["data.horizontal_flip=0"]  # a mirrored digit is another sign


def demo(
    data: str | None,
    out: str,
    *,
    percent: float | None,
    unlabeled: str | None = None,
    validation_fraction: float | None = None,
    preset: str | None,
    overrides: list[str],
    keep: bool = False,
    runner: Runner = "subprocess",
) -> None:
    """Run the pipeline on the embedded digits or on a user's COCO data set, and ask the deployed endpoint.

    Args:
        data: folder or `s3://` prefix with `images/` and `annotations/`; none: the digits.
        out: local folder for everything the run makes.
        percent: share of the training images that is labelled; none: 5 of the digits, 10 of a user's own.
        unlabeled: folder or `s3://` prefix of more images, without a json.
        validation_fraction: share of the images to validate on, where there is no val json; none: that of the val json.
        preset: of the training; none: `demo` for the digits, `small` for a user's own images.
        overrides: settings, `key=value`.
        keep: leave store and endpoint up until Ctrl-C.
        runner: what each step runs in, and Triton: a process, or a container of its image.

    Raises:
        UserError: bad input, other data than an earlier run's in the same store, or a server can't be started here.
    """
    if not PIPELINE.is_file():
        raise UserError(f"{PIPELINE}: not there; the demo runs in a checkout of the repository (git clone)")
    name = "digits" if data is None else "detector"
    preset = preset or ("demo" if data is None else "small")
    overrides = [*(DIGITS if data is None else []), *overrides]
    if percent is None:
        percent = 5 if data is None else 10
    check_percent(percent, unlabeled)
    load_settings(preset, overrides)
    if data is not None and not storage.is_s3(data) and not Path(data).is_dir():
        raise UserError(f"{data}: no such folder; give one with images/ and annotations/ in COCO format")
    if unlabeled and not storage.is_s3(unlabeled):
        if not Path(unlabeled).is_dir():
            raise UserError(f"{unlabeled}: no such folder; give one of images")
        if data and Path(unlabeled).resolve() in Path(data).resolve().parents:
            raise UserError(f"{unlabeled}: holds the data set itself; give a folder beside it, or in it")
    if runner == "docker":
        check_image(TRITON_IMAGE)
    if storage.is_s3(out):
        raise UserError(f"--out {out}: the demo writes to this machine; choose a local folder")
    folder = Path(out).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: can't be a folder ({e.strerror}); choose another") from None
    started = time.monotonic()
    with ExitStack() as servers:
        if s3.endpoint() or (data and storage.is_s3(data)):
            base = "/".join(data.split("/")[:3]) if data and storage.is_s3(data) else f"s3://{BUCKET}"
            say(f"store: yours, {s3.endpoint() or 'AWS'}, bucket {base}")
        else:
            store = servers.enter_context(seaweedfs(folder / "s3"))
            os.environ.update(store.env)
            base = store.create_bucket(BUCKET)
            say(f"store: SeaweedFS at {store.endpoint}")
        if data is None:
            make_digits(folder / "data")
            data = str(folder / "data")
            say(f"data: handwritten digits in cluttered scenes, look at {data}/images")
        repository = f"{base}/triton"
        live = [name] if read_champion(repository, name) else []
        if live:  # the gate would find it, after the training
            check_classes(data, repository, name)
        local = Path(data).resolve()
        if not storage.is_s3(data):
            storage.remove(f"{base}/data/{name}")  # an earlier run's
            data = _upload(data, f"{base}/data/{name}")
        if unlabeled and not storage.is_s3(unlabeled):
            if (more := Path(unlabeled).resolve()).is_relative_to(local):  # they are there already
                unlabeled = storage.join(data, *more.relative_to(local).parts)
            else:
                storage.remove(f"{base}/unlabeled/{name}")  # an earlier run's
                unlabeled = _upload(unlabeled, f"{base}/unlabeled/{name}")
        url = os.environ.get("TRITON_URL")
        if not url:
            # what an earlier run deployed goes on serving if the gate keeps it
            image = TRITON_IMAGE if runner == "docker" else None
            url = servers.enter_context(triton(repository, folder / "triton", load=live, image=image)).http
        say(f"server: Triton at {url}, models from {repository}")

        steps = _run_pipeline(folder, {
            "data": data,
            "repository": repository,
            "registry": f"{base}/registry",
            "triton": url,
            "name": name,
            "percent": f"{percent:g}",
            "unlabeled": unlabeled or "",
            "validation-fraction": f"{validation_fraction or 0:g}",
            "preset": preset,
            "runner": runner,
            "triton-backend": "onnxruntime" if "TRITON_URL" in os.environ else "python",
        }, overrides)  # fmt: skip

        facts = _facts(steps, time.monotonic() - started)
        unseen = load_coco(Path(steps["split"]["dataset"], "validation.json"))
        images = [unseen.uri(i) for i in sorted({n * len(unseen) // QUESTIONS for n in range(QUESTIONS)})]
        facts["answer"] = predict(images, url, name, str(folder / "pictures"))
        facts["places"]["pictures"] = str(folder / "pictures")
        facts["lineage"] = lineage.lineage(name, repository, f"{base}/registry")
        (folder / "summary.json").write_text(json.dumps(facts, indent=1))
        _print_summary(facts)
        if keep:
            print("\nThe endpoint is up until Ctrl-C:")
            print(f"  softteacher predict --triton {url} --name {name} IMAGE ... --out pictures")
            print(f"  curl {url}/v2/models/{name}", flush=True)
            signal.pause()


def check_classes(data: str, repository: str, name: str) -> None:
    """Whether a detector of a data set can follow the live version: the gate takes none that lacks a class of it.

    Args:
        data: folder or `s3://` prefix with `images/` and `annotations/`.
        repository: Triton's model repository.
        name: of the model there.

    Raises:
        UserError: it can't.
    """
    known = parse_config(storage.read_bytes(storage.join(repository, name, "config.pbtxt"))).parameters["classes"]
    classes = {c["name"] for c in json.loads(known.string_value)}
    train_json = find_annotations(data)[0]
    if lost := sorted(classes - set(load_coco(train_json).classes)):
        raise UserError(
            f"{train_json}: lacks the classes {', '.join(lost[:5])}{', ...' * (len(lost) > 5)} of the model that an "
            f"earlier run left in {repository}; take another --out for other data (with a store of your own, remove "
            f"{repository}/{name})"
        )


def _upload(data: str, target: str) -> str:
    files = list(storage.list_files(data, follow=True))
    for file in track(files, "upload", len(files)):
        storage.copy(storage.join(data, file.name), storage.join(target, file.name))
    say(f"data: {len(files)} files -> {target}")
    return target


def _run_pipeline(folder: Path, parameters: dict[str, str], overrides: list[str]) -> dict[str, Any]:
    """Run `pipeline.py run-local` in a process of its own: the library knows nothing of KFP."""
    outputs = folder / "outputs.json"
    command = [sys.executable, str(PIPELINE), "run-local", "training", "--baseline", "--stratify"]
    command += ["--outputs", str(outputs), "--pipeline-root", str(folder / "pipeline")]
    for key, value in parameters.items():
        command += [f"--{key}", value]
    for override in overrides:
        command += ["--set", override]
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    try:
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    if code == 2:
        raise UserError("the pipeline stopped; the line above says why")
    if code:
        raise RuntimeError(f"the pipeline failed with exit code {code}; the lines above say where")
    return dict(json.loads(outputs.read_text()))


def _facts(steps: dict[str, Any], seconds: float) -> dict[str, Any]:
    scores = [
        json.loads(Path(steps[s]["results"], "metrics.json").read_text()) for s in ("evaluate-baseline", "evaluate")
    ]
    parts = json.loads(Path(steps["split"]["dataset"], "split.json").read_text())
    # supervised training without a teacher gives its student
    rows = {"supervised": scores[0]["student"], "student": scores[1]["student"], "teacher": scores[1]["teacher"]}
    return {
        "ap": {name: {key: row[key] for key in ("AP", "AP50", "AP75")} for name, row in rows.items()},
        "images": {part: parts[part]["images"] for part in ("labeled", "unlabeled", "validation")},
        "deployed": "deploy" in steps,
        "seconds": {**{name: outputs["seconds"] for name, outputs in steps.items()}, "all": round(seconds, 1)},
        "places": {
            "report": str(Path(steps["evaluate"]["results"], "report.html")),
            "model": steps["train"]["model"],
            "onnx": str(Path(steps["export"]["onnx"], "model.onnx")),
        },
    }


def _print_summary(facts: dict[str, Any]) -> None:
    times = Table("step", "seconds", title="Time")
    for name, seconds in facts["seconds"].items():
        times.add_row(name, f"{seconds:.0f}")
    results = Table("", "AP", "AP50", title="Validation; same labels, same number of iterations")
    for name, row in facts["ap"].items():
        results.add_row(name, f"{row['AP']:.3f}", f"{row['AP50']:.3f}")
    out = Console(width=100)
    out.print(times, results)
    if not facts["deployed"]:
        print("The gate kept the version that was live: the new one is not better.")
    print(f"The endpoint about images it has not seen:\n{table(facts['answer'])}", end="")
    print(f"Where it came from:\n{lineage.table(facts['lineage'])}", end="")
    for what, where in facts["places"].items():
        print(f"{what:<8} {where}")
