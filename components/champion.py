"""The step `champion`."""

from kfp import dsl

from components import TOOLS_IMAGE


@dsl.component(base_image=TOOLS_IMAGE, install_kfp_package=False)
def champion(repository: str, registry: str, name: str) -> str:
    """Find the model folder of the live version, for a training that starts from it.

    Args:
        repository: Triton model repository, folder or s3:// prefix.
        registry: Folder or s3:// prefix that `record` writes to.
        name: Name of the model.

    Returns:
        Output: Its path or URI; empty if nothing is live, or its model folder is not kept.
    """
    import json

    from softteacher.serving.lineage import champion_model

    model = champion_model(repository, registry, name)
    print(json.dumps({"step": "champion", "model": model}))
    return model
