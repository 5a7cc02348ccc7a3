"""A training on many nodes: a Kubeflow Trainer `TrainJob`, submitted once, followed to its end and taken away.

This runs in the pod of the step, which needs no accelerator for it. What it shares with the nodes lies below one S3
prefix: `data/` (the manifests), `checkpoints/` and `model/`.
"""

import contextlib
import hashlib
import json
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kfp import dsl
from kubeflow.trainer import Runtime, TrainerClient
from kubeflow.trainer.constants import constants
from kubeflow.trainer.types.types import TrainJob
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from kubernetes.client import ApiException

from softteacher import storage
from softteacher.errors import UserError

RUNTIME = constants.DEFAULT_TRAINING_RUNTIME  # torch-distributed
PARTS = ("labeled", "unlabeled", "validation")
POLL_SECONDS = 10.0
LOG_SECONDS = 30.0  # for the end of the log, once the job has ended
PATIENCE_SECONDS = 600.0  # for an API server that doesn't answer, and for a job to be gone
GRACE_SECONDS = 60  # from SIGTERM to SIGKILL on the nodes; torchrun gives its workers 30 of them to save


def train_on_nodes(
    client: TrainerClient,
    manifests: str,
    model: str,
    prefix: str,
    settings: list[str],
    *,
    image: str,
    nodes: int,
    processes: int,
    shm: str,
    task: dsl.TaskConfig,
    deadline: int,
    owner: Mapping[str, str] | None = None,
    pull_secrets: Sequence[str] = (),
) -> dict[str, Any]:
    """Train on many nodes; called again with the same prefix, it takes up what is there: a model or a running job.

    Args:
        client: Of the cluster.
        manifests: Folder of the manifests that `split` wrote.
        model: Folder for the model folder.
        prefix: s3:// prefix of this training and no other.
        settings: Options of `softteacher train`: `--preset`, `--set`.
        image: Of the nodes.
        nodes: How many.
        processes: On each node, one an accelerator.
        shm: Size of the memory-backed /dev/shm of each node.
        task: Resources of a node, its environment, volumes, node selector, tolerations and affinity.
        deadline: Seconds after which Trainer ends the job, whatever became of this process.
        owner: `name` and `uid` of the pod that this runs in: Kubernetes takes the job away with it.
        pull_secrets: Secrets by which the nodes may pull the image.

    Returns:
        `metrics.json` of the model folder.

    Raises:
        UserError: the prefix isn't on S3, or the cluster refuses or lacks something.
        RuntimeError: the training failed; its log has been printed.
    """
    if not storage.is_s3(prefix):
        raise UserError(f"checkpoints {prefix}: many nodes meet on S3; compile with --checkpoints s3://bucket/prefix")
    result = storage.join(prefix, "model")
    if not storage.exists(storage.join(result, "provenance.json")):
        for part in PARTS:
            name = f"{part}.json"
            storage.copy(storage.join(manifests, name), storage.join(prefix, "data", name))
        job = build(
            train_command(prefix, settings, processes),
            name=job_name(prefix),
            runtime=_runtime(client),
            image=image,
            nodes=nodes,
            shm=shm,
            task=task,
            deadline=deadline,
            owner=owner,
            pull_secrets=pull_secrets,
        )
        run(client, job)
    storage.copy(result, model)
    return json.loads(Path(model, "metrics.json").read_bytes())


def job_name(prefix: str) -> str:
    """Name of the TrainJob of a prefix: the same for every try of a step, another for every other training."""
    return f"softteacher-{hashlib.sha256(prefix.encode()).hexdigest()[:12]}"


def train_command(prefix: str, settings: list[str], processes: int) -> list[str]:
    """What each node runs; which node it is and where the first one is, torchrun reads from Trainer's `PET_*`."""
    data = (option for part in PARTS for option in (f"--{part}", storage.join(prefix, "data", f"{part}.json")))
    return [
        *("torchrun", f"--nproc-per-node={processes}", "-m", "softteacher", "train", *data, *settings),
        *("--checkpoints", storage.join(prefix, "checkpoints"), "--out", storage.join(prefix, "model")),
    ]


def build(
    command: list[str],
    *,
    name: str,
    runtime: Runtime,
    image: str,
    nodes: int,
    shm: str,
    task: dsl.TaskConfig,
    deadline: int,
    owner: Mapping[str, str] | None = None,
    pull_secrets: Sequence[str] = (),
) -> TrainerV1alpha1TrainJob:
    """The TrainJob, in the SDK's types.

    Deadline and owner end it where this process can't, since it was killed or lost with its node.

    Not by `TrainerClient.train()`: its trainers take no environment from secrets, Trainer refuses environment in a
    patch of the container `node`, and its pod patch has no grace period.
    """
    pod = {
        "nodeSelector": task.node_selector,
        "tolerations": task.tolerations,
        "affinity": task.affinity,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "imagePullSecrets": [{"name": secret} for secret in pull_secrets] or None,
        # KFP passes no emptyDir through, and a pod's own /dev/shm is 64 MB
        "volumes": [*(task.volumes or []), {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shm}}],
        "containers": [
            {
                "name": constants.NODE,
                "volumeMounts": [*(task.volume_mounts or []), {"name": "shm", "mountPath": "/dev/shm"}],
            }
        ],
    }
    jobs = [{"name": constants.NODE, "template": {"spec": {"template": {"spec": pod}}}}]
    trainer = {
        "image": image,
        "command": command,
        "numNodes": nodes,
        "resourcesPerNode": task.resources,
        "env": task.env,
    }
    metadata = {"name": name, "labels": {"app.kubernetes.io/part-of": "softteacher"}}
    if owner:
        metadata["ownerReferences"] = [{"apiVersion": "v1", "kind": "Pod", **owner}]
    return TrainerV1alpha1TrainJob.from_dict(
        {
            "apiVersion": constants.API_VERSION,
            "kind": constants.TRAINJOB_KIND,
            "metadata": metadata,
            "spec": {
                "activeDeadlineSeconds": deadline,
                "runtimeRef": {"name": runtime.name, "kind": runtime.kind.value},
                "trainer": trainer,
                "runtimePatches": [
                    {
                        "manager": "softteacher/pipeline",
                        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}},
                    }
                ],
            },
        }
    )


def run(client: TrainerClient, job: TrainerV1alpha1TrainJob) -> None:
    """Submit a job unless it is there, wait for its end, and delete it when it has ended or this process is stopped.

    Raises:
        UserError: the cluster refuses something.
        RuntimeError: the job failed, or the API server has not answered for long; the job goes on then.
    """
    name = job.metadata.name
    found = _find(client, name)
    if found and found.status == constants.TRAINJOB_FAILED:  # of a try that was killed before it could delete it
        _delete(client, name)
        found = None
    # a handler that raises, so that a stopped step leaves no job behind
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if found:
            print(f"TrainJob {name}: is there ({found.status}); waiting for it", flush=True)
        else:
            _submit(client, job)
        ended = follow(client, name)
    except (SystemExit, KeyboardInterrupt):
        with contextlib.suppress(RuntimeError, TimeoutError):
            client.delete_job(name)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if ended.status == constants.TRAINJOB_FAILED:
        _print_other_nodes(client, ended)
    try:
        _delete(client, name)
    except (RuntimeError, TimeoutError) as error:  # days of training are not lost over this
        print(f"warning: TrainJob {name} could not be deleted ({error}); delete it by hand", flush=True)
    if ended.status == constants.TRAINJOB_FAILED:
        raise RuntimeError(f"TrainJob {name} failed; its log is above")


def follow(client: TrainerClient, name: str) -> TrainJob:
    """Print the first node's log and every change of state, until the job is complete or failed.

    Raises:
        UserError: it is gone, or may not be read.
        RuntimeError: the API server has not answered for long.
    """
    ended = threading.Event()
    # beside the polling, because a broken connection may never say so
    log = threading.Thread(target=_print_log, args=(client, name, ended), daemon=True)
    log.start()
    state, answered = "", time.monotonic()
    try:
        while True:
            try:
                job = client.get_job(name)
            except (RuntimeError, TimeoutError) as error:
                if _code(error) == 404:
                    raise UserError(f"TrainJob {name}: was deleted before it ended; run the step again") from error
                if _code(error) == 403 or time.monotonic() - answered > PATIENCE_SECONDS:
                    _explain(error, name)
            else:
                answered = time.monotonic()
                if state != (state := ", ".join([job.status, *(f"{s.name} {s.status}" for s in job.steps)])):
                    print(f"TrainJob {name}: {state}", flush=True)
                if job.status in {constants.TRAINJOB_COMPLETE, constants.TRAINJOB_FAILED}:
                    return job
            time.sleep(POLL_SECONDS)
    finally:
        ended.set()
        log.join(LOG_SECONDS)


def _print_log(client: TrainerClient, name: str, ended: threading.Event) -> None:
    printed: list[str] = []
    while True:
        last = ended.is_set()
        with contextlib.suppress(Exception):  # no pod yet, or a broken connection; what counts is the job's state
            for index, line in enumerate(client.get_job_logs(name, follow=not last)):
                # each connection starts at the first line; a container that was restarted has other ones
                if printed[index : index + 1] != [line]:
                    del printed[index:]
                    printed.append(line)
                    print(line, flush=True)
        if last:
            return
        ended.wait(POLL_SECONDS)


def _print_other_nodes(client: TrainerClient, job: TrainJob) -> None:
    """The last lines of the nodes whose log was not followed: the reason may be there."""
    for step in job.steps:
        if step.name != f"{constants.NODE}-0":
            with contextlib.suppress(Exception):  # a pod that never ran has none
                lines = list(client.get_job_logs(job.name, step=step.name))[-20:]
                print(f"--- the end of {step.name}'s log", *lines, sep="\n", flush=True)


def _runtime(client: TrainerClient) -> Runtime:
    try:
        return client.get_runtime(RUNTIME)
    except (RuntimeError, TimeoutError) as error:
        if _code(error) == 404:
            raise UserError(f"no training runtime {RUNTIME} in this cluster; install Kubeflow Trainer's") from error
        _explain(error, RUNTIME)


def _find(client: TrainerClient, name: str) -> TrainJob | None:
    try:
        return client.get_job(name)
    except (RuntimeError, TimeoutError) as error:
        if _code(error) == 404:
            return None
        _explain(error, name)


def _submit(client: TrainerClient, job: TrainerV1alpha1TrainJob) -> None:
    where = (constants.GROUP, constants.VERSION, client.backend.namespace, constants.TRAINJOB_PLURAL)
    try:
        client.backend.custom_api.create_namespaced_custom_object(*where, job.to_dict())
    except ApiException as error:
        _explain(error, job.metadata.name)
    print(f"TrainJob {job.metadata.name}: submitted to {client.backend.namespace}", flush=True)


def _delete(client: TrainerClient, name: str) -> None:
    """Delete a job and wait until it is gone: the next one has the same name."""
    started = time.monotonic()
    client.delete_job(name)
    while _find(client, name):
        if time.monotonic() - started > PATIENCE_SECONDS:
            raise TimeoutError(f"still there after {PATIENCE_SECONDS:.0f} s")
        time.sleep(min(POLL_SECONDS, 2))


def _code(error: BaseException) -> int | None:
    """HTTP status behind an error of the SDK, which wraps those of the Kubernetes client."""
    return getattr(error if isinstance(error, ApiException) else error.__cause__, "status", None)


def _explain(error: Exception, what: str) -> NoReturn:
    """Raise a `UserError` for what the API server refused, and the error itself otherwise."""
    answer = error if isinstance(error, ApiException) else error.__cause__
    if not isinstance(answer, ApiException) or answer.status not in {400, 403, 409, 422}:
        raise error
    try:
        said = json.loads(answer.body)["message"]
    except (TypeError, ValueError, KeyError):
        said = answer.reason
    advice = {
        403: "bind the Role of manifests/trainer to the step's service account (docs/kubeflow.md)",
        409: "a job of this name is just going away; run the step again",
    }.get(answer.status, "check the options of `pipeline.py compile`, and that Kubeflow Trainer is 2.3 or later")
    raise UserError(f"TrainJob {what}: {' '.join(str(said).split())}; {advice}") from error
