"""The step `export`."""

from kfp import dsl

from components import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def export(model: dsl.Input[dsl.Model], onnx: dsl.Output[dsl.Model], parity: dsl.Output[dsl.Metrics]):
    """Export a model to ONNX and compare ONNX Runtime with PyTorch on real images.

    Args:
        model: Model folder that `train` wrote.
        onnx: Folder with model.onnx, parity.json, smoke.npz, provenance.json and validation.json.
        parity: AP of both, and at batch 1 and 4 the matched boxes and largest differences.
    """
    import json

    from softteacher.evaluation.metrics import numbers
    from softteacher.serving.export import export

    facts = export(model.path, onnx.path)
    onnx.metadata.update(facts)
    for group in ("ap", "batch_1", "batch_4"):
        for key, value in numbers(facts[group]).items():
            parity.log_metric(f"{group}_{key}", value)
    print(json.dumps({"step": "export", **parity.metadata}))
