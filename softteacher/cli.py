"""The command line: every command is a door to one library function.

Exit codes: 0 good, 2 wrong usage or bad input (one line says what and what to do), 1 a failure of ours.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from enum import StrEnum
from typing import Annotated

import typer

from softteacher.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Soft Teacher: a detector from few labelled and many unlabelled images.",
)

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting; see `softteacher config`.")
]
Preset = Annotated[
    str | None, typer.Option(help="Settings to start from, a+b: b on top of a; see `softteacher config`.")
]


class MethodName(StrEnum):
    """Training methods."""

    soft_teacher = "soft_teacher"
    mean_teacher = "mean_teacher"
    stac = "stac"
    supervised = "supervised"


class BackendName(StrEnum):
    """Triton's backends that can run the model."""

    python = "python"
    onnxruntime = "onnxruntime"


class WeightsName(StrEnum):
    """Which of the two detectors."""

    teacher = "teacher"
    student = "student"


@app.command(epilog="Example: softteacher split --data s3://bucket/cards --percent 10 --fold 1 --out splits/cards-10-1")
def split(
    data: Annotated[str, typer.Option(help="Folder or s3:// prefix with images/ and annotations/, or a COCO json.")],
    percent: Annotated[float, typer.Option(help="Share of the training images that is labelled.")],
    out: Annotated[str, typer.Option(help="Folder or s3:// prefix for the manifests.")],
    fold: Annotated[int, typer.Option(help="Number of the fold, from 1.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of all folds.")] = 0,
    validation_fraction: Annotated[float | None, typer.Option(help="Validate on this share of the images.")] = None,
    stratify: Annotated[bool, typer.Option("--stratify", help="At least one labelled image of every class.")] = False,
    unlabeled: Annotated[str | None, typer.Option(help="Further images without json, folder or s3:// prefix.")] = None,
    max_bad_images: Annotated[float, typer.Option(help="Share of broken images that is survived.")] = 0.01,
) -> None:
    """Split a COCO data set into a labelled, an unlabelled and a validation part."""
    from softteacher.data.split import split as run

    facts = run(
        data,
        out,
        percent=percent,
        fold=fold,
        seed=seed,
        validation_fraction=validation_fraction,
        stratify=stratify,
        unlabeled=unlabeled,
        max_bad_images=max_bad_images,
    )
    _facts({name: facts[name]["images"] for name in ("labeled", "unlabeled", "validation")})


@app.command(
    epilog="Example: softteacher train --labeled s/labeled.json --unlabeled s/unlabeled.json "
    "--validation s/validation.json --preset small --set training.iterations=2000 --out model"
)
def train(
    labeled: Annotated[str, typer.Option(help="Manifest or COCO json.")],
    validation: Annotated[str, typer.Option(help="Manifest or COCO json.")],
    out: Annotated[str, typer.Option(help="The model folder, local or s3://.")],
    unlabeled: Annotated[
        str | None, typer.Option(help="Manifest, COCO json, folder or s3:// prefix of images.")
    ] = None,
    method: Annotated[MethodName | None, typer.Option(help="Training method; by default the preset's.")] = None,
    preset: Preset = None,
    overrides: Set = None,
    checkpoints: Annotated[
        str | None, typer.Option(help="Folder or s3:// prefix of the checkpoints; by default OUT/checkpoints.")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=0, help="Processes on this machine, through torchrun's launcher; 0: one for each GPU.")
    ] = 1,
) -> None:
    """Train a detector; the model folder holds student, teacher and where they came from.

    The same command again goes on from the last checkpoint of a run that was cut off.
    """
    from softteacher.config import load_settings
    from softteacher.training.launch import launch

    chosen = [f"method.name={method.value}"] if method else []
    settings = load_settings(preset, [*(overrides or []), *chosen])
    metrics = launch(labeled, unlabeled, validation, out, settings, checkpoints, processes)
    _facts({f"{name}_{key}": round(metrics[name][key], 4) for name in metrics for key in ("AP", "AP50")})


@app.command(epilog="Example: softteacher evaluate --model model --data s/validation.json --out evaluation")
def evaluate(
    model: Annotated[str, typer.Option(help="Model folder.")],
    data: Annotated[str, typer.Option(help="Manifest or COCO json with boxes.")],
    out: Annotated[str, typer.Option(help="Folder for metrics.json, detections.json and report.html.")],
    weights: Annotated[WeightsName | None, typer.Option(help="Only these; by default both.")] = None,
) -> None:
    """Score teacher and student the COCO way and write a report."""
    from softteacher.evaluation.evaluate import evaluate as run

    metrics = run(model, data, out, weights=weights.value if weights else None)
    masks = {f"segm_{key}": value for key, value in metrics.get("segm", {}).items()}
    keys = ("AP", "AP50", "AP75", "segm_AP", "segm_AP50", "segm_AP75")
    _facts({key: round((metrics | masks)[key], 4) for key in keys if key in metrics | masks})


@app.command(epilog="Example: softteacher analyze --model model --data s/validation.json --out analysis")
def analyze(
    model: Annotated[str, typer.Option(help="Model folder.")],
    data: Annotated[str, typer.Option(help="Manifest or COCO json with boxes.")],
    out: Annotated[str, typer.Option(help="Folder for the report, three figures and analysis.json.")],
    weights: Annotated[WeightsName, typer.Option(help="Whose boxes are looked at.")] = WeightsName.teacher,
    images: Annotated[str | None, typer.Option(help="Folder of the images, where the data set's is another.")] = None,
) -> None:
    """Evaluate, and show which of the model's boxes can be believed: the paper's Figure 3 for your own data."""
    from softteacher.evaluation.analyze import analyze as run

    facts = run(model, data, out, weights=weights.value, images=images)
    _facts({"best_f1": facts["best_f1"], "advice": facts["advice"]})


@app.command(
    epilog="Example: softteacher rank --model model --unlabeled s/unlabeled.json --labeled s/labeled.json --top 100 "
    "--out ranking"
)
def rank(
    model: Annotated[str, typer.Option(help="Model folder.")],
    unlabeled: Annotated[str, typer.Option(help="Manifest, COCO json, folder or s3:// prefix of images.")],
    out: Annotated[str, typer.Option(help="Folder for the list, to_label.json and contact_sheet.jpg.")],
    top: Annotated[int, typer.Option(help="Number of images.")] = 100,
    labeled: Annotated[str | None, typer.Option(help="The labels so far; by default those of the training.")] = None,
) -> None:
    """Find the unlabelled images that are most worth labelling next."""
    from softteacher.evaluation.rank import rank as run

    rows = run(model, unlabeled, out, top=top, labeled=labeled)
    _facts({"images": len(rows), "first": rows[0]["file_name"]})


@app.command(epilog="Example: softteacher export --model model --out onnx")
def export(
    model: Annotated[str, typer.Option(help="Model folder.")],
    out: Annotated[str, typer.Option(help="Folder for model.onnx and parity.json.")],
    weights: Annotated[WeightsName, typer.Option(help="Whose weights.")] = WeightsName.teacher,
) -> None:
    """Export to ONNX, and compare with PyTorch on real images."""
    from softteacher.serving.export import export as run

    parity = run(model, out, weights=weights.value)
    _facts({"ap": parity["ap"], "batch_1": parity["batch_1"], "batch_4": parity["batch_4"]})


@app.command(
    epilog="Example: softteacher deploy --onnx onnx --repository s3://models/triton --triton http://localhost:8000 "
    "--name cards; and back: the same with --rollback instead of --onnx"
)
def deploy(
    repository: Annotated[str, typer.Option(help="Triton's model repository, local or s3://.")],
    triton: Annotated[str, typer.Option(help="Triton's HTTP URL.")],
    name: Annotated[str, typer.Option(help="Name of the model.")],
    onnx: Annotated[str | None, typer.Option(help="Folder that `softteacher export` wrote.")] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Go back one version.")] = False,
    backend: Annotated[
        BackendName, typer.Option(help="Triton's; NVIDIA's container has onnxruntime.")
    ] = BackendName.python,
    gpu: Annotated[bool, typer.Option("--gpu", help="Run on Triton's GPUs.")] = False,
) -> None:
    """Make a new version live when it answers as ONNX Runtime does; otherwise the old one stays."""
    from softteacher.serving import deploy as serving

    if rollback == (onnx is not None):
        raise UserError("deploy: give either --onnx DIR or --rollback")
    if onnx is None:
        _facts(serving.rollback(repository, triton, name))
    else:
        _facts(serving.deploy(onnx, repository, triton, name, backend=backend.value, gpu=gpu))


@app.command(epilog="Example: softteacher predict --triton http://localhost:8000 --name cards table.jpg --out pictures")
def predict(
    images: Annotated[list[str], typer.Argument(help="Image files, local or s3://.")],
    triton: Annotated[str, typer.Option(help="Triton's HTTP URL.")],
    name: Annotated[str, typer.Option(help="Name of the model.")],
    out: Annotated[str | None, typer.Option(help="Folder for pictures with boxes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    score: Annotated[float, typer.Option(min=0, max=1, help="Lowest score that is shown.")] = 0.3,
) -> None:
    """Ask the endpoint about images."""
    from softteacher.serving.predict import predict as run
    from softteacher.serving.predict import table

    found = run(images, triton, name, out, score)
    print(json.dumps(found, indent=1) if as_json else table(found))


@app.command(epilog="Example: softteacher config --preset coco-10pct --set training.seed=1")
def config(preset: Preset = None, overrides: Set = None) -> None:
    """Print the whole settings tree with comments."""
    from softteacher.config import load_settings, presets

    print(f"# presets: {', '.join(presets())}")
    print(load_settings(preset, overrides or []).to_yaml(comments=True), end="")


@app.command(epilog="Example: softteacher demo --data ~/cards --preset small --set training.iterations=800")
def demo(
    data: Annotated[str | None, typer.Option(help="Your COCO data set, folder or s3://; by default digits.")] = None,
    out: Annotated[str, typer.Option(help="Folder for everything the run makes.")] = "demo-output",
    percent: Annotated[float | None, typer.Option(help="Labelled share; by default 10, of the digits 5.")] = None,
    preset: Preset = None,
    overrides: Set = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the endpoint up until Ctrl-C.")] = False,
) -> None:
    """The main job on this machine: the pipeline with a real S3 store and a real Triton, then the endpoint is asked."""
    from softteacher.demo.run import demo as run

    run(data, out, percent=percent, preset=preset, overrides=overrides or [], keep=keep)


def main() -> None:
    """Entry point: runs a command and turns errors into exit codes."""
    try:
        app()
    except UserError as e:
        print("error:", " ".join(str(e).splitlines()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception:
        trace = traceback.format_exc()
        try:
            with tempfile.NamedTemporaryFile("w", prefix="softteacher-error-", suffix=".log", delete=False) as log:
                log.write(f"{sys.argv}\n{trace}")
            where = f"details in {log.name}"
        except OSError as e:
            where = f"details could not be written: {e.strerror}"
        print(f"internal error: {trace.strip().splitlines()[-1]} ({where}; please report it)", file=sys.stderr)
        sys.exit(1)


def _facts(facts: object) -> None:
    """The last line of a command: its result as JSON on standard output."""
    print(json.dumps(facts))
