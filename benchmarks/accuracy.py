"""What each method makes of a few labels, against the same labels alone and against all labels; on any COCO data set.

    python benchmarks/accuracy.py --name cards --data DIR --percent 10 --folds 3 \\
        --set detector.backbone_weights=mobilenet_v2.pth --jobs 2
    python benchmarks/accuracy.py --name cards --percent 10 --table          # print the table of what is there

Every method has the same number of student iterations and of labelled images an iteration; `supervised_full` has all
labels. AP is the teacher's (the moving average of the student, which supervised training has too), at the best of the
same number of validations. The methods share what burn-in made of a fold, which is the supervised run's first part:
each ends with the bits of a run that did it by itself. A run that was cut off goes on, one whose result is there is not
run again (it is refused where settings or data are others), and one that fails leaves the others alone. Writes
`results/accuracy/<name>-<percent>-<method>-<fold>.json` for each run and `results/accuracy-<name>-<percent>.json`.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import RESULTS, machine

from softteacher import storage
from softteacher.config import Settings, load_settings
from softteacher.data.split import find_annotations, split
from softteacher.errors import UserError

# no methods, but the limits of some: see oracle.py
ORACLES = {"soft_teacher-oracle": ("soft_teacher", []), "mean_teacher-oracle": ("mean_teacher", [])}
# method of the library, and the presets and settings that change it
METHODS = {
    "supervised": ("supervised", []),
    "supervised_full": ("supervised", []),
    "mean_teacher": ("mean_teacher", []),
    "stac": ("stac", []),
    "soft_teacher": ("soft_teacher", []),
    "soft_teacher-no_soft_weights": ("soft_teacher", ["no-soft-weights"]),
    "soft_teacher-no_jitter": ("soft_teacher", ["no-jitter"]),
    "soft_teacher-student_background": ("soft_teacher", ["reliability-student-background"]),
    "soft_teacher-prediction_difference": ("soft_teacher", ["reliability-prediction-difference"]),
    "soft_teacher-iou": ("soft_teacher", ["reliability-iou"]),
    "soft_teacher-reverse_iou": ("soft_teacher", ["reliability-reverse-iou"]),
}
# what the preset `small` has of its own, each taken back alone, and all together
SWITCHES = {
    "soft_teacher-fixed_threshold": ["method.threshold=fixed"],
    "soft_teacher-hard_positives": ["method.positives=hard"],
    "soft_teacher-no_rpn_ignore": ["method.rpn_ignore=false"],
    "soft_teacher-no_reg_confident": ["method.reg_confident=false"],
}
PAPER = [*(change for changes in SWITCHES.values() for change in changes), "method.pool_threshold=0.5"]
PAPER += ["method.reg_variance_threshold=0.02", "method.unsup_weight=4"]
OTHERS = {name: ("soft_teacher", changes) for name, changes in SWITCHES.items()}
OTHERS |= {"soft_teacher-paper": ("soft_teacher", PAPER)} | ORACLES
DEFAULT = ["supervised", "supervised_full", "mean_teacher", "soft_teacher"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the data set, for the result files")
    parser.add_argument("--data", help="folder with images/ and annotations/instances_{train,val}.json, or s3://")
    parser.add_argument("--percent", type=float, default=10, help="share of labelled images")
    parser.add_argument("--folds", type=int, nargs="+", default=[3], help="how many; or which, if several are named")
    parser.add_argument("--methods", nargs="+", default=DEFAULT, choices=[*METHODS, *OTHERS, "all"])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--set", action="append", default=[], help="setting, key=value, for all methods; repeatable")
    parser.add_argument("--validation-fraction", type=float, help="of the images, where there is no val json: 0.2")
    parser.add_argument("--stratify", action="store_true", help="every class gets a labelled image where it can")
    parser.add_argument("--work", type=Path, default=Path("build/accuracy"), help="folder of splits, models and logs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; they share the cores")
    parser.add_argument("--quick", action="store_true", help="20 iterations, results to the work folder: does it run?")
    parser.add_argument("--table", action="store_true", help="only print the table")
    a = parser.parse_args()
    if a.quick:
        a.work = a.work / "quick"  # splits, burn-ins and models, too: a real run must find none of them
    if "/" in a.name:
        parser.error(f"--name {a.name}: is part of file names; take one without /")
    results = a.work if a.quick else RESULTS
    failed: list[str] = []
    folds = list(range(1, a.folds[0] + 1)) if len(a.folds) == 1 else sorted(set(a.folds))
    if not a.table:
        if not a.data:
            parser.error("--data is needed to train")
        a.source = source(a)
        methods = [*METHODS, *(m for m in a.methods if m in OTHERS)] if "all" in a.methods else a.methods
        # what others build on comes first: supervised training makes the burn-in of all, and the model STAC labels with
        order = {"supervised": 0, "supervised_full": 1}
        runs = sorted(((m, f) for m in methods for f in folds), key=lambda run: (order.get(run[0], 2), run[1]))
        for fold in folds:
            if problem := prepare(a, fold):
                failed.append(f"fold {fold}: {problem}")
                runs = [run for run in runs if run[1] != fold]
        with ThreadPoolExecutor(a.jobs) as pool:
            try:
                for last in (False, True):
                    wave = [run for run in runs if (run[0] == "stac") == last]
                    done = [pool.submit(one_run, a, method, fold, results) for method, fold in wave]
                    failed += [str(e) for run in done if (e := run.exception())]
            except KeyboardInterrupt:  # the runs under way got it, too, and save where they are
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    summary = summarize(a.name, a.percent, results)
    if not a.table:
        results.mkdir(parents=True, exist_ok=True)
        (results / f"accuracy-{a.name}-{a.percent:g}.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(table(summary))
    if failed:
        sys.exit("\n".join(["", *failed]))


def source(a: argparse.Namespace) -> dict[str, Any]:
    """What the splits are made of: digests of the data set's json files, and how they are divided."""
    train, val = find_annotations(a.data)
    if val is None and a.validation_fraction is None:
        a.validation_fraction = 0.2
        print(f"{train}: has no val json beside it: a fifth of its images validates (--validation-fraction)")
    files = {"train": train} | ({"val": val} if val and a.validation_fraction is None else {})
    digests = {part: hashlib.sha256(storage.read_bytes(file)).hexdigest() for part, file in files.items()}
    return digests | {"validation_fraction": a.validation_fraction, "stratify": a.stratify}


def prepare(a: argparse.Namespace, fold: int) -> str | None:
    """Split a fold; `full.json` is its labelled and its unlabelled part together; `source.json` comes last.

    Returns:
        Why it can't be split: of few images some folds have no box at all.
    """
    folder = a.work / f"{a.name}-{a.percent:g}-{fold}"
    if (folder / "source.json").exists():
        if json.loads((folder / "source.json").read_text()) != a.source:
            raise UserError(f"{folder}: is a split of other data, or was split otherwise; take another --work")
        return None
    how = {"validation_fraction": a.validation_fraction, "stratify": a.stratify}
    survived = load_settings(a.preset, a.set).data.max_bad_images
    try:
        split(a.data, str(folder), percent=a.percent, fold=fold, max_bad_images=survived, **how)
    except UserError as e:
        return str(e)
    parts = [json.loads((folder / f"{name}.json").read_text()) for name in ("labeled", "unlabeled")]
    whole = parts[0] | {key: parts[0][key] + parts[1][key] for key in ("images", "annotations")}
    for name, content in (("full", whole), ("source", a.source)):
        storage.write_bytes(folder / f"{name}.json", json.dumps(content).encode())
    return None


def one_run(a: argparse.Namespace, name: str, fold: int, results: Path) -> None:
    """Train a method on a fold and write its JSON, unless that is there."""
    title = f"{a.name}-{a.percent:g}-{name}-{fold}"
    file = results / "accuracy" / f"{title}.json"
    if name == "supervised_full" and not file.exists():  # that of another percentage has seen the same
        of_fold = (f for f, run in runs_of(a.name, results) if (run["method"], run["fold"]) == (name, fold))
        file = next(of_fold, file)
    method, changes = (METHODS | OTHERS)[name]
    data, out = a.work / f"{a.name}-{a.percent:g}-{fold}", a.work / title
    preset = "+".join([a.preset, *(change for change in changes if "=" not in change)])
    overrides = [f"method.name={method}", *(change for change in changes if "=" in change)]
    overrides += [f"training.seed={fold}", *a.set]
    if a.jobs > 1:
        overrides.append(f"training.threads={max(1, (os.cpu_count() or 1) // a.jobs)}")
    if a.quick:  # whose teacher is sure of nothing, and STAC has no second training without a pseudo box
        overrides += ["training.iterations=20", *["method.cls_threshold=0.001"] * (method == "stac")]
    teacher = a.work / f"{a.name}-{a.percent:g}-supervised-{fold}"
    if method == "stac" and (teacher / "provenance.json").exists():
        overrides.append(f"method.label_model={json.dumps(str(teacher))}")  # a name may be no plain YAML
    settings = what_decides(load_settings(preset, overrides))  # a typing error is told before hours of work
    if file.exists():
        # a setting that is younger than the result had its default then
        defaults, result = what_decides(Settings()), json.loads(file.read_text())
        earlier = result["settings"]
        earlier["method"]["label_model"] = None
        if any({**defaults[group], **earlier[group]} != {**defaults[group], **settings[group]} for group in settings):
            raise UserError(
                f"{file}: is of other settings; delete it and {out} to run {title} again, or take another --name"
            )
        if result.get("data") != a.source:
            raise UserError(
                f"{file}: is of other data; delete it and {out} to run {title} again, or take another --name"
            )
        return
    if name != "supervised_full":  # it has other labels
        overrides.append(f"method.burn_in_cache={json.dumps(str(data / 'burn_in'))}")
    labeled = data / ("full.json" if name == "supervised_full" else "labeled.json")
    program = [str(Path(__file__).with_name("oracle.py"))] if name in ORACLES else ["-m", "softteacher"]
    command = [sys.executable, *program, "train", "--labeled", labeled, "--out", out, "--preset", preset]
    command += ["--unlabeled", data / "unlabeled.json", "--validation", data / "validation.json"]
    for override in overrides:
        command += ["--set", override]
    out.parent.mkdir(parents=True, exist_ok=True)
    with (journal := a.work / f"{title}.log").open("a") as log:
        done = subprocess.run([str(c) for c in command], stdout=log, stderr=log, env={**os.environ, **quiet(a.jobs)})
    if done.returncode:
        last = (journal.read_text().splitlines() or [""])[-1]
        raise UserError(f"{title} failed ({done.returncode}), see {journal}: {last}")
    metrics, provenance = (json.loads((out / f"{n}.json").read_text()) for n in ("metrics", "provenance"))
    rows = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    figures = {
        "dataset": a.name,
        "percent": a.percent,
        "method": name,
        "fold": fold,
        "ap": metrics["teacher"]["AP"],
        "ap50": metrics["teacher"]["AP50"],
        "student_ap": metrics["student"]["AP"],
        "per_class": metrics["teacher"]["per_class"],
        "curve": [[row["step"], row["teacher_AP"]] for row in rows if "teacher_AP" in row],
        "pseudo_boxes": [
            [row["step"], *(round(row.get(f"pseudo_{k}", -1), 3) for k in ("boxes_cls", "precision", "recall"))]
            for row in rows
            if "pseudo_boxes_cls" in row
        ][::5],
        "training": provenance["training"],
        "precision": provenance["machine"]["precision"],
        "data": a.source,
        "settings": settings,
        "git_sha": provenance["git_sha"],
        **machine(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(figures, indent=None) + "\n")
    print(f"{title}: AP {figures['ap']:.3f}, student {figures['student_ap']:.3f}", flush=True)


def what_decides(settings: Settings) -> dict[str, Any]:
    """The settings that a result depends on: not those of the machine; of files the names."""
    tree = settings.model_dump(mode="json", exclude={"export"})
    machine_only = ("data.workers", "data.cache_dir", "training.threads", "training.device", "method.burn_in_cache")
    for group, key in (name.split(".") for name in machine_only):
        del tree[group][key]
    if settings.method.name == "supervised":
        tree["method"] = {key: tree["method"][key] for key in ("name", "label_model", "ema_momentum", "ema_ramp")}
    tree["method"]["label_model"] = None  # the supervised run of the fold, or one like it that STAC trains itself
    for key in ("backbone_weights", "init_from"):
        tree["detector"][key] = tree["detector"][key] and Path(tree["detector"][key]).name
    return tree


def quiet(jobs: int) -> dict[str, str]:
    """Environment of runs that share the cores: spinning threads would take them from each other."""
    return {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}


def runs_of(name: str, results: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The results of a data set, at all percentages; not those of one whose name begins with this one's."""
    files = sorted((results / "accuracy").glob(f"{glob.escape(name)}-*.json"))
    return [(file, run) for file in files if (run := json.loads(file.read_text()))["dataset"] == name]


def summarize(name: str, percent: float, results: Path) -> dict[str, Any]:
    """Mean and deviation of each method over its folds, and the share of the gap that the default method closes."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    # all labels are the same at any percentage
    mine = [r for _, r in runs_of(name, results) if r["percent"] == percent or r["method"] == "supervised_full"]
    for run in sorted(mine, key=lambda r: (r["percent"] == percent, r["percent"])):
        runs.setdefault(run["method"], {})[run["fold"]] = run
    methods = {}
    for method in [m for m in METHODS | OTHERS if m in runs]:
        aps = [run["ap"] for run in runs[method].values()]
        methods[method] = {
            "ap_mean": statistics.mean(aps),
            "ap_std": statistics.stdev(aps) if len(aps) > 1 else 0.0,
            "runs": [
                {key: run.get(key) for key in ("fold", "ap", "ap50", "student_ap", "precision")}
                | {
                    "processor": run["machine"]["processor"],
                    "same_start": method == "supervised_full" or same_start(run, runs.get("supervised", {})),
                    "still_rising": run["training"]["best_step"] == run["training"]["steps"],
                }
                for fold, run in sorted(runs[method].items())
            ],
        }
        if {"supervised", "supervised_full"} <= set(runs):
            methods[method]["gap_closed"] = gap_closed(runs, method)
    closed = methods.get("soft_teacher", {}).get("gap_closed")
    return {"dataset": name, "percent": percent, "methods": methods, "gap_closed": closed}


def same_start(run: dict[str, Any], supervised: dict[int, dict[str, Any]]) -> bool:
    """Whether it is of the burn-in of its fold's supervised run, if there is one: their first validations tell."""
    return run["curve"][:1] == supervised.get(run["fold"], run)["curve"][:1]


def gap_closed(runs: dict[str, dict[int, dict[str, Any]]], method: str) -> float | None:
    """(method - supervised) / (supervised_full - supervised), of means over the folds where both began the same.

    None where all labels are no better than a few, or there is no such fold.
    """
    supervised = runs["supervised"]
    folds = [fold for fold, run in sorted(runs[method].items()) if fold in supervised and same_start(run, supervised)]
    full = [run["ap"] for run in runs["supervised_full"].values()]
    if not folds:
        return None
    low, reached = (statistics.mean(runs[m][f]["ap"] for f in folds) for m in ("supervised", method))
    gap = statistics.mean(full) - low
    return (reached - low) / gap if gap > 0 else None


def table(summary: dict[str, Any]) -> str:
    """The summary as a table in Markdown, with what limits it below."""
    every = sorted({run["fold"] for m in summary["methods"].values() for run in m["runs"]})
    lines = [
        f"{summary['dataset']}, {summary['percent']:g} % labelled\n",
        f"| method | AP | of fold {', '.join(map(str, every))} | student's AP | AP50 | gap closed |",
        "|---|---|---|---|---|---|",
    ]
    notes: set[str] = set()
    for name, m in summary["methods"].items():
        spread = f" ± {m['ap_std']:.3f}" if len(m["runs"]) > 1 else ""
        student, ap50 = (statistics.mean(run[key] for run in m["runs"]) for key in ("student_ap", "ap50"))
        gap = m.get("gap_closed")
        shown = f"{gap:.0%}" if gap is not None and not name.startswith("supervised") else ""
        rising = name.startswith("supervised") and any(run["still_rising"] for run in m["runs"])
        marks = "*" * any(not run["same_start"] for run in m["runs"]) + "†" * rising
        notes |= set(marks)
        of = {run["fold"]: f"{run['ap']:.3f}" for run in m["runs"]}  # rows of different folds have other means
        folds = ", ".join(of.get(fold, "-") for fold in every)
        lines.append(f"| {name}{marks} | {m['ap_mean']:.3f}{spread} | {folds} | {student:.3f} | {ap50:.3f} | {shown} |")
    told = {
        "*": "a run of it is of another machine than the supervised one of its fold, and of a burn-in of its own",
        "†": "a run of it was best at its last validation: longer, it would be better",
    }
    return "\n".join([*lines, *(f"\n{mark} {text}" for mark, text in told.items() if mark in notes)])


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
