"""The KFP pipelines: compile them for a cluster, run one on this machine, submit or schedule one on Kubeflow Pipelines.

training:    fingerprint -> split -> train -> evaluate
                                       └ export -> gate -> deploy -> record   (if the gate says so; a registry is named)
             baseline: split -> train (supervised, the same labels) -> evaluate   (if asked for)
retraining:  collect -> champion -> train (starts from it) -> evaluate          (if enough has arrived)
                                     └ export -> gate -> deploy -> record       (if the gate says so)
                                                  └ commit, at the end: accepted or rejected
             report, at the end of every run of either: what failed, and where its log is
"""

import sys
from functools import partial
from typing import Any

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent

from components.champion import champion
from components.cluster import ClusterOptions, place, run_config
from components.collect import collect, hash_images, merge_collect, plan_collect
from components.commands import make_app
from components.commit import commit
from components.deploy import deploy
from components.evaluate import evaluate
from components.export import export
from components.fingerprint import fingerprint
from components.gate import gate
from components.record import record
from components.report import report
from components.shards import evaluate_shard, join_evaluation
from components.split import split
from components.train import train
from components.train_nodes import train_nodes
from softteacher.errors import UserError

# by itself: KFP replaces it nowhere within a longer text
RUN = dsl.PIPELINE_JOB_ID_PLACEHOLDER


def reported(pipeline: str, options: ClusterOptions | None) -> dsl.ExitHandler:
    """The block of all steps of a pipeline: `report` runs after them, whatever becomes of them."""
    api, ui = (options.kfp_api, options.kfp_ui) if options else ("", "")
    return dsl.ExitHandler(place(report(pipeline=pipeline, run=RUN, kfp_api=api, kfp_ui=ui), options, reports=True))


def training(name: str, options: ClusterOptions | None, **arguments: Any) -> dsl.PipelineTask:
    """The task that trains, in its pod or on many nodes.

    Args:
        name: Of the training, one of its own for each in a run.
        options: Of the cluster.
        arguments: For `train`: dataset, method, preset, overrides, and for a retraining init and new_share.
    """
    arguments = (
        {"init": "", "new_share": 0.0} | arguments | {"name": name, "run": RUN, "processes": 1, "checkpoints": ""}
    )
    if options is None:
        return place(train(**arguments), None).set_display_name(name)
    arguments |= {"processes": max(options.gpus, 1), "checkpoints": options.checkpoints}
    launches = options.nodes > 1
    if launches:
        nodes = {"nodes": options.nodes, "image": options.train_image, "shm": options.shm}
        nodes |= {"deadline": options.longest(), "pull_secrets": [*options.image_pull_secrets]}
        task = train_nodes(**arguments, **nodes)
    else:
        task = train(**arguments)
    return place(task, options, heavy=True, gpus=options.gpus, launches=launches, long=True).set_display_name(name)


def collecting(options: ClusterOptions | None, **arguments: Any) -> dsl.PipelineTask:
    """The task that collects, in one pod or with the images looked at in many.

    Args:
        options: Of the cluster.
        arguments: For `collect`.
    """
    if options is None or options.shards == 1:
        return place(collect(**arguments), options)
    chosen = {key: arguments.pop(key) for key in ("min_new", "near_duplicate_bits", "max_bad_images")}
    planned = place(plan_collect(**arguments, shards=options.shards), options)
    plan = planned.outputs["plan"]
    with dsl.ParallelFor(planned.outputs["Output"], name="shards") as shard:
        hashed = place(hash_images(plan=plan, shard=shard), options)
    merged = merge_collect(plan=plan, hashes=dsl.Collected(hashed.outputs["hashes"]), **chosen)
    return place(merged, options).set_display_name("collect")


def evaluating(name: str, options: ClusterOptions | None, **arguments: Any) -> dsl.PipelineTask:
    """The task that evaluates, in one pod or with the validation images looked at in many.

    Args:
        name: Of the evaluation.
        options: Of the cluster.
        arguments: For `evaluate`: dataset and model.
    """
    gpus = min(options.gpus, 1) if options else 0
    if options is None or options.shards == 1:
        return place(evaluate(**arguments), options, heavy=True, gpus=gpus).set_display_name(name)
    with dsl.ParallelFor(list(range(1, options.shards + 1)), name=f"{name} shards") as number:
        looked = place(evaluate_shard(**arguments, number=number, of=options.shards), options, heavy=True, gpus=gpus)
    joined = join_evaluation(**arguments, parts=dsl.Collected(looked.outputs["part"]))
    return place(joined, options, heavy=True).set_display_name(name)


def build_training_pipeline(options: ClusterOptions | None = None) -> GraphComponent:
    """The training pipeline.

    Args:
        options: Of the cluster; none for a run on this machine, where there are no pods to configure.
    """
    placed = partial(place, options=options)

    @dsl.pipeline(
        name="training-pipeline",
        description="Semi-supervised object detection: a COCO data set to a served detector",
        **run_config(options),
    )
    def training_pipeline(
        data: str,
        repository: str,
        triton: str,
        name: str = "detector",
        percent: float = 10.0,
        fold: int = 1,
        stratify: bool = False,
        validation_fraction: float = 0.0,
        unlabeled: str = "",
        method: str = "soft_teacher",
        preset: str = "coco-10pct",
        overrides: list[str] = [],  # noqa: B006 - KFP compiles the default into the pipeline
        baseline: bool = False,
        registry: str = "",
        gate_delta: float = 0.0,
        max_class_drop: float = 0.05,
        max_latency_ratio: float = 1.5,
        require_significant: bool = False,
        triton_backend: str = "onnxruntime" if options else "python",
        triton_engine: str = "onnxruntime-fp32",
        triton_gpu: bool = False,
    ):
        """Train a detector from few labels and many images, and serve it if it beats the champion.

        Args:
            data: Folder or s3:// prefix with images/ and annotations/, or a COCO json.
            repository: Triton model repository, folder or s3:// prefix.
            triton: URL of the Triton server, http://host:port.
            name: Name of the model that is served.
            percent: Share of the training images that is labelled.
            fold: Number of the fold, from 1.
            stratify: Give every class a labelled image where the data allows.
            validation_fraction: Share of the images held out for validation; 0 takes the data set's own val json.
            unlabeled: Folder or s3:// prefix of more images, without a json.
            method: soft_teacher, mean_teacher, stac or supervised.
            preset: Name of a preset of settings.
            overrides: Settings as key=value on top of the preset.
            baseline: Also train and evaluate a supervised detector on the same labels.
            registry: Folder or s3:// prefix where the model is kept for retraining, with its lineage; empty: nowhere.
            gate_delta: AP by which a model must beat the champion to be deployed.
            max_class_drop: AP that a class may fall by where that is no chance; 1: any.
            max_latency_ratio: Latency that a model may have, over the champion's.
            require_significant: Deploy only if the 95 % interval of the gain lies over zero.
            triton_backend: onnxruntime or openvino, as in NVIDIA's container, or python where Triton has that one only.
            triton_engine: What runs the model: onnxruntime-fp32, or one of export.engines.
            triton_gpu: Run on Triton's GPUs.

        Example:
            --data s3://data/cards --repository s3://models/triton --triton http://127.0.0.1:8000 --preset small
        """
        with reported("training-pipeline", options):
            listed = placed(fingerprint(data=data, unlabeled=unlabeled))
            parts = placed(
                split(
                    data=data,
                    percent=percent,
                    fold=fold,
                    stratify=stratify,
                    validation_fraction=validation_fraction,
                    unlabeled=unlabeled,
                    fingerprint=listed.output,
                ),
                cached=True,
            ).output
            settings = {"dataset": parts, "preset": preset, "overrides": overrides}
            model = training("train", options, method=method, **settings).output
            evaluating("evaluate", options, dataset=parts, model=model)
            onnx = placed(export(model=model), heavy=True).outputs["onnx"]
            model_name = {"repository": repository, "name": name}
            bounds = {"max_class_drop": max_class_drop, "max_latency_ratio": max_latency_ratio}
            bounds |= {"delta": gate_delta, "require_significant": require_significant}
            decision = placed(gate(onnx=onnx, **model_name, **bounds))
            with dsl.If(decision.outputs["Output"] == True, name="better than the champion"):  # noqa: E712 - KFP reads it
                served = {"backend": triton_backend, "engine": triton_engine, "gpu": triton_gpu, "canary": 0.0}
                better = {"onnx": onnx, "decision": decision.outputs["results"], "run": RUN, **model_name}
                deployed = placed(deploy(**better, triton=triton, **served))
                with dsl.If(registry != "", name="there is a registry"):
                    placed(record(**better, model=model, registry=registry)).after(deployed)
            with dsl.If(baseline == True, name="baseline"):  # noqa: E712
                base = training("train-baseline", options, method="supervised", **settings)
                if options is None:
                    base.after(decision)  # the local runner goes step by step: a broken run should end before this one
                evaluating("evaluate-baseline", options, dataset=parts, model=base.output)

    return training_pipeline


def build_retraining_pipeline(options: ClusterOptions | None = None) -> GraphComponent:
    """The retraining pipeline.

    Args:
        options: Of the cluster; none for a run on this machine.
    """
    placed = partial(place, options=options)

    @dsl.pipeline(
        name="retraining-pipeline",
        description="What has arrived since the last round: train on from the champion, serve the better of the two",
        **run_config(options),
    )
    def retraining_pipeline(
        source: str,
        state: str,
        base: str,
        repository: str,
        registry: str,
        triton: str,
        name: str = "detector",
        labels: list[str] = [],  # noqa: B006 - KFP compiles the default into the pipeline
        min_new: int = 100,
        near_duplicate_bits: int = 10,
        max_bad_images: float = 0.1,
        include_rejected: bool = False,
        new_share: float = 0.5,
        method: str = "soft_teacher",
        preset: str = "coco-10pct",
        overrides: list[str] = [],  # noqa: B006
        gate_delta: float = 0.0,
        max_class_drop: float = 0.05,
        max_latency_ratio: float = 1.5,
        require_significant: bool = False,
        canary: float = 0.0,
        triton_backend: str = "onnxruntime" if options else "python",
        triton_engine: str = "onnxruntime-fp32",
        triton_gpu: bool = False,
    ):
        """Train on from the served detector with what has arrived, and serve the new one if it is better.

        With too few new images the run ends early, and well. A model that is not better leaves the served one in its
        place, and what arrived is not used again. If a step fails, the next run begins with the same images.

        Args:
            source: Folder or s3:// prefix where unlabelled images arrive.
            state: Folder or s3:// prefix that remembers which images came with which round.
            base: Folder or s3:// prefix that `softteacher split` wrote.
            repository: Triton model repository, folder or s3:// prefix.
            registry: Folder or s3:// prefix of the models' folders and lineage, beside the repository.
            triton: URL of the Triton server, http://host:port.
            name: Name of the model that is served.
            labels: COCO jsons that arrive, or folders or prefixes of them.
            min_new: A round is worthwhile from so many new images, those with new labels among them.
            near_duplicate_bits: Pictures whose hashes of 256 bits differ in up to so many are the same; -1: no two are.
            max_bad_images: Share of broken new images that is survived.
            include_rejected: Images and labels of rejected rounds are new again.
            new_share: Share of new images among the unlabelled ones of a batch; 0: as they come.
            method: soft_teacher, mean_teacher, stac or supervised.
            preset: Name of a preset of settings; its architecture is that of the served model.
            overrides: Settings as key=value on top of the preset.
            gate_delta: AP by which a model must beat the champion to be deployed.
            max_class_drop: AP that a class may fall by where that is no chance; 1: any.
            max_latency_ratio: Latency that a model may have, over the champion's.
            require_significant: Deploy only if the 95 % interval of the gain lies over zero.
            canary: Share of the requests, 0 to 1, of a better model until `softteacher promote`; 0: it goes live.
            triton_backend: onnxruntime or openvino, as in NVIDIA's container, or python where Triton has that one only.
            triton_engine: What runs the model: onnxruntime-fp32, or one of export.engines.
            triton_gpu: Run on Triton's GPUs.

        Example:
            --source s3://data/incoming --labels s3://data/labels --state s3://data/state --base s3://data/splits
            --repository s3://models/triton --registry s3://models/registry --triton http://127.0.0.1:8000
        """
        with reported("retraining-pipeline", options):
            arrivals = {"source": source, "state": state, "base": base, "labels": labels, "min_new": min_new}
            arrivals |= {"near_duplicate_bits": near_duplicate_bits, "max_bad_images": max_bad_images}
            collected = collecting(options, **arrivals, include_rejected=include_rejected)
            parts = collected.outputs["dataset"]

            def end(verdict: str) -> dsl.PipelineTask:
                task = placed(commit(dataset=parts, state=state, accepted=verdict == "accepted", run=RUN))
                return task.set_display_name(f"commit-{verdict}")

            with dsl.If(collected.outputs["Output"] == True, name="enough is new"):  # noqa: E712 - KFP reads it
                model_name = {"repository": repository, "name": name}
                start = placed(champion(**model_name, registry=registry))
                settings = {"preset": preset, "overrides": overrides, "init": start.output, "new_share": new_share}
                model = training("train", options, dataset=parts, method=method, **settings).output
                scored = evaluating("evaluate", options, dataset=parts, model=model)
                onnx = placed(export(model=model), heavy=True).outputs["onnx"]
                bounds = {"max_class_drop": max_class_drop, "max_latency_ratio": max_latency_ratio}
                bounds |= {"delta": gate_delta, "require_significant": require_significant}
                decision = placed(gate(onnx=onnx, **model_name, **bounds))
                with dsl.If(decision.outputs["Output"] == True, name="better than the champion"):  # noqa: E712
                    served = {"backend": triton_backend, "engine": triton_engine, "gpu": triton_gpu, "canary": canary}
                    better = {"onnx": onnx, "decision": decision.outputs["results"], "run": RUN, **model_name}
                    deployed = placed(deploy(**better, triton=triton, **served))
                    kept = placed(record(**better, model=model, registry=registry)).after(deployed)
                    end("accepted").after(kept, scored)
                with dsl.Else(name="not better"):
                    end("rejected").after(scored)
            with dsl.Else(name="too little is new"):
                end("nothing")  # what the images look like is kept, so that the next run need not read them

    return retraining_pipeline


# `compile` compiles all of these; run-local, submit and schedule take one by name and have its parameters as options
app = make_app({"training": build_training_pipeline, "retraining": build_retraining_pipeline})


def main() -> None:
    """Run the command line; a `UserError` is one line and exit code 2, a failure of ours exit code 1."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
