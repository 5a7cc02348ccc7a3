"""Triton's python backend: answers with the ONNX file beside it, by ONNX Runtime.

It is uploaded as `model.py` into every version folder and runs in Triton's own environment, which has numpy and
onnxruntime and nothing else: it must not import softteacher.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb  # type: ignore[import-not-found]


class TritonPythonModel:
    """One instance of one version; Triton calls its methods."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the ONNX file of this version.

        Args:
            args: as Triton gives them: folder of the model, version, device, config (JSON), ...
        """
        path = Path(args["model_repository"], args["model_version"], "model.onnx")
        cuda = ("CUDAExecutionProvider", {"device_id": args["model_instance_device_id"]})
        providers = [cuda] if args["model_instance_kind"] == "GPU" else ["CPUExecutionProvider"]
        self.session = ort.InferenceSession(path, providers=providers)
        self.names = [output.name for output in self.session.get_outputs()]
        self.shape = tuple(json.loads(args["model_config"])["input"][0]["dims"])  # (H, W, 3)

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
        # kept until the next call: the responses only borrow this memory
        self.outputs = self.session.run(self.names, {"images": np.concatenate(good)}) if good else []
        responses, start = [], 0
        for images, problem in zip(batches, problems, strict=True):
            if problem is not None:
                responses.append(pb.InferenceResponse(error=pb.TritonError(problem, pb.TritonError.INVALID_ARG)))
                continue
            rows = [ort.OrtValue.ortvalue_from_numpy(x[start : start + len(images)]) for x in self.outputs]
            tensors = [pb.Tensor.from_dlpack(name, x) for name, x in zip(self.names, rows, strict=True)]
            responses.append(pb.InferenceResponse(tensors))
            start += len(images)
        return responses

    def _problem(self, images: np.ndarray) -> str | None:
        if images.dtype == np.uint8 and images.shape[1:] == self.shape and len(images):
            return None
        wanted, given = ("x".join(map(str, shape)) for shape in (self.shape, images.shape[1:]))
        return f"images: a batch of uint8 {wanted} is needed, not of {images.dtype} {given}"
