"""Who may do what: leave of the service accounts, and who reaches whom by the network policies."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.manifests.conftest import MANIFESTS, Documents, one, pods

KUBEFLOW = {"kubernetes.io/metadata.name": "kubeflow"}
MODELS = {"kubernetes.io/metadata.name": "models"}
MONITORING = {"kubernetes.io/metadata.name": "monitoring"}
APPS = {"kubernetes.io/metadata.name": "apps", "softteacher/triton-clients": "true"}
USER = {"kubernetes.io/metadata.name": "alice", "softteacher/pipelines": "true"}
STEP = {"pipelines.kubeflow.org/v2_component": "true"}
NODE = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
CLIENT = {"softteacher/triton-client": "true"}
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}
TRITON = {"app.kubernetes.io/name": "triton"}
STORE = {"app.kubernetes.io/name": "seaweedfs"}


def matches(selector: dict[str, Any] | None, labels: dict[str, str]) -> bool:
    selector = selector or {}
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", [])
    )


def egress(policies: Documents, pod: dict[str, str]) -> list[dict[str, Any]]:
    """The rules by which a pod of `models` reaches others, as Kubernetes reads the policies."""
    selecting = [p["spec"] for p in policies if p["kind"] == "NetworkPolicy" and matches(p["spec"]["podSelector"], pod)]
    closed = [policy for policy in selecting if "Egress" in policy["policyTypes"]]
    assert closed, "it reaches all"
    return [rule for policy in closed for rule in policy.get("egress", [])]


def reached(policies: Documents, to: dict[str, str], namespace: dict[str, str], pod: dict[str, str]) -> set[int]:
    """The ports of a pod in `models` that a pod gets through to, as Kubernetes reads the policies."""
    selecting = [p["spec"] for p in policies if matches(p["spec"]["podSelector"], to)]
    closed = [policy for policy in selecting if "Ingress" in policy["policyTypes"]]
    assert closed, "open to all"
    found: set[int] = set()
    for rule in (rule for policy in closed for rule in policy.get("ingress", [])):
        for peer in rule["from"]:
            there = namespace == MODELS
            if "namespaceSelector" in peer:
                there = matches(peer["namespaceSelector"], namespace)
            if there and matches(peer.get("podSelector"), pod):
                found |= {port["port"] for port in rule["ports"]}
    return found


@pytest.mark.parametrize(
    ("to", "namespace", "pod", "ports"),
    [
        (TRITON, MODELS, CLIENT, {8000, 8001}),
        (TRITON, APPS, CLIENT, {8000, 8001}),
        (TRITON, APPS, {}, set()),
        (TRITON, {"kubernetes.io/metadata.name": "other"}, CLIENT, set()),
        (TRITON, KUBEFLOW, STEP, {8000, 8001}),
        (TRITON, KUBEFLOW, {}, set()),
        (TRITON, USER, STEP, {8000, 8001}),
        (TRITON, USER, {}, set()),
        (STORE, USER, STEP, {8333}),
        (STORE, USER, NODE, {8333}),
        (STORE, USER, {}, set()),
        (TRITON, MONITORING, PROMETHEUS, {8002}),
        (TRITON, APPS, PROMETHEUS, set()),
        (TRITON, MODELS, {}, set()),
        (STORE, MODELS, TRITON, {8333}),
        (STORE, KUBEFLOW, STEP, {8333}),
        (STORE, KUBEFLOW, NODE, {8333}),
        (STORE, KUBEFLOW, {"app": "ml-pipeline-ui"}, {8333}),
        (STORE, KUBEFLOW, {"app": "mysql"}, set()),
        (STORE, MODELS, CLIENT, set()),
        (STORE, APPS, CLIENT, set()),
        (STORE, MONITORING, PROMETHEUS, set()),
        ({"app": "anything else"}, MODELS, TRITON, set()),
    ],
)
def test_who_reaches_whom(
    built: dict[str, Documents], to: dict[str, str], namespace: dict[str, str], pod: dict[str, str], ports: set[int]
) -> None:
    policies = [d for d in built["overlays/dev"] if d["kind"] == "NetworkPolicy"]
    assert reached(policies, to, namespace, pod) == ports


@pytest.mark.parametrize("name", ["overlays/gpu", "overlays/kserve"])
def test_triton_in_production_reaches_s3_and_names_only(built: dict[str, Documents], name: str) -> None:
    names, s3 = egress([one(built[name], "NetworkPolicy", "triton")], TRITON)
    assert {port["port"] for port in names["ports"]} == {53}
    assert s3["ports"] == [{"port": 443}]
    assert s3["to"] == [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}}]
    assert egress(built[name], TRITON) == [names, s3]


@pytest.mark.parametrize("name", ["overlays/dev", "overlays/gpu", "overlays/kserve"])
def test_nothing_gets_in_or_out_that_no_policy_names(built: dict[str, Documents], name: str) -> None:
    """Both ways by itself: by the namespace's policy for all pods, and by those of Triton and the store without it."""
    policies = {d["metadata"]["name"]: d["spec"] for d in built[name] if d["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert {tuple(policy["policyTypes"]) for policy in policies.values()} == {("Ingress", "Egress")}


def test_the_store_of_dev_reaches_nobody(built: dict[str, Documents]) -> None:
    assert egress([one(built["overlays/dev"], "NetworkPolicy", "seaweedfs")], STORE) == []
    _, s3 = egress([one(built["overlays/dev"], "NetworkPolicy", "triton")], TRITON)
    assert s3 == {"to": [{"podSelector": {"matchLabels": STORE}}], "ports": [{"port": 8333}]}


@pytest.mark.parametrize("name", ["base", "overlays/dev", "overlays/gpu"])
def test_triton_gets_through_to_the_store_that_it_is_told(built: dict[str, Documents], name: str) -> None:
    (config,) = (
        d["data"] for d in built[name] if d["kind"] == "ConfigMap" and d["metadata"]["name"].startswith("triton")
    )
    _, s3 = egress(built[name], TRITON)
    assert urlsplit(config["AWS_ENDPOINT_URL_S3"]).port in {port["port"] for port in s3["ports"]}


def rights(role: dict[str, Any]) -> set[tuple[str, str]]:
    """`verb resource` of a role's rules, with the names that they are for."""
    return {
        (f"{verb} {group}/{resource}", ",".join(rule.get("resourceNames", [])))
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_leave_of_the_steps(built: dict[str, Documents]) -> None:
    documents = built["steps"]
    assert {d["kind"] for d in documents} == {"ServiceAccount", "Role", "RoleBinding", "ConfigMap"}
    account = {"kind": "ServiceAccount", "name": "softteacher-steps", "namespace": "kubeflow"}
    assert one(documents, "RoleBinding")["subjects"] == [account]
    assert one(documents, "RoleBinding")["roleRef"]["name"] == one(documents, "Role")["metadata"]["name"]
    assert rights(one(documents, "Role")) == {
        ("get /configmaps", "kfp-launcher"),
        ("get /secrets", "s3-credentials,mlpipeline-minio-artifact"),
        *((f"{verb} /pods", "") for verb in ("get", "list", "watch")),
        *((f"{verb} argoproj.io/workflowtaskresults", "") for verb in ("create", "patch")),
        ("get pipelines.kubeflow.org/runs", ""),
    }


@pytest.fixture(scope="module")
def trainer(kustomize: Callable[[Path], Documents], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Documents]:
    """What is needed to train on many nodes, as it is and in the overlay that its comment describes."""
    folder = tmp_path_factory.mktemp("trainer")
    shutil.copytree(MANIFESTS / "trainer", folder / "trainer")
    described = re.findall(r"^#   (.*)", (MANIFESTS / "trainer" / "kustomization.yaml").read_text(), re.M)
    overlay = "\n".join(line for line in described if not line.startswith("kubectl"))
    (folder / "overlays" / "user").mkdir(parents=True)
    (folder / "overlays" / "user" / "kustomization.yaml").write_text(overlay)
    return {name: kustomize(folder / name) for name in ("trainer", "overlays/user")}


@pytest.mark.parametrize(
    ("name", "namespace", "accounts"),
    [
        ("trainer", "kubeflow", ["softteacher-steps", "pipeline-runner"]),
        ("overlays/user", "USER", ["default-editor"]),
    ],
)
def test_leave_to_train_on_many_nodes(
    trainer: dict[str, Documents], name: str, namespace: str, accounts: list[str]
) -> None:
    """In one namespace, and nothing but a TrainJob can be made or deleted with it."""
    documents = trainer[name]
    assert {d["kind"] for d in documents} == {"Role", "RoleBinding", "TrainingRuntime"}
    assert {d["metadata"]["namespace"] for d in documents} == {namespace}
    binding, role = one(documents, "RoleBinding"), one(documents, "Role")
    assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == ("Role", role["metadata"]["name"])
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": a, "namespace": namespace} for a in accounts]
    runtime = one(documents, "TrainingRuntime")
    assert {right for right in rights(role) if right[0].split()[0] not in {"get", "list", "watch"}} == {
        ("create trainer.kubeflow.org/trainjobs", ""),
        ("delete trainer.kubeflow.org/trainjobs", ""),
    }
    assert ("get trainer.kubeflow.org/trainingruntimes", runtime["metadata"]["name"]) in rights(role)
    assert "*" not in str(role["rules"])
    # a multi-user Kubeflow would give each node a sidecar, behind which they don't find one another
    [(labels, _)] = pods([runtime])
    assert labels["sidecar.istio.io/inject"] == "false"


def test_the_sdk_takes_the_runtime(trainer: dict[str, Documents]) -> None:
    """The one that the step asks for, as Kubeflow's SDK reads it."""
    from kubeflow.trainer.backends.kubernetes.backend import KubernetesBackend
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime

    from components.trainjob import RUNTIME

    document = one(trainer["trainer"], "TrainingRuntime")
    resource = TrainerV1alpha1TrainingRuntime.from_dict(document)
    read = KubernetesBackend._KubernetesBackend__get_runtime_from_cr  # type: ignore[attr-defined]
    runtime = read(object.__new__(KubernetesBackend), resource)
    assert (runtime.name, runtime.kind.value) == (RUNTIME, "TrainingRuntime")
    assert runtime.trainer.framework == "torch"
