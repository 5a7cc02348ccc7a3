"""As much of Kubeflow Pipelines' API as is used, with every request and answer checked against its published schema."""

import copy
import json
import re
import threading
import uuid
from datetime import UTC, datetime
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import jsonschema
import pytest
import yaml

from tests.helpers import SHARED

SWAGGER = SHARED / "reference" / "schemas" / "kfp_v2beta1.swagger.json"
API = "/apis/v2beta1"
LONGEST = 128  # of a name


class Refusal(Exception):
    """An error that the server answers with."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Schema:
    """The published API: what a path takes and gives."""

    def __init__(self) -> None:
        document = json.loads(SWAGGER.read_text("utf-8"))
        self.definitions = document["definitions"]
        for definition in self.definitions.values():
            _strict(definition)
        # the longest first: /pipelines/upload before /pipelines/{pipeline_id}
        self.paths = {
            re.compile(re.sub(r"\\\{.*?\\\}", "([^/:]+)", re.escape(path)) + "$"): operations
            for path, operations in sorted(document["paths"].items(), key=lambda p: (p[0].count("{"), -len(p[0])))
        }

    def operation(self, method: str, path: str) -> dict[str, Any]:
        for pattern, operations in self.paths.items():
            if pattern.match(path):
                assert method in operations, f"the API has no {method} {path}"
                return operations[method]
        raise AssertionError(f"the API has no {path}")

    def check(self, value: Any, schema: dict[str, Any]) -> None:
        jsonschema.Draft4Validator(schema | {"definitions": self.definitions}).validate(value)

    def check_request(self, operation: dict[str, Any], query: dict[str, str], body: Any) -> None:
        parameters = {(p["in"], p["name"]): p for p in operation.get("parameters", [])}
        for name, value in query.items():
            assert ("query", name) in parameters, f"{operation['operationId']} takes no {name}"
            if parameters["query", name]["type"] == "integer":
                int(value)
        bodies = [p for (place, _), p in parameters.items() if place == "body"]
        if bodies:
            self.check(body, bodies[0]["schema"])
        else:
            assert body is None or ("formData", "uploadfile") in parameters


def _strict(schema: Any) -> None:
    """Refuse fields that a schema doesn't have; take numbers for int64, whose JSON form is a string."""
    if isinstance(schema, list):
        for part in schema:
            _strict(part)
    if isinstance(schema, dict):
        if schema.get("type") == "string" and schema.get("format") == "int64":
            schema["type"] = ["string", "integer"]
        if isinstance(schema.get("properties"), dict):
            schema.setdefault("additionalProperties", False)
        for part in schema.values():
            _strict(part)


class KfpServer:
    """A server in this process; `with` starts and stops it.

    Attributes:
        url: Of it.
        asked: Every request: method, path, query, body.
        pipelines, versions, experiments, runs, jobs: What is there, by id.
        uploads: The YAML of each version that was uploaded, by its id.
        multi_user: Whether it has namespaces.
        token: Bearer token that it asks for.
        refusals: What it answers instead, by the start of `METHOD path`.
    """

    def __init__(self, *, multi_user: bool = False, token: str = "") -> None:
        if not SWAGGER.exists():
            pytest.skip(f"no {SWAGGER}: the published API of Kubeflow Pipelines, to check against")
        self.schema = Schema()
        self.multi_user, self.token = multi_user, token
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        self.refusals: dict[str, Refusal] = {}
        self.complaints: list[str] = []
        self.pipelines: dict[str, dict] = {}
        self.versions: dict[str, dict] = {}
        self.experiments: dict[str, dict] = {}
        self.runs: dict[str, dict] = {}
        self.jobs: dict[str, dict] = {}
        self.uploads: dict[str, dict] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.handle(self, "get")

            def do_POST(self) -> None:
                server.handle(self, "post")

            def do_DELETE(self) -> None:
                server.handle(self, "delete")

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        assert self.complaints == []

    def handle(self, http: BaseHTTPRequestHandler, method: str) -> None:
        """Check a request, answer it, and check the answer."""
        url = urlsplit(http.path)
        path, query = unquote(url.path), {key: values[0] for key, values in parse_qs(url.query).items()}
        raw = http.rfile.read(int(http.headers.get("Content-Length") or 0))
        is_json = http.headers.get("Content-Type", "").startswith("application/json")
        body = json.loads(raw) if raw and is_json else None
        if raw and not is_json:
            form = message_from_bytes(b"Content-Type: " + http.headers["Content-Type"].encode() + b"\n\n" + raw)
            body = {"uploadfile": form.get_payload()[0].get_payload(decode=True).decode()}
        self.asked.append((method, path, query, body))
        try:
            try:
                for start, refusal in self.refusals.items():
                    if f"{method.upper()} {path}".startswith(start):
                        raise refusal
                if self.token and http.headers.get("Authorization") != f"Bearer {self.token}":
                    raise Refusal(401, "Unauthenticated")
                operation = self.schema.operation(method, path)
                self.schema.check_request(operation, query, body)
                code, answer = 200, self.answer(method, path.removeprefix(API), query, copy.deepcopy(body))
                self.schema.check(answer, operation["responses"]["200"]["schema"])
            except Refusal as refusal:
                code, answer = refusal.code, {"code": 3, "message": refusal.message, "details": []}
                self.schema.check(answer, {"$ref": "#/definitions/googleRpcStatus"})
        except (AssertionError, jsonschema.ValidationError) as error:
            self.complaints.append(f"{method} {path}: {error}")
            code, answer = 400, {"message": str(error).splitlines()[0]}
        text = json.dumps(answer).encode()
        http.send_response(code)
        http.send_header("Content-Type", "application/json")
        http.send_header("Content-Length", str(len(text)))
        http.end_headers()
        http.wfile.write(text)

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> dict:
        """What the real one would do."""
        match method, path.strip("/").replace(":", "/").split("/"):
            case "get", ["healthz"]:
                return {"multi_user": self.multi_user}
            case "get", ["pipelines"]:
                return self._list("pipelines", self._in_namespace(self.pipelines, query), query)
            case "post", ["pipelines"]:
                self._check_namespace(body.get("namespace"))
                self._check_name(body["name"], self._in_namespace(self.pipelines, body))
                return self._add(self.pipelines, "pipeline_id", body)
            case "get", ["pipelines", pipeline, "versions"]:
                found = [v for v in self.versions.values() if v["pipeline_id"] == pipeline]
                return self._list("pipeline_versions", found, query)
            case "post", ["pipelines", "upload_version"]:
                found = [v for v in self.versions.values() if v["pipeline_id"] == query["pipelineid"]]
                self._check_name(query["name"], found)
                documents = list(yaml.load_all(body["uploadfile"], yaml.CSafeLoader))
                version = {"pipeline_id": query["pipelineid"], "name": query["name"], "display_name": query["name"]}
                added = self._add(self.versions, "pipeline_version_id", version)
                self.uploads[added["pipeline_version_id"]] = documents[0]
                return added
            case "get", ["experiments"]:
                return self._list("experiments", self._in_namespace(self.experiments, query), query)
            case "post", ["experiments"]:
                self._check_namespace(body.get("namespace"))
                self._check_name(body["display_name"], self._in_namespace(self.experiments, body))
                return self._add(self.experiments, "experiment_id", body)
            case "get", ["runs"]:
                return self._list("runs", self._of_experiments(self.runs, query), query)
            case "post", ["runs"]:
                self._check_start(body)
                return self._add(self.runs, "run_id", body | {"state": "PENDING"})
            case "get", ["runs", run]:
                return self._get(self.runs, run)
            case "get", ["recurringruns"]:
                return self._list("recurringRuns", self._of_experiments(self.jobs, query), query)
            case "post", ["recurringruns"]:
                self._check_start(body)
                assert len(body["trigger"]["cron_schedule"]["cron"].split()) == 6
                body["max_concurrency"] = str(body["max_concurrency"])  # as protobuf writes 64 bits
                return self._add(self.jobs, "recurring_run_id", body | {"status": body["mode"] + "D"})
            case "delete", ["recurringruns", job]:
                self._get(self.jobs, job)
                del self.jobs[job]
                return {}
            case "post", ["recurringruns", job, "enable"]:
                self._get(self.jobs, job)["status"] = "ENABLED"
                return {}
        raise AssertionError(f"{method} {path} is not used")

    def _add(self, store: dict[str, dict], key: str, body: dict) -> dict:
        body |= {key: str(uuid.uuid4()), "created_at": datetime.now(UTC).isoformat()}
        store[body[key]] = body
        return body

    def _get(self, store: dict[str, dict], key: str) -> dict:
        if key not in store:
            raise Refusal(404, f"ResourceNotFoundError: {key} not found.")
        return store[key]

    def _list(self, field: str, found: list[dict], query: dict[str, str]) -> dict:
        """A page of two at most, however many were asked for."""
        for predicate in json.loads(query.get("filter") or "{}").get("predicates", []):
            assert predicate["operation"] in ("EQUALS", 1)
            found = [one for one in found if one[predicate["key"]] == predicate["stringValue"]]
        if query.get("sort_by") == "created_at desc":
            found = sorted(found, key=lambda one: one["created_at"], reverse=True)
        start, size = int(query.get("page_token") or 0), min(2, int(query.get("page_size") or 20))
        more = {"next_page_token": str(start + size)} if start + size < len(found) else {}
        return {field: found[start : start + size], "total_size": len(found), **more}

    def _in_namespace(self, store: dict[str, dict], asked: dict) -> list[dict]:
        return [one for one in store.values() if (one.get("namespace") or "") == (asked.get("namespace") or "")]

    def _of_experiments(self, store: dict[str, dict], query: dict[str, str]) -> list[dict]:
        experiments = {e["experiment_id"] for e in self._in_namespace(self.experiments, query)}
        return [one for one in store.values() if one["experiment_id"] in experiments]

    def _check_namespace(self, namespace: str | None) -> None:
        if self.multi_user != bool(namespace):
            raise Refusal(400, "namespace missing, or not allowed in single-user mode")

    def _check_name(self, name: str, others: list[dict]) -> None:
        if len(name) > LONGEST:
            raise Refusal(400, f"Invalid input error: name length cannot exceed {LONGEST}")
        if name in [one.get("name", one["display_name"]) for one in others]:
            raise Refusal(409, f"Already exist error: {name} already exists")

    def _check_start(self, body: dict) -> None:
        self._check_name(body["display_name"], [])
        self._get(self.experiments, body["experiment_id"])
        reference = body["pipeline_version_reference"]
        version = self._get(self.versions, reference["pipeline_version_id"])
        assert version["pipeline_id"] == reference["pipeline_id"]
        declared = self.uploads[version["pipeline_version_id"]]["root"]["inputDefinitions"]["parameters"]
        given = body["runtime_config"]["parameters"]
        if unknown := given.keys() - declared.keys():
            raise Refusal(400, f"parameters not in the pipeline: {unknown}")
        if missing := {n for n, p in declared.items() if not p.get("isOptional")} - given.keys():
            raise Refusal(400, f"parameters missing: {missing}")
