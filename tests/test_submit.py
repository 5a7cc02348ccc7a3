"""The compiled pipeline submitted to as much of the Kubeflow Pipelines API as a submission asks for."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.test_pipeline import REQUIRED, run

RUN_ID = "0a1b2c3d"


@pytest.fixture
def api():
    """As much of the Kubeflow Pipelines API as a submission asks for; yields its URL and the bodies posted to it."""
    posted: dict[str, dict] = {}

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: dict, code: int = 200) -> None:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_GET(self) -> None:
            self.answer({"multi_user": False} if self.path.endswith("healthz") else {"experiments": []})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            kind = self.path.split("?")[0].rsplit("/", 1)[1]
            posted[kind] = body
            if body.get("display_name") == "forbidden":
                return self.answer({"error": "no"}, 403)
            self.answer({"experiment_id": "e", "run_id": RUN_ID, "display_name": body["display_name"]})

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", posted
    server.shutdown()
    server.server_close()


@pytest.fixture
def package(tmp_path: Path, capsys) -> Path:
    run(capsys, "compile", "--out", tmp_path)
    return tmp_path / "training_pipeline.yaml"


def test_submit(api, package: Path, capsys):
    host, posted = api
    options = ["--experiment", "cards", "--baseline", "--set", "training.seed=7"]
    code, out, _ = run(capsys, "submit", package, "--host", host + "/", *REQUIRED, *options)
    assert code == 0
    assert out.splitlines()[-1] == f"{host}/#/runs/details/{RUN_ID}"
    assert posted["experiments"]["display_name"] == "cards"
    parameters = posted["runs"]["runtime_config"]["parameters"]
    assert parameters["data"] == "s3://data/cards"
    assert parameters["baseline"] is True
    assert parameters["overrides"] == ["training.seed=7"]
    assert parameters["triton_backend"] == "onnxruntime"
    assert posted["runs"]["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] == "training-pipeline"


def test_submit_that_is_refused(api, package: Path, capsys):
    code, _, err = run(capsys, "submit", package, "--host", api[0], *REQUIRED, "--experiment", "forbidden")
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: --host {api[0]}: refused the run (403 ")


@pytest.mark.parametrize(
    ("host", "message"),
    [("http://127.0.0.1:9", "no Kubeflow Pipelines there"), ("localhost", "write a URL")],
)
def test_submit_to_nobody(package: Path, capsys, host, message):
    code, _, err = run(capsys, "submit", package, "--host", host, *REQUIRED)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: --host {host}: ")
    assert message in err


def test_submit_of_no_package(tmp_path: Path, capsys):
    code, _, err = run(capsys, "submit", tmp_path / "none.yaml", "--host", "http://127.0.0.1:9", *REQUIRED)
    assert (code, err.count("\n")) == (2, 1)
    assert "none.yaml: no such file" in err
