"""Our pieces against inputs and outputs of mmdetection 3.3.0's SoftTeacher, dumped by its own code."""

import numpy as np
import pytest
import torch

from softteacher.config import load_settings
from softteacher.data.loader import Views
from softteacher.data.views import project_boxes
from softteacher.detections import Detections
from softteacher.detectors.boxes import HEAD_STD, RPN_STD, anchors, clip, decode, encode, pyramid_level
from softteacher.detectors.build import build
from softteacher.detectors.faster_rcnn import STRIDES, FasterRCNN, RPNOutput
from softteacher.detectors.losses import RoIs, RPNTargets, assign, classification_loss, regression_loss, rpn_loss
from softteacher.methods.base import Unlabeled, to_strong_view
from softteacher.methods.jitter import jitter, regression_variance
from softteacher.methods.soft_teacher import SoftTeacher
from softteacher.methods.thresholds import ClassThresholds
from softteacher.training.ema import update_teacher
from tests.helpers import SHARED

FILE = SHARED / "reference" / "numerics" / "numerics.npz"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"{FILE} is not there")
LEVELS = range(5)


@pytest.fixture(scope="module")
def reference():
    arrays = np.load(FILE)
    return lambda key: torch.from_numpy(np.asarray(arrays[key]))


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("kind", ["flip", "scale", "rot", "shear", "persp"])
def test_project_boxes(reference, kind):
    boxes, matrix, size = (reference(f"project/{k}") for k in ("boxes", f"{kind}/H", "img_shape_hw"))
    close(project_boxes(boxes, matrix), reference(f"project/{kind}/out_noclip"), atol=1e-3)
    close(project_boxes(boxes, matrix, size), reference(f"project/{kind}/out_clip"), atol=1e-3)


def test_which_boxes_are_kept(reference):
    """Scores and sides strictly above their thresholds."""
    boxes, scores, threshold = (reference(f"filter/{k}").float() for k in ("boxes", "scores", "score_thr"))
    found = Detections(boxes, scores, torch.zeros(len(boxes), dtype=torch.int64))
    above = ClassThresholds(load_settings(None, []).method, torch.ones(1)).above(found, float(threshold))
    _, large = to_strong_view(found, torch.eye(3), torch.tensor([100, 100]))
    for ours, name in ((above, "score"), (large, "wh"), (above & large, "both")):
        assert torch.nonzero(ours).flatten().tolist() == reference(f"filter/kept_by_{name}").tolist()


def test_ema(reference):
    def net(which):
        module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        names = module.state_dict()
        module.load_state_dict({k: reference(f"ema/{which}/{k}") for k in names})
        return module

    student, teacher, expected = net("student_before"), net("teacher_before"), net("teacher_after")
    update_teacher(teacher, student, 1 - float(reference("ema/momentum")))
    for key, value in expected.state_dict().items():
        close(teacher.state_dict()[key], value)


def test_jitter(reference):
    boxes, noise, scale = (reference(f"jitter/{k}") for k in ("boxes", "noise", "frac"))
    close(jitter(boxes, noise, float(scale)), reference("jitter/out"), atol=1e-4)


def test_variance(reference):
    close(regression_variance(reference("unc/refined_own_class")), reference("unc/out_mmdet"))
    close(
        regression_variance(reference("unc/refined_own_class"), reference("jitter/boxes")),
        reference("unc/paper_unbiased"),
    )


def test_box_coder(reference):
    priors, gt, deltas = (reference(f"coder/{k}") for k in ("priors", "gt", "deltas"))
    close(encode(gt, priors, HEAD_STD), reference("coder/rcnn_encode"), atol=1e-5)
    size = torch.tensor([[128, 128]])
    for std, name in ((HEAD_STD, "rcnn"), (RPN_STD, "rpn")):
        decoded = clip(decode(deltas, priors, std)[None], size)[0]
        close(decoded, reference(f"coder/{name}_decode_clip_hw128"), atol=1e-4)


def test_pyramid_level(reference):
    assert pyramid_level(reference("levels/rois")[:, 1:], 4).tolist() == reference("levels/out").tolist()


@pytest.fixture(scope="module")
def rpn(reference):
    """The dumped level outputs in our layout."""
    logits = [reference(f"rpn/cls_scores/{n}") for n in LEVELS]
    deltas = [reference(f"rpn/bbox_preds/{n}").permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)) for n in LEVELS]
    levels = anchors([tuple(x.shape[-2:]) for x in logits], STRIDES, 8.0, torch.device("cpu"))
    flat = torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in logits], 1)
    return RPNOutput(flat, torch.cat(deltas, 1), torch.cat(levels), [len(x) for x in levels])


def test_anchors(reference, rpn):
    close(rpn.anchors, torch.cat([reference(f"rpn/anchors/{n}") for n in LEVELS]))


@pytest.mark.parametrize("image", [0, 1])
def test_rpn_assignment(reference, rpn, image):
    matched = assign(rpn.anchors, reference(f"rpn/gt_boxes/{image}"), 0.7, 0.3, low_quality=True, min_positive=0.3)
    # theirs: 0 negative, -1 ignored, from 1 the box
    ours = torch.where(matched >= 0, matched + 1, torch.where(matched == -1, 0, -1))
    assert torch.equal(ours, reference(f"rpn/assigned_gt_inds/{image}"))


def test_rpn_loss(reference, rpn):
    labels, weights = reference("rpn/labels"), reference("rpn/label_weights")
    sampled = torch.nonzero(weights.flatten() > 0).flatten()
    objectness = (labels.flatten()[sampled] == 0).float()
    targets = reference("rpn/bbox_targets").reshape(-1, 4)[sampled[objectness > 0]]
    losses = rpn_loss(
        rpn.logits.flatten()[sampled], rpn.deltas.flatten(0, 1)[sampled], RPNTargets(sampled, objectness, targets)
    )
    assert len(sampled) == int(reference("rpn/avg_factor"))
    close(losses["rpn_cls"], reference("rpn/loss_cls_sum_levels"))
    close(losses["rpn_box"], reference("rpn/loss_bbox_sum_levels"))


def test_rpn_targets_are_encoded_alike(reference, rpn):
    for image in (0, 1):
        boxes = reference(f"rpn/gt_boxes/{image}")
        matched = assign(rpn.anchors, boxes, 0.7, 0.3, low_quality=True, min_positive=0.3)
        positive = torch.nonzero(reference("rpn/bbox_weights")[image, :, 0] > 0).flatten()
        ours = encode(boxes[matched[positive]], rpn.anchors[positive], RPN_STD)
        close(ours, reference("rpn/bbox_targets")[image, positive], atol=1e-5)


def test_proposals(reference, rpn, tiny_detector):
    sizes = torch.full((2, 2), 128)
    boxes, scores = FasterRCNN.proposals(tiny_detector, rpn, sizes, training=True)
    for image in (0, 1):
        keep = scores[image] > 0
        assert int(keep.sum()) == len(reference(f"rpn/proposals/{image}"))
        close(scores[image][keep], reference(f"rpn/proposal_scores/{image}"))
        distance = torch.cdist(boxes[image][keep], reference(f"rpn/proposals/{image}"), p=torch.inf)
        assert distance.amin(0).max() < 1e-3  # boxes of equal score may stand in another order
        assert distance.amin(1).max() < 1e-3


@pytest.fixture
def tiny_detector():
    sizes = ["detector.pre_nms_train=2000", "detector.proposals_train=1000"]
    return build(load_settings("demo", sizes).detector, 80)


def test_classification_loss(reference):
    logits, labels = reference("cls/logits"), reference("cls/labels")
    rois = RoIs([], labels, torch.zeros(len(labels), 4), torch.tensor(float(len(labels))), labels)
    close(classification_loss(logits, rois, reference("cls/label_weights")), reference("cls/loss_mmdet"))


def test_classification_loss_of_the_paper(reference):
    """Eq. 4-5 over the batch."""
    logits, labels = reference("cls/logits"), reference("cls/labels")
    rois = RoIs([], labels, torch.zeros(len(labels), 4), torch.tensor(float(len(labels))), labels)
    loss = classification_loss(logits, rois, reference("cls/label_weights"), "paper")
    close(loss, reference("cls/paper_eq4_batch"))


def test_negatives_are_weighted_by_the_teachers_background_score(reference, monkeypatch):
    settings = load_settings("demo", [])
    student = build(settings.detector, 80)
    method = SoftTeacher(student, build(settings.detector, 80), settings, {str(n): 1.0 for n in range(80)})
    rois, labels = reference("cls/rois"), reference("cls/labels")
    boxes = [rois[rois[:, 0] == n][:, 1:] for n in (0, 1)]
    negative = [labels[rois[:, 0] == n] == 80 for n in (0, 1)]
    matrices = torch.stack(
        [
            reference(f"iter/H_student/{n}").double() @ torch.linalg.inv(reference(f"iter/H_teacher/{n}").double())
            for n in (0, 1)
        ]
    )

    def box_head(features, places):
        """Its softmax is what the reference's teacher saw; it must be asked about the reference's places."""
        for n, place in enumerate(places):
            close(place, reference(f"cls/rois_teacher_frame/{n}")[negative[n]], atol=1e-3)
        seen = [reference(f"cls/teacher_scores/{n}")[negative[n]] for n in (0, 1)]
        return torch.cat(seen).clamp(min=1e-30).log(), None

    monkeypatch.setattr(method.teacher, "box_head", box_head)
    views = Views(torch.zeros(2, 3, 128, 128), torch.full((2, 2), 128), torch.eye(3).expand(2, 3, 3), [], [], [0, 1])
    sampled = RoIs(boxes, labels, rois[:, 1:], torch.tensor(float(len(labels))), labels)
    part = Unlabeled(views, views, matrices, [], views.noise())
    close(method.reliability(sampled, reference("cls/logits"), [], part), reference("cls/label_weights"))


@pytest.mark.parametrize("image", [0, 1])
def test_roi_assignment(reference, image):
    boxes = reference(f"cls/assign_gt/{image}")
    candidates = torch.cat([boxes, reference(f"cls/proposals_in/{image}")])
    matched = assign(candidates, boxes, 0.5, 0.5, low_quality=False)
    expected = reference(f"cls/assign_gt_inds/{image}")
    assert torch.equal(matched + 1, expected)


def test_rois_in_the_teachers_frame(reference):
    rois = reference("cls/rois")
    for image in (0, 1):
        to_strong = reference(f"iter/H_student/{image}").double() @ torch.linalg.inv(
            reference(f"iter/H_teacher/{image}").double()
        )
        boxes = rois[rois[:, 0] == image][:, 1:]
        ours = project_boxes(boxes, torch.linalg.inv(to_strong), torch.tensor([128, 128]))
        close(ours, reference(f"cls/rois_teacher_frame/{image}"), atol=1e-3)


def test_regression_loss(reference):
    rois, labels = reference("reg/rois"), reference("reg/labels")
    boxes = [rois[rois[:, 0] == n][:, 1:] for n in (0, 1)]
    targets = []
    for n in (0, 1):
        own, gt = labels[rois[:, 0] == n], reference(f"reg/gt/{n}")
        matched = assign(boxes[n], gt, 0.5, 0.5, low_quality=False)
        targets.append(torch.where((own < 80)[:, None], gt[matched.clamp(min=0)], boxes[n]))
    deltas = reference("reg/bbox_pred")[:, None].expand(-1, 80, -1)
    rois = RoIs(boxes, labels, torch.cat(targets), torch.tensor(float(len(labels))), labels)
    close(regression_loss(deltas, rois), reference("reg/loss_mmdet"))
    close(regression_loss(deltas, rois, "paper"), reference("reg/paper_per_fg"))


@pytest.mark.parametrize("image", [0, 1])
def test_pseudo_boxes_in_the_students_frame(reference, image):
    boxes, scores, labels = (reference(f"iter/pseudo_{k}/{image}") for k in ("orig_frame", "scores", "labels"))
    to_student = reference(f"iter/H_student/{image}").double()
    moved, keep = to_strong_view(Detections(boxes, scores, labels), to_student, torch.tensor([128, 128]))
    assert keep.all()
    close(moved.boxes, reference(f"iter/pseudo_student_frame/{image}"), atol=1e-3)


def test_settings_of_the_reference(reference):
    ours = load_settings(None, []).method
    for key, theirs in (("unsup_weight", "unsup_weight"), ("jitter_times", "jitter_times"), ("jitter_scale",) * 2):
        assert getattr(ours, key) == pytest.approx(float(reference(f"iter/cfg/{theirs}")))
