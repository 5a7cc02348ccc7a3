"""The schemas of custom resources, made small enough to stand here: crds/*.json.

    python -m tests.manifests.crds CRD.yaml ...

makes them from the CustomResourceDefinitions that these projects publish (Apache-2.0): prometheus-operator 0.93
(PrometheusRule, ServiceMonitor), KServe (InferenceService), Kubeflow Trainer (TrainingRuntime, TrainJob). Left out are
descriptions, status, KServe's ready-made servers (so that they count as unknown), and rules in CEL, which only an API
server checks. Pods and containers, most of the bulk, are taken from Kubernetes' own schemas, in kubernetes-validate.
"""

import json
import sys
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate import latest_version
from referencing import Registry, Resource

FOLDER = Path(__file__).parent / "crds"
CORE = "io.k8s.api.core.v1."
# an object with these properties is taken for one of Kubernetes' own
MARKS = {
    CORE + "PodSpec": {"containers", "volumes", "securityContext", "tolerations"},
    CORE + "Container": {"image", "command", "env", "volumeMounts", "livenessProbe"},
}
NOT_CHECKED = {"description", "x-kubernetes-validations"}
READY_MADE = {"protocolVersion", "storageUri"}


@cache
def _definitions() -> dict[str, Any]:
    base = resources.files("kubernetes_validate") / "kubernetes-json-schema"
    return json.loads((base / f"v{latest_version()}-local-strict" / "_definitions.json").read_text())


def compact(crd: dict[str, Any]) -> dict[str, Any]:
    """`apiVersion kind` -> schema, of each version that a CustomResourceDefinition serves."""
    spec = crd["spec"]
    return {
        f"{spec['group']}/{version['name']} {spec['names']['kind']}": _small(version["schema"]["openAPIV3Schema"])
        for version in spec["versions"]
        if version["served"]
    }


def _small(node: Any) -> Any:
    if isinstance(node, list):
        return [_small(value) for value in node]
    if not isinstance(node, dict):
        return node
    small = {key: _small(value) for key, value in node.items() if key not in NOT_CHECKED and key != "properties"}
    if "properties" in node:
        core, theirs = _definitions(), {}
        for name, marks in MARKS.items():
            if marks <= node["properties"].keys():
                theirs |= {key: {"$ref": f"{core['$id']}#/$defs/{name}/properties/{key}"}
                           for key in core["$defs"][name]["properties"]}  # fmt: skip
        small["properties"] = {
            key: theirs.get(key) or _small(value)
            for key, value in node["properties"].items()
            if key != "status" and not value.get("properties", {}).keys() >= READY_MADE
        }
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            small.setdefault("additionalProperties", False)  # what an API server warns of, and drops
    return small


def errors(document: dict[str, Any]) -> list[str] | None:
    """What is wrong with a custom resource, in words; none if there is no schema for its kind."""
    schema = _schemas().get(f"{document['apiVersion']} {document['kind']}")
    if schema is None:
        return None
    schema = schema | {"properties": schema["properties"] | {"metadata": {"type": "object"}}}
    validator = Draft202012Validator(schema, registry=Resource.from_contents(_definitions()) @ Registry())
    return [f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(document)]


@cache
def _schemas() -> dict[str, Any]:
    return {kind: schema for file in FOLDER.glob("*.json") for kind, schema in json.loads(file.read_text()).items()}


def as_text(crd: dict[str, Any]) -> str:
    """As a file has it."""
    return json.dumps(compact(crd), separators=(",", ":"), sort_keys=True) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path in sys.argv[1:]:
        crd = yaml.load(Path(path).read_bytes(), yaml.CSafeLoader)
        (FOLDER / f"{crd['metadata']['name']}.json").write_text(as_text(crd))
