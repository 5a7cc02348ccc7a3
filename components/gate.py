"""The step `gate`."""

from kfp import dsl

from components import TOOLS_IMAGE


# The decision is the one unnamed output because kfp.local can't evaluate a condition on a named one (2.17).
@dsl.component(base_image=TOOLS_IMAGE, install_kfp_package=False)
def gate(
    onnx: dsl.Input[dsl.Model],
    repository: str,
    name: str,
    delta: float,
    max_class_drop: float,
    max_latency_ratio: float,
    require_significant: bool,
    decision: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    results: dsl.Output[dsl.Artifact],
) -> bool:
    """Decide whether an exported model is better than the champion; the first one always is.

    Args:
        onnx: Folder that `export` wrote.
        repository: Triton model repository, folder or s3:// prefix.
        name: Name of the model in the repository.
        delta: AP by which the model must be better.
        max_class_drop: AP that a class may fall by where that is no chance; 1: any.
        max_latency_ratio: Latency that it may have, over the champion's.
        require_significant: The 95 % interval of the gain must lie over zero.
        decision: AP of the exported model (ap) and, if there is a champion, of that (champion_ap), the gain with its
            interval, the ratio of latencies, and the reason.
        report: The self-contained HTML report.
        results: Folder with gate.json and report.html.

    Returns:
        Output: Whether to deploy.
    """
    import json
    import shutil
    from pathlib import Path

    from softteacher.choices import Bounds
    from softteacher.serving.gate import gate

    bounds = Bounds(delta, max_class_drop, max_latency_ratio, require_significant)
    answer = gate(onnx.path, repository, name, bounds=bounds, out=results.path)
    for key, value in answer.metrics().items():
        decision.log_metric(key, value)
    decision.metadata["reason"] = answer.reason
    shutil.copyfile(Path(results.path, "report.html"), report.path)
    print(json.dumps({"step": "gate", "deploy": answer.deploy, **decision.metadata}))
    return answer.deploy
