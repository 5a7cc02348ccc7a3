"""Many replicas of Triton over one repository: a deployment speaks to one of them, and the others follow.

Triton's load API reaches one server. So beside each replica runs `softteacher follow`, which reads the champion pointer
every few seconds and has its own Triton load what is live. What a replica serves is always a whole version that was
verified; for some seconds after a switch replicas may differ.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from softteacher import storage
from softteacher.console import say
from softteacher.errors import UserError
from softteacher.serving.canary_state import read_canary
from softteacher.serving.claim import claim_uri, read_claim
from softteacher.serving.connection import addresses, connect, explained, split_url
from softteacher.serving.places import check_repository
from softteacher.serving.repository import parse_config, read_champion

EVERY = 5.0  # seconds
PATIENCE = 60.0  # seconds, the longest pause while something goes wrong
TIMEOUT = 600.0  # seconds, as for a deployment


def follow(
    repository: str,
    triton: str,
    *,
    every: float = EVERY,
    timeout: float = TIMEOUT,
    ready_file: str | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Keep one Triton at what is live in its repository, until stopped. What goes wrong is said, and tried again.

    Args:
        repository: the model repository that Triton serves, local or `s3://`; it is only read.
        triton: URL of this one Triton's HTTP service.
        every: seconds between two looks.
        timeout: seconds that Triton may take for loading a model.
        ready_file: made when Triton first serves what is live, or at least one of several models, and touched at each
            look from then on; for the probes of a container.
        stop: ends it, when set.

    Raises:
        UserError: the URL is none of Triton's HTTP service, or the ready file can't be written.
    """
    split_url(triton, "http", "https")  # this no waiting mends
    stop = stop or threading.Event()
    ready = Path(ready_file) if ready_file else None
    before: dict[str, str] = {}
    pause = every
    while not stop.is_set():
        up = not ready or ready.exists()  # once ready, it stays so: models that are loaded need no store
        try:
            problems = catch_up(repository, triton, timeout)
            # one broken model doesn't hold up the others; but a pod that serves none must not replace one that does
            up = up or not problems or len(problems) < len(_deployed(repository))
        except UserError as e:
            problems = {"": str(e)}
        for name in problems.keys() - before.keys():
            say(problems[name])
        before = problems
        if ready and up:
            try:
                ready.touch()
            except OSError as e:
                raise UserError(f"--ready-file {ready}: can't be written: {e.strerror}") from None
        pause = min(2 * pause, max(every, PATIENCE)) if problems else every
        stop.wait(pause)


def catch_up(repository: str, triton: str, timeout: float = TIMEOUT) -> dict[str, str]:
    """Have a Triton load what is live and isn't loaded, and unload trials that are over.

    Args:
        repository: the model repository that Triton serves, local or `s3://`.
        triton: URL of its HTTP service.
        timeout: seconds that it may take for loading a model.

    Returns:
        What could not be done, in words, by the name of the model.

    Raises:
        UserError: repository or Triton can't be reached, or the repository isn't there.
    """
    names = _deployed(repository)
    if not names:
        check_repository(repository)
    problems = {}
    with closing(connect(triton, timeout)) as server:
        for name in names:
            wanted = set()
            try:
                for model, version, config in _live(repository, name):
                    wanted.add(model)
                    with explained(triton):
                        if server.is_model_ready(model, str(version)):
                            continue
                    # In this order: a deployment writes the config before it loads, and moves the pointer last. Where
                    # they differ it is at work on this very Triton, which serves the version before meanwhile, or was
                    # killed, and the next one mends it; but a Triton that was started since may serve nothing.
                    if _read(storage.join(repository, model, "config.pbtxt")) != config:
                        with explained(triton):
                            if server.is_model_ready(model):
                                continue
                    _load(server, triton, model, version, config)
                for model in {f"{name}-canary", f"{name}-candidate"} - wanted:
                    with explained(triton):
                        if server.is_model_ready(model) and not _claimed(repository, name):
                            server.unload_model(model)
                            say(f"{model}: unloaded, the trial is over")
            except UserError as e:
                problems[name] = f"{name}: {e}"
    return problems


def await_replicas(triton: str, name: str, version: int, timeout: float = 60) -> dict[str, Any]:
    """Wait until all replicas serve a version.

    Args:
        triton: URL of Triton's HTTP service; a name with many addresses means as many replicas.
        name: of the model.
        version: that has gone live.
        timeout: seconds to wait.

    Returns:
        `replicas`: `serving` it, and how many there are `of` them; nothing if there is only one.
    """
    until = time.monotonic() + timeout
    while True:
        replicas = addresses(triton)  # anew each time: they come and go
        if len(replicas) < 2:
            return {}
        serving = sum(_serves(url, name, version) for url in replicas)
        if serving == len(replicas) or time.monotonic() > until:
            break
        time.sleep(1)
    if serving < len(replicas):
        say(
            f"{name}: {len(replicas) - serving} of {len(replicas)} replicas don't serve version {version} after"
            f" {timeout:.0f} s; look at the log of `softteacher follow` beside them"
        )
    return {"replicas": {"serving": serving, "of": len(replicas)}}


def _deployed(repository: str) -> list[str]:
    """The names that have a champion."""
    parts = (file.name.split("/") for file in storage.list_files(repository))
    return [name for name, *rest in parts if rest == ["champion.json"]]


def _live(repository: str, name: str) -> Iterator[tuple[str, int, bytes]]:
    """What Triton has to serve of a name: model, version and config of the champion, and of the canary if any."""
    champion = read_champion(repository, name)
    if champion is None:
        return
    yield name, champion.version, _read(storage.join(repository, name, str(champion.version), "config.pbtxt"))
    canary = read_canary(repository, name)
    if canary and canary.version != champion.version:  # else it was promoted, but that was killed half-way
        model = f"{name}-canary"
        config = _read(storage.join(repository, model, str(canary.version), "config.pbtxt"))
        yield model, canary.version, config + canary.parameter()


def _load(server: Any, triton: str, model: str, version: int, config: bytes) -> None:
    """Load a version by its own config: what lies under the model's name may change meanwhile.

    Triton also takes a file that changed twice in a second for unchanged; a config of the request it always takes.
    """
    from google.protobuf import json_format

    text = json_format.MessageToJson(parse_config(config), preserving_proto_field_name=True)
    with explained(triton):
        server.load_model(model, config=text)
        if not server.is_model_ready(model, str(version)):
            raise UserError(
                f"Triton at {triton} loaded {model}, but not version {version}: does it serve this repository?"
            )
    say(f"{model}: version {version} loaded")


def _claimed(repository: str, name: str) -> bool:
    return read_claim(claim_uri(repository, name)) is not None


def _serves(url: str, name: str, version: int) -> bool:
    try:
        with closing(connect(url, 10)) as server, explained(url):
            return bool(server.is_model_ready(name, str(version)))
    except UserError:  # it is just starting, or going
        return False


def _read(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except storage.MissingFile:
        return b""
