"""The other engines and precisions that can run an exported detector: what each costs in AP and gains in speed."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from softteacher.config import ExportSettings
from softteacher.console import say
from softteacher.data.coco import CocoDataset
from softteacher.processors import engine_threads
from softteacher.serving import engines
from softteacher.serving.graph import LATERALS
from softteacher.serving.onnx_runtime import OnnxDetector, score_canvases
from softteacher.serving.repository import INT8_FILE

BATCHES = (1, 8)  # at which the speed is measured
REPEATS = 5
GOOD_LOSS = 0.002  # AP; more than that is worth some speed


def measure_engines(
    folder: Path,
    pytorch: engines.Run,
    detector: OnnxDetector,
    validation: CocoDataset,
    samples: np.ndarray,
    settings: ExportSettings,
    ap: dict[str, float],
) -> dict[str, dict[str, Any]]:
    """AP and images/s of `export.engines`, beside those of PyTorch and ONNX Runtime in fp32.

    Args:
        folder: onnx folder with `model.onnx`; `model.int8.onnx` is added where an engine needs it and keeps its AP.
        pytorch: the PyTorch detector, uint8 [B, H, W, 3] to outputs.
        detector: the ONNX file's metadata.
        validation: the validation set.
        samples: validation images on the canvas, uint8 [N, H, W, 3], to time and to calibrate with.
        settings: which engines, and the AP that may be lost.
        ap: of `pytorch` and `onnxruntime` in fp32.

    Returns:
        For each engine `ap`, `ap_loss` (against PyTorch), `images_per_second` by batch size on all cores; where part of
        the backbone had to stay in fp32 to keep the AP, of bf16 `fp32_until`, the tensor after that part, of int8
        `fp32_backbone`; `refused` (why it must not serve) where it must not.
    """
    out: dict[str, dict[str, Any]] = {
        "pytorch-fp32": {"ap": ap["pytorch"], "images_per_second": _speed(pytorch, samples)},
        "onnxruntime-fp32": {
            "ap": ap["onnxruntime"],
            "ap_loss": ap["pytorch"] - ap["onnxruntime"],
            "images_per_second": _speed(detector.run, samples),
        },
    }
    for name in settings.engines:
        engine, _, precision = name.partition("-")
        if missing := engines.supported(engine, precision):
            out[name] = {"refused": missing}
            continue
        loss, facts = 1.0, {}
        for file, until, kept in _attempts(folder, precision, detector, samples):
            run = engines.load(file, engine, precision, fp32_until=until, threads=engine_threads())
            found = score_canvases(run, detector, validation, name)["AP"]
            loss = ap["pytorch"] - found
            facts = {"ap": found, "ap_loss": loss, "images_per_second": _speed(run, samples), **kept}
            if loss <= GOOD_LOSS:
                break
        out[name] = facts
        if loss > settings.max_ap_loss:
            facts["refused"] = f"it loses {loss:.4f} AP, {settings.max_ap_loss} allowed (export.max_ap_loss)"
    if all("refused" in facts for key, facts in out.items() if key.endswith("int8")):
        (folder / INT8_FILE).unlink(missing_ok=True)
    for engine_name, facts in out.items():
        if "refused" in facts:
            say(f"export: {engine_name} must not serve: {facts['refused']}")
    return out


def _attempts(
    folder: Path, precision: str, detector: OnnxDetector, samples: np.ndarray
) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """The file to load, `fp32_until`, and what to say of it: first all in the precision, then less of the backbone."""
    plain, int8 = folder / "model.onnx", folder / INT8_FILE
    if precision == "bf16" and detector.finest_map:
        yield plain, "", {}
        yield plain, detector.finest_map, {"fp32_until": detector.finest_map}
    elif precision != "int8":
        yield plain, "", {}
    elif int8.exists():  # another engine has found out
        yield int8, "", {}
    else:
        quantize(plain, int8, samples)
        yield int8, "", {}
        quantize(plain, int8, samples, backbone=False)
        yield int8, "", {"fp32_backbone": True}


def quantize(file: Path, out: Path, samples: np.ndarray, backbone: bool = True) -> None:
    """Static int8 quantization of the convolutions and matrix products, as QDQ; the rest of the graph stays fp32.

    Args:
        file: the ONNX file.
        out: the quantized one, with the same metadata.
        samples: images to calibrate the activations' ranges with, uint8 [N, H, W, 3].
        backbone: quantize the backbone, too; else only the pyramid and the heads.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Samples(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {"images": image[None]}

    with tempfile.TemporaryDirectory() as scratch:
        prepared = f"{scratch}/prepared.onnx"
        logging.disable(logging.WARNING)  # it advises to run the very step before
        try:
            quant_pre_process(str(file), prepared, skip_symbolic_shape=True)
            kept = [] if backbone else _backbone(onnx.load(prepared).graph)
            quantize_static(
                prepared,
                str(out),
                Samples(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "MatMul", "Gemm"],
                nodes_to_exclude=kept,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.disable(logging.NOTSET)


def _backbone(graph: onnx.GraphProto) -> list[str]:
    """The names of the nodes that lead to the pyramid."""
    makers = {name: node for node in graph.node for name in node.output}
    wanted = [node.input[0] for node in graph.node if any(x.startswith(LATERALS) for x in node.input)]
    found: dict[str, None] = {}
    while wanted:
        maker = makers.get(wanted.pop())
        if maker is not None and maker.name not in found:
            found[maker.name] = None
            wanted += maker.input
    return list(found)


def _speed(run: engines.Run, samples: np.ndarray) -> dict[str, float]:
    """Images per second by batch size: the median of a few runs after one to warm up."""
    speed = {}
    for batch in BATCHES:
        images = samples[np.arange(batch) % len(samples)]
        run(images)
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            run(images)
            seconds.append(time.perf_counter() - start)
        speed[str(batch)] = batch / statistics.median(seconds)
    return speed
