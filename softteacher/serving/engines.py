"""The engines that run the ONNX file, behind one function.

This file is also uploaded beside `triton_model.py`, into Triton's own environment: it imports numpy and the engine that
is asked for, and nothing of softteacher.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

Name = Literal["onnxruntime", "openvino"]
Precision = Literal["fp32", "bf16", "int8"]
Run = Callable[[np.ndarray], dict[str, np.ndarray]]


def supported(engine: str, precision: str) -> str:
    """Why this machine can't run an engine in a precision; empty if it can.

    Args:
        engine: `onnxruntime` (everywhere, CUDA on GPUs) or `openvino` (x86 and ARM processors).
        precision: `fp32`; `bf16`, of OpenVINO where the processor multiplies it; `int8`, which is another ONNX file.
    """
    if importlib.util.find_spec(engine) is None:
        return f"{engine} is not installed"
    if precision == "bf16":
        if engine != "openvino":
            return f"{engine} has no bf16 on processors"
        import openvino

        if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return "this processor does not multiply bf16 matrices"
    return ""


def load(
    path: str | Path,
    engine: str = "onnxruntime",
    precision: str = "fp32",
    *,
    fp32_until: str = "",
    threads: int = 0,
    gpu: int | None = None,
) -> Run:
    """Get an ONNX file ready to run.

    Args:
        path: local path of the ONNX file; for `int8` of the quantized one.
        engine: see `supported`.
        precision: see `supported`.
        fp32_until: with OpenVINO's bf16, the tensor before which everything stays in fp32.
        threads: of the processor; 0: all.
        gpu: number of the CUDA device; none: the processor.

    Returns:
        A function from uint8 images [B, H, W, 3] to the outputs by name. The arrays are the caller's own.

    Raises:
        Exception: the engine's own, of any class: the file is broken, or the engine lacks something.
    """
    if engine == "openvino":
        return _openvino(str(path), precision == "bf16", fp32_until, threads)
    return _onnxruntime(str(path), threads, gpu)


def _onnxruntime(path: str, threads: int, gpu: int | None) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # its threads would spin for work on cores that others need
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = ["CPUExecutionProvider"]
    if gpu is not None:
        providers = [("CUDAExecutionProvider", {"device_id": gpu})]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(names, {"images": images}), strict=True))


def _openvino(path: str, bf16: bool, fp32_until: str, threads: int) -> Run:
    import openvino

    core = openvino.Core()

    def compiled(model: Any, hint: str) -> Any:
        hints = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        return core.compile_model(model, "CPU", hints)

    model, first = core.read_model(path), None
    outputs = len(model.outputs)
    if bf16:
        # what leads to an output from the last convolution or matrix product on stays in fp32 by the plugin's rule;
        # so must the RoIs' coordinates, of which bf16 would keep eight bits
        for node in model.get_ordered_ops():
            if node.get_type_name() == "ROIAlign":
                model.add_outputs(node.input_value(1))
    if bf16 and fp32_until:
        first, model = _cut(core.read_model(path), model, fp32_until)
        early = compiled(first, "f32").create_infer_request()
    program = compiled(model, "bf16" if bf16 else "f32")
    request = program.create_infer_request()
    named = [(output.any_name, output) for output in program.outputs[:outputs]]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        feed: dict[Any, np.ndarray] = {"images": images}
        if first:
            feed[fp32_until] = early.infer({"images": images}, share_inputs=True)[0]
        found = request.infer(feed, share_inputs=True)
        return {name: found[output] for name, output in named}

    return run


def _cut(first: Any, second: Any, tensor: str) -> tuple[Any, Any]:
    """Two copies of a model to its part before a tensor, and the part that has the tensor as an input."""
    import openvino
    from openvino import opset13 as op

    def find(model: Any) -> Any:
        return next(o for node in model.get_ordered_ops() for o in node.outputs() if tensor in o.get_names())

    head = openvino.Model([op.result(find(first))], first.get_parameters())
    output = find(second)
    parameter = op.parameter(output.get_partial_shape(), output.get_element_type().to_dtype())
    for target in output.get_target_inputs():
        target.replace_source_output(parameter.output(0))
    output.set_names(set())
    parameter.output(0).set_names({tensor})
    return head, openvino.Model(second.get_results(), [*second.get_parameters(), parameter])
