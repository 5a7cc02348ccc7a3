"""`watch`: live traffic against the reference, as a report, as metrics, and as the trigger for retraining."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from typing import Any

from softteacher import storage
from softteacher.console import say, track
from softteacher.errors import MissingFile, UserError
from softteacher.watching.drift import TITLES, compare, explain
from softteacher.watching.profile import FILE, NoProfile, TrafficProfile

FILES = r"(\d{4}/\d{2}/\d{2})/[^/]+\.json"


def watch(
    reference: str,
    live: str,
    *,
    name: str | None = None,
    version: str | None = None,
    all_versions: bool = False,
    since: str = "7d",
    until: str | None = None,
    out: str | None = None,
    threshold: float = 0.25,
    min_images: int = 200,
    metrics_file: str | None = None,
    push_gateway: str | None = None,
) -> dict[str, Any]:
    """Compare live traffic with the reference.

    Args:
        reference: see `read_reference`.
        live: folder or `s3://` prefix that a `TrafficRecorder` writes to.
        name: of the model; by default the reference's, or the only one that is recorded there.
        version: by default that of a reference in Triton's repository; of any other, the one that answered last.
        all_versions: the traffic of all versions together.
        since: first day, `2026-11-01` (UTC), or how many days back, `7d`.
        until: last day, likewise.
        out: folder for `report.html`, `drift.json` and `profile.json` (the traffic; a later run may take the folder as
            its reference); none: they are not written.
        threshold: PSI above it is drift.
        min_images: of fewer nothing is said.
        metrics_file: for node_exporter's textfile collector, `*.prom`.
        push_gateway: URL of a Prometheus pushgateway.

    Returns:
        What `compare` says; `name`, `version`, `verdict` (a sentence), and `reference`, `live`, `threshold`,
        `min_images`.

    Raises:
        UserError: bad input, nothing was ever recorded at `live`, `out` is the reference, or the metrics can't be
            delivered.
    """
    base = read_reference(reference, out)
    first, last = _day(since, "--since"), _day(until or "0d", "--until")
    if first > last:
        raise UserError(f"--since {since}: is after --until {until or 'today'}; swap them")
    groups = read_traffic(live, first, last)
    names = sorted({n for n, _ in groups})
    if name and names and name not in {base.name, *names}:  # a typo would never alarm
        say(f"warning: {live}: no traffic of {name} from {first} to {last}, but of {', '.join(names)}; check --name")
    traffic = _choose(groups, live, name or base.name, None if all_versions else version or base.version, all_versions)
    # without any traffic in that time there is still something to report: no images
    traffic = traffic or TrafficProfile(base.classes, name or base.name, version or base.version, base.min_score)
    facts: dict[str, Any] = {"name": traffic.name, "version": traffic.version, "reference": reference, "live": live}
    facts |= compare(base, traffic, threshold, min_images)
    facts |= {"threshold": threshold, "min_images": min_images}
    facts["verdict"] = _verdict(facts)
    say(f"watch: {facts['verdict']}")
    for sentence in explain(base, traffic).values() if traffic.images else ():
        say(f"watch: {sentence}")
    if out:
        from softteacher.watching.report import write_report

        with storage.output_folder(out) as folder:
            (folder / "report.html").write_text(write_report(base, traffic, facts), "utf-8", "backslashreplace")
            (folder / "drift.json").write_text(json.dumps(facts, indent=1))
            traffic.write(str(folder / FILE))
    if metrics_file or push_gateway:
        from softteacher.watching.metrics import deliver

        deliver(facts, metrics_file, push_gateway)
    return facts


def read_reference(uri: str, out: str | None = None) -> TrafficProfile:
    """What traffic is compared with.

    Args:
        uri: a profile (`*.json`), or a folder with `profile.json` in it: an onnx folder, the report of an earlier
            `watch`, or the folder of a version in Triton's model repository, whose number is then known. Or the
            folder of the model there: the live version's is taken.
        out: folder that `watch` will write to.

    Raises:
        UserError: there is none, or its file would be replaced in `out`.
    """
    record: dict[str, Any] = {}
    version = ""
    if uri.endswith(".json"):
        source, profile = uri, TrafficProfile.read(uri)
    else:
        for file, is_pointer in (("champion.json", True), ("manifest.json", False)):
            try:
                record = json.loads(storage.read_bytes(storage.join(uri, file)))
                record = record if is_pointer else record["record"]
                version = str(record["version"])
                uri = storage.join(uri, version) if is_pointer else uri
                break
            except MissingFile:
                pass
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{storage.join(uri, file)}: not ours; give another --reference") from None
        source = storage.join(uri, FILE)
        try:
            profile = TrafficProfile.read(source)
        except MissingFile:
            raise MissingFile(
                f"{uri}: no {FILE} in it; give a profile, or the folder of `softteacher export` (an old one: export "
                "again)"
            ) from None
    if out and storage.place(source) == storage.place(storage.join(out, FILE)):
        raise UserError(f"--out {out}: the traffic would replace the reference {source}; choose another folder")
    # an earlier report's version is of a deployment that may be over
    profile.version = version
    if record:
        profile.name = str(record.get("name", ""))
    return profile


def read_traffic(live: str, first: date, last: date) -> dict[tuple[str, str], TrafficProfile]:
    """What recorders wrote from the first to the last day.

    Files that are no profiles are left out, and that is told.

    Returns:
        By name and version of the model; empty if nothing was recorded then.

    Raises:
        UserError: nothing was ever recorded there, or it can't be read.
    """
    if not storage.exists(live):
        raise UserError(f"{live}: no traffic was ever recorded there; check --live, and that the client has a recorder")
    files, days = [], [day.strftime("%Y/%m/%d") for day in (first, last)]
    for month in sorted({(first + timedelta(n)).strftime("%Y/%m") for n in range((last - first).days + 1)}):
        for info in storage.list_files(storage.join(live, month)):
            path = f"{month}/{info.name}"
            if (match := re.fullmatch(FILES, path)) and days[0] <= match[1] <= days[1]:
                files.append(path)
    groups: dict[tuple[str, str], TrafficProfile] = {}
    bad = []
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(lambda path: _read(storage.join(live, path)), files)
        for path, profile in zip(files, track(read, "watch", len(files)), strict=True):
            if profile is None:
                bad.append(path)
                continue
            key = profile.name, profile.version
            groups[key] = groups[key] + profile if key in groups else profile
    if bad:
        say(f"watch: {live}: {len(bad)} of {len(files)} files are no traffic profiles and were left out, e.g. {bad[0]}")
    return groups


def _read(uri: str) -> TrafficProfile | None:
    try:
        return TrafficProfile.read(uri)
    except NoProfile:
        return None


def _choose(
    groups: dict[tuple[str, str], TrafficProfile], live: str, name: str, version: str | None, all_versions: bool
) -> TrafficProfile | None:
    """The traffic of one model; none where it has none."""
    names = sorted({n for n, _ in groups})
    if not name and len(names) > 1:
        raise UserError(f"{live}: has traffic of {', '.join(names)}; choose one by --name")
    mine = {v: profile for (n, v), profile in groups.items() if n == (name or n)}
    if not mine:
        return None
    if all_versions:
        first, *others = mine.values()
        for profile in others:
            first = first + profile
        return first
    chosen = version or max(mine, key=lambda v: mine[v].end)
    if others_seen := sorted(set(mine) - {chosen}):
        say(f"watch: version {chosen} alone; there is traffic of {', '.join(others_seen)}, too (--all-versions)")
    return mine.get(chosen)


def _day(text: str, option: str) -> date:
    today = datetime.now(UTC).date()
    try:
        if match := re.fullmatch(r"(\d+)d", text):
            return today - timedelta(int(match[1]))
        return date.fromisoformat(text)
    except (ValueError, OverflowError):
        raise UserError(f"{option} {text}: no day; write 2026-11-01, or 7d for seven days back") from None


def _verdict(facts: dict[str, Any]) -> str:
    who = f"{facts['name'] or 'the model'} version {facts['version'] or 'unknown'}"
    if not facts["enough"]:
        return f"Too few images of {who} to say: {facts['images']}, and {facts['min_images']} are needed."
    if not facts["over"]:
        return f"The traffic of {who} is like the reference: no PSI is above its limit."
    moved = ", ".join(f"{TITLES[name].lower()} (PSI {facts['psi'][name]:.2f})" for name in facts["over"])
    return (
        f"The traffic of {who} has drifted from the reference: {moved}. Look at recent images; if they are what the "
        "model has to work on from now on, train again with some of them."
    )
