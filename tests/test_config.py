"""The settings tree: the paper's values, overrides, and what is refused with the nearest valid key."""

import re

import pytest
import yaml

from softteacher.config import Settings, change_settings, load_settings, presets, read_settings
from softteacher.errors import UserError


def value(settings, key):
    group, name = key.split(".")
    return getattr(getattr(settings, group), name)


def test_presets():
    full = {"coco-full", "coco-full-r101", "coco-full-swin"}
    assert set(presets()) >= {"demo", "small", "coco-1pct", "coco-5pct", "coco-10pct", *full}


@pytest.mark.parametrize("preset", ["coco-1pct", "coco-5pct", "coco-10pct"])
@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("method.name", "soft_teacher"),
        ("method.unsup_weight", 4),
        ("method.pool_threshold", 0.5),
        ("method.rpn_threshold", 0.9),
        ("method.cls_threshold", 0.9),
        ("method.reg_variance_threshold", 0.02),
        ("method.jitter_times", 10),
        ("method.jitter_scale", 0.06),
        ("method.ema_momentum", 0.999),
        ("method.burn_in", 0),
        ("training.iterations", 180_000),
        ("training.lr", 0.01),
        ("training.lr_steps", (2 / 3, 8 / 9)),
        ("training.reference_batch", 40),
        ("training.labeled_per_batch", 1),
        ("training.unlabeled_per_batch", 4),
        ("training.weight_decay", 1e-4),
        ("training.warmup_iterations", 500),
        ("training.momentum", 0.9),
        ("training.warmup_factor", 0.001),
        ("training.clip_gradient", None),
        ("data.short_side", 800),
        ("data.max_long_side", 1333),
        ("data.scale_jitter", (0.5, 1.5)),
        ("data.horizontal_flip", 0.5),
        ("data.labeled_color", True),
        ("data.max_rotation", 30),
        ("data.max_translation", 0.1),
        ("detector.name", "fasterrcnn_resnet50_fpn"),
        ("detector.frozen_stages", 1),
        ("detector.anchor_scale", 8),
        ("detector.pre_nms_train", 2000),
        ("detector.proposals_train", 1000),
        ("detector.pre_nms_test", 1000),
        ("detector.proposals_test", 1000),
        ("detector.rpn_batch", 256),
        ("detector.roi_batch", 512),
        ("detector.sampling_ratio", 0),
        ("detector.score_threshold", 0.05),
        ("detector.nms_threshold", 0.5),
        ("detector.max_detections", 100),
    ],
)
def test_the_papers_partial_setting(preset, key, expected):
    assert value(load_settings(preset), key) == expected


@pytest.mark.parametrize(
    ("preset", "name", "iterations"),
    [
        ("coco-full", "resnet50", 720_000),
        ("coco-full-r101", "resnet101", 1_080_000),
        ("coco-full-swin", "swin_b", 720_000),
    ],
)
def test_the_papers_full_setting(preset, name, iterations):
    settings = load_settings(preset)
    assert settings.detector.name == f"fasterrcnn_{name}_fpn"
    assert settings.method.unsup_weight == 2
    assert settings.training.iterations == iterations
    assert settings.training.reference_batch == 64
    assert (settings.training.labeled_per_batch, settings.training.unlabeled_per_batch) == (4, 4)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        # what both say is the later one's, what one says is its own: iterations, weight, optimizer, backbone weights
        ("coco-full+demo", (700, 2.0, "adamw", "IMAGENET1K_V1")),
        ("demo+coco-full", (720_000, 2.0, "adamw", "IMAGENET1K_V1")),
        ("coco-10pct+coco-full", (720_000, 2.0, "sgd", "IMAGENET1K_V1")),
        ("demo+small+coco-full-r101", (1_080_000, 2.0, "adamw", "IMAGENET1K_V1")),
        ("demo+demo", (700, 2.0, "adamw", None)),
    ],
)
def test_combined(preset, expected):
    settings = load_settings(preset)
    found = (settings.training.iterations, settings.method.unsup_weight, settings.training.optimizer)
    assert (*found, settings.detector.backbone_weights) == expected
    assert load_settings(preset, ["training.iterations=5"]).training.iterations == 5


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("training.iterations=7", "training.iterations", 7),
        ("training.iterations=10.0", "training.iterations", 10),
        ("training.lr=1e-4", "training.lr", 1e-4),
        ("training.lr=.5e-1", "training.lr", 0.05),
        ("training.lr_steps=[1e-1, 0.5, 1]", "training.lr_steps", (0.1, 0.5, 1)),
        ("training.seed=010", "training.seed", 10),
        ("training.iterations=180_000", "training.iterations", 180_000),
        ("export.image_size=[064, 96]", "export.image_size", (64, 96)),
        ("data.scale_jitter=[0.8, 1.2]", "data.scale_jitter", (0.8, 1.2)),
        ("detector.backbone_weights=s3://b/w.pth", "detector.backbone_weights", "s3://b/w.pth"),
        ("detector.backbone_weights=null", "detector.backbone_weights", None),
        ("detector.name=fasterrcnn_mobilenet_v2_fpn", "detector.name", "fasterrcnn_mobilenet_v2_fpn"),
        ("data.strong_color=false", "data.strong_color", False),
        ("export.image_size=[64, 96]", "export.image_size", (64, 96)),
    ],
)
def test_overrides(override, key, expected):
    assert value(load_settings("coco-10pct", ["training.iterations=3", override]), key) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.iteration=5", "training.iteration: no such setting; did you mean training.iterations?"),
        ("iterations=5", "iterations: no such setting; did you mean training.iterations?"),
        ("trainng.lr=5", "did you mean training.lr?"),
        ("short_side=5", "did you mean data.short_side?"),
        ("foo=1", "foo: no such setting; did you mean [a-z]+"),
        ("=5", "no such setting"),
        ("training=5", "no such setting; did you mean training"),
        ("training.iterations", "write key=value"),
        ("detector.name=resnet50", "did you mean fasterrcnn_resnet50_fpn?"),
        ("training.optimizer=adam", "did you mean adamw?"),
        ("method.name=softteacher", "did you mean soft_teacher?"),
        ("training.iterations=0", "training.iterations = 0: .*greater than or equal to 1"),
        ("training.iterations=abc", "training.iterations = 'abc': .*integer"),
        ("training.iterations=1.5", "training.iterations = 1.5: .*integer"),
        ("training.iterations=true", "training.iterations = True"),
        ("training.iterations=1000000000000", "training.iterations = "),
        ("training.seed=-1", "training.seed = -1"),
        ("training.seed=4294967296", "training.seed = "),
        *((f"training.lr={v}", "training.lr = ") for v in ("0", "-1", "nan", ".nan", ".inf", "inf", "[1]", "true", "")),
        ("training.lr_steps=[.nan]", "training.lr_steps = nan"),
        *((f"training.lr_steps={v}", "are shares of training.iterations") for v in ("[120000, 160000]", "[-1]", "[0]")),
        ("training.iterations=10:00", "training.iterations = '10:00': .*integer"),
        ("training.lr=1:30.5", "training.lr = '1:30.5': .*number"),
        ("training.threads=1025", "training.threads = 1025: .*less than or equal to 1024"),
        ("data.scale_jitter=[2, 1]", "0 < low <= high"),
        ("data.scale_jitter=3", "data.scale_jitter = 3"),
        ("data.long_side=40", "long_side must not be under data.short_side"),
        ("data.horizontal_flip=2", "data.horizontal_flip = 2"),
        ("data.labeled_color=maybe", "data.labeled_color = 'maybe'"),
        ("data.workers=2001-13-45", "can't be read"),
        ("data.workers=[1", "can't be read"),
        ("data.workers=!!int [1]", "can't be read"),
        ("export.image_size=[1]", "export.image_size"),
        ("export.image_size=[0, 64]", "export.image_size = 0"),
        ("detector.backbone_weights=123", "detector.backbone_weights = 123"),
    ],
)
def test_refused(override, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as e:
        load_settings(None, [override])
    assert len(str(e.value).splitlines()) == 1


def test_changed_after_the_training():
    settings = load_settings("small", ["detector.backbone_weights=none"])
    changed = change_settings(settings, ["export.engines=[openvino-int8]", "detector.score_threshold=0.001"])
    assert changed.export.engines == ["openvino-int8"]
    assert changed.detector.score_threshold == 0.001
    assert change_settings(changed, ["export.engines=[]"]).detector == changed.detector
    assert change_settings(settings, []) == settings
    for override, message in (
        (
            "detector.name=fasterrcnn_tiny_fpn",
            r"is decided when the model is trained; later there are export\.\*, .*max_bad_images",
        ),
        ("detector.score_treshold=1", r"did you mean detector\.score_threshold"),
        ("export.max_ap_loss=2", "less than or equal to 1"),
    ):
        with pytest.raises(UserError, match=message):
            change_settings(settings, [override])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coco-10", "did you mean coco-10pct?"),
        ("coco-10pct+coco-ful", "--preset coco-ful: no such preset; did you mean coco-full?"),
        ("zzzzzz", "there are coco-10pct, "),
        ("", "there are"),
        ("demo+", "--preset : no such preset; there are"),
    ],
)
def test_unknown_preset(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_settings(name)


@pytest.mark.parametrize("preset", [None, *presets()])
@pytest.mark.parametrize("comments", [False, True])
def test_round_trip(tmp_path, preset, comments):
    settings = load_settings(preset, ["training.seed=7", "detector.backbone_weights='a: #b'"])
    (tmp_path / "settings.yaml").write_text(settings.to_yaml(comments))
    assert read_settings(tmp_path / "settings.yaml") == settings


def test_every_key_is_explained():
    text = Settings().to_yaml(comments=True)
    tree = yaml.safe_load(text)
    keys = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(keys) == sum(len(group) for group in tree.values()) > 50
    assert all("  # " in line and line.split("  # ")[1] not in {"", "None"} for line in text.splitlines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no settings in it"),
        ("5", "no settings in it"),
        ("[1", "not valid YAML"),
        ("a: 2001-13-45", "not valid YAML"),
        ("data: {short_side: -1}", "data.short_side = -1"),
        ("data: {shortside: 64}", "data.shortside = 64"),
        ("data: null", "data = None"),
        ("colour: {}", "colour = {}"),
        ("{5: 3}", "Keys should be strings"),
    ],
)
def test_read_settings(tmp_path, text, message):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as e:
        read_settings(path)
    assert str(path) in str(e.value)
