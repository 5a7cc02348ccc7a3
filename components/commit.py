"""The step `commit`."""

from kfp import dsl

from components import TOOLS_IMAGE


@dsl.component(base_image=TOOLS_IMAGE, install_kfp_package=False)
def commit(dataset: dsl.Input[dsl.Dataset], state: str, accepted: bool, run: str):
    """End a round: what `collect` found is no longer new.

    Args:
        dataset: Folder that `collect` wrote.
        state: Folder or s3:// prefix of the state.
        accepted: Whether the model was taken; of a rejected round nothing is used again.
        run: Id of the run, for the record.
    """
    import json

    from softteacher.collecting.collect import commit

    print(json.dumps({"step": "commit", **commit(state, dataset.path, accepted=accepted, run=run)}))
