"""Commands that train."""

from __future__ import annotations

from typing import Annotated

import typer

from softteacher.choices import MethodName
from softteacher.cli.options import Preset, Set, print_facts

app = typer.Typer()


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

    chosen = [f"method.name={method}"] if method else []
    settings = load_settings(preset, [*(overrides or []), *chosen])
    metrics = launch(labeled, unlabeled, validation, out, settings, checkpoints, processes)
    print_facts({f"{name}_{key}": round(metrics[name][key], 4) for name in metrics for key in ("AP", "AP50")})


@app.command(epilog="Example: softteacher config --preset coco-10pct --set training.seed=1")
def config(preset: Preset = None, overrides: Set = None) -> None:
    """Print the whole settings tree with comments."""
    from softteacher.config import load_settings, presets

    print(f"# presets: {', '.join(presets())}")
    print(load_settings(preset, overrides or []).to_yaml(comments=True), end="")
