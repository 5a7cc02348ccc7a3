"""The step `record`."""

from kfp import dsl

from components import TOOLS_IMAGE


@dsl.component(base_image=TOOLS_IMAGE, install_kfp_package=False)
def record(
    model: dsl.Input[dsl.Model],
    onnx: dsl.Input[dsl.Model],
    decision: dsl.Input[dsl.Artifact],
    repository: str,
    registry: str,
    name: str,
    run: str,
    lineage: dsl.Output[dsl.Markdown],
):
    """Keep the model folder of what `deploy` deployed, and write down where it came from.

    Args:
        model: Model folder that `train` wrote.
        onnx: Folder that `export` made from it, which has been deployed.
        decision: Folder that `gate` wrote (results).
        repository: Triton model repository, folder or s3:// prefix.
        registry: Folder or s3:// prefix for the records, beside the repository.
        name: Name of the model.
        run: Id of the run.
        lineage: The version and those before it: data, parents, settings, metrics, image, run.
    """
    import json
    from pathlib import Path

    from softteacher.serving import lineage as library

    facts = library.record(model.path, onnx.path, repository, name, registry, gate=decision.path, run=run)
    chain = library.lineage(name, repository, registry, facts["version"])
    Path(lineage.path).write_text(f"```\n{library.table(chain)}```\n", encoding="utf-8")
    print(json.dumps({"step": "record", "name": name, "version": facts["version"], "run": facts["run_id"]}))
