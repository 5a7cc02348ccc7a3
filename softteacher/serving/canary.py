"""The client's side of a canary: a share of the requests goes to the candidate too, and the answers are compared."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from softteacher.detections import Detections, match_boxes
from softteacher.errors import UserError
from softteacher.serving.connection import Connection, NotServed
from softteacher.serving.served_model import OtherVersion, ServedModel

POLL_SECONDS = 2.0  # that looking for a canary may hold up a request
PATIENCE = (10.0, 2.0)  # a candidate may take so many times as long as the live model, and at least so many seconds
IOU = 0.5
SCORE = 0.3  # boxes under it are not compared: detectors answer dozens of them


@dataclass
class CanaryReport:
    """How a candidate did in the requests of this client. Boxes are those of score `SCORE` and above.

    Attributes:
        name: of the live model.
        version: of the candidate.
        share: of the requests that it gets.
        requests: that went to both.
        failures: requests that it failed in, so that the live model's answer was taken.
        last_error: what the last failure was; empty without one.
        images: that both answered.
        boxes_live: the live model's.
        boxes_candidate: the candidate's.
        matched: pairs of them with the same class name and an IoU of at least `IOU`.
        score_difference: mean absolute difference of the scores of those pairs.
        seconds_live: that the live model took for these images, network included.
        seconds_candidate: the candidate's.
    """

    name: str
    version: int
    share: float
    requests: int = 0
    failures: int = 0
    last_error: str = ""
    images: int = 0
    boxes_live: int = 0
    boxes_candidate: int = 0
    matched: int = 0
    score_difference: float = 0.0
    seconds_live: float = 0.0
    seconds_candidate: float = 0.0

    def __str__(self) -> str:
        times = f"{self.requests} request{'s' * (self.requests != 1)}"
        line = f"canary of {self.name}, version {self.version}: asked in {times}"
        if self.images:
            line += (
                f"; boxes live {self.boxes_live}, candidate {self.boxes_candidate}, matched {self.matched}"
                f" (scores differ by {self.score_difference:.3f}); seconds an image live"
                f" {self.seconds_live / self.images:.3f}, candidate {self.seconds_candidate / self.images:.3f}"
            )
        return line + (f"; {self.failures} failures, the last: {self.last_error}" if self.failures else "")

    def add(self, live: Sequence[Detections], candidate: Sequence[Detections], seconds: tuple[float, float]) -> None:
        """Count the answers of both about the same images; labels mean the same in both.

        Args:
            live: the live model's.
            candidate: the candidate's.
            seconds: that each took.
        """
        self.images += len(live)
        self.seconds_live += seconds[0]
        self.seconds_candidate += seconds[1]
        for a, b in zip(live, candidate, strict=True):
            a, b = a[a.scores >= SCORE], b[b.scores >= SCORE]
            self.boxes_live += len(a)
            self.boxes_candidate += len(b)
            for i, j in match_boxes(b, a, IOU):
                difference = abs(float(a.scores[j]) - float(b.scores[i]))
                self.matched += 1
                self.score_difference += (difference - self.score_difference) / self.matched


class CanaryWatch:
    """Looks for the candidate `{name}-canary` and asks it about its share of the requests. Threads may share it.

    Nothing here raises, whatever the candidate does.

    Args:
        server: where the models are.
        url: what messages call it.
        name: of the live model.
        poll: seconds between looks.
        seed: of the draws by which requests are chosen; none: different in every run.
    """

    def __init__(self, server: Connection, url: str, name: str, poll: float, seed: int | None) -> None:
        self._server, self._url, self._name, self._poll = server, url, name, poll
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._polling = threading.Lock()
        self._next_look = 0.0
        self._candidate: ServedModel | None = None
        self._report: CanaryReport | None = None

    @property
    def report(self) -> CanaryReport | None:
        """What is known of the candidate, also after it has gone; none if there never was one."""
        with self._lock:
            return self._report and replace(self._report)

    def look(self) -> None:
        """Look for a candidate, if it is time to."""
        if time.monotonic() < self._next_look or not self._polling.acquire(blocking=False):
            return
        candidate: ServedModel | None
        try:
            candidate = ServedModel.read(self._server, self._url, f"{self._name}-canary", POLL_SECONDS)
            if candidate.canary is None or not 0 <= candidate.canary[0] <= 1:
                candidate = None  # a model that only has this name
        except NotServed:
            candidate = None
        except Exception:  # whatever it is, no request may fail by it; asking the candidate will tell
            candidate = self._candidate
        finally:
            self._next_look = time.monotonic() + self._poll
            self._polling.release()
        with self._lock:
            self._candidate = candidate
            if candidate and candidate.canary:
                share, version = candidate.canary
                if self._report is None or self._report.version != version:
                    self._report = CanaryReport(self._name, version, share)
                self._report.share = share

    def draw(self) -> ServedModel | None:
        """The candidate, if it is to be asked in this request."""
        self.look()
        with self._lock:
            if self._candidate and self._candidate.canary and self._random.random() < self._candidate.canary[0]:
                return self._candidate
        return None

    def ask(
        self,
        candidate: ServedModel,
        images: Sequence[Image.Image],
        model: ServedModel,
        live: list[Detections],
        seconds: float,
        until: float,
    ) -> list[Detections] | None:
        """Ask the candidate what the live model has answered, and compare.

        Args:
            candidate: from `draw`.
            images: of the request.
            model: the live model.
            live: its answer.
            seconds: that it took.
            until: when the request has to be over (`time.monotonic`).

        Returns:
            The candidate's answer with the live model's labels; none if it has failed, or if there was less time left
            than the live model took.
        """
        started = time.monotonic()
        if until - started < seconds:  # a good candidate, too, would fail
            return None
        found, error = None, ""
        try:
            if set(candidate.classes) == set(model.classes):
                patience = started + max(PATIENCE[0] * seconds, PATIENCE[1])
                found = candidate.ask(self._server, images, min(patience, until))
                order = np.array([model.classes.index(name) for name in candidate.classes])
                found = [replace(d, labels=order[d.labels]) for d in found]
            else:
                odd = sorted(set(candidate.classes) ^ set(model.classes))
                error = f"its classes are not those of version {model.version}: {', '.join(odd[:3])}"
        except (NotServed, OtherVersion):  # promoted, rolled back, or replaced by another: no fault of its own
            with self._lock:
                self._candidate, self._next_look = None, 0.0
            return None
        except UserError as e:
            error = str(e)
        except Exception as e:  # an answer that nobody thought of must not fail the request
            error = f"{type(e).__name__}: {e}"
        with self._lock:
            report = self._report
            if report is not None and candidate.canary and report.version == candidate.canary[1]:
                report.requests += 1
                if found is None:
                    report.failures += 1
                    report.last_error = error
                else:
                    report.add(live, found, (seconds, time.monotonic() - started))
        return found
