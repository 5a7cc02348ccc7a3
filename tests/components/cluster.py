"""As much of a Kubernetes API as a TrainJob needs, and a controller that a test writes."""

import json
import re
import threading
import time
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from kubeflow.common.types import KubernetesBackendConfig
from kubeflow.trainer import TrainerClient
from kubernetes.client import Configuration

from tests.manifests import crds

API = "/apis/trainer.kubeflow.org/v1alpha1"
RUNTIME = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "ClusterTrainingRuntime",
    "metadata": {"name": "torch-distributed", "labels": {"trainer.kubeflow.org/framework": "torch"}},
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {}},
        "template": {
            "spec": {
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                            "spec": {
                                "template": {
                                    "spec": {"containers": [{"name": "node", "image": "pytorch/pytorch:2.7.1"}]}
                                }
                            },
                        },
                    }
                ]
            }
        },
    },
}


class Job:
    """A TrainJob in the cluster: what was submitted, and its nodes' phases and logs, which a controller writes."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self.phases = ["Pending"] * body["spec"]["trainer"]["numNodes"]
        self.logs: list[list[str]] = [[] for _ in self.phases]
        self.ended = False

    def end(self, condition: str) -> None:
        """Complete or Failed."""
        self.phases = ["Succeeded" if condition == "Complete" else "Failed"] * len(self.phases)
        status = {"type": condition, "status": "True", "reason": "r", "message": "m"}
        self.body["status"] = {"conditions": [{**status, "lastTransitionTime": "2026-01-01T00:00:00Z"}]}
        self.ended = True

    def pods(self) -> list[dict[str, Any]]:
        labels = {"jobset.sigs.k8s.io/replicatedjob-name": "node"}
        return [
            {
                "metadata": {
                    "name": f"{self.body['metadata']['name']}-node-0-{index}",
                    "labels": {**labels, "batch.kubernetes.io/job-completion-index": str(index)},
                },
                "spec": {"containers": [{"name": "node", "image": self.body["spec"]["trainer"]["image"]}]},
                "status": {"phase": phase},
            }
            for index, phase in enumerate(self.phases)
        ]


class Cluster:
    """The API on a port of this machine.

    Attributes:
        controller: Called with each submitted job, in a thread of its own.
        jobs: By name.
        calls: Verb and kind of each change, such as "create trainjobs".
        asked: Verb and kind of everything that was asked for.
        refuse: Kind of object that the service account may not touch.
        runtimes: Of the whole cluster.
        own_runtimes: Of the namespace.
    """

    def __init__(self) -> None:
        self.controller: Callable[[Job], None] = lambda job: job.end("Complete")
        self.jobs: dict[str, Job] = {}
        self.calls: list[str] = []
        self.asked: set[tuple[str, str]] = set()
        self.refuse: str | None = None
        self.runtimes = {"torch-distributed": RUNTIME}
        self.own_runtimes: dict[str, dict[str, Any]] = {}
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, body: object, code: int = 200) -> None:
                data = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def fail(self, code: int, message: str) -> None:
                self.answer({"kind": "Status", "status": "Failure", "message": message, "code": code}, code)

            def handle_any(self) -> None:
                cluster.handle(self, self.command, *self.path.partition("?")[::2])

            do_GET = do_POST = do_DELETE = handle_any

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def client(self) -> TrainerClient:
        """The SDK's client of this cluster, in the namespace `team`."""
        configuration = Configuration(host=f"http://127.0.0.1:{self._server.server_port}")
        return TrainerClient(KubernetesBackendConfig(namespace="team", client_configuration=configuration))

    def create(self, body: dict[str, Any]) -> Job:
        """Submit a job past the API."""
        body["metadata"] |= {"namespace": "team", "creationTimestamp": "2026-01-01T00:00:00Z"}
        job = self.jobs[body["metadata"]["name"]] = Job(body)

        def control() -> None:
            try:
                self.controller(job)
            except Exception:  # a job that never ends would be a test that never does
                job.logs[0] += traceback.format_exc().splitlines()
                job.end("Failed")

        threading.Thread(target=control, daemon=True).start()
        return job

    def handle(self, request: Any, method: str, path: str, query: str) -> None:
        kind, _, name = re.sub(r".*/(namespaces/[^/]+|v1alpha1)/", "", path).partition("/")
        verb = {"POST": "create", "DELETE": "delete"}.get(method, "get" if name else "list")
        self.asked.add((verb, "pods/log" if path.endswith("/log") else kind))
        if method != "GET":
            self.calls.append(f"{verb} {kind}")
        if kind == self.refuse:
            return request.fail(403, f'{kind} is forbidden: User "runner" cannot {verb} {kind}')
        if kind.endswith("trainingruntimes"):
            runtimes = self.runtimes if kind.startswith("cluster") else self.own_runtimes
            return request.answer(runtimes[name]) if name in runtimes else request.fail(404, f"{kind} {name} not found")
        if kind == "trainjobs":
            if method == "POST":
                body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
                if wrong := crds.errors(body):
                    return request.fail(422, f"TrainJob is invalid: {wrong}")
                if body["metadata"]["name"] in self.jobs:
                    return request.fail(409, "already exists")
                return request.answer(self.create(body).body, 201)
            if name in self.jobs:
                job = self.jobs.pop(name) if method == "DELETE" else self.jobs[name]
                job.ended = job.ended or method == "DELETE"
                return request.answer(job.body)
        if kind == "pods" and not name:
            return request.answer({"kind": "PodList", "items": [p for j in self.jobs.values() for p in j.pods()]})
        if kind == "pods" and name.endswith("/log"):
            job_name, _, index = name.removesuffix("/log").rpartition("-node-0-")
            return self.stream(request, self.jobs[job_name], int(index), "follow=True" in query)
        request.fail(404, f"{kind} {name} not found")

    def stream(self, request: Any, job: Job, index: int, follow: bool) -> None:
        """A node's log, as it is or as it comes; a break ends the connection."""
        request.send_response(200)
        request.end_headers()
        sent = 0
        while True:
            ended = job.ended
            log = job.logs[index]
            for line in log[sent:]:
                if line == "BREAK" and follow:
                    log.remove(line)
                    return
                request.wfile.write(f"{line}\n".encode())
                sent += 1
            if ended or not follow:
                return
            time.sleep(0.01)
