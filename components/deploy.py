"""The step `deploy`."""

from typing import NamedTuple

from kfp import dsl

from components import TOOLS_IMAGE


@dsl.component(base_image=TOOLS_IMAGE, install_kfp_package=False)
def deploy(
    onnx: dsl.Input[dsl.Model],
    decision: dsl.Input[dsl.Artifact],
    repository: str,
    triton: str,
    name: str,
    backend: str,
    engine: str,
    gpu: bool,
    canary: float,
    run: str,
) -> NamedTuple("Deployed", [("facts", dict)]):
    """Upload a new version, load it, smoke-test it, make it live; on any failure the old version stays live.

    Args:
        onnx: Folder that `export` wrote.
        decision: Folder that `gate` wrote (results); what it compared with must still be live.
        repository: Triton model repository, folder or s3:// prefix.
        triton: URL of the Triton server, http://host:port.
        name: Name of the model.
        backend: onnxruntime or openvino, as in NVIDIA's container, or python where Triton has that one only.
        engine: What runs the model: onnxruntime-fp32, or one of export.engines such as openvino-bf16.
        gpu: Run on Triton's GPUs.
        canary: Share of the requests, 0 to 1, that the new version gets until `softteacher promote`; 0: it goes live.
        run: Id of the run: a second try of it does not deploy what the first one has.

    Returns:
        facts: What was deployed, the live version among it.
    """
    import json

    from softteacher.serving.deploy import deploy
    from softteacher.serving.repository import Runtime

    served = {"runtime": Runtime(backend, engine, gpu), "canary": canary or None}
    facts = deploy(onnx.path, repository, triton, name, **served, decision=decision.path, run=run)
    print(json.dumps({"step": "deploy", **facts}))
    return (facts,)
