"""The manifests as kustomize builds them: schemas, safety, and whether what they say of one another holds."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

import softteacher
from softteacher import storage
from softteacher.cli import app
from softteacher.demo.servers import ObjectStore
from tests.helpers import SHARED
from tests.manifests import crds
from tests.manifests.conftest import BUILDS, MANIFESTS, Documents, containers, one, pods

SECRET = yaml.safe_load((MANIFESTS / "s3-secret.example.yaml").read_text())
VERSION = "1.37"
every_build = pytest.mark.parametrize("name", BUILDS)


def complaints(document: dict[str, Any]) -> list[str]:
    """What an API server would say to a document."""
    found = crds.errors(document)
    if found is not None:
        return found
    try:
        kubernetes_validate.validate(document, VERSION, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return [error.message]
    return []


@every_build
def test_schemas(built: dict[str, Documents], name: str) -> None:
    assert [c for document in built[name] for c in complaints(document)] == []


def test_schema_of_the_secret() -> None:
    assert complaints(SECRET) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("overlays/gpu", "Deployment"),
        ("overlays/kserve", "InferenceService"),
        ("trainer", "TrainingRuntime"),
    ],
)
def test_schemas_would_notice(built: dict[str, Documents], name: str, kind: str) -> None:
    document = json.dumps(one(built[name], kind))
    for good, bad in (
        ('"imagePullPolicy"', '"imagePolicy"'),
        ('"sizeLimit"', '"sizelimit"'),
        ('"memory": "', '"memory": true, "no": "'),
    ):
        assert good in document
        assert complaints(json.loads(document.replace(good, bad))) != []
    assert complaints(json.loads(document.replace(kind, "Unheard"))) != []


def test_schemas_are_the_published_ones() -> None:
    files = sorted(crds.FOLDER.glob("*.json"))
    assert len(files) == 5
    folder = SHARED / "reference" / "schemas"
    if not folder.is_dir():
        pytest.skip("the published CustomResourceDefinitions are not here")
    for path in folder.glob("*.yaml"):
        crd = yaml.load(path.read_bytes(), yaml.CSafeLoader)
        file = crds.FOLDER / f"{crd['metadata']['name']}.json"
        if file in files:
            assert file.read_text() == crds.as_text(crd)
            files.remove(file)
    assert files == []


def test_checkov(built: dict[str, Documents], tool: Callable[[str, str], str], tmp_path: Path) -> None:
    """No finding but those that .checkov.yaml gives a reason for; a privileged container is one."""
    program = tool("checkov", "make manifests-check installs it into .venv-checks")

    def findings(documents: Documents, file: Path) -> tuple[int, str]:
        file.write_text(yaml.safe_dump_all(documents))
        command = [program, "--config-file", MANIFESTS / ".checkov.yaml", "--file", file]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr

    # base and monitoring have no namespace by themselves; they are in the overlays
    everything = [document for name in BUILDS if name not in {"base", "monitoring"} for document in built[name]]
    code, text = findings(everything, tmp_path / "all.yaml")
    assert (code, "Failed checks: 0" in text) == (0, True), text
    assert int(re.findall(r"Passed checks: (\d+)", text)[0]) > 300
    risky = json.loads(
        json.dumps(one(built["overlays/dev"], "Deployment")).replace('"drop": ["ALL"]', '"add": ["SYS_ADMIN"]')
    )
    code, text = findings([risky], tmp_path / "risky.yaml")
    assert code == 1
    assert "CKV_K8S_39" in text


@every_build
def test_pods_are_restricted(built: dict[str, Documents], name: str) -> None:
    """The `restricted` Pod Security Standard, a read-only root, resources, probes, and a fixed image."""
    for _, pod in pods(built[name]):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["runAsGroup"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys() & container["resources"]["requests"]
            assert all(isinstance(v, str) for limits in container["resources"].values() for v in limits.values())
            assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}
            image, _, tag = container["image"].partition(":")
            assert tag == softteacher.__version__ if image.startswith("softteacher/") else tag not in {"", "latest"}
            if container in pod["containers"] and container["name"] != "node":
                assert {"livenessProbe", "readinessProbe", "startupProbe"} <= set(container)


@every_build
def test_references_hold(built: dict[str, Documents], name: str) -> None:
    documents = built[name]
    maps = {d["metadata"]["name"] for d in documents if d["kind"] == "ConfigMap"}
    accounts = {d["metadata"]["name"] for d in documents if d["kind"] == "ServiceAccount"}
    claims = {
        claim["metadata"]["name"] for d in documents for claim in d.get("spec", {}).get("volumeClaimTemplates", [])
    }
    for _, pod in pods(documents):
        assert pod.get("serviceAccountName") in {*accounts, None}
        volumes = {volume["name"] for volume in pod["volumes"]} | claims
        for container in containers(pod):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert {e["configMapRef"]["name"] for e in container.get("envFrom", [])} <= maps
            keys = [e["valueFrom"]["secretKeyRef"] for e in container["env"] if "valueFrom" in e]
            assert {key["name"] for key in keys} <= {SECRET["metadata"]["name"]}
            assert {key["key"] for key in keys} <= SECRET["stringData"].keys()
    for document in documents:
        kind, spec = document["kind"], document.get("spec", {})
        if kind in {"Deployment", "StatefulSet", "PodDisruptionBudget"}:
            selected([*pods(documents)], spec["selector"]["matchLabels"])
        elif kind == "NetworkPolicy" and spec["podSelector"]:
            selected([*pods(documents)], spec["podSelector"]["matchLabels"])
        elif kind == "Service":
            pod = selected([*pods(documents)], spec["selector"])
            ports = {port["name"]: port["containerPort"] for c in pod["containers"] for port in c.get("ports", [])}
            assert all(port["port"] == ports[port["targetPort"]] for port in spec["ports"])
        elif kind == "StatefulSet":
            one(documents, "Service", spec["serviceName"])


def selected(of: list[tuple[dict[str, str], dict[str, Any]]], labels: dict[str, str]) -> dict[str, Any]:
    """The spec of the one pod that a selector selects."""
    [pod] = [pod for theirs, pod in of if labels.items() <= theirs.items()]
    return pod


def test_base_has_no_namespace_and_no_secret(built: dict[str, Documents]) -> None:
    assert {d["kind"] for d in built["base"]} == {
        *("ConfigMap", "Deployment", "Service", "ServiceAccount", "NetworkPolicy")
    }
    assert not any("namespace" in document["metadata"] for document in built["base"])
    assert not any(document["kind"] == "Secret" for name in BUILDS for document in built[name])


@pytest.mark.parametrize("name", ["overlays/dev", "overlays/gpu", "overlays/kserve"])
def test_overlays_are_whole(built: dict[str, Documents], name: str) -> None:
    """One apply makes the namespace, and everything is in it."""
    namespace = built[name][0]
    assert (namespace["kind"], namespace["metadata"]["name"]) == ("Namespace", "models")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {document["metadata"]["namespace"] for document in built[name][1:]} == {"models"}


def test_what_was_live_comes_back_after_a_restart(built: dict[str, Documents]) -> None:
    """What the flags do is seen in tests/integration/test_switching.py."""
    for name in ("base", "overlays/dev", "overlays/gpu", "overlays/kserve"):
        triton = next(c for _, pod in pods(built[name]) for c in pod["containers"] if "tritonserver" in c["args"])
        assert {
            *("--model-control-mode=explicit", "--load-model=*", "--exit-on-error=false", "--strict-readiness=false")
        } <= set(triton["args"])


def test_in_production_triton_is_a_release_without_known_holes(built: dict[str, Documents]) -> None:
    for name in ("overlays/gpu", "overlays/kserve"):
        [image] = {
            c["image"] for _, pod in pods(built[name]) for c in pod["containers"] if c["image"].startswith("nvcr.io/")
        }
        assert tuple(map(int, re.findall(r":(\d+)\.(\d+)-py3$", image)[0])) >= (25, 8)


def test_one_replica_without_followers(built: dict[str, Documents]) -> None:
    for name in ("base", "overlays/dev"):
        assert one(built[name], "Deployment")["spec"]["replicas"] == 1
        assert not any(d["kind"] == "HorizontalPodAutoscaler" for d in built[name])


@pytest.mark.parametrize(("name", "target"), [("overlays/gpu", "triton"), ("overlays/kserve", "softteacher-predictor")])
def test_many_replicas_follow(built: dict[str, Documents], name: str, target: str) -> None:
    scaler = one(built[name], "HorizontalPodAutoscaler")["spec"]
    assert (scaler["scaleTargetRef"]["kind"], scaler["scaleTargetRef"]["name"]) == ("Deployment", target)
    assert scaler["minReplicas"] >= 2
    if name == "overlays/gpu":
        assert "replicas" not in one(built[name], "Deployment", target)["spec"]
    one(built[name], "PodDisruptionBudget")
    pod = next(pod for _, pod in pods(built[name]))
    [follow] = [c for c in pod["containers"] if c["name"] == "follow"]
    program, command = follow["command"]
    assert program == "softteacher"
    options = get_command(app).commands[command].make_context(command, [*follow["args"]]).params  # type: ignore[attr-defined]
    assert options["triton"] == "http://localhost:8000"
    assert options["ready_file"] in follow["readinessProbe"]["exec"]["command"]
    assert options["ready_file"] in follow["livenessProbe"]["exec"]["command"][-1]


def test_the_predictor_is_the_same_pod(built: dict[str, Documents]) -> None:
    ours = one(built["overlays/gpu"], "Deployment")["spec"]["template"]["spec"]
    theirs = one(built["overlays/kserve"], "InferenceService")["spec"]["predictor"]
    assert {c["name"] for c in theirs["containers"]} == {"kserve-container", "follow"}
    taken = {key: value for key, value in theirs.items() if key in ours}
    assert ours.keys() - taken.keys() == {"tolerations"}
    assert "nvidia.com/gpu" in json.dumps(ours)

    def without_gpu(pod: dict[str, Any]) -> dict[str, Any]:
        own = {"name", "resources"}
        by_name = {
            c["name"].replace("kserve-container", "triton"): {k: v for k, v in c.items() if k not in own}
            for c in pod["containers"]
        }
        return pod | {"containers": by_name, "tolerations": []}

    assert without_gpu(taken) == without_gpu(ours)


def test_liveness_of_the_follower(built: dict[str, Documents], tmp_path: Path) -> None:
    pod = next(pod for _, pod in pods(built["overlays/gpu"]))
    [follow] = [c for c in pod["containers"] if c["name"] == "follow"]
    ready = tmp_path / "ready"
    command = [part.replace("/tmp/ready", str(ready)) for part in follow["livenessProbe"]["exec"]["command"]]
    assert subprocess.run(command, capture_output=True).returncode != 0
    ready.touch()
    assert subprocess.run(command).returncode == 0
    os.utime(ready, (time.time() - 1000,) * 2)
    assert subprocess.run(command).returncode != 0


def test_an_empty_repository_is_filled(built: dict[str, Documents], s3: str) -> None:
    """What the init container runs, against a real store: Triton refuses a repository with nothing in it."""
    [init] = one(built["base"], "Deployment")["spec"]["template"]["spec"]["initContainers"]
    assert init["command"] == ["python", "-c"]
    repository = f"{s3}/models/triton"
    script = init["args"][0].replace("s3://$(MODEL_REPOSITORY)", repository)

    def run(**environment: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | environment
        )
        return done.returncode, done.stderr

    assert run() == run() == (0, "")
    assert [file.name for file in storage.list_files(repository)] == [".keep"]
    code, line = run(AWS_ENDPOINT_URL_S3="http://127.0.0.1:9")
    assert code == 1
    assert line.startswith("error: ")
    assert "Traceback" not in line


def test_the_store_of_dev(built: dict[str, Documents], object_store: ObjectStore, tmp_path: Path) -> None:
    """SeaweedFS takes the arguments, makes the buckets, and tells the probe that it is well."""
    import socket
    import urllib.request

    import boto3

    [container] = one(built["overlays/dev"], "StatefulSet")["spec"]["template"]["spec"]["containers"]
    options = {part.split("=")[0].lstrip("-") for part in container["args"][1:]}
    assert {"dir", "s3.port", "ip", "ip.bind"} <= options
    ports = []
    while len(ports) < 5:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1] % 20000 + 20000
            ports += [port] if port not in ports else []
    named = [f"-{part}.port={p}" for part, p in zip(("master", "volume", "filer", "s3", "admin"), ports, strict=True)]
    command = [*container["command"], *container["args"], f"-dir={tmp_path}", *named]
    keys = {"AWS_ACCESS_KEY_ID": "dev", "AWS_SECRET_ACCESS_KEY": "only-for-this-test", "HOME": str(tmp_path)}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | keys | {"PATH": path}, cwd=tmp_path)
    url = f"http://127.0.0.1:{ports[3]}"
    try:
        store = boto3.client(
            "s3", endpoint_url=url, aws_access_key_id="dev", aws_secret_access_key="only-for-this-test", region_name="x"
        )
        until, names = time.monotonic() + 60, set()
        while names != {"models", "data"}:
            assert time.monotonic() < until, (tmp_path / "log").read_text()[-2000:]
            assert server.poll() is None
            time.sleep(0.5)
            try:
                names = {bucket["Name"] for bucket in store.list_buckets()["Buckets"]}
            except Exception:
                continue
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url + container["livenessProbe"]["httpGet"]["path"]) as answer:
            assert answer.status == 200
    finally:
        server.kill()
        server.wait()


def test_metric_of_the_autoscaler(built: dict[str, Documents], promtool: Callable[..., str], tmp_path: Path) -> None:
    """It is the one that the adapter's rule makes, of the mean of a minute for each pod."""
    [rule] = yaml.safe_load((MANIFESTS / "replicas" / "prometheus-adapter.values.yaml").read_text())["rules"]["custom"]
    [metric] = one(built["overlays/gpu"], "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'namespace="models"')
    series = 'nv_inference_pending_request_count{namespace="models", pod="%s", model="%s", version="1"}'
    expected = [{"labels": '{pod="a"}', "value": 7}, {"labels": '{pod="b"}', "value": 0}]
    case = {
        "interval": "15s",
        "input_series": [
            {"series": series % ("a", "one"), "values": "5x6"},
            {"series": series % ("a", "two"), "values": "2x6"},
            {"series": series % ("b", "one"), "values": "0x6"},
        ],
        "promql_expr_test": [{"expr": query, "eval_time": "75s", "exp_samples": expected}],
    }
    (tmp_path / "case.yaml").write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": [case]}))
    assert promtool(tmp_path, "test", "rules", "case.yaml") == ""
    matched = rule["seriesQuery"].partition("{")[0]
    assert query.count(matched) == 1


def test_the_steps_find_the_store(built: dict[str, Documents]) -> None:
    launcher = one(built["steps"], "ConfigMap", "kfp-launcher")["data"]
    provider = yaml.safe_load(launcher["providers"])["s3"]["default"]
    reference = provider["credentials"]["secretRef"]
    assert reference["secretName"] == SECRET["metadata"]["name"]
    assert {reference["accessKeyKey"], reference["secretKeyKey"]} == SECRET["stringData"].keys()
    store = one(built["overlays/dev"], "Service", "seaweedfs")
    host, port = store["metadata"]["name"], store["spec"]["ports"][0]["port"]
    assert provider["endpoint"] == f"http://{host}.{store['metadata']['namespace']}:{port}"
    assert provider["disableSSL"] is True
    [configuration] = [d["data"] for d in built["overlays/dev"] if d["kind"] == "ConfigMap"]
    assert configuration["AWS_ENDPOINT_URL_S3"] == f"http://{host}:{port}"
    buckets = one(built["overlays/dev"], "StatefulSet")["spec"]["template"]["spec"]["containers"][0]["args"][-1]
    for uri in (launcher["defaultPipelineRoot"].removeprefix("s3://"), configuration["MODEL_REPOSITORY"]):
        assert uri.split("/")[0] in buckets.removeprefix("-bucket=").split(",")


def test_secret_template_holds_placeholders_only() -> None:
    assert all(value.startswith("<") and value.endswith(">") for value in SECRET["stringData"].values())
    assert "data" not in SECRET
