"""The steps of a run on Kubeflow Pipelines, as its API tells them.

Not by `kfp.Client`, which can't be imported within a step.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import urllib3
from kfp_server_api import ApiClient, ApiException, Configuration, RunServiceApi, V2beta1Run

from softteacher.errors import UserError

TIMEOUT = 10.0  # seconds
TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")  # in pods of a multi-user Kubeflow
ADDED = re.compile(r"|root|executor|.*-driver|(exit-handler|condition|condition-branches|for-loop|iteration)-\d+(-.*)?")


@dataclass(frozen=True)
class Step:
    """A step of a run.

    Attributes:
        name: As the pipeline calls it.
        state: SUCCEEDED, FAILED, RUNNING, ...
        seconds: How long it took; none: it hasn't ended.
        message: What KFP knows about its failure, often nothing: the rest is in its log.
    """

    name: str
    state: str
    seconds: float | None
    message: str


def steps_of(run: V2beta1Run) -> list[Step]:
    """The steps of a run in the order of their start, without what KFP adds: drivers, executors, groups of steps."""
    details = (run.run_details and run.run_details.task_details) or []
    parents = {d.parent_task_id for d in details if not ADDED.fullmatch(d.display_name or "")}
    by_id = {key: d for d in details for key in (d.task_id, d.pod_name) if key}
    steps = []
    for d in details:
        if ADDED.fullmatch(d.display_name or "") or d.task_id in parents:
            continue
        # children may be the step's own pods or the steps that follow; only of the pods it is the step's error
        children = [by_id.get(child.task_id or child.pod_name) for child in d.child_tasks or []]
        pods = [child for child in children if child and child.display_name == "executor"]
        error = next((e.error.message for e in (d, *pods) if e.error and e.error.message), "")
        ended = d.end_time and d.start_time and d.end_time >= d.start_time
        seconds = (d.end_time - d.start_time).total_seconds() if ended else None
        began = d.start_time or d.create_time or datetime.max.replace(tzinfo=UTC)
        steps.append((began, Step(d.display_name, str(d.state or "PENDING"), seconds, " ".join(error.split()))))
    return [step for _, step in sorted(steps, key=lambda pair: pair[0])]


def failed_steps(api: str, run_id: str) -> list[Step]:
    """The steps of a run that failed, asked for by a pod in the cluster with its own rights.

    Args:
        api: URL of KFP's API inside the cluster.
        run_id: Of the run.

    Raises:
        UserError: the API can't be asked.
    """
    access = Configuration(host=api)
    access.retries = False
    try:
        if TOKEN.exists():
            access.api_key, access.api_key_prefix = {"authorization": TOKEN.read_text()}, {"authorization": "Bearer"}
        with ApiClient(access) as client:
            run = RunServiceApi(client).run_service_get_run(run_id, _request_timeout=TIMEOUT)
    except ApiException as error:
        raise UserError(f"KFP's API answers {error.status} {error.reason}") from None
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise UserError(f"KFP's API does not answer ({type(error).__name__})") from None
    return [step for step in steps_of(run) if step.state == "FAILED"]
