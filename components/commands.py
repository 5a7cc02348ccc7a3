"""The command line of the pipelines; its options are the pipelines' parameters and `ClusterOptions`."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import docstring_parser
import typer
from kfp import compiler
from kfp.dsl.graph_component import GraphComponent

from components.cluster import ClusterOptions
from components.cron import kfp_cron, next_time
from components.local import run_local
from components.options import options_of, with_options
from components.server import Server, is_enabled, read_package
from components.steps import steps_of
from softteacher import storage
from softteacher.choices import Backend, Runner, ServedEngine, check_name, check_percent
from softteacher.config import load_settings
from softteacher.errors import UserError

Build = Callable[[ClusterOptions | None], GraphComponent]

# what the command line calls them, and what it lets through; KFP knows neither
FLAGS = {"overrides": "--set", "tolerations": "--toleration", "image_pull_secrets": "--image-pull-secret"}
TYPES = {
    "triton_backend": Backend,
    "triton_engine": ServedEngine,
    "node_selector": list[str],
    "tolerations": list[str],
    "image_pull_secrets": list[str],
}

PLACES = {"data", "unlabeled", "source", "state", "base", "repository", "registry", "labels"}

Package = Annotated[Path, typer.Argument(help="YAML that `compile` wrote")]
Host = Annotated[str, typer.Option(help="URL of Kubeflow Pipelines")]
Namespace = Annotated[str | None, typer.Option(help="Of the user, on a multi-user Kubeflow")]
Token = Annotated[str | None, typer.Option(envvar="KFP_TOKEN", show_envvar=True, help="Bearer token")]
Experiment = Annotated[str, typer.Option(help="Experiment that the runs belong to")]
Account = Annotated[str | None, typer.Option(help="Kubernetes service account of the steps")]


def make_app(pipelines: Mapping[str, Build]) -> typer.Typer:
    """The commands compile, run-local, submit, schedule, unschedule, list and status.

    Args:
        pipelines: What builds each, by the name that the command line gives it. The pipeline's docstring describes
            the parameters and has an example of them; `name` is among them, and the settings are `preset`,
            `overrides` and `method`.
    """
    app = _app("The KFP pipelines: compile, run on this machine, submit, schedule.")
    _add_compile(app, pipelines)
    groups = {
        "run-local": _app("Run a pipeline on this machine."),
        "submit": _app("Run a compiled pipeline on Kubeflow Pipelines."),
        "schedule": _app("Run a compiled pipeline on Kubeflow Pipelines by the clock."),
    }
    for name, group in groups.items():
        app.add_typer(group, name=name)
    for name, build in pipelines.items():
        _add_pipeline(groups, name, build)
    for command in (unschedule, list_, status):
        app.command(command.__name__.rstrip("_"))(command)
    return app


def _app(text: str) -> typer.Typer:
    return typer.Typer(
        help=text, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
    )


def _add_compile(app: typer.Typer, pipelines: Mapping[str, Build]) -> None:
    def compile_(out: Annotated[Path, typer.Option(help="Folder for a YAML a pipeline")], **cluster: Any) -> None:
        """Compile the pipelines for a cluster.

        Example: python pipeline.py compile --out build --train-image registry.example.com/train:1 --gpus 2
        --node-selector pool=gpu --toleration nvidia.com/gpu:NoSchedule --s3-secret s3-credentials
        """
        options = ClusterOptions(**cluster)
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, build in pipelines.items():
                file = out / f"{name}_pipeline.yaml"
                compiler.Compiler().compile(build(options), str(file))
                print(file)
        except (OSError, ValueError) as error:  # KFP says ValueError to a resource quantity that is none
            raise UserError(f"compile: {error}") from None

    app.command("compile")(with_options(compile_, options_of(ClusterOptions, flags=FLAGS, types=TYPES)))


def _add_pipeline(groups: Mapping[str, typer.Typer], name: str, build: Build) -> None:
    """Add run-local, submit and schedule of a pipeline."""
    local, pipeline = build(None), build(ClusterOptions())

    def run_local_(
        pipeline_root: Annotated[str, typer.Option(help="Folder for what the steps write")] = "local_outputs",
        runner: Annotated[
            Runner, typer.Option(help="A step in a process, or in a container of its image")
        ] = "subprocess",
        outputs: Annotated[
            Path | None, typer.Option(help="Write what each step made to this file instead of printing it")
        ] = None,
        **parameters: Any,
    ) -> None:
        from softteacher.serving.places import check_repository

        checked = _checked(parameters)
        if not storage.is_s3(checked["repository"]):  # of a store, the steps tell
            check_repository(checked["repository"])
        if outputs:
            storage.write_bytes(outputs, b"{}")  # can it be written? that is better known before hours of work
        text = json.dumps(run_local(local, checked, pipeline_root, runner), indent=1)
        if outputs:
            storage.write_bytes(outputs, text.encode())
        else:
            print(text)

    def submit(
        package: Package,
        host: Host,
        namespace: Namespace = None,
        token: Token = None,
        experiment: Experiment = "softteacher",
        service_account: Account = None,
        **parameters: Any,
    ) -> None:
        checked = _on_store(_checked(parameters))
        _check_package(package, pipeline)
        server = Server(host, namespace, token)
        print(server.submit(package, checked, experiment=experiment, service_account=service_account))

    def schedule(
        package: Package,
        host: Host,
        cron: Annotated[str, typer.Option(help='When, in UTC: minute hour day month weekday, e.g. "0 3 * * MON"')],
        job: Annotated[str, typer.Option(help="Name of the schedule; none: that of pipeline and model")] = "",
        namespace: Namespace = None,
        token: Token = None,
        experiment: Experiment = "softteacher",
        service_account: Account = None,
        **parameters: Any,
    ) -> None:
        checked, fields = _on_store(_checked(parameters)), kfp_cron(cron)
        _check_package(package, pipeline)
        job = job or f"{pipeline.name}-{checked['name']}"
        server = Server(host, namespace, token)
        more = {"experiment": experiment, "service_account": service_account}
        done = server.schedule(package, checked, job=job, cron=fields, **more)
        print(f"{job}: {done}; next run {next_time(fields):%Y-%m-%d %H:%M} UTC")

    text = docstring_parser.parse(local.pipeline_func.__doc__ or "")
    where = f"build/{name}_pipeline.yaml --host http://localhost:8080"
    on_server = "Uploads the compiled pipeline, unless it is there, and"
    for command, run, of, begin, explanation in (
        ("run-local", run_local_, local, "", "S3 keys and endpoint come from the AWS environment variables."),
        ("submit", submit, pipeline, where, f"{on_server} starts a run."),
        (
            *("schedule", schedule, pipeline, f'{where} --cron "0 3 * * MON"'),
            f"{on_server} starts runs by the clock, one at a time; missed ones are not made up for. "
            "A schedule of the same name is replaced.",
        ),
    ):
        line = ["python pipeline.py", command, name, begin, *(text.examples[0].description or "").split()]
        groups[command].command(
            name, help=f"{text.short_description}\n\n{explanation}\n\nExample: {' '.join(filter(None, line))}"
        )(with_options(run, options_of(of.pipeline_func, flags=FLAGS, types=TYPES)))


def _checked(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a pipeline, if a run with them can begin."""
    from softteacher.serving.places import check_registry
    from softteacher.serving.repository import REFERENCE_ENGINE, Runtime

    for key, value in parameters.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{key.replace('_', '-')} {value}: must be a finite number")
    settings = load_settings(parameters["preset"], [*parameters["overrides"], f"method.name={parameters['method']}"])
    check_name(parameters["name"])
    check_registry(parameters["registry"], parameters["repository"])
    if parameters["triton"]:
        engine = parameters["triton_engine"]
        try:
            Runtime(parameters["triton_backend"], engine, parameters["triton_gpu"])
        except UserError as error:  # by the options that these are called elsewhere
            raise UserError(re.sub("--(engine|backend)", r"--triton-\1", str(error))) from None
        if engine != REFERENCE_ENGINE and engine not in settings.export.engines:
            known = [*settings.export.engines, engine]
            raise UserError(
                f"--triton-engine {engine}: export must measure it; --set 'export.engines=[{', '.join(known)}]'"
            )
    check_percent(parameters.get("percent", 10), parameters.get("unlabeled"))
    if not 0 <= parameters.get("new_share", 0) <= 1:
        raise UserError(f"--new-share {parameters['new_share']:g}: must be from 0 to 1, e.g. 0.5")
    if not 0 <= parameters.get("canary", 0) < 1:
        raise UserError(f"--canary {parameters['canary']:g}: must be 0 or more and less than 1, e.g. 0.1")
    return parameters


def _on_store(parameters: dict[str, Any]) -> dict[str, Any]:
    """The same parameters, if the places that they name are there for every pod."""
    for name in sorted(PLACES & parameters.keys()):
        for place in parameters[name] if isinstance(parameters[name], list) else [parameters[name]]:
            if place and not storage.is_s3(place):
                raise UserError(f"--{name} {place}: no pod sees it; write s3://bucket/prefix")
    return parameters


def _check_package(package: Path, pipeline: GraphComponent) -> None:
    """Refuse a YAML that isn't of this pipeline as it is now."""
    document = read_package(package)
    inputs = document["root"].get("inputDefinitions", {}).get("parameters", {}).keys()
    name = document["pipelineInfo"]["name"]
    if name != pipeline.name or inputs != pipeline.component_spec.inputs.keys():
        other = "another version of it" if name == pipeline.name else name
        raise UserError(f"{package}: is of {other}, not of {pipeline.name}; compile again, or take the other YAML")


def unschedule(
    job: Annotated[str, typer.Argument(help="Name of the schedule, as `list` shows it")],
    host: Host,
    namespace: Namespace = None,
    token: Token = None,
) -> None:
    """Remove a schedule; its runs stay, and go on.

    Example: python pipeline.py unschedule training-pipeline-detector --host http://localhost:8080
    """
    count = Server(host, namespace, token).unschedule(job)
    print(f"{job}: {'removed' if count else 'there is no such schedule'}")


def list_(
    host: Host,
    namespace: Namespace = None,
    token: Token = None,
    limit: Annotated[int, typer.Option(min=1, help="How many runs")] = 10,
) -> None:
    """List the schedules and the latest runs.

    Example: python pipeline.py list --host http://localhost:8080
    """
    server = Server(host, namespace, token)
    for one in server.schedules():
        cron = one.trigger and one.trigger.cron_schedule and one.trigger.cron_schedule.cron
        print("schedule", one.display_name, "enabled" if is_enabled(one) else "disabled", cron or "periodic", sep="  ")
    for run in server.runs(limit):
        print("run", run.run_id, run.state or "PENDING", f"{run.created_at:%Y-%m-%d %H:%M}", run.display_name, sep="  ")


def status(
    host: Host,
    run: Annotated[str, typer.Argument(help="Id of the run; none: the latest")] = "",
    namespace: Namespace = None,
    token: Token = None,
) -> None:
    """Show how a run is doing, step by step; exit code 1 if it failed.

    Example: python pipeline.py status --host http://localhost:8080
    """
    server = Server(host, namespace, token)
    latest = [] if run else server.runs(1)
    if not (run or latest):
        raise UserError(f"--host {host}: no runs yet; start one with `python pipeline.py submit`")
    found = server.run(run or latest[0].run_id)
    print(f"{found.run_id}  {found.state or 'PENDING'}  {found.display_name}")
    for step in steps_of(found):
        took = "" if step.seconds is None else f"{step.seconds:.0f} s"
        print(f"  {step.name:24} {step.state:10} {took:>8}  {step.message}".rstrip())
    if found.error and found.error.message:
        print(" ".join(found.error.message.split()))
    print(server.link(found.run_id))
    if found.state == "FAILED":
        raise typer.Exit(1)
