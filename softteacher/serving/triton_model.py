"""Triton's python backend: answers with the ONNX file beside it, on the engine that the model's config names.

It is uploaded as `model.py`, with `engines.py`, into every version folder and runs in Triton's own environment, which
has numpy and the engines and nothing else: it must not import softteacher.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb  # type: ignore[import-not-found]


class TritonPythonModel:
    """One instance of one version; Triton calls its methods."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the ONNX file of this version.

        Args:
            args: as Triton gives them: folder of the model, version, device, config (JSON), ...
        """
        folder, config = Path(args["model_repository"], args["model_version"]), json.loads(args["model_config"])
        chosen = json.loads(config["parameters"]["engine"]["string_value"])
        # by its path: other versions and models have an engines.py of their own
        spec = importlib.util.spec_from_file_location("engines", folder / "engines.py")
        assert spec is not None
        assert spec.loader is not None
        engines = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(engines)
        gpu = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        self.run = engines.load(folder / "model.onnx", **chosen, gpu=gpu)
        self.shape = tuple(config["input"][0]["dims"])  # (H, W, 3)
        # Triton counts a request that a python model refuses as a success
        self.family = pb.MetricFamily(
            name="softteacher_bad_requests_total",
            description="Requests that the model refused or could not answer",
            kind=pb.MetricFamily.COUNTER,
        )
        sys.unraisablehook = _without_capsules
        self.bad = self.family.Metric(labels={"model": args["model_name"], "version": args["model_version"]})

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the requests that Triton has gathered, in one run of the detector.

        Tensors travel by DLPack, since Triton's own conversions read arrays of numpy 2 as empty.

        Args:
            requests: each with `images` uint8 [b, H, W, 3].

        Returns:
            One response for each, in order: the outputs with b rows, or an error.
        """
        batches = [np.from_dlpack(pb.get_input_tensor_by_name(request, "images")) for request in requests]
        problems = [self._problem(images) for images in batches]
        good = [images for images, problem in zip(batches, problems, strict=True) if problem is None]
        outputs: dict[str, np.ndarray] = {}
        if good:
            try:
                outputs = self.run(good[0] if len(good) == 1 else np.concatenate(good))
            except Exception as e:  # the engine's own, of any class; the next batch may be a better one
                failure = pb.TritonError(f"the engine failed: {' '.join(str(e).split())}", pb.TritonError.INTERNAL)
                problems = [problem or failure for problem in problems]
        # kept until the next call: the responses only borrow this memory
        self.outputs = outputs
        responses, start = [], 0
        for images, problem in zip(batches, problems, strict=True):
            if problem is not None:
                self.bad.increment(1)
                responses.append(pb.InferenceResponse(error=problem))
                continue
            rows = slice(start, start + len(images))
            tensors = [pb.Tensor.from_dlpack(name, x[rows]) for name, x in outputs.items()]
            responses.append(pb.InferenceResponse(tensors))
            start += len(images)
        return responses

    def _problem(self, images: np.ndarray) -> Any:
        if images.dtype == np.uint8 and images.shape[1:] == self.shape and len(images):
            return None
        wanted, given = ("x".join(map(str, shape)) for shape in (self.shape, images.shape[1:]))
        message = f"images: a batch of uint8 {wanted} is needed, not of {images.dtype} {given}"
        return pb.TritonError(message, pb.TritonError.INVALID_ARG)


def _without_capsules(event: Any) -> None:
    """Triton renames a DLPack capsule that it has taken otherwise than numpy expects: a traceback for each tensor."""
    if "PyCapsule_GetPointer" not in str(event.exc_value):
        sys.__unraisablehook__(event)
