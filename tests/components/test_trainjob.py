"""A training on many nodes: the TrainJob against the SDK's types and the published schema, and its life."""

import copy
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from kfp import dsl
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from torch.distributed.run import get_args_parser

from components import trainjob
from softteacher import storage
from softteacher.errors import UserError
from tests.components.cluster import RUNTIME, Cluster, Job
from tests.helpers import SHARED

ROOT = Path(__file__).parents[2]
PREFIX = "s3://bucket/checkpoints/0a1b2c3d/train"
# as KFP's driver writes it
TASK = dsl.TaskConfig(
    resources={"limits": {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "4"}, "requests": {}},
    node_selector={"pool": "gpu"},
    tolerations=[{"key": "spot", "operator": "Exists", "effect": "NoExecute"}],
    env=[
        {"name": "AWS_ENDPOINT_URL_S3", "value": "http://s3.example:8333"},
        {
            "name": "AWS_SECRET_ACCESS_KEY",
            "valueFrom": {"secretKeyRef": {"name": "s3-keys", "key": "AWS_SECRET_ACCESS_KEY"}},
        },
    ],
    volumes=[{"name": "data", "persistentVolumeClaim": {"claimName": "images"}}],
    volume_mounts=[{"name": "data", "mountPath": "/data"}],
)
OWNER = {"name": "train-pod-7", "uid": "0a1b2c3d-0000-4000-8000-000000000000"}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trainjob, "POLL_SECONDS", 0.05)
    with Cluster() as cluster:
        yield cluster


def build(cluster: Cluster, prefix: str = PREFIX, command: list[str] | None = None, **changes: Any):
    arguments = {"image": "r.example/train:1", "nodes": 2, "shm": "16Gi", "task": TASK, "deadline": 7200} | changes
    return trainjob.build(
        command or trainjob.train_command(prefix, ["--preset", "demo"], 4),
        name=trainjob.job_name(prefix),
        runtime=cluster.client().get_runtime("torch-distributed"),
        **arguments,
    )


# ---- the job


def strict(schema: Any) -> Any:
    """A schema that refuses unknown fields, as `kubectl --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    return found | ({"additionalProperties": False} if "properties" in found else {})


def crd(kind: str) -> Draft202012Validator:
    file = SHARED / "reference" / "schemas" / f"trainer.kubeflow.org_{kind}.yaml"
    if not file.exists():
        pytest.skip(f"no {file}: the published schemas aren't part of this repository")
    [version] = yaml.safe_load(file.read_text())["spec"]["versions"]
    assert version["name"] == "v1alpha1"
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own business
    return Draft202012Validator(schema)


def test_job_fits_the_published_schema(cluster):
    job = build(cluster).to_dict()
    schema = crd("trainjobs")
    schema.validate(job)
    schema.validate(build(cluster, task=dsl.TaskConfig()).to_dict())
    schema.validate(build(cluster, owner=OWNER, pull_secrets=["registry"]).to_dict())
    # this test would notice a misspelt field, a wrong type and a missing name
    for path, value in (
        (("trainer", "numNode"), 2),
        (("trainer", "numNodes"), "2"),
        (("activeDeadlineSeconds",), 0),
        (("runtimeRef",), {"kind": "ClusterTrainingRuntime"}),
    ):
        broken = copy.deepcopy(job)
        place = broken["spec"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        assert not schema.is_valid(broken), path


def test_runtime_of_these_tests_fits_the_published_schema():
    crd("trainingruntimes").validate(RUNTIME)


def test_job_has_what_the_task_has(cluster):
    job = build(cluster).to_dict()
    assert TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
    assert job["metadata"]["name"] == trainjob.job_name(PREFIX)
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed", "kind": "ClusterTrainingRuntime"}
    trainer = job["spec"]["trainer"]
    assert (trainer["image"], trainer["numNodes"]) == ("r.example/train:1", 2)
    assert trainer["resourcesPerNode"] == TASK.resources
    assert trainer["env"] == TASK.env
    [patch] = job["spec"]["runtimePatches"]
    [node] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert node["name"] == "node"
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == TASK.node_selector
    assert pod["tolerations"] == TASK.tolerations
    assert pod["terminationGracePeriodSeconds"] >= 30
    assert pod["volumes"] == [
        *TASK.volumes,
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
    ]
    [container] = pod["containers"]
    assert container["name"] == "node"
    assert container["volumeMounts"] == [*TASK.volume_mounts, {"name": "shm", "mountPath": "/dev/shm"}]
    assert "env" not in container  # Trainer's webhook refuses it here
    assert "imagePullSecrets" not in pod


def test_job_ends_without_the_step_that_made_it(cluster):
    """Whose pod may be killed or lost: by its deadline, and by Kubernetes' garbage collection with that pod."""
    job = build(cluster, owner=OWNER, pull_secrets=["registry"]).to_dict()
    assert job["spec"]["activeDeadlineSeconds"] == 7200
    assert job["metadata"]["ownerReferences"] == [{"apiVersion": "v1", "kind": "Pod", **OWNER}]
    [patch] = job["spec"]["runtimePatches"]
    [node] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert node["template"]["spec"]["template"]["spec"]["imagePullSecrets"] == [{"name": "registry"}]


def test_name_is_one_for_each_training():
    names = [trainjob.job_name(f"s3://b/{run}/{name}") for run in ("1", "2") for name in ("train", "train-baseline")]
    assert len(set(names)) == 4
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) < 40 for name in names)
    assert names[0] == trainjob.job_name("s3://b/1/train")


def test_torchrun_understands_the_command(monkeypatch):
    for key, value in {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "NPROC_PER_NODE": "auto"}.items():
        monkeypatch.setenv(f"PET_{key}", value)  # from Trainer
    command = trainjob.train_command(PREFIX, ["--preset", "demo", "--set", "training.seed=7"], 4)
    assert command[0] == "torchrun"
    read = get_args_parser().parse_args(command[1:])
    assert (read.nnodes, str(read.node_rank), read.master_addr) == ("2", "1", "first")
    assert (read.nproc_per_node, read.module, read.training_script) == ("4", True, "softteacher")
    assert read.training_script_args[0] == "train"
    pairs = list(zip(read.training_script_args[1::2], read.training_script_args[2::2], strict=True))
    assert pairs == [
        *((f"--{part}", f"{PREFIX}/data/{part}.json") for part in ("labeled", "unlabeled", "validation")),
        *(("--preset", "demo"), ("--set", "training.seed=7")),
        *(("--checkpoints", f"{PREFIX}/checkpoints"), ("--out", f"{PREFIX}/model")),
    ]


# ---- its life


def controller(log: list[str], end: str):
    """One that runs two nodes, of which the first writes a log."""

    def run(job: Job) -> None:
        time.sleep(0.1)
        job.phases = ["Running"] * 2
        for line in log:
            job.logs[0].append(line)
            time.sleep(0.05)
        job.logs[1] += ["the second node", "has a log too"]
        job.end(end)

    return run


def test_a_job_that_completes(cluster, capsys):
    cluster.controller = controller(["step 1", "step 2"], "Complete")
    trainjob.run(cluster.client(), build(cluster))
    assert cluster.calls == ["create trainjobs", "delete trainjobs"]
    assert cluster.jobs == {}
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("step")] == ["step 1", "step 2"]
    assert ": Created, node-0 Pending, node-1 Pending\n" in out
    assert ": Complete, node-0 Succeeded, node-1 Succeeded\n" in out
    assert "second node" not in out


def test_a_job_that_fails(cluster, capsys):
    cluster.controller = controller(["error: no such bucket"], "Failed")
    with pytest.raises(RuntimeError, match=r"TrainJob softteacher-\w+ failed"):
        trainjob.run(cluster.client(), build(cluster))
    assert cluster.jobs == {}
    out = capsys.readouterr().out
    assert "error: no such bucket" in out
    assert "the second node\nhas a log too\n" in out


def test_a_log_whose_connection_breaks_is_printed_once(cluster, capsys):
    cluster.controller = controller(["step 1", "step 2", "BREAK", "step 3"], "Complete")
    trainjob.run(cluster.client(), build(cluster))
    assert re.findall("^step .", capsys.readouterr().out, re.M) == ["step 1", "step 2", "step 3"]


def test_the_log_of_a_container_that_was_restarted(cluster, capsys):
    def run(job: Job) -> None:
        job.phases = ["Running"] * 2
        job.logs[0] += ["train: start", "step 1", "step 2", "BREAK"]
        time.sleep(0.5)
        job.logs[0] = ["train: start", "resumed from step 2", "step 3"]
        time.sleep(0.2)
        job.end("Complete")

    cluster.controller = run
    trainjob.run(cluster.client(), build(cluster))
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("TrainJob")]
    assert lines == ["train: start", "step 1", "step 2", "resumed from step 2", "step 3"]


def test_a_second_try_waits_for_the_running_job(cluster, capsys):
    cluster.controller = controller(["step 1"], "Complete")
    cluster.create(build(cluster).to_dict())
    trainjob.run(cluster.client(), build(cluster))
    assert cluster.calls == ["delete trainjobs"]
    assert "step 1" in capsys.readouterr().out


def test_a_second_try_replaces_the_failed_job(cluster):
    cluster.controller = lambda job: job.end("Failed")
    cluster.create(build(cluster).to_dict())
    time.sleep(0.2)
    cluster.controller = controller([], "Complete")
    trainjob.run(cluster.client(), build(cluster))
    assert cluster.calls == ["delete trainjobs", "create trainjobs", "delete trainjobs"]


def test_a_step_that_is_stopped_deletes_its_job(cluster):
    cluster.controller = lambda job: None  # runs for ever
    stop = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    stop.start()
    with pytest.raises(SystemExit) as exit:
        trainjob.run(cluster.client(), build(cluster))
    assert exit.value.code == 143
    assert cluster.jobs == {}
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_job_that_somebody_deletes(cluster):
    cluster.controller = lambda job: (time.sleep(0.3), cluster.jobs.clear())
    with pytest.raises(UserError, match="was deleted before it ended"):
        trainjob.run(cluster.client(), build(cluster))


def test_an_api_that_stops_answering_leaves_the_job_alone(cluster, monkeypatch):
    monkeypatch.setattr(trainjob, "PATIENCE_SECONDS", 0.3)
    client = cluster.client()
    cluster.controller = lambda job: (time.sleep(0.3), setattr(cluster, "handle", None))
    with pytest.raises(RuntimeError, match="Failed to get TrainJob"):
        trainjob.run(client, build(cluster))
    assert len(cluster.jobs) == 1


@pytest.mark.parametrize("kind", ["trainjobs", "pods"])
def test_a_service_account_without_the_role(cluster, kind):
    job = build(cluster)
    cluster.controller = lambda job: None
    cluster.refuse = kind
    with pytest.raises(UserError) as refused:
        trainjob.run(cluster.client(), job)
    assert f"{kind} is forbidden" in str(refused.value)
    assert "manifests/trainer" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_roles_of_the_manifests_are_enough(cluster):
    cluster.own_runtimes["torch-distributed"] = yaml.safe_load((ROOT / "manifests/trainer/runtime.yaml").read_text())
    cluster.controller = controller(["step 1"], "Failed")
    job = build(cluster)
    assert job.spec.runtime_ref.kind == "TrainingRuntime"
    with pytest.raises(RuntimeError):
        trainjob.run(cluster.client(), job)
    documents = [
        d for file in (ROOT / "manifests/trainer").glob("*role.yaml") for d in yaml.safe_load_all(file.read_text())
    ]
    rules = [rule for document in documents for rule in document.get("rules", [])]
    granted = {(verb, kind) for rule in rules for verb in rule["verbs"] for kind in rule["resources"]}
    asked = cluster.asked - {("get", "configmaps")}  # Trainer's version, which the SDK can do without
    assert {("create", "trainjobs"), ("get", "pods/log"), ("get", "trainingruntimes")} <= asked
    assert asked <= granted


# ---- the whole step


def train(cluster: Cluster, manifests: Path, out: Path, prefix: str, settings: list[str], **changes: Any):
    arguments = {"image": "r.example/train:1", "nodes": 2, "processes": 1, "shm": "1Gi", "task": TASK, "deadline": 7200}
    arguments |= changes
    return trainjob.train_on_nodes(cluster.client(), str(manifests), str(out), prefix, settings, **arguments)


def test_manifests_and_model_pass_through_s3(cluster, s3, manifests: Path, tmp_path: Path):
    def nodes(job: Job) -> None:
        command = job.body["spec"]["trainer"]["command"]
        labeled, out = command[command.index("--labeled") + 1], command[command.index("--out") + 1]
        assert job.body["metadata"]["ownerReferences"][0]["uid"] == OWNER["uid"]
        assert "registry" in str(job.body["spec"]["runtimePatches"])
        assert storage.read_bytes(labeled) == (manifests / "labeled.json").read_bytes()
        for name in ("metrics.json", "provenance.json"):
            storage.write_bytes(storage.join(out, name), b'{"teacher": {"AP": 0.5}}')
        job.end("Complete")

    cluster.controller = nodes
    cluster_knows = {"owner": OWNER, "pull_secrets": ["registry"]}
    for attempt in (1, 2):
        out = tmp_path / str(attempt)
        assert train(cluster, manifests, out, f"{s3}/run/train", [], **cluster_knows) == {"teacher": {"AP": 0.5}}
        assert (tmp_path / str(attempt) / "provenance.json").exists()
    # the second try found the model
    assert cluster.calls == ["create trainjobs", "delete trainjobs"]


def test_cluster_without_the_runtime(cluster, s3, manifests: Path, tmp_path: Path):
    cluster.runtimes = {}
    with pytest.raises(UserError, match="no training runtime torch-distributed"):
        train(cluster, manifests, tmp_path, f"{s3}/run/train", [])


def test_nodes_need_s3(cluster, manifests: Path, tmp_path: Path):
    with pytest.raises(UserError, match="many nodes meet on S3"):
        train(cluster, manifests, tmp_path, "/mnt/checkpoints", [])
