"""Commands that look at a model or at its traffic."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from softteacher.choices import Weights
from softteacher.cli.options import Parts, SetLater, ShardText, finite, print_facts, read_shard

app = typer.Typer()


@app.command(epilog="Example: softteacher evaluate --model model --data s/validation.json --out evaluation")
def evaluate(
    model: Annotated[str, typer.Option(help="Model folder.")],
    data: Annotated[str, typer.Option(help="Manifest or COCO json with boxes.")],
    out: Annotated[str, typer.Option(help="Folder for metrics.json, detections.json and report.html.")],
    weights: Annotated[Weights | None, typer.Option(help="Only these; by default both.")] = None,
    overrides: SetLater = None,
    shard: ShardText = None,
    join: Parts = None,
) -> None:
    """Score teacher and student the COCO way and write a report.

    In shards: with --shard 1/2 --out a, with --shard 2/2 --out b, then with --join a --join b.
    """
    from softteacher.evaluation.evaluate import evaluate as run

    which = read_shard(shard, join)
    metrics = run(model, data, out, weights=weights, shard=which, parts=join or [], overrides=overrides or [])
    if shard:
        return print_facts({"shard": shard, **metrics})
    masks = {f"segm_{key}": value for key, value in metrics.get("segm", {}).items()}
    keys = ("AP", "AP50", "AP75", "AP_low_scores", "segm_AP", "segm_AP50", "segm_AP75")
    print_facts({key: round((metrics | masks)[key], 4) for key in keys if key in metrics | masks})


@app.command(epilog="Example: softteacher analyze --model model --data s/validation.json --out analysis")
def analyze(
    model: Annotated[str, typer.Option(help="Model folder.")],
    data: Annotated[str, typer.Option(help="Manifest or COCO json with boxes.")],
    out: Annotated[str, typer.Option(help="Folder for the report, three figures and analysis.json.")],
    weights: Annotated[Weights, typer.Option(help="Whose boxes are looked at.")] = "teacher",
    images: Annotated[str | None, typer.Option(help="Folder of the images, where the data set's is another.")] = None,
    overrides: SetLater = None,
) -> None:
    """Evaluate, and show which of the model's boxes can be believed: the paper's Figure 3 for your own data."""
    from softteacher.evaluation.analyze import analyze as run

    facts = run(model, data, out, weights=weights, images=images, overrides=overrides or [])
    print_facts({"best_f1": facts["best_f1"], "advice": facts["advice"]})


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
    overrides: SetLater = None,
    shard: ShardText = None,
    join: Parts = None,
) -> None:
    """Find the unlabelled images that are most worth labelling next.

    In shards: with --shard 1/2 --out a, with --shard 2/2 --out b, then with --join a --join b.
    """
    from softteacher.evaluation.rank import rank as run

    which, chosen = read_shard(shard, join), overrides or []
    rows = run(model, unlabeled, out, top=top, labeled=labeled, shard=which, parts=join or [], overrides=chosen)
    print_facts({"shard": shard} if shard else {"images": len(rows), "first": rows[0]["file_name"]})


@app.command(
    epilog="Example: softteacher watch --reference onnx --live s3://bucket/traffic --since 7d --out drift "
    "--metrics-file /var/lib/node_exporter/softteacher.prom"
)
def watch(
    reference: Annotated[
        str, typer.Option(help="Onnx folder, the model's folder in Triton's repository, or a profile.json.")
    ],
    live: Annotated[str, typer.Option(help="Folder or s3:// prefix that the clients record to.")],
    name: Annotated[str | None, typer.Option(help="Name of the model, where traffic of several is there.")] = None,
    version: Annotated[
        str | None,
        typer.Option(help="By default that of a reference in Triton's repository, else the one that answered last."),
    ] = None,
    all_versions: Annotated[bool, typer.Option("--all-versions", help="All of them together.")] = False,
    since: Annotated[str, typer.Option(help="First day, 2026-11-01 (UTC), or days back.")] = "7d",
    until: Annotated[str | None, typer.Option(help="Last day, likewise; by default today.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for report.html, drift.json and profile.json.")] = None,
    threshold: Annotated[
        float, typer.Option(min=0, callback=finite, help="Population stability index that is drift.")
    ] = 0.25,
    min_images: Annotated[int, typer.Option(min=1, help="Of fewer, retraining isn't advised.")] = 200,
    metrics_file: Annotated[str | None, typer.Option(help="A .prom file for node_exporter.")] = None,
    push_gateway: Annotated[str | None, typer.Option(help="URL of a Prometheus pushgateway.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all the numbers, indented.")] = False,
) -> None:
    """Compare live traffic with the validation set: has it drifted, is it time to train again?"""
    from softteacher.watching.watch import watch as run

    facts = run(
        reference,
        live,
        name=name,
        version=version,
        all_versions=all_versions,
        since=since,
        until=until,
        out=out,
        threshold=threshold,
        min_images=min_images,
        metrics_file=metrics_file,
        push_gateway=push_gateway,
    )
    keys = ("name", "version", "images", "psi", "drift", "enough", "retrain")
    print(json.dumps(facts, indent=1)) if as_json else print_facts({key: facts[key] for key in keys})
