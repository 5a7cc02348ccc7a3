"""Commands that bring a model to Triton, and ask it there."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from softteacher.choices import Backend, Format, ServedEngine, Weights
from softteacher.cli.options import ModelName, Parts, Repository, SetLater, ShardText, finite, print_facts, read_shard

DAY = 86400.0  # seconds; of many more, a thread can't wait
TritonUrl = Annotated[str, typer.Option(help="Triton's HTTP URL.")]
Timeout = Annotated[
    float,
    typer.Option(min=1, max=DAY, callback=finite, help="Seconds that Triton may take to load a model or to answer."),
]
app = typer.Typer()


@app.command(epilog="Example: softteacher export --model model --out onnx")
def export(
    model: Annotated[str, typer.Option(help="Model folder.")],
    out: Annotated[str, typer.Option(help="Folder for model.onnx and parity.json.")],
    weights: Annotated[Weights, typer.Option(help="Whose weights.")] = "teacher",
    overrides: SetLater = None,
) -> None:
    """Export to ONNX, and compare with PyTorch on real images."""
    from softteacher.serving.export import export as run

    parity = run(model, out, weights=weights, overrides=overrides or [])
    print_facts({"ap": parity["ap"], "batch_1": parity["batch_1"], "batch_4": parity["batch_4"]})


@app.command(
    epilog="Example: softteacher deploy --onnx onnx --repository s3://models/triton --triton http://localhost:8000 "
    "--name cards"
)
def deploy(
    onnx: Annotated[str, typer.Option(help="Folder that `softteacher export` wrote.")],
    repository: Repository,
    triton: TritonUrl,
    name: ModelName,
    backend: Annotated[
        Backend, typer.Option(help="Triton's; NVIDIA's container has onnxruntime and openvino.")
    ] = "python",
    engine: Annotated[
        ServedEngine, typer.Option(help="What runs the model; parity.json of the export has AP and speed of each.")
    ] = "onnxruntime-fp32",
    gpu: Annotated[bool, typer.Option("--gpu", help="Run on Triton's GPUs.")] = False,
    tensorrt: Annotated[bool, typer.Option("--tensorrt", help="With --gpu: by TensorRT in fp16, not CUDA.")] = False,
    canary: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Only this share of the requests, 10% or 0.1, until `promote`.")
    ] = None,
    decision: Annotated[
        str | None,
        typer.Option(
            help="Folder of `softteacher gate --out`: refuse if that said no, or another version is live now."
        ),
    ] = None,
    timeout: Timeout = 600,
) -> None:
    """Make a new version live when it answers as ONNX Runtime does; otherwise the old one stays."""
    from softteacher.serving.canary_state import parse_share
    from softteacher.serving.deploy import deploy as run
    from softteacher.serving.repository import Runtime

    share = None if canary is None else parse_share(canary)
    runtime = Runtime(backend, engine, gpu, tensorrt)
    facts = run(onnx, repository, triton, name, runtime=runtime, canary=share, decision=decision, timeout=timeout)
    print_facts(facts)


@app.command(
    epilog="Example: softteacher promote --repository s3://models/triton --triton http://localhost:8000 --name cards"
)
def promote(repository: Repository, triton: TritonUrl, name: ModelName, timeout: Timeout = 600) -> None:
    """Make the canary the live version, after checking its files and answers again."""
    from softteacher.serving.deploy import promote as run

    print_facts(run(repository, triton, name, timeout=timeout))


@app.command(
    epilog="Example: softteacher rollback --repository s3://models/triton --triton http://localhost:8000 --name cards"
)
def rollback(repository: Repository, triton: TritonUrl, name: ModelName, timeout: Timeout = 600) -> None:
    """End the canary; without one, go back one version."""
    from softteacher.serving.deploy import rollback as run

    print_facts(run(repository, triton, name, timeout=timeout))


@app.command(epilog="Example: softteacher follow --repository s3://models/triton --triton http://localhost:8000")
def follow(
    repository: Repository,
    triton: TritonUrl,
    every: Annotated[
        float, typer.Option(min=0.1, max=DAY, callback=finite, help="Seconds between two looks at the repository.")
    ] = 5,
    ready_file: Annotated[
        str | None, typer.Option(help="File that is made once Triton is up to date, and touched at each look.")
    ] = None,
    timeout: Timeout = 600,
) -> None:
    """Keep one Triton of many at what is live in their repository, until it is stopped."""
    import signal
    import threading

    from softteacher.serving.follow import follow as run

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())  # as the first process of a container it has no default
    run(repository, triton, every=every, timeout=timeout, ready_file=ready_file, stop=stop)


@app.command(
    epilog="Example: softteacher status --repository s3://models/triton --triton http://localhost:8000 --name cards "
    "--metrics http://localhost:8002/metrics"
)
def status(
    repository: Repository,
    triton: TritonUrl,
    name: ModelName,
    metrics: Annotated[str | None, typer.Option(help="URL of Triton's metrics, to show its counters, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show the versions, which one is live, and what Triton says of it."""
    from softteacher.serving.status import status as run
    from softteacher.serving.status import table

    state = run(repository, triton, name, metrics)
    print(json.dumps(state, indent=1) if as_json else table(state))


@app.command(
    epilog="Example: softteacher predict --triton http://localhost:8000 --name cards table.jpg --out pictures; "
    "or a folder, a quoted glob and a prefix by gRPC: softteacher predict --triton grpc://localhost:8001 --name cards "
    "photos '2026-*/**/*.png' s3://bucket/stream --format coco --output found.json"
)
def predict(
    images: Annotated[list[str], typer.Argument(help="Files, folders, quoted globs, s3:// URIs and prefixes.")],
    triton: Annotated[str, typer.Option(help="Triton's URL, http://host:port or grpc://host:port.")],
    name: Annotated[str, typer.Option(help="Name of the model.")],
    out: Annotated[str | None, typer.Option(help="Folder or s3:// prefix for pictures with boxes.")] = None,
    form: Annotated[Format, typer.Option("--format", help="How the answers are written.")] = "table",
    output: Annotated[str | None, typer.Option(help="File for them, local or s3://, instead of the screen.")] = None,
    score: Annotated[float, typer.Option(min=0, max=1, callback=finite, help="Lowest score that is shown.")] = 0.3,
    record: Annotated[str | None, typer.Option(help="Folder or s3:// prefix to count them in, for `watch`.")] = None,
    shard: ShardText = None,
    join: Parts = None,
) -> None:
    """Ask the endpoint about images. Broken ones are named; the exit code is 2 then, after all others are done.

    In shards: with --shard 1/2 --format json --output a.json, likewise 2/2 and b.json, then with --join a.json
    --join b.json.
    """
    from softteacher.serving.predict import predict_files as run

    run(
        images,
        triton,
        name,
        out,
        score,
        form=form,
        output=output,
        record=record,
        shard=read_shard(shard, join),
        parts=join or [],
    )
