"""The gate: is a new model better than the champion?"""

from __future__ import annotations

from dataclasses import dataclass

from softteacher import storage
from softteacher.serving.repository import read_champion, read_onnx_folder


@dataclass(frozen=True)
class Decision:
    """Whether to deploy.

    Attributes:
        deploy: the answer.
        reason: one line.
        ap: the new model's AP on its validation set.
        champion_ap: the champion's AP on the same set; none if there is no champion.
    """

    deploy: bool
    reason: str
    ap: float
    champion_ap: float | None


def gate(onnx: str, repository: str, name: str, *, delta: float = 0.0) -> Decision:
    """Decide whether a model goes live: its AP must be strictly greater than the champion's plus `delta`.

    Both are ONNX Runtime's APs on the same validation set. Where the champion's was measured on another, its own ONNX
    file is fetched and scored on the new one. Without a champion the model goes live.

    Args:
        onnx: onnx folder of the new model, local or `s3://`.
        repository: Triton model repository, local or `s3://`.
        name: of the model in it.
        delta: what the new model has to be better by; a negative one tolerates a loss.

    Raises:
        UserError: the onnx folder is torn, or the repository can't be read.
    """
    with storage.local_input(onnx) as folder:
        model = read_onnx_folder(folder)
        champion = read_champion(repository, name)
        if champion is None:
            return Decision(True, f"{name} has no champion yet", model.ap, None)
        champion_ap = champion.ap
        if champion.validation_fingerprint != model.validation_fingerprint:
            from softteacher.serving.onnx_runtime import evaluate_onnx

            with storage.local_input(storage.join(repository, name, str(champion.version), "model.onnx")) as file:
                champion_ap = evaluate_onnx(str(file), str(folder / "validation.json"))["AP"]
    better = model.ap > champion_ap + delta
    sign = ">" if better else "is not >"
    reason = f"AP {model.ap:.4f} {sign} {champion_ap:.4f} of version {champion.version} + {delta:g}"
    return Decision(better, reason, model.ap, champion_ap)
