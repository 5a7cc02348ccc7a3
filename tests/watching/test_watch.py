"""`watch` over what recorders wrote: which traffic, the report, the metrics, and the command."""

import json
import re
import sys
import threading
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prometheus_client.parser import text_string_to_metric_families

from softteacher import cli, storage
from softteacher.errors import UserError
from softteacher.watching.profile import HISTOGRAMS, TrafficProfile
from softteacher.watching.recorder import TrafficRecorder
from softteacher.watching.report import MOST_CLASSES, write_report
from softteacher.watching.watch import read_reference, watch
from tests.evaluation.test_report import NASTY, Page
from tests.watching.test_drift import profile
from tests.watching.test_profile import CLASSES, detections

TODAY = date(2026, 6, 15)


@pytest.fixture(autouse=True)
def _noon(monkeypatch):
    """It is noon of that day all the time: for a run over midnight, the days would be others than the traffic's."""

    class Noon(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(TODAY.year, TODAY.month, TODAY.day, 12, tzinfo=tz)

    for module in ("watch", "recorder"):
        monkeypatch.setattr(f"softteacher.watching.{module}.datetime", Noon)


def put(traffic, images, days_ago=0, name="cards", version="1", **kind):
    """Traffic of some day, as a recorder would have written it."""
    day = TODAY - timedelta(days_ago)
    one = profile(images, name=name, version=version, **kind)
    one.start = one.end = f"{day}T12:00:00+00:00"
    one.write(f"{traffic}/{day:%Y/%m/%d}/host-{days_ago}-{name}-{version}-{images}.json")


@pytest.fixture
def reference(tmp_path):
    """A folder as `export` leaves it, as far as `watch` is concerned."""
    profile(400).write(str(tmp_path / "onnx" / "profile.json"))
    return str(tmp_path / "onnx")


def metrics(text):
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {(s.name, *(s.labels[k] for k in ("model", "histogram") if k in s.labels)): s.value for s in samples}


def test_from_the_recorder_to_the_command(s3, reference, tmp_path, monkeypatch, capsys):
    """All in S3: clients record, `watch` sees that small objects have come, and writes report and metrics."""
    storage.copy(reference, f"{s3}/onnx")

    def command(arguments):
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        return capsys.readouterr()

    live = f"{s3}/traffic"
    for _ in range(2):
        with TrafficRecorder(live, "cards", every_images=60) as recorder:
            for _ in range(150):
                recorder.add(detections((0.85, 1, 8), (0.8, 1, 8)), (100, 100), "7", CLASSES)
    arguments = ["softteacher", "watch", "--reference", f"{s3}/onnx", "--live", live, "--out", f"{s3}/drift"]
    arguments += ["--metrics-file", str(tmp_path / "m.prom")]
    out, err = command(arguments)
    facts = json.loads(out.splitlines()[-1])
    assert {k: facts[k] for k in ("name", "version", "images", "drift", "enough", "retrain")} == {
        "name": "cards", "version": "7", "images": 300, "drift": True, "enough": True, "retrain": True,
    }  # fmt: skip
    assert set(facts["psi"]) == set(HISTOGRAMS)
    assert "The traffic of cards version 7 has drifted from the reference" in err
    assert "Objects have become smaller: typical side 25 % → 7 % of the image's." in err
    assert {f.name for f in storage.list_files(f"{s3}/drift")} == {"report.html", "drift.json", "profile.json"}
    assert json.loads(storage.read_bytes(f"{s3}/drift/drift.json"))["psi"] == facts["psi"]
    found = metrics((tmp_path / "m.prom").read_text())
    assert found["softteacher_drift_psi", "cards", "size"] == facts["psi"]["size"]
    # the same traffic as the next reference
    facts = json.loads(command([*arguments[:3], f"{s3}/drift", *arguments[4:6], "--json"])[0])
    assert (facts["drift"], facts["psi"], facts["threshold"]) == (False, dict.fromkeys(HISTOGRAMS, 0.0), 0.25)


def test_which_days(reference, tmp_path):
    live = str(tmp_path / "traffic")
    for days_ago, images in ((0, 1), (6, 2), (7, 4), (8, 8), (40, 16), (400, 32)):
        put(live, images, days_ago)

    def images(**days):
        return watch(reference, live, **days)["images"]

    assert images() == 1 + 2 + 4
    assert images(since="0d") == 1
    assert images(since=str(TODAY - timedelta(400))) == 63
    assert images(since="401d", until="8d") == 8 + 16 + 32
    assert images(since=str(TODAY - timedelta(40)), until=str(TODAY - timedelta(7))) == 4 + 8 + 16
    assert images(since="3d", until="2d") == 0


def test_which_model_and_version(reference, tmp_path, capsys):
    live = str(tmp_path / "traffic")
    put(live, 3, 2, version="10")
    put(live, 5, 1, version="9")  # rolled back: it answered last
    put(live, 7, 0, name="digits")
    with pytest.raises(UserError, match="has traffic of cards, digits; choose one by --name"):
        watch(reference, live)
    facts = watch(reference, live, name="cards")
    assert (facts["version"], facts["images"]) == ("9", 5)
    assert "version 9 alone; there is traffic of 10, too (--all-versions)" in capsys.readouterr().err
    assert watch(reference, live, name="cards", version="10")["images"] == 3
    assert watch(reference, live, name="cards", version="11")["images"] == 0
    facts = watch(reference, live, name="cards", all_versions=True)
    assert (facts["version"], facts["images"]) == ("", 8)
    capsys.readouterr()
    assert watch(reference, live, name="crads")["images"] == 0  # a model may have a quiet week
    assert re.search("warning: .*no traffic of crads from .*, but of cards, digits; check", capsys.readouterr().err)
    assert watch(reference, live, name="digits", since="5d", until="4d")["images"] == 0  # nobody has any


def test_a_model_that_has_just_been_deployed_has_no_traffic(reference, tmp_path):
    """Its name is no typo: the reference has it, too."""
    live, model = str(tmp_path / "traffic"), tmp_path / "models" / "cards"
    put(live, 7, name="digits")
    storage.copy(reference, model / "1")
    (model / "champion.json").write_text(json.dumps({"name": "cards", "version": 1}))
    for name in (None, "cards"):
        facts = watch(str(model), live, name=name)
        assert (facts["name"], facts["images"], facts["enough"]) == ("cards", 0, False)


def test_reference_of_the_live_version(reference, tmp_path):
    """A model repository as `deploy` leaves it: the pointer says which version is live."""
    model = tmp_path / "models" / "cards"
    for version, images in (("2", 20), ("3", 30)):
        profile(images).write(str(model / version / "profile.json"))
        record = {"record": {"name": "cards", "version": int(version)}}
        (model / version / "manifest.json").write_text(json.dumps(record))
    (model / "champion.json").write_text(json.dumps({"name": "cards", "version": 3}))
    found = read_reference(str(model))
    assert (found.images, found.name, found.version) == (30, "cards", "3")
    found = read_reference(str(model / "2"))
    assert (found.images, found.name, found.version) == (20, "cards", "2")
    found = read_reference(f"{reference}/profile.json")
    assert (found.images, found.name, found.version) == (400, "", "")
    live = str(tmp_path / "traffic")
    put(live, 3, version="2")
    put(live, 5, version="3")
    put(live, 7, name="digits")
    assert watch(str(model), live)["images"] == 5
    for torn in ("[]", "{", '{"name": "cards"}'):
        (model / "champion.json").write_text(torn)
        with pytest.raises(UserError, match=r"champion\.json: not ours"):
            read_reference(str(model))
    for torn in ("[]", "{", '{"record": {"a": 1}}', '{"record": []}'):
        (model / "2" / "manifest.json").write_text(torn)
        with pytest.raises(UserError, match=r"manifest\.json: not ours"):
            read_reference(str(model / "2"))


def test_an_earlier_report_as_reference(reference, tmp_path):
    """Its version is of a deployment that is over."""
    live, report = str(tmp_path / "traffic"), str(tmp_path / "report")
    put(live, 250, 2, version="1")
    assert watch(reference, live, out=report)["version"] == "1"
    put(live, 300, 0, version="2", side=9)
    put(live, 400, 0, name="digits")
    for folder in (report, f"{report}/profile.json"):
        facts = watch(folder, live)
        assert (facts["name"], facts["version"], facts["images"], facts["retrain"]) == ("cards", "2", 300, True)
    assert watch(report, live, version="1")["drift"] is False


def test_reading_shows_progress(reference, tmp_path, capsys):
    live = str(tmp_path / "traffic")
    for version in "123":
        put(live, 5, version=version)
    watch(reference, live)
    assert f"watch      [{24 * '#'}] 3/3\n" in capsys.readouterr().err


def test_the_reference_is_never_replaced(reference, s3, tmp_path):
    live, version = str(tmp_path / "traffic"), tmp_path / "models" / "cards" / "3"
    put(live, 250, version="3", side=9)
    storage.copy(reference, f"{s3}/onnx")
    storage.copy(reference, version)
    (version.parent / "champion.json").write_text(json.dumps({"name": "cards", "version": 3}))
    (tmp_path / "link").symlink_to(reference)
    for given, out in (
        (reference, f"{reference}/"),
        (f"{reference}/profile.json", reference),
        (reference, tmp_path / "link"),
        (version.parent, version),
        (f"{s3}/onnx", f"{s3}/onnx/"),
    ):
        with pytest.raises(UserError, match=rf"--out {out}: the traffic would replace the reference .*profile\.json"):
            watch(str(given), live, out=str(out))
        assert watch(str(given), live, out=str(tmp_path / "out"))["drift"] is True


def test_foreign_files_are_left_out_and_told(reference, tmp_path, capsys):
    live = tmp_path / "traffic"
    put(str(live), 3)
    today = live / TODAY.strftime("%Y/%m/%d")
    (today / "torn.json").write_text('{"format": "softteacher-traffic-1", "ima')
    (today / "notes.txt").write_text("no json")
    (live / TODAY.strftime("%Y/%m") / "stray.json").write_text("{}")
    assert watch(reference, str(live))["images"] == 3
    assert "1 of 2 files are no traffic profiles and were left out, e.g. " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"live": "/nowhere"}, "/nowhere: no traffic was ever recorded there"),
        ({"reference": "/nowhere"}, "/nowhere: no profile.json in it; give a profile, or the folder of"),
        ({"reference": "/nowhere.json"}, "/nowhere.json: no such file"),
        ({"since": "yesterday"}, "--since yesterday: no day; write 2026-11-01"),
        ({"since": "99999999999d"}, "--since 99999999999d: no day"),
        ({"until": "2026-02-31"}, "--until 2026-02-31: no day"),
        ({"since": "1d", "until": "2d"}, "--since 1d: is after --until 2d"),
        ({"push_gateway": "http://127.0.0.1:9"}, "http://127.0.0.1:9: the pushgateway did not take the metrics"),
        ({"push_gateway": "http://host:port"}, r"http://host:port: the pushgateway did not take .*nonnumeric port"),
        ({"metrics_file": "/proc/none/m.prom"}, "/proc/none"),
    ],
)
def test_bad_input(reference, tmp_path, monkeypatch, changed, message):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    put(str(tmp_path / "traffic"), 3)
    arguments = {"reference": reference, "live": str(tmp_path / "traffic"), **changed}
    with pytest.raises(UserError, match=message):
        watch(**arguments)


def test_metrics_of_too_few_images_have_no_psi(reference, tmp_path):
    put(str(tmp_path / "traffic"), 30, side=9)
    facts = watch(reference, str(tmp_path / "traffic"), metrics_file=str(tmp_path / "m.prom"))
    assert facts["verdict"] == "Too few images of cards version 1 to say: 30, and 200 are needed."
    assert (facts["drift"], facts["retrain"]) == (True, False)
    found = metrics((tmp_path / "m.prom").read_text())
    assert found["softteacher_traffic_images", "cards"] == 30
    assert not any(name.startswith(("softteacher_drift_psi", "softteacher_drift_limit")) for name, *_ in found)


def test_pushed_metrics(reference, tmp_path, monkeypatch):
    """What arrives at a pushgateway: the group is replaced (PUT), and all the numbers are there."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    got = []

    class Gateway(BaseHTTPRequestHandler):
        def do_PUT(self):
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"])).decode()))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    put(str(tmp_path / "traffic"), 250)
    before = datetime.now(UTC).timestamp()
    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        facts = watch(
            reference, str(tmp_path / "traffic"), push_gateway=f"http://127.0.0.1:{server.server_port}", threshold=0.4
        )
        server.shutdown()
    [(path, text)] = got
    assert path == "/metrics/job/softteacher-watch/model/cards"
    found = metrics(text)
    assert found.pop(("softteacher_drift_last_run_timestamp_seconds", "cards")) >= before
    expected = {("softteacher_traffic_images", "cards"): 250}
    for name in HISTOGRAMS:
        expected["softteacher_drift_psi", "cards", name] = facts["psi"][name]
        expected["softteacher_drift_limit", "cards", name] = 0.4
    assert found == expected
    assert facts["verdict"] == "The traffic of cards version 1 is like the reference: no PSI is above its limit."


def test_a_push_gateway_that_speaks_no_http(reference, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Grpc(BaseHTTPRequestHandler):
        def do_PUT(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(b"\0\0\x06\x04\0\0\0\0\0\0\x05\0\0\x40\0")  # HTTP/2

        def log_message(self, *_):
            pass

    put(str(tmp_path / "traffic"), 3)
    with HTTPServer(("127.0.0.1", 0), Grpc) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=r"the pushgateway did not take the metrics .*; check the URL"):
            watch(reference, str(tmp_path / "traffic"), push_gateway=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_report(reference, tmp_path):
    put(str(tmp_path / "traffic"), 250, side=9, score=0.6)
    facts = watch(reference, str(tmp_path / "traffic"), out=str(tmp_path / "out"))
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert all(link.startswith("data:") for link in page.links)
    assert len([link for link in page.links if link.startswith("data:image/png")]) == 4
    assert facts["verdict"] in page.words
    for name in HISTOGRAMS:
        assert f"{facts['psi'][name]:.3f}" in page.words
    assert page.words.count("yes") == len(facts["over"]) == 2
    assert any(word.startswith("Scores have dropped: mean 0.84 → 0.59") for word in page.words)


def test_report_of_any_names_and_of_no_images():
    classes = (NASTY, "$x_{$", "", *(f"class {n}" for n in range(80)))
    live = TrafficProfile(classes, NASTY, NASTY)
    live.observe(detections(*((0.9, n, 9) for n in range(MOST_CLASSES + 3))), (10, 10))
    for traffic in (live, TrafficProfile(classes)):
        facts = {
            "name": traffic.name, "version": traffic.version, "reference": NASTY, "live": NASTY, "verdict": NASTY,
            "images": 1, "reference_images": 1, "min_images": 1, "threshold": 0.25, "over": ["class"],
            "psi": dict.fromkeys(HISTOGRAMS) | {"class": 3.0}, "limit": dict.fromkeys(HISTOGRAMS, 0.25),
        }  # fmt: skip
        page = Page(write_report(live, traffic, facts))
        assert not {"script", "iframe"} & set(page.tags)
        assert NASTY in page.words
