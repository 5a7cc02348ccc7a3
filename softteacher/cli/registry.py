"""Commands about what may go live, and where it came from."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from softteacher.choices import Bounds
from softteacher.cli.options import ModelName, Repository, print_facts

Registry = Annotated[str, typer.Option(help="Folder or s3:// prefix of the records, beside the repository.")]
REJECTED = 3

app = typer.Typer()


@app.command(epilog="Example: softteacher gate --onnx onnx --repository s3://models/triton --name cards --out gate")
def gate(
    onnx: Annotated[str, typer.Option(help="Folder that `softteacher export` wrote.")],
    repository: Repository,
    name: ModelName,
    delta: Annotated[float, typer.Option(help="AP by which it must be better; may be negative.")] = Bounds.delta,
    max_class_drop: Annotated[
        float, typer.Option(min=0, help="AP that a class may fall by where that is no chance; 1: any.")
    ] = Bounds.max_class_drop,
    max_latency_ratio: Annotated[
        float, typer.Option(min=0, help="Latency that it may have, over the champion's.")
    ] = Bounds.max_latency_ratio,
    require_significant: Annotated[
        bool, typer.Option("--require-significant", help="The 95 % interval of the gain must lie over zero.")
    ] = False,
    out: Annotated[str | None, typer.Option(help="Folder for gate.json and report.html, local or s3://.")] = None,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 3 where the champion stays.")] = False,
) -> None:
    """Is it better than the live model? Both answer its validation set; nothing is deployed."""
    from softteacher.serving.gate import gate as run

    bounds = Bounds(delta, max_class_drop, max_latency_ratio, require_significant)
    decision = run(onnx, repository, name, bounds=bounds, out=out)
    print_facts({"deploy": decision.deploy, "reason": decision.reason, **decision.metrics()})
    if exit_code and not decision.deploy:
        raise typer.Exit(REJECTED)


@app.command(
    epilog="Example: softteacher record --model model --onnx onnx --gate gate --repository s3://models/triton "
    "--registry s3://models/registry --name cards"
)
def record(
    model: Annotated[str, typer.Option(help="Model folder.")],
    onnx: Annotated[str, typer.Option(help="Folder that was exported from it, and deployed.")],
    repository: Repository,
    registry: Registry,
    name: ModelName,
    gate: Annotated[str | None, typer.Option(help="Folder that `softteacher gate` wrote.")] = None,
    keep: Annotated[int, typer.Option(min=1, help="Model folders that stay; records all do.")] = 5,
) -> None:
    """Keep the model folder of a deployed version, and where it came from, for `lineage` and a warm start."""
    from softteacher.serving.lineage import record as run

    facts = run(model, onnx, repository, name, registry, gate=gate, keep=keep)
    print_facts({key: facts[key] for key in ("name", "version", "onnx_sha256", "run_id")})


@app.command(
    epilog="Example: softteacher lineage cards --repository s3://models/triton --registry s3://models/registry"
)
def lineage(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    repository: Repository,
    registry: Registry,
    version: Annotated[int | None, typer.Option(min=1, help="By default the live one.")] = None,
    form: Annotated[Literal["table", "json"], typer.Option("--format", help="For people or for programs.")] = "table",
) -> None:
    """Show where the live version came from, and those before it: data, parents, settings, metrics, image, run."""
    from softteacher.serving.lineage import lineage as run
    from softteacher.serving.lineage import table

    chain = run(name, repository, registry, version)
    print(json.dumps(chain, indent=1) if form == "json" else table(chain))
