"""One change of what a name serves: it keeps others out, undoes what fails, and mends what a killed one left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from softteacher import storage
from softteacher.console import say
from softteacher.errors import UserError
from softteacher.serving.canary_state import Canary, canary_folder, read_canary, write_canary
from softteacher.serving.claim import Claim, claim_uri
from softteacher.serving.connection import addresses, connect, explained
from softteacher.serving.repository import (
    LAST_VERSION,
    Champion,
    champion_etag,
    parse_config,
    read_champion,
    versions,
    write_champion,
)
from softteacher.serving.smoke import compare, read_smoke
from softteacher.serving.version_folder import copy_version, incomplete_versions, open_version, read_manifest

Smoke = tuple[dict[str, np.ndarray], bool]  # recorded answers, and whether exactly these must come

CLEANUP_TIMEOUT = 60.0  # seconds; Triton unloads a model only when it has come to the end of loading it


@dataclass(frozen=True)
class Deployment:
    """The right to change what is live under `name`, and the state that was found.

    Attributes:
        server: a `tritonclient`.
        url: of Triton's HTTP service.
        repository: the model repository.
        name: of the model.
        claim: that others see.
        champion: the live version at the start, if any.
        etag: of its pointer.
        canary: at the start, if any.
        before: the version that Triton serves if this deployment fails: the champion, or what a killed first deployment
            had put live without coming to write the pointer.
        started: when, by the monotonic clock.
    """

    server: Any
    url: str
    repository: str
    name: str
    claim: Claim
    champion: Champion | None
    etag: str
    canary: Canary | None
    before: int | None
    started: float = field(default_factory=time.monotonic)

    def folder(self, version: int, kind: str = "") -> str:
        """The folder of a version of the model, its `-candidate` or its `-canary`."""
        return storage.join(self.repository, f"{self.name}{kind}", str(version))

    def try_candidate(self, version: int) -> dict[str, Any]:
        """Read back what was uploaded as a candidate, load it, and compare its answer with the recorded one.

        It is loaded without warm-up: Triton 2.51 may crash, with all its models, when a warm-up request fails.
        """
        smoke = _verified_smoke(self.folder(version, "-candidate"))
        return self.activate(f"{self.name}-candidate", version, smoke, _without_warm_up)

    def go_live(self, new: Champion, source: str | None = None) -> dict[str, Any]:
        """Switch to a version; back again if that fails. Returns how its answer compared.

        Args:
            new: the champion pointer to write.
            source: the version folder that becomes the one under `name`; by default it is there.

        Raises:
            UserError: the version is not live, and what was live is live again.
            NotRestored: the second part could not be done.
        """
        final = self.folder(new.version)
        with ExitStack() as undo:
            if source:
                undo.callback(self._drop, new.version)
                copy_version(source, final)
            smoke = _verified_smoke(final)
            self.claim.check()
            undo.push(partial(self._restore, new))
            compared = self.activate(self.name, new.version, smoke)
            write_champion(self.repository, new, self.etag)
            undo.pop_all()
        return compared

    def try_live(self, version: int) -> dict[str, Any]:
        """Check the live version's files, load it unless it is loaded, and compare its answer with the recorded one."""
        return self.activate(self.name, version, _verified_smoke(self.folder(version)))

    def start_canary(self, canary: Canary, source: str) -> dict[str, Any]:
        """Serve a version folder as the canary. Returns how its answer compared."""
        with ExitStack() as undo:
            undo.callback(_or_say, f"{self.name}-canary", self._give_up_canary)
            copy_version(source, self.folder(canary.version, "-canary"))
            self.claim.check()
            compared = self.try_canary(canary)
            write_canary(self.repository, self.name, canary)
            undo.pop_all()
        return compared

    def try_canary(self, canary: Canary) -> dict[str, Any]:
        """Check the canary's files, load it unless it is loaded, and compare its answer with the recorded one."""
        smoke = _verified_smoke(self.folder(canary.version, "-canary"))
        return self.activate(f"{self.name}-canary", canary.version, smoke, lambda config: config + canary.parameter())

    def end_canary(self) -> None:
        """Take the canary, or what a killed deployment left of one, from Triton and from the repository."""
        folder = canary_folder(self.repository, self.name)

        def end() -> None:
            storage.remove(f"{folder}/canary.json")  # first: what is left now is no canary
            if storage.exists(folder) or self._is_ready(f"{self.name}-canary"):
                self._unload(f"{self.name}-canary")
                storage.remove(folder)

        _or_say(folder, end)

    def prune(self, keep: Champion) -> None:
        """Remove the versions that are neither live nor to be rolled back to."""

        def prune() -> None:
            for version in set(versions(self.repository, self.name)) - {keep.version, *keep.previous}:
                storage.remove(self.folder(version))

        _or_say(f"{self.repository}/{self.name}: old versions", prune)

    def activate(
        self,
        model: str,
        version: int,
        smoke: Smoke | None = None,
        edit: Callable[[bytes], bytes] = lambda config: config,
    ) -> dict[str, Any]:
        """Make `version` the one that Triton serves under `model`, and compare its answer with the recorded one.

        Args:
            model: `name`, or its candidate or canary.
            version: of it.
            smoke: what it must answer; by default it isn't asked.
            edit: what to change in the version's config.

        Raises:
            UserError: Triton can't load it, or it answers otherwise.
        """
        folder = storage.join(self.repository, model)
        config = edit(storage.read_bytes(storage.join(folder, str(version), "config.pbtxt")))
        for wait in (1.1, 0):
            storage.write_bytes(storage.join(folder, "config.pbtxt"), config)
            with explained(f"{self.url} (which has to serve {self.repository})"):
                self.server.load_model(model)
                if self.server.is_model_ready(model, str(version)):
                    break
            # dates on S3 count seconds: Triton takes a config that changed twice in one for unchanged
            time.sleep(wait)
        else:
            raise UserError(f"Triton at {self.url} loaded {model}, but not version {version}: does it serve {folder}?")
        return compare(self.server, self.url, model, version, *smoke) if smoke else {}

    def mend(self) -> None:
        """Undo what a deployment that was killed left: a candidate, half versions, a switch without its pointer."""
        self.remove_candidate()
        live = self.champion
        for version in incomplete_versions(self.repository, self.name):
            if live is None or version != live.version:  # which lost its manifest: it serves, and can be gone back to
                self._remove(self.folder(version))
        if self.canary is None:
            self.end_canary()
        if live is None or read_manifest(self.folder(live.version)) is None:
            return
        if not (self._is_ready(self.name, live.version) and self._is_configured(live.version)):
            try:
                self.activate(self.name, live.version)
            except UserError as e:
                say(f"{self.name}: version {live.version} should be live, but could not be loaded again: {e}")

    def remove_candidate(self) -> None:
        """Take the candidate from Triton and from the repository; the claim, which lies beside it, stays."""
        folder = storage.join(self.repository, f"{self.name}-candidate")
        there = {file.name.split("/")[0] for file in storage.list_files(folder)} - {"claim.json"}
        if there or self._is_ready(f"{self.name}-candidate"):
            self._unload(f"{self.name}-candidate")
        for name in there:
            self._remove(f"{folder}/{name}")

    def _restore(self, new: Champion, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Make live again what was live before, or what another deployment that took over has put live since."""
        try:
            live = read_champion(self.repository, self.name)
            if live == new:
                return  # interrupted after the last step: it is live
            before = live.version if live else self.before
            if before is not None:
                self.activate(self.name, before)
            elif self.claim.ours():
                with explained(self.url):
                    self.server.unload_model(self.name)
                storage.remove(storage.join(self.repository, self.name, "config.pbtxt"))
        except UserError as worse:
            raise NotRestored(
                f"{error}; and the state before could not be restored ({worse}): look at {self.url}"
            ) from error

    def clean_up(self) -> None:
        """Leave no candidate behind, nor a name that nothing was ever live under; what another took over is its own."""
        if self.claim.ours():
            self.remove_candidate()
            if self.champion is not None or versions(self.repository, self.name):
                return
            if read_champion(self.repository, self.name) is None:
                storage.remove(storage.join(self.repository, self.name, LAST_VERSION))

    def _give_up_canary(self) -> None:
        if self.claim.ours():
            self.end_canary()

    def _drop(self, version: int) -> None:
        """Remove a version that did not go live."""

        def drop() -> None:
            if not self._is_configured(version):  # else Triton loads it at its next start
                storage.remove(self.folder(version))

        _or_say(self.folder(version), drop)

    def _is_configured(self, version: int) -> bool:
        """Whether Triton would serve `version` after a restart."""
        try:
            config, its = (
                storage.read_bytes(storage.join(folder, "config.pbtxt"))
                for folder in (storage.join(self.repository, self.name), self.folder(version))
            )
        except storage.MissingFile:
            return False
        return config == its

    def _is_ready(self, model: str, version: int | str = "") -> bool:
        with explained(self.url):
            return bool(self.server.is_model_ready(model, str(version)))

    def _unload(self, model: str) -> None:
        def unload() -> None:
            # a connection of its own: the other may wait for the answer of a model that hangs
            with closing(connect(self.url, CLEANUP_TIMEOUT)) as server, explained(self.url):
                server.unload_model(model)

        _or_say(model, unload)

    def _remove(self, uri: str) -> None:
        _or_say(uri, lambda: storage.remove(uri))


@contextmanager
def deployment(repository: str, triton: str, name: str, timeout: float) -> Iterator[Deployment]:
    """Connect, keep others out, mend what a killed deployment left, and leave no candidate behind.

    Args:
        repository: the model repository that Triton serves, local or `s3://`.
        triton: URL of Triton's HTTP service; of many replicas one is spoken to, and the others `follow`.
        name: of the model.
        timeout: seconds that Triton may take for loading a model, and for an answer.

    Raises:
        UserError: with what is live at the end of the message, if it comes from the block.
    """
    triton = addresses(triton)[0]
    with closing(connect(triton, timeout)) as server:
        incomplete_versions(repository, name)  # can the repository be read, and is it ours?
        claim = Claim(claim_uri(repository, name), name)
        try:
            with claim.renewed():
                etag = champion_etag(repository, name)
                champion = read_champion(repository, name)
                canary = read_canary(repository, name)
                if canary and champion and canary.version == champion.version:
                    canary = None  # promoted, but that was killed before it had removed the canary
                before = champion.version if champion else None
                for version in versions(repository, name) if champion is None else ():
                    with explained(triton):
                        before = version if server.is_model_ready(name, str(version)) else before
                target = Deployment(server, triton, repository, name, claim, champion, etag, canary, before)
                live = "nothing is live" if before is None else f"version {before} stays live"
                try:
                    target.mend()
                    yield target
                except NotRestored:
                    raise
                except UserError as e:
                    raise UserError(f"{e} ({name}: {live})") from e
                finally:
                    _or_say(f"{name}-candidate", target.clean_up)
        finally:
            _or_say(claim.uri, claim.release)


class NotRestored(UserError):
    """A switch failed, and switching back failed, too."""


def _verified_smoke(uri: str) -> Smoke:
    with open_version(uri) as (manifest, folder):
        return read_smoke(folder), manifest.record.engine.endswith("fp32")


def _without_warm_up(config: bytes) -> bytes:
    from google.protobuf import text_format

    parsed = parse_config(config)
    parsed.ClearField("model_warmup")
    return text_format.MessageToBytes(parsed)


def _or_say(what: str, action: Callable[[], object]) -> None:
    """Cleaning up must not hide how a deployment ended; what it leaves, the next one mends."""
    try:
        action()
    except UserError as e:
        say(f"{what}: could not be cleaned up: {e}")
