"""Engines against eager PyTorch, and the real Triton against its bare engine.

    python benchmarks/serving.py                          # speed: Faster R-CNN R50-FPN at 256 x 256, random weights
    python benchmarks/serving.py --model DIR              # with the AP of every engine on the model's validation set

Engines run in turn, a few rounds, on all cores; the speed-up is that of the served engine (`--engine`) over eager fp32.
Triton runs that engine in its python backend; clients are threads of a process of their own that ask by gRPC without a
pause, one image a request; before each turn the bare engine is timed. Overhead: median latency of one client minus the
bare engine's at batch 1. Share: images/s over the bare engine's best at any batch size, on the same cores that also run
the clients. Both are medians over the turns. The letterbox
is that of a 4000 x 3000 JPEG. Writes `results/serving.json`; the requests lost in switches are those of
`benchmarks/switching.py`, the last time it ran.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import training
from common import RESULTS, write_result
from PIL import Image
from rich.console import Console
from rich.table import Table

from softteacher.config import ExportSettings, load_settings
from softteacher.data.check import read_image
from softteacher.data.images import decode, letterbox
from softteacher.demo.servers import triton
from softteacher.detectors.build import build
from softteacher.model_folder import ModelFolder
from softteacher.serving import engines
from softteacher.serving.connection import connect, open_connection
from softteacher.serving.deploy import PYTHON_FILES
from softteacher.serving.export import canvas_size
from softteacher.serving.graph import ServedDetector, write_onnx
from softteacher.serving.onnx_runtime import OnnxDetector, score_canvases
from softteacher.serving.repository import INT8_FILE, OnnxFolder, Runtime, config
from softteacher.serving.variants import measure_engines, quantize

SIDE, NAME, WARM_UP = 256, "r50", 3.0
BATCHES = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="openvino-bf16", help="that Triton serves")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=6, help="of load for each number of clients, in each turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the engines, and of Triton and the bare engine")
    parser.add_argument("--model", help="trained model folder, to measure the AP of every engine with")
    parser.add_argument("--client", nargs=3, metavar=("URL", "THREADS", "SECONDS"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.client:
        load(a.client[0], int(a.client[1]), float(a.client[2]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        served, images = detector(folder)
        speed = engine_speed(served, folder, images, a.rounds)
        facts: dict[str, Any] = {"engine": a.engine, "images_per_second": speed}
        for batch in (1, 8):
            facts[f"engine_speedup_batch{batch}"] = speed[a.engine][batch] / speed["eager-fp32"][batch]
        facts |= under_load(folder, images, a)
        facts |= letterbox_ms()
        if a.model:
            facts["ap"] = accuracy(a.model, folder)
    switching = RESULTS / "switching.json"
    if switching.exists():
        facts["failed_requests_during_switches"] = json.loads(switching.read_text())["failed_requests_during_switches"]
    write_result("serving", facts)


def detector(folder: Path) -> tuple[ServedDetector, np.ndarray]:
    """The detector in `folder/model.onnx` and `model.int8.onnx`, with random weights and live scores; 8 images."""
    training.SIDE = SIDE
    torch.manual_seed(0)
    batch = training.make_batch()
    torch.save(training.backbone(batch), folder / "r50.pth")
    settings = load_settings("coco-10pct", [f"detector.backbone_weights={folder / 'r50.pth'}"])
    network = build(settings.detector, training.CLASSES).eval()
    training.make_scores_live(network, batch)
    served = ServedDetector(network, (SIDE, SIDE)).eval()
    categories = [(n, str(n)) for n in range(training.CLASSES)]
    source: Any = SimpleNamespace(settings=settings, categories=categories)
    write_onnx(served, source, (SIDE, SIDE), folder / "model.onnx")
    assert batch.weak is not None
    assert batch.strong is not None
    views = torch.cat([batch.weak.images, batch.strong.images]).permute(0, 2, 3, 1).contiguous().numpy()
    quantize(folder / "model.onnx", folder / INT8_FILE, views)
    return served, views


def engine_speed(served: ServedDetector, folder: Path, images: np.ndarray, rounds: int) -> dict[str, dict[int, float]]:
    """Images/s of every engine that runs here, by batch size."""
    runs: dict[str, engines.Run] = {"eager-fp32": served.run}
    for name in ("onnxruntime-fp32", "openvino-fp32", "openvino-bf16", "onnxruntime-int8", "openvino-int8"):
        runtime = Runtime("python", name)
        if missing := engines.supported(runtime.library, runtime.precision):
            print(f"{name}: left out, {missing}")
            continue
        runs[name] = engines.load(folder / runtime.onnx_file, runtime.library, runtime.precision)
    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds):
        for name, run in runs.items():
            for batch in BATCHES:
                run(images[:batch])
                for _ in range(max(2, 8 // batch)):
                    start = time.perf_counter()
                    run(images[:batch])
                    seconds.setdefault((name, batch), []).append(time.perf_counter() - start)
        print(f"engines: turn {turn + 1} of {rounds}", flush=True)
    speed = {name: {b: b / statistics.median(seconds[name, b]) for b in BATCHES} for name in runs}
    table = Table("engine", *(f"images/s, batch {b}" for b in BATCHES), "over eager, batch 1", "batch 8")
    for name, by_batch in speed.items():
        gains = [f"{by_batch[b] / speed['eager-fp32'][b]:.2f}" for b in (1, 8)]
        table.add_row(name, *(f"{by_batch[b]:.1f}" for b in BATCHES), *gains)
    Console(width=140).print(table)
    return speed


def under_load(folder: Path, images: np.ndarray, a: argparse.Namespace) -> dict[str, Any]:
    """Triton with the engine, asked by more and more clients, in turn with the bare engine."""
    runtime = Runtime("python", a.engine)
    version = folder / "models" / NAME / "1"
    version.mkdir(parents=True)
    shutil.copy(folder / runtime.onnx_file, version / "model.onnx")
    for file, source in PYTHON_FILES.items():
        shutil.copy(source, version / file)
    known = OnnxDetector(folder / "model.onnx")
    how = {"image_size": known.image_size, "short_side": known.short_side, "long_side": known.long_side}
    classes = [{"id": i, "name": n} for i, n in known.categories]
    model = OnnxFolder(folder, "", 0.0, "", {}, known.image_size, 100, False, classes, how, {})
    (version.parent / "config.pbtxt").write_text(config(model, 1, runtime))
    np.save(folder / "images.npy", images)
    bare = engines.load(folder / runtime.onnx_file, runtime.library, runtime.precision)
    turns: dict[int, list[dict[str, Any]]] = {clients: [] for clients in a.clients}
    with (
        triton(str(folder / "models"), folder / "triton", load=[NAME]) as urls,
        closing(connect(urls.http, 60)) as server,
    ):
        for turn in range(a.rounds):
            for clients in a.clients:
                alone = {b: images_per_second(bare, images[:b], 2) for b in BATCHES}
                before = executions(server)
                command = [sys.executable, __file__, "--client", urls.grpc, str(clients), str(a.seconds)]
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
                row = json.loads(done.stdout.splitlines()[-1])
                after = executions(server)
                row["batches"] = {size: n for size in sorted(after) if (n := after[size] - before.get(size, 0))}
                row["overhead_ms"] = row["p50_ms"] - 1e3 / alone[1]
                row["share_of_engine"] = row["requests_per_second"] / max(alone.values())
                turns[clients].append(row)
            print(f"load: turn {turn + 1} of {a.rounds}", flush=True)
    table = Table("clients", "requests/s", "p50 ms", "p95 ms", "p99 ms", "share of the engine's best", "batches formed")
    rows = {}
    for clients, measured in turns.items():
        keys = ("requests_per_second", "p50_ms", "p95_ms", "p99_ms", "overhead_ms", "share_of_engine")
        row = rows[clients] = {key: statistics.median(m[key] for m in measured) for key in keys}
        row["failed"] = sum(m["failed"] for m in measured)
        formed = Counter({size: 0 for m in measured for size in m["batches"]})
        for m in measured:
            formed.update(m["batches"])
        row["batches"] = dict(sorted(formed.items()))
        figures = [f"{row[key]:.1f}" for key in keys[:4]]
        text = ", ".join(f"{size}: {n}" for size, n in row["batches"].items())
        table.add_row(str(clients), *figures, f"{row['share_of_engine']:.2f}", text)
    Console(width=140).print(table)
    out: dict[str, Any] = {"load": rows, "failed_requests": sum(row["failed"] for row in rows.values())}
    if 1 in rows:
        out["p50_overhead_ms"] = rows[1]["overhead_ms"]
    if 8 in rows:
        out["throughput_share_of_engine"] = rows[8]["share_of_engine"]
    print({k: v for k, v in out.items() if k != "load"})
    return out


def images_per_second(run: engines.Run, images: np.ndarray, seconds: float) -> float:
    """By the median of runs for about so long."""
    run(images)
    took: list[float] = []
    while sum(took) < seconds:
        start = time.perf_counter()
        run(images)
        took.append(time.perf_counter() - start)
    return len(images) / statistics.median(took)


def executions(server: Any) -> dict[int, int]:
    """How often Triton ran the model at each batch size."""
    stats = server.get_inference_statistics(NAME)["model_stats"][0].get("batch_stats", [])
    return {int(s["batch_size"]): int(s["compute_infer"]["count"]) for s in stats}


def load(url: str, clients: int, seconds: float) -> None:
    """Ask from threads; the last line printed is JSON."""
    images = np.load("images.npy")
    latencies: list[float] = []
    failed = 0
    end = time.monotonic() + WARM_UP + seconds
    begin = end - seconds

    def ask(first: int) -> None:
        nonlocal failed
        with closing(open_connection(url)) as connection:
            n = first
            while (start := time.monotonic()) < end:
                try:
                    connection.infer(NAME, images[n % len(images)][None], 60)
                except Exception as e:
                    print(e, file=sys.stderr)
                    failed += 1
                if begin <= time.monotonic() <= end:
                    latencies.append(time.monotonic() - start)
                n += 1

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    percentiles = {f"p{p}_ms": float(np.percentile(latencies, p)) * 1e3 for p in (50, 95, 99)}
    print(json.dumps({"requests_per_second": len(latencies) / seconds, **percentiles, "failed": failed}))


def letterbox_ms() -> dict[str, float]:
    """Milliseconds to decode a JPEG of 12 megapixels, and to letterbox it after that; medians."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (75, 100, 3), np.uint8))
    file = io.BytesIO()
    small.resize((4000, 3000), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    data, short_side = file.getvalue(), 256

    def median(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(9):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds) * 1e3

    reduced = decode(data, "photo", short_side)[0]
    out = {
        "decode_12mp_ms": median(lambda: decode(data, "photo", short_side)),
        "letterbox_12mp_ms": median(lambda: letterbox(reduced, (256, 352), short_side, 512)),
        "decode_12mp_full_ms": median(lambda: decode(data, "photo")),
    }
    print(out)
    return out


def accuracy(model: str, folder: Path) -> dict[str, Any]:
    """AP of every engine on a trained model's validation set."""
    source = ModelFolder(Path(model), model)
    validation = source.validation()
    size = canvas_size(source, validation)
    served = ServedDetector(source.detector("teacher"), size).eval()
    target = folder / "trained"
    target.mkdir()
    write_onnx(served, source, size, target / "model.onnx")
    known = OnnxDetector(target / "model.onnx")
    spread = np.linspace(0, len(validation) - 1, 16).astype(int).tolist()
    samples = np.stack([known.letterbox(read_image(validation, i)[0])[0] for i in spread])
    ap = {
        "pytorch": score_canvases(served.run, known, validation, "eager-fp32")["AP"],
        "onnxruntime": score_canvases(known.run, known, validation, "onnxruntime-fp32")["AP"],
    }
    settings = ExportSettings(
        engines=["openvino-fp32", "openvino-bf16", "onnxruntime-int8", "openvino-int8"], max_ap_loss=1
    )
    found = measure_engines(target, served.run, known, validation, samples, settings, ap)
    table = Table("engine", "AP", "lost", "images/s, batch 1", "batch 8")
    for name, row in found.items():
        speed = row.get("images_per_second", {})
        table.add_row(
            name,
            f"{row['ap']:.4f}" if "ap" in row else row["refused"],
            f"{row.get('ap_loss', 0):.4f}",
            *(f"{speed[b]:.1f}" if b in speed else "" for b in ("1", "8")),
        )
    Console(width=140).print(table)
    return {"images": len(validation), "canvas": list(size), "detector": source.settings.detector.name, **found}


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
