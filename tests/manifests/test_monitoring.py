"""Alert rules by promtool: series that must make them fire, and series that must not; and the dashboard.

The names of the metrics are compared with what a real Triton and `watch` tell.
"""

import json
import re
import urllib.request
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest

from softteacher.serving.client import Client
from softteacher.serving.deploy import deploy
from softteacher.watching.metrics import registry
from tests.conftest import TritonServer
from tests.helpers import onnx_folder, square_image
from tests.manifests.conftest import MANIFESTS, one

FOLDER = MANIFESTS / "monitoring"
RULES = [
    rule
    for group in yaml.safe_load((FOLDER / "prometheus-rule.yaml").read_text())["spec"]["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
METRIC = r"\b(?:nv|softteacher)_\w+"

CARDS = 'job="triton", instance="a", model="cards", version="1"'
OK = f"nv_inference_request_success{{{CARDS}}}"
FAILED = f'nv_inference_request_failure{{{CARDS}, reason="%s"}}'
BAD = f"softteacher_bad_requests_total{{{CARDS}}}"
TIME = f"nv_inference_request_duration_us{{{CARDS}}}"
QUEUE = f"nv_inference_queue_duration_us{{{CARDS}}}"
UP = 'up{job="triton", instance="a"}'
PSI, LIMIT = (f'softteacher_drift_{x}{{job="push", model="cards", histogram="size"}}' for x in ("psi", "limit"))
RAN = 'softteacher_drift_last_run_timestamp_seconds{job="push", model="cards"}'
SERVING, SIZE = {"job": "triton", "model": "cards"}, {"model": "cards", "histogram": "size"}
HEALTHY = {
    UP: "1x300", OK: "0+600x300", FAILED % "BACKEND": "0+3x300", FAILED % "CANCELED": "0+300x300", BAD: "0+20x300",
    TIME: "0+300000000x300", QUEUE: "0+60000000x300",  # half a second each, a tenth of it in the queue
    PSI: "0.24x300", LIMIT: "0.25x300", RAN: "0x300",
}  # fmt: skip
# what is changed from HEALTHY (a value a minute), and what fires after 4 hours: alert -> labels, summary
CASES = {
    "healthy": ({}, {}),
    **{
        f"a {kind} that came and went": (
            {x.replace("cards", f"cards-{kind}"): "0 20x200 _x99" for x in (OK, TIME, QUEUE)},
            {},
        )
        for kind in ("candidate", "canary")
    },
    "nobody asks": (dict.fromkeys((OK, FAILED % "BACKEND", FAILED % "CANCELED", BAD, TIME, QUEUE), "5x300"), {}),
    "down": (
        {UP: "1x200 0x99"} | dict.fromkeys((OK, TIME, QUEUE, BAD), "0+600x200 _x99"),
        {"SoftTeacherTritonDown": ({"job": "triton", "instance": "a"}, "Triton does not answer.")},
    ),
    "down for a minute": ({UP: "1x238 0 0 1x60"}, {}),
    "no target at all": ({UP: "_x300"}, {"SoftTeacherTritonDown": ({"job": "triton"}, "Triton does not answer.")}),
    "restarted without the model": (
        {k: v + " _x99" for k, v in ((OK, "0+600x200"), (TIME, "0+1x200"), (QUEUE, "0+1x200"))},
        {"SoftTeacherModelGone": (SERVING, "Triton runs, but cards is not loaded any more.")},
    ),
    "restarted with it, counters from nothing": ({OK: "0+600x230 0+600x70", BAD: "0+20x230 0+20x70"}, {}),
    "errors": (
        {FAILED % "BACKEND": "0+20x300"},
        {"SoftTeacherErrors": (SERVING, "3.226% of the requests to cards fail.")},
    ),
    "errors that are over": ({FAILED % "BACKEND": "0+20x230 4600x70"}, {}),
    "nothing but errors": (
        dict.fromkeys((OK, TIME, QUEUE, BAD), "0x300") | {FAILED % "OTHER": "0+9x300"},
        {"SoftTeacherErrors": (SERVING, "100% of the requests to cards fail.")},
    ),
    "bad requests": (
        {BAD: "0+180x300"},
        {"SoftTeacherBadRequests": (SERVING, "19.93% of the requests to cards are no images that it takes.")},
    ),
    "slow": (
        {TIME: "0+1200000000x300"},
        {"SoftTeacherSlow": (SERVING, "cards takes 2s a request on average.")},
    ),
    "queue": (
        {QUEUE: "0+540000000x300"},
        {"SoftTeacherQueue": (SERVING, "Requests to cards wait 900ms in the queue on average.")},
    ),
    "slow for five minutes": ({TIME: "0+300000000x235 70800000000+1200000000x65"}, {}),
    "replicas differ": (
        {OK.replace('"a"', '"b"').replace('"1"', '"2"'): "0+600x300"},
        {"SoftTeacherReplicasDiffer": (SERVING, "Two versions of cards have been answering for a quarter of an hour.")},
    ),
    "a switch": ({OK: "0+600x235 141000x65", OK.replace('"1"', '"2"'): "_x235 0+600x65"}, {}),
    "drift": (
        {PSI: "0.24x200 0.5x100", PSI.replace("push", "textfile"): "0.5x300"},
        {"SoftTeacherDrift": (SIZE, "The traffic of cards has drifted: size, PSI 0.50.")},
    ),
    "drift that chance explains": ({PSI: "0.5x300", LIMIT: "0.6x300"}, {}),
    "not watched": (
        {RAN: f"{-8 * 86400}x300"},
        {"SoftTeacherWatchMissing": ({"model": "cards"}, "The traffic of cards has not been watched for 8d 4h 0m 0s.")},
    ),
}  # fmt: skip


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """A folder with the rules as Prometheus reads them."""
    spec = yaml.safe_load((FOLDER / "prometheus-rule.yaml").read_text())["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    return tmp_path


def unit_test(name: str) -> dict:
    """A case in promtool's form."""
    changed, fires = CASES[name]
    by_name = {rule["alert"]: rule for rule in RULES}
    expected = []
    for alert, rule in by_name.items():
        alerts = []
        if alert in fires:
            labels, summary = fires[alert]
            annotations = {k: v for k, v in rule["annotations"].items() if k != "summary"} | {"summary": summary}
            alerts = [{"exp_labels": labels | rule["labels"], "exp_annotations": annotations}]
        expected.append({"eval_time": "4h", "alertname": alert, "exp_alerts": alerts})
    series = [{"series": k, "values": v} for k, v in (HEALTHY | changed).items()]
    test = {"interval": "1m", "input_series": series, "alert_rule_test": expected}
    return {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [test]}


def test_rules_are_valid(promtool, rules: Path):
    assert promtool(rules, "check", "rules", "rules.yaml") == ""


@pytest.mark.parametrize("case", CASES)
def test_what_fires(promtool, rules: Path, case: str):
    (rules / "case.yaml").write_text(yaml.safe_dump(unit_test(case)))
    assert promtool(rules, "test", "rules", "case.yaml") == ""


def test_every_alert_fires_in_some_case():
    assert {alert for _, fires in CASES.values() for alert in fires} == {rule["alert"] for rule in RULES}


def test_a_rule_that_never_fires_would_be_found(promtool, rules: Path):
    text = (rules / "rules.yaml").read_text()
    assert "> 0.01" in text
    (rules / "rules.yaml").write_text(text.replace("> 0.01", "> 0.9"))
    (rules / "case.yaml").write_text(yaml.safe_dump(unit_test("errors")))
    assert "SoftTeacherErrors" in promtool(rules, "test", "rules", "case.yaml")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_and_what_to_do(rule: dict):
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["alert"].startswith("SoftTeacher")
    assert len(rule["annotations"]["runbook"]) > 80


def test_metrics_are_told_by_triton_and_watch(triton_server: TritonServer, tmp_path: Path):
    deploy(str(onnx_folder(tmp_path / "onnx")), triton_server.repository, triton_server.url, "monitored")
    with Client(triton_server.url, "monitored") as client:
        client.predict([square_image((5, 5, 30, 30))])
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(triton_server.urls.metrics) as answer:
        told = answer.read().decode()
    told += generate_latest(
        registry({"name": "m", "enough": True, "images": 1, "psi": {"size": 1.0}, "limit": {"size": 1.0}})
    ).decode()
    rows = dict(re.findall(r"^(\w+)(\{.*\})? ", told, re.M))
    expressions = [*(rule["expr"] for rule in RULES), *(expr for _, expr in QUERIES)]
    used = {name for expr in expressions for name in re.findall(METRIC, expr)}
    assert used <= set(rows)
    assert len(used) >= 12
    for name in used & set(rows):
        assert "model=" in rows[name], f"{name} has no label model"
    assert 'reason="CANCELED"' in told


@pytest.mark.parametrize(("title", "expr"), QUERIES)
def test_queries_are_valid(promtool, tmp_path: Path, title: str, expr: str):
    expr = expr.replace("$model", ".*").replace("$__rate_interval", "1m")
    assert "$" not in expr
    tree = {"groups": [{"name": "queries", "rules": [{"record": "x", "expr": expr}]}]}
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump(tree))
    assert promtool(tmp_path, "check", "rules", "queries.yaml") == ""


def test_panels():
    panels = DASHBOARD["panels"]
    assert len({p["id"] for p in panels}) == len({p["title"] for p in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert all(
            target["legendFormat"] and target["datasource"] == panel["datasource"] for target in panel["targets"]
        )
    cells = [
        (x, y)
        for p in panels
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))  # none lies over another
    assert max(x for x, _ in cells) < 24
    assert {v["name"] for v in DASHBOARD["templating"]["list"]} == {"datasource", "model"}


def test_as_kustomize_builds_it(built):
    ours = {document["kind"]: document for document in built["monitoring"]}
    assert set(ours) == {"ConfigMap", "PrometheusRule", "ServiceMonitor"}
    assert not any("namespace" in d["metadata"] for d in ours.values())
    assert ours["ConfigMap"]["metadata"]["name"] == "softteacher-dashboard"
    assert ours["ConfigMap"]["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(ours["ConfigMap"]["data"]["softteacher.json"]) == DASHBOARD


def test_the_scrape_target_is_triton_s_service(built):
    monitor = one(built["monitoring"], "ServiceMonitor")["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    [service] = [d for d in built["base"] if d["kind"] == "Service" and wanted <= d["metadata"]["labels"].items()]
    assert {e["port"] for e in monitor["endpoints"]} <= {p["name"] for p in service["spec"]["ports"]}
    # the operator names the scrape job after the service
    jobs = {job for rule in RULES for job in re.findall(r'job="(\w+)"', rule["expr"])}
    assert jobs == {service["metadata"]["name"]}
