"""Watches a training: says why the method does not learn, lowers the weight of pseudo labels that do harm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from softteacher import distributed
from softteacher.console import say

if TYPE_CHECKING:
    from softteacher.training.trainer import Trainer

PATIENCE = 100  # steps with pseudo labels before anything is said of them
FEW = 0.3  # pseudo boxes an image over labelled boxes an image
TOLERANCE = 0.9  # of the supervised phase's AP; a small validation set is noisy
LAST = 2  # times the guard lowers the weight; then it is labelled images only


def guard(trainer: Trainer, ap: float) -> None:
    """After a validation: where the teacher fell below the supervised phase, back to the best weights with less trust.

    The supervised phase is `method.burn_in`. The first times halve the weight of the unsupervised loss, the last one
    takes it away, which leaves supervised training.

    Args:
        trainer: its method's `trust` is lowered, its weights may go back, without the optimizer's momentum.
        ap: the teacher's.
    """
    p, s = trainer.progress, trainer.settings
    if p.step <= s.burn_in_steps:
        p.supervised = max(ap, p.supervised or 0.0)
        return
    method = trainer.method
    if not s.method.guard or method.seen is None or not method.trust or p.supervised is None or p.best is None:
        return
    if ap >= TOLERANCE * p.supervised:
        return
    p.harm, p.worse = p.harm + 1, 0  # what comes now is another training
    method.trust = 0.0 if p.harm > LAST else method.trust / 2
    trainer.teacher.load_state_dict(p.best["teacher"])
    trainer.student.load_state_dict(p.best["student"])
    trainer.optimizer.state.clear()  # its momentum is that of the way which did harm
    what = f"their weight is {s.method.unsup_weight * method.trust:g} now" if method.trust else "they are left out now"
    say(
        f"step {p.step}: pseudo labels do harm: the teacher's AP is {ap:.3f}, {p.supervised:.3f} before them; "
        f"back to the weights of step {p.best['step']}, {what}"
    )


def warn(trainer: Trainer, line: dict[str, float]) -> None:
    """After a line of the log: say once each what keeps the method from learning.

    Args:
        trainer: its progress remembers what was said.
        line: the means of the log.
    """
    p = trainer.progress
    for key, text in _findings(trainer, line):
        if key not in p.said:
            p.said.append(key)
            say(f"step {p.step}: {text}")


def _findings(trainer: Trainer, line: dict[str, float]) -> Iterator[tuple[str, str]]:
    p, s, method = trainer.progress, trainer.settings, trainer.method
    taught = p.step - s.burn_in_steps
    if taught < PATIENCE or "pseudo_boxes_cls" not in line:
        return
    there, used = float(method.frequency.sum()), line["pseudo_boxes_cls"]
    lowest = "pool_threshold"
    if s.method.name == "stac":  # its labels are made before it starts, by one threshold
        lowest, more, of_class = "cls_threshold", "lower method.cls_threshold", "lower method.cls_threshold"
    elif s.method.threshold == "adaptive":
        more, of_class = "lower method.pool_threshold or raise method.adaptive_share", "lower method.pool_threshold"
    else:
        of_class = "set method.threshold=adaptive"
        blocks = "cls_threshold" if s.method.cls_threshold > s.method.pool_threshold else "pool_threshold"
        more = f"{of_class}, or lower method.{blocks}"
    if not line.get("pseudo_boxes_pool", used):
        yield (
            "nothing found",
            f"the teacher finds nothing in the unlabelled images (no score above {getattr(s.method, lowest):g}); train "
            f"longer on labels first (method.burn_in), lower method.{lowest}, or check that both sets are alike",
        )
    elif used < FEW * there:
        yield (
            "few pseudo boxes",
            f"{used:.2f} pseudo boxes an image where labelled images have {there:.2f}: most objects are taught as "
            f"background; {more}",
        )
    if method.seen is not None and p.step >= s.training.iterations // 2 and "class never" not in p.said:
        seen = torch.tensor(distributed.mean(method.seen.tolist(), trainer.device))
        never = torch.nonzero((seen == 0) & (method.frequency.cpu() > 0)).flatten().tolist()
        if never:
            names = ", ".join(method.classes[n] for n in never[:5]) + (", ..." if len(never) > 5 else "")
            yield (
                "class never",
                f"never a pseudo box of {names}: only labelled images teach it; label some more of it "
                f"(`softteacher rank` finds them), or {of_class}",
            )
