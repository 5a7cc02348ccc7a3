"""The step `deploy`."""

from typing import NamedTuple

from kfp import dsl

from components import TOOLS_IMAGE


@dsl.component(base_image=TOOLS_IMAGE, install_kfp_package=False)
def deploy(onnx: dsl.Input[dsl.Model], repository: str, triton: str, name: str, backend: str, gpu: bool) -> NamedTuple(
    "Deployed", [("facts", dict)]
):
    """Upload a new version, load it, smoke-test it, make it live; on any failure the old version stays live.

    Args:
        onnx: Folder that `export` wrote.
        repository: Triton model repository, folder or s3:// prefix.
        triton: URL of the Triton server, http://host:port.
        name: Name of the model.
        backend: onnxruntime, as in NVIDIA's container, or python where Triton has that one only.
        gpu: Run on Triton's GPUs.

    Returns:
        facts: What was deployed, the live version among it.
    """
    import json

    from softteacher.serving.deploy import deploy

    facts = deploy(onnx.path, repository, triton, name, backend=backend, gpu=gpu)
    print(json.dumps({"step": "deploy", **facts}))
    return (facts,)
