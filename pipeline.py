"""The KFP pipeline: compile it for a cluster, run it on this machine, submit it to Kubeflow Pipelines.

split -> train -> evaluate
           └ export -> gate -> deploy   (if the gate says so)
baseline: split -> train (supervised, the same labels) -> evaluate   (if asked for)
"""

import json
import re
import sys
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import kfp_server_api
import typer
from kfp import Client, compiler, dsl
from kfp.dsl.graph_component import GraphComponent

from components import TOOLS_IMAGE, TRAIN_IMAGE
from components.cluster import ClusterOptions, place
from components.deploy import deploy
from components.evaluate import evaluate
from components.export import export
from components.gate import gate
from components.local import run_local
from components.split import split
from components.train import train
from components.train_nodes import train_nodes
from softteacher.config import load_settings
from softteacher.errors import UserError
from softteacher.storage import is_s3


def build_training_pipeline(options: ClusterOptions | None = None) -> GraphComponent:
    """The training pipeline.

    Args:
        options: Of the cluster; none for a run on this machine, where there are no pods to configure.
    """

    def placed(
        task: dsl.PipelineTask, *, heavy: bool = False, gpus: int | None = None, launches: bool = False
    ) -> dsl.PipelineTask:
        # the data folder may hold something else than at the last run with equal parameters: nothing is cached
        task.set_caching_options(False)
        return place(task, options, heavy=heavy, gpus=gpus, launches=launches) if options else task

    gpus, nodes = (options.gpus, options.nodes) if options else (0, 1)

    def training(name: str, **arguments: Any) -> dsl.PipelineTask:
        """The task that trains, in its pod or on many nodes."""
        arguments |= {"name": name, "processes": max(gpus, 1), "checkpoints": (options and options.checkpoints) or ""}
        arguments["run"] = dsl.PIPELINE_JOB_ID_PLACEHOLDER  # by itself: KFP replaces it nowhere within a longer text
        if nodes > 1:
            on_nodes = {"nodes": nodes, "image": options.train_image, "shm": options.shm}
            task = train_nodes(**arguments, **on_nodes)
        else:
            task = train(**arguments)
        return placed(task, heavy=True, gpus=gpus, launches=nodes > 1).set_display_name(name)

    @dsl.pipeline(
        name="training-pipeline", description="Semi-supervised object detection: a COCO data set to a served detector"
    )
    def training_pipeline(
        data: str,
        repository: str,
        triton: str,
        name: str = "detector",
        percent: float = 10.0,
        fold: int = 1,
        stratify: bool = False,
        validation_fraction: float = 0.0,
        unlabeled: str = "",
        method: str = "soft_teacher",
        preset: str = "coco-10pct",
        overrides: list[str] = [],  # noqa: B006 - KFP compiles the default into the pipeline
        baseline: bool = False,
        gate_delta: float = 0.0,
        triton_backend: str = "onnxruntime",
        triton_gpu: bool = False,
    ):
        """Train a detector from few labels and many images, and serve it if it beats the champion.

        Args:
            data: Folder or s3:// prefix with images/ and annotations/, or a COCO json.
            repository: Triton model repository, folder or s3:// prefix.
            triton: URL of the Triton server, http://host:port.
            name: Name of the model that is served.
            percent: Share of the training images that is labelled.
            fold: Number of the fold, from 1.
            stratify: Give every class a labelled image where the data allows.
            validation_fraction: Share of the images held out for validation; 0 takes the data set's own val json.
            unlabeled: Folder or s3:// prefix of more images, without a json.
            method: soft_teacher, mean_teacher, stac or supervised.
            preset: Name of a preset of settings.
            overrides: Settings as key=value on top of the preset.
            baseline: Also train and evaluate a supervised detector on the same labels.
            gate_delta: AP by which a model must beat the champion to be deployed.
            triton_backend: onnxruntime, as in NVIDIA's container, or python where Triton has that one only.
            triton_gpu: Run on Triton's GPUs.
        """
        parts = placed(
            split(
                data=data,
                percent=percent,
                fold=fold,
                stratify=stratify,
                validation_fraction=validation_fraction,
                unlabeled=unlabeled,
            )
        ).output
        model = training("train", dataset=parts, method=method, preset=preset, overrides=overrides).output
        placed(evaluate(dataset=parts, model=model), heavy=True, gpus=min(gpus, 1))
        onnx = placed(export(model=model), heavy=True).outputs["onnx"]
        decision = placed(gate(onnx=onnx, repository=repository, name=name, delta=gate_delta))
        with dsl.If(decision.outputs["Output"] == True, name="better than the champion"):  # noqa: E712 - KFP reads it
            placed(
                deploy(
                    onnx=onnx,
                    repository=repository,
                    triton=triton,
                    name=name,
                    backend=triton_backend,
                    gpu=triton_gpu,
                )
            )
        with dsl.If(baseline == True, name="baseline"):  # noqa: E712
            base = training("train-baseline", dataset=parts, method="supervised", preset=preset, overrides=overrides)
            if options is None:
                base.after(decision)  # the local runner goes step by step: a broken run should end before this one
            scored = placed(evaluate(dataset=parts, model=base.output), heavy=True, gpus=min(gpus, 1))
            scored.set_display_name("evaluate-baseline")

    return training_pipeline


app = typer.Typer(
    help="The KFP pipeline: compile, run on this machine, submit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command("compile")
def compile_command(
    out: Annotated[Path, typer.Option(help="folder for training_pipeline.yaml")],
    train_image: Annotated[str, typer.Option(help="image of train, evaluate, export")] = TRAIN_IMAGE,
    tools_image: Annotated[str, typer.Option(help="image of split, gate, deploy")] = TOOLS_IMAGE,
    gpu_type: Annotated[str, typer.Option(help="resource name of the accelerator")] = ClusterOptions.gpu_type,
    gpus: Annotated[
        int, typer.Option(min=0, help="accelerators of train on each node, one process each; 0: none")
    ] = ClusterOptions.gpus,
    nodes: Annotated[
        int, typer.Option(min=1, help="nodes that train together; from 2 by Kubeflow Trainer")
    ] = ClusterOptions.nodes,
    checkpoints: Annotated[
        str | None, typer.Option(help="s3:// prefix for those of all runs; none: a retry of train begins anew")
    ] = None,
    cpu: Annotated[str, typer.Option(help="processor limit on the train image")] = ClusterOptions.cpu,
    memory: Annotated[str, typer.Option(help="memory limit on the train image")] = ClusterOptions.memory,
    tools_memory: Annotated[str, typer.Option(help="memory limit on the tools image")] = ClusterOptions.tools_memory,
    shm: Annotated[str, typer.Option(help="size of the memory-backed /dev/shm")] = ClusterOptions.shm,
    node_selector: Annotated[list[str], typer.Option(help="label=value, repeatable; train and evaluate")] = [],  # noqa: B006
    toleration: Annotated[list[str], typer.Option(help="key[=value]:effect, repeatable; train and evaluate")] = [],  # noqa: B006
    retries: Annotated[
        int, typer.Option(min=0, help="tries again after a failure, with backoff")
    ] = ClusterOptions.retries,
    s3_secret: Annotated[str | None, typer.Option(help="name of the secret with the S3 keys")] = None,
    s3_endpoint: Annotated[str | None, typer.Option(help="URL of the object store; none: AWS")] = None,
) -> None:
    """Compile the pipeline for a cluster, one YAML a pipeline.

    Example: python pipeline.py compile --out build --train-image registry.example.com/train:1 --gpus 2
    --node-selector pool=gpu --toleration nvidia.com/gpu:NoSchedule --s3-secret s3-credentials
    """
    selector = {}
    for text in node_selector:
        label, separator, value = text.partition("=")
        if not (label and separator):
            raise UserError(f"--node-selector {text}: write label=value, for example pool=gpu")
        selector[label] = value
    tolerations = []
    for text in toleration:
        taint, separator, effect = text.rpartition(":")
        if not (separator and effect in {"NoSchedule", "PreferNoSchedule", "NoExecute"}):
            raise UserError(f"--toleration {text}: write key[=value]:effect, for example nvidia.com/gpu:NoSchedule")
        key, equal, value = taint.partition("=")
        tolerations.append(
            {"key": key, "effect": effect, "operator": "Equal" if equal else "Exists"}
            | ({"value": value} if equal else {})
        )
    if nodes > 1 and not is_s3(checkpoints or ""):
        raise UserError(
            f"--nodes {nodes}: they share checkpoints and model through S3; add --checkpoints s3://bucket/prefix"
        )
    options = ClusterOptions(
        train_image=train_image,
        tools_image=tools_image,
        gpu_type=gpu_type,
        gpus=gpus,
        nodes=nodes,
        checkpoints=checkpoints,
        cpu=cpu,
        memory=memory,
        tools_memory=tools_memory,
        shm=shm,
        node_selector=selector,
        tolerations=tolerations,
        retries=retries,
        s3_secret=s3_secret,
        s3_endpoint=s3_endpoint,
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        pipeline = build_training_pipeline(options)
        compiler.Compiler().compile(pipeline, str(out / "training_pipeline.yaml"))
    except (OSError, ValueError) as error:  # KFP says ValueError to a resource quantity that is none
        raise UserError(f"compile: {error}") from None
    print(out / "training_pipeline.yaml")


Data = Annotated[str, typer.Option(help="folder or s3:// prefix with images/ and annotations/, or a COCO json")]
Repository = Annotated[str, typer.Option(help="Triton model repository, folder or s3:// prefix")]
Triton = Annotated[str, typer.Option(help="URL of the Triton server, http://host:port")]
Name = Annotated[str, typer.Option(help="name of the model that is served")]
Percent = Annotated[float, typer.Option(help="share of the training images that is labelled")]
Fold = Annotated[int, typer.Option(min=1, help="number of the fold")]
Stratify = Annotated[bool, typer.Option(help="every class gets a labelled image where the data allows")]
Fraction = Annotated[float, typer.Option(help="share held out for validation; 0: the data set's own val json")]
Unlabeled = Annotated[str, typer.Option(help="folder or s3:// prefix of more images, without a json")]
Method = Annotated[str, typer.Option(help="soft_teacher, mean_teacher, stac or supervised")]
Preset = Annotated[str, typer.Option(help="preset of settings")]
Overrides = Annotated[list[str], typer.Option("--set", help="key=value on top of the preset, repeatable")]
Baseline = Annotated[bool, typer.Option(help="also train a supervised detector on the same labels")]
GateDelta = Annotated[float, typer.Option(help="AP by which a model must beat the champion")]
Backend = Annotated[Literal["onnxruntime", "python"], typer.Option(help="Triton's; its own container has onnxruntime")]
TritonGpu = Annotated[bool, typer.Option(help="run on Triton's GPUs")]


def _parameters(context: typer.Context) -> dict[str, Any]:
    """The pipeline's parameters among the options of a command; the settings are checked before anything starts."""
    given = context.params
    load_settings(given["preset"], [*given["overrides"], f"method.name={given['method']}"])
    if not 0 < given["percent"] < 100:
        raise UserError(f"--percent {given['percent']:g}: must be more than 0 and less than 100, e.g. 10")
    return {key: given[key] for key in build_training_pipeline().component_spec.inputs}


@app.command("run-local")
def run_local_command(
    context: typer.Context,
    data: Data,
    repository: Repository,
    triton: Triton,
    name: Name = "detector",
    percent: Percent = 10.0,
    fold: Fold = 1,
    stratify: Stratify = False,
    validation_fraction: Fraction = 0.0,
    unlabeled: Unlabeled = "",
    method: Method = "soft_teacher",
    preset: Preset = "coco-10pct",
    overrides: Overrides = [],  # noqa: B006
    baseline: Baseline = False,
    gate_delta: GateDelta = 0.0,
    triton_backend: Backend = "python",
    triton_gpu: TritonGpu = False,
    pipeline_root: Annotated[str, typer.Option(help="folder for what the steps write")] = "local_outputs",
    outputs: Annotated[
        Path | None, typer.Option(help="write what each step made to this file instead of printing it")
    ] = None,
) -> None:
    """Run the pipeline on this machine; S3 keys and endpoint come from the AWS environment variables.

    Example: python pipeline.py run-local --data s3://data/cards --repository s3://models/triton
    --triton http://127.0.0.1:8000 --preset demo --set training.iterations=500 --baseline
    """
    text = json.dumps(run_local(build_training_pipeline(), _parameters(context), pipeline_root), indent=1)
    if outputs:
        outputs.write_text(text)
    else:
        print(text)


@app.command("submit")
def submit_command(
    context: typer.Context,
    package: Annotated[Path, typer.Argument(help="YAML that `compile` wrote")],
    host: Annotated[str, typer.Option(help="URL of Kubeflow Pipelines")],
    data: Data,
    repository: Repository,
    triton: Triton,
    namespace: Annotated[str | None, typer.Option(help="of the user, on a multi-user Kubeflow")] = None,
    experiment: Annotated[str, typer.Option(help="experiment that the run belongs to")] = "softteacher",
    token: Annotated[str | None, typer.Option(envvar="KFP_TOKEN", show_envvar=True, help="bearer token")] = None,
    name: Name = "detector",
    percent: Percent = 10.0,
    fold: Fold = 1,
    stratify: Stratify = False,
    validation_fraction: Fraction = 0.0,
    unlabeled: Unlabeled = "",
    method: Method = "soft_teacher",
    preset: Preset = "coco-10pct",
    overrides: Overrides = [],  # noqa: B006
    baseline: Baseline = False,
    gate_delta: GateDelta = 0.0,
    triton_backend: Backend = "onnxruntime",
    triton_gpu: TritonGpu = False,
) -> None:
    """Run a compiled pipeline on Kubeflow Pipelines.

    Example: python pipeline.py submit build/training_pipeline.yaml --host http://localhost:8080
    --data s3://data/coco --repository s3://models/triton --triton http://triton.models:8000
    """
    parameters = _parameters(context)
    if not package.is_file():
        raise UserError(f"{package}: no such file; write it with `python pipeline.py compile --out DIR`")
    host = host.rstrip("/")
    if not re.match(r"https?://\w", host):
        raise UserError(f"--host {host}: write a URL, for example http://localhost:8080")
    # asked first because the client tries for half a minute and prints a traceback each time
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        urllib.request.urlopen(
            urllib.request.Request(f"{host}/apis/v2beta1/healthz", headers=headers), timeout=10
        ).close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            client = Client(host=host, existing_token=token)
            run = client.create_run_from_pipeline_package(
                str(package), parameters, experiment_name=experiment, namespace=namespace
            )
    except urllib.error.HTTPError as error:
        raise UserError(f"--host {host}: answers {error.code} {error.reason}; check the URL and --token") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"--host {host}: no Kubeflow Pipelines there ({error}); check the URL and the network"
        ) from None
    except kfp_server_api.ApiException as error:
        raise UserError(f"--host {host}: refused the run ({error.status} {error.reason}); check --namespace") from None
    print(f"{host}/#/runs/details/{run.run_id}")


def main() -> None:
    """Run the command line; a `UserError` is one line and exit code 2, a failure of ours exit code 1."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
