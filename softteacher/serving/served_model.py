"""A model as Triton serves it: what its config says, and asking it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from softteacher.data.images import letterbox, original_size
from softteacher.detections import Detections
from softteacher.errors import UserError
from softteacher.serving.connection import Connection, Unavailable
from softteacher.serving.outputs import nonsense, to_detections


class OtherVersion(Unavailable):
    """Another version of the model answered than the one whose config was read."""


@dataclass(frozen=True)
class ServedModel:
    """One version of a model, by the config that `softteacher deploy` wrote.

    Attributes:
        name: of the model.
        version: the live one.
        categories: (id, name) in label order.
        image_size: height and width of the input.
        short_side: of the resized image, as in `softteacher.data.images.inference_size`.
        long_side: the same.
        max_batch: most images in a request.
        canary: share of the requests and version, as `softteacher deploy` marked a candidate; none for a live model.
    """

    name: str
    version: str
    categories: tuple[tuple[int, str], ...]
    image_size: tuple[int, int]
    short_side: int
    long_side: int
    max_batch: int
    canary: tuple[float, int] | None = None

    @property
    def classes(self) -> list[str]:
        """Class names in label order."""
        return [name for _, name in self.categories]

    @classmethod
    def read(cls, server: Connection, url: str, name: str, seconds: float) -> ServedModel:
        """Ask Triton for a model's config.

        Args:
            server: where it is.
            url: what errors call it.
            name: of the model.
            seconds: that the call may take.

        Raises:
            NotServed: Triton serves no such model at present.
            UserError: it was not deployed by us, or Triton can't be asked.
        """
        config = server.config(name, seconds)
        try:
            parameters = config["parameters"]
            keys = [key for key in ("classes", "preprocessing", "canary") if key in parameters]
            said = {key: json.loads(parameters[key]["string_value"]) for key in keys}
            how, canary = said["preprocessing"], said.get("canary")
            model = cls(
                name=name,
                # Triton answers by the newest of those that it serves
                version=str(max(int(v) for v in config["version_policy"]["specific"]["versions"])),
                categories=tuple((int(c["id"]), str(c["name"])) for c in said["classes"]),
                image_size=(int(how["image_size"][0]), int(how["image_size"][1])),
                short_side=int(how["short_side"]),
                long_side=int(how["long_side"]),
                max_batch=int(config["max_batch_size"]),
                canary=(float(canary["share"]), int(canary["version"])) if canary else None,
            )
            if min(model.max_batch, *model.image_size, model.short_side, model.long_side) < 1:
                raise ValueError
            return model
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{name} at {url} was not deployed by `softteacher deploy`: no classes in it") from None

    def ask(self, server: Connection, images: Sequence[Image.Image], until: float) -> list[Detections]:
        """Detect objects.

        Args:
            server: where the model is.
            images: RGB; they may have been decoded at a reduced size.
            until: when all has to be over (`time.monotonic`).

        Returns:
            One for each image, in the pixels of its original (numpy arrays).

        Raises:
            OtherVersion: another version answered: read the config again.
            UserError: Triton refuses, can't be reached, or answers nonsense.
        """
        found: list[Detections] = []
        while len(found) < len(images):
            some = images[len(found) : len(found) + self.max_batch]
            prepared = [letterbox(image, self.image_size, self.short_side, self.long_side) for image in some]
            canvases = np.stack([canvas for canvas, _ in prepared])
            answer, version = server.infer(self.name, canvases, until - time.monotonic())
            if version != self.version:
                raise OtherVersion(f"{self.name}: version {version} answers where {self.version} is live; try later")
            if wrong := nonsense(answer, len(some), len(self.categories)):
                raise UserError(f"{self.name} version {version} answers nonsense: {wrong}; roll it back")
            found += [
                to_detections(answer, i, scale, original_size(image))
                for i, (image, (_, scale)) in enumerate(zip(some, prepared, strict=True))
            ]
        return found
