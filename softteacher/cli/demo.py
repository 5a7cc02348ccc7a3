"""The command that shows everything."""

from __future__ import annotations

from typing import Annotated

import typer

from softteacher.choices import Runner
from softteacher.cli.options import Preset, Set

app = typer.Typer()


@app.command(epilog="Example: softteacher demo --data ~/cards --preset small --set training.iterations=800")
def demo(
    data: Annotated[str | None, typer.Option(help="Your COCO data set, folder or s3://; by default digits.")] = None,
    out: Annotated[str, typer.Option(help="Folder for everything the run makes.")] = "demo-output",
    percent: Annotated[float | None, typer.Option(help="Labelled share; by default 10, of the digits 5.")] = None,
    unlabeled: Annotated[str | None, typer.Option(help="More images without a json, folder or s3://.")] = None,
    validation_fraction: Annotated[
        float | None, typer.Option(help="Validate on this share of the images, where there is no val json.")
    ] = None,
    preset: Preset = None,
    overrides: Set = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the endpoint up until Ctrl-C.")] = False,
    runner: Annotated[Runner, typer.Option(help="Each step a process, or a container of its image.")] = "subprocess",
) -> None:
    """The main job on this machine: the pipeline with a real S3 store and a real Triton, then the endpoint is asked."""
    from softteacher.demo.run import demo as run

    run(
        data,
        out,
        percent=percent,
        unlabeled=unlabeled,
        validation_fraction=validation_fraction,
        preset=preset,
        overrides=overrides or [],
        keep=keep,
        runner=runner,
    )
