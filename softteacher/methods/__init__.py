"""Training methods: each is a small file over the same trainer, see `softteacher.methods.base.Method`."""

from __future__ import annotations

from softteacher.config import Settings
from softteacher.detectors.base import Detector
from softteacher.detectors.fcos import FCOS
from softteacher.detectors.mask_rcnn import MaskRCNN
from softteacher.errors import UserError
from softteacher.methods.base import Method
from softteacher.methods.mask_soft_teacher import MaskSoftTeacher
from softteacher.methods.mean_teacher import MeanTeacher
from softteacher.methods.one_stage import OneStageSoftTeacher
from softteacher.methods.soft_teacher import SoftTeacher
from softteacher.methods.stac import Stac
from softteacher.methods.supervised import Supervised

METHODS: dict[str, type[Method]] = {
    "soft_teacher": SoftTeacher,
    "mean_teacher": MeanTeacher,
    "stac": Stac,
    "supervised": Supervised,
}


def build_method(settings: Settings, student: Detector, teacher: Detector, frequency: dict[str, float]) -> Method:
    """The method that `method.name` names, in the form for the student's kind of detector.

    Args:
        settings: all of them.
        student: learns.
        teacher: its moving average.
        frequency: labelled boxes per labelled image, by class name in label order.

    Raises:
        UserError: the method can't do this with this detector.
    """
    method = METHODS[settings.method.name]
    if method is SoftTeacher and isinstance(student, FCOS):
        method = OneStageSoftTeacher
    elif method is SoftTeacher and isinstance(student, MaskRCNN):
        method = MaskSoftTeacher
        if settings.method.mixup:
            raise UserError("method.mixup: a mask can't be laid over another; set it to 0 for a maskrcnn detector")
    if settings.method.mixup and settings.training.unlabeled_per_batch == 1:
        raise UserError("method.mixup: lays two images over each other; set training.unlabeled_per_batch=2 or more")
    return method(student, teacher, settings, frequency)
