"""The step `report`: the last of every run, whatever became of it."""

from kfp import dsl

from components import TOOLS_IMAGE


@dsl.component(base_image=TOOLS_IMAGE, install_kfp_package=False)
def report(status: dsl.PipelineTaskFinalStatus, pipeline: str, run: str, kfp_api: str, kfp_ui: str):
    """Tell in one line how the run ended: what failed, and where its log is.

    Args:
        status: Of all other steps, from KFP.
        pipeline: Name of the pipeline.
        run: Id of the run.
        kfp_api: URL of KFP's API, which knows the step that failed; empty where there is none.
        kfp_ui: URL of KFP's pages, for a link to the run; may be empty.
    """
    import os

    from components.ending import tell_ending

    tell_ending(
        status.state,
        status.error_message or "",
        pipeline,
        run,
        kfp_api=kfp_api,
        kfp_ui=kfp_ui,
        webhook=os.environ.get("SOFTTEACHER_WEBHOOK", "").strip(),  # a file's last newline
    )
