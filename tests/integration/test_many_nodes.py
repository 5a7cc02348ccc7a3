"""A training on many nodes for real, but for the cluster: torchrun, Gloo, an S3 store, the SDK's two back ends."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl
from kubeflow.trainer import CustomTrainer, LocalProcessBackendConfig, TrainerClient

from components import trainjob
from softteacher import storage
from softteacher.model_folder import ModelFolder
from tests.components.cluster import Cluster, Job
from tests.samples import TINY

ROOT = Path(__file__).parents[2]


def nodes_of_this_machine(job: Job) -> None:
    """Each node's container as a process, with the environment that Trainer and the cluster give it."""
    trainer = job.body["spec"]["trainer"]
    assert trainer["command"][0] == "torchrun"
    secrets = {"s3-keys": dict(os.environ)}
    given = {e["name"]: e.get("value") or from_secret(secrets, **e["valueFrom"]) for e in trainer["env"]}
    bare = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    torch = {"NNODES": trainer["numNodes"], "NPROC_PER_NODE": "auto", "MASTER_ADDR": "127.0.0.1"}
    torch["MASTER_PORT"] = free_port()
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *trainer["command"][1:]],
            env=bare
            | given
            | {f"PET_{key}": str(value) for key, value in (torch | {"NODE_RANK": index}).items()}
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(trainer["numNodes"])
    ]
    readers = [
        threading.Thread(target=lambda node, log: log.extend(map(str.rstrip, node.stdout)), args=pair)
        for pair in zip(nodes, job.logs, strict=True)
    ]
    for reader in readers:
        reader.start()
    job.phases = ["Running"] * len(nodes)
    codes = [node.wait(120) for node in nodes]
    for reader in readers:
        reader.join()
    job.end("Failed" if any(codes) else "Complete")


def from_secret(secrets: dict[str, dict[str, str]], secretKeyRef: dict[str, str]) -> str:
    return secrets[secretKeyRef["name"]][secretKeyRef["key"]]


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


def access() -> list[dict[str, Any]]:
    """Access to the store as KFP's driver passes it on."""
    keys = [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": "s3-keys", "key": key}}}
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    ]
    return [{"name": "AWS_ENDPOINT_URL_S3", "value": os.environ["AWS_ENDPOINT_URL_S3"]}, *keys]


def start(arguments):
    """The local back end runs the source of a function by itself."""
    import runpy
    import sys

    sys.argv = arguments["command"]
    runpy.run_module("torch.distributed.run", run_name="__main__")


def kill(text: str) -> None:
    """SIGKILL to the processes of this machine that have a text in their command."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text in (process / "cmdline").read_text() and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)


@pytest.mark.timeout(180)
def test_two_processes_in_the_sdks_local_back_end_are_lost_and_two_nodes_go_on(
    s3, manifests: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr(trainjob, "POLL_SECONDS", 0.05)
    prefix = f"{s3}/checkpoints/0a1b/train"
    options = ["--preset", "demo", *(part for option in TINY for part in ("--set", option))]
    options += ["--set", "training.checkpoint_every=2", "--set", "training.iterations=6"]
    storage.copy(manifests, f"{prefix}/data")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # it takes the first `python`
    client = TrainerClient(LocalProcessBackendConfig())
    runtime = client.get_runtime("torch-distributed")
    # with "torch" it would call the torchrun of its new venv, where PyTorch, 2 GB, would have to be installed first
    runtime.trainer.framework = "python"
    environment = {key: value for key, value in os.environ.items() if key == "PATH" or key.startswith("AWS_")}
    environment |= {"PYTHONPATH": f"{ROOT}:{sysconfig.get_path('purelib')}", "OMP_NUM_THREADS": "1"}
    command = trainjob.train_command(prefix, options, 2)
    name = client.train(runtime, trainer=CustomTrainer(start, func_args={"command": command}, env=environment))
    while not storage.exists(f"{prefix}/checkpoints"):
        assert client.get_job(name).status != "Failed", "\n".join(client.get_job_logs(name))
        time.sleep(0.05)
    kill(prefix)
    assert trainjob.follow(client, name).status == "Failed"
    assert "2 x cpu" in capsys.readouterr().out

    place = {"image": "r.example/train:1", "nodes": 2, "processes": 1, "shm": "1Gi", "deadline": 3600}
    task, out = dsl.TaskConfig(env=access()), tmp_path / "model"
    with Cluster() as cluster:
        cluster.controller = nodes_of_this_machine
        metrics = trainjob.train_on_nodes(
            cluster.client(), str(manifests), str(out), prefix, options, **place, task=task
        )
    assert set(metrics) >= {"teacher", "student"}
    ModelFolder(out)
    assert "train: goes on at step" in capsys.readouterr().out
    assert not storage.exists(f"{prefix}/checkpoints")
