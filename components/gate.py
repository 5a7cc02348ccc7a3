"""The step `gate`."""

from kfp import dsl

from components import TOOLS_IMAGE


# The decision is the one unnamed output because kfp.local can't evaluate a condition on a named one (2.17).
@dsl.component(base_image=TOOLS_IMAGE, install_kfp_package=False)
def gate(
    onnx: dsl.Input[dsl.Model], repository: str, name: str, delta: float, decision: dsl.Output[dsl.Metrics]
) -> bool:
    """Decide whether an exported model is better than the champion; the first one always is.

    Args:
        onnx: Folder that `export` wrote.
        repository: Triton model repository, folder or s3:// prefix.
        name: Name of the model in the repository.
        delta: AP by which the model must be better.
        decision: AP of the exported model (ap) and of the champion (champion_ap, if there is one), and the reason.

    Returns:
        Output: Whether to deploy.
    """
    import json

    from softteacher.serving.gate import gate

    answer = gate(onnx.path, repository, name, delta=delta)
    decision.log_metric("ap", answer.ap)
    if answer.champion_ap is not None:
        decision.log_metric("champion_ap", answer.champion_ap)
    decision.metadata["reason"] = answer.reason
    print(json.dumps({"step": "gate", "deploy": answer.deploy, **decision.metadata}))
    return answer.deploy
