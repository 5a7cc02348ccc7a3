"""One typed, validated settings tree. Presets are small YAML files over its defaults; `--set key=value` goes on top.

The defaults are the paper's partially-labelled setting in the form of the authors' code (see `docs/method.md`), but
for the ImageNet weights, which the presets `coco-*` name.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from softteacher.choices import EngineName, MethodName
from softteacher.errors import UserError
from softteacher.overrides import nearest, read_overrides

KINDS = ("fasterrcnn", "maskrcnn", "fcos")
RESNETS, SWINS = ("resnet18", "resnet34", "resnet50", "resnet101"), ("swin_t", "swin_s", "swin_b")
BACKBONES = (*RESNETS, *SWINS, "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "tiny")
if TYPE_CHECKING:
    DetectorName = str
else:
    DetectorName = Literal[tuple(f"{kind}_{backbone}_fpn" for kind in KINDS for backbone in BACKBONES)]
# what a trained model can be evaluated and exported with, other than it was trained
AFTER_TRAINING = (
    *("detector.score_threshold", "detector.nms_threshold", "detector.max_detections"),
    "detector.refine_boxes",
    *("training.device", "training.precision", "training.evaluate_batch", "data.workers", "data.max_bad_images"),
)
Share = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=32, le=8192)]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _bool_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false are no value of this setting")
        return value


class DataSettings(_Group):
    """Images and their views."""

    short_side: int = Field(800, ge=32, le=4096, description="short side of an image at test time, pixels")
    long_side: int | None = Field(None, ge=32, le=8192, description="limit of the long side; none: 5/3 of short_side")
    scale_jitter: tuple[float, float] = Field(
        (0.5, 1.5), description="training views: the short side is drawn from short_side times this range"
    )
    horizontal_flip: Share = Field(0.5, description="probability of a flip, drawn for each view by itself")
    labeled_color: bool = Field(True, description="one colour operation on labelled images")
    strong_color: bool = Field(True, description="one colour operation on the strong view")
    strong_geometry: bool = Field(True, description="one of translate, rotate, shear on the strong view")
    strong_erase: bool = Field(True, description="1 to 5 erased patches on the strong view")
    max_rotation: float = Field(30.0, ge=0, le=90, description="strong view: degrees of rotation and of shear")
    max_translation: Share = Field(0.1, description="strong view: translation, share of the side")
    max_bad_images: Share = Field(
        0.01, description="share of unreadable images that a run survives (one always may be)"
    )
    workers: int = Field(2, ge=0, le=256, description="loader processes; 0: load in the training process")
    cache_mb: int = Field(20_480, ge=0, description="images of S3 kept on the local disk, MB in all; 0: none")
    cache_dir: str | None = Field(
        None, description="where, on a local disk; none: softteacher in the user's cache folder"
    )

    @property
    def max_long_side(self) -> int:
        """The limit of the long side in pixels (1333 for a short side of 800, as in the paper)."""
        return self.long_side or round(self.short_side * 1333 / 800)

    @model_validator(mode="after")
    def _ordered(self) -> DataSettings:
        low, high = self.scale_jitter
        if not 0 < low <= high <= 4:
            raise ValueError("data.scale_jitter must be two numbers, 0 < low <= high <= 4")
        if self.max_long_side < self.short_side:
            raise ValueError("data.long_side must not be under data.short_side")
        return self


class DetectorSettings(_Group):
    """Faster R-CNN, Mask R-CNN or FCOS on a feature pyramid."""

    name: DetectorName = Field("fasterrcnn_resnet50_fpn", description="architecture")
    backbone_weights: str | None = Field(
        None, description="torchvision weights name (IMAGENET1K_V1), local path or s3:// URI; none: random"
    )
    init_from: str | None = Field(
        None,
        description="model folder or state dict (.pt, .pth), local or s3://, whose detector this one starts from, "
        "maybe of other classes",
    )
    norm: Literal["auto", "frozen_batch", "group"] = Field(
        "auto",
        description="of the backbone; auto: that of the model folder init_from, or frozen_batch with backbone_weights, "
        "else group, which learns from nothing; Swin has layer norm in any case, tiny group norm",
    )
    frozen_stages: int = Field(
        1,
        ge=0,
        le=4,
        description="backbone stages that stay as loaded, stem or patch embedding in the first; none without "
        "backbone_weights or init_from",
    )
    finest_stride: Literal[4, 8] = Field(
        4, description="of the finest pyramid level; 8 does without the level that takes most of the time. FCOS: 8"
    )
    fpn_channels: int = Field(256, ge=8, le=1024, description="channels of every pyramid level")
    head_channels: int = Field(1024, ge=8, le=4096, description="width of the box head's two linear layers")
    mask_channels: int = Field(256, ge=8, le=1024, description="maskrcnn: width of the mask head's convolutions")
    head_convs: int = Field(4, ge=1, le=8, description="FCOS: 3x3 convolutions of each branch of the head")
    anchor_scale: float = Field(8.0, gt=0, description="anchor side over the stride of its level")
    pre_nms_train: int = Field(
        2000, ge=1, description="anchors kept per level before NMS, in training and by the teacher"
    )
    proposals_train: int = Field(1000, ge=1, description="proposals per image, in training and by the teacher")
    pre_nms_test: int = Field(1000, ge=1, description="anchors kept per level before NMS, at test")
    proposals_test: int = Field(1000, ge=1, description="proposals per image, at test")
    rpn_batch: int = Field(256, ge=2, description="anchors sampled per image for the RPN loss")
    roi_batch: int = Field(512, ge=2, description="RoIs sampled per image for the box head's losses")
    sampling_ratio: int = Field(0, ge=0, le=8, description="RoIAlign points per bin and axis; 0: adaptive")
    score_threshold: Share = Field(0.05, description="detections under this score are dropped")
    nms_threshold: Share = Field(0.5, description="IoU of the class-wise NMS")
    refine_boxes: bool = Field(
        False, description="at test the box head goes over its detections once more: they fit better. Not FCOS"
    )
    max_detections: int = Field(100, ge=1, le=1000, description="detections per image")

    @property
    def masks(self) -> bool:
        """Whether it learns and answers masks beside boxes."""
        return self.name.startswith("maskrcnn_")


class MethodSettings(_Group):
    """Soft Teacher (paper, section 3), and what it is compared with."""

    name: MethodName = Field("soft_teacher", description="training method")
    unsup_weight: float = Field(4.0, ge=0, description="alpha of L = L_sup + alpha * L_unsup")
    pool_threshold: Share = Field(0.5, description="teacher boxes above this score make the pool of pseudo boxes")
    rpn_threshold: Share = Field(0.9, description="pseudo boxes above this score teach the RPN; 0: all of the pool")
    cls_threshold: Share = Field(0.9, description="pseudo boxes above this score teach the classification; 0: all")
    threshold: Literal["fixed", "adaptive"] = Field(
        "fixed", description="adaptive: one for each class, in place of rpn_ and cls_threshold once it is known"
    )
    adaptive_share: float = Field(
        1.0, gt=0, le=4, description="adaptive: pseudo boxes of a class per image over its labelled boxes per image"
    )
    reliability: Literal[
        "teacher_background", "student_background", "prediction_difference", "iou", "reverse_iou", "none"
    ] = Field("teacher_background", description="weight of negatives; none: 1, as in hard assignment")
    positives: Literal["hard", "soft"] = Field(
        "hard", description="soft: a positive learns the teacher's class distribution there, not the pseudo box's class"
    )
    rpn_ignore: bool = Field(
        False,
        description="anchors on boxes of the pool that don't teach the RPN are left out, not taught as background",
    )
    loss_normalization: Literal["weights", "paper"] = Field(
        "weights", description="by the sum of the weights and the number of RoIs, or as Eq. 4-5 and 9 write it"
    )
    box_jitter: bool = Field(True, description="false: the boxes of cls_threshold teach the regression")
    reg_variance_threshold: float | None = Field(0.02, ge=0, description="boxes below teach the regression; none: all")
    reg_confident: bool = Field(
        False, description="only boxes that teach the classification teach the regression, if their variance is small"
    )
    jitter_times: int = Field(10, ge=2, le=100, description="jittered copies of a pseudo box")
    jitter_scale: float = Field(0.06, gt=0, description="size of the jitter, share of width and height")
    jitter_law: Literal["normal", "uniform"] = Field("normal", description="uniform: Eq. 6 of the paper")
    variance_normalization: Literal["own_side", "mean_side"] = Field(
        "own_side", description="each coordinate over its own side, or all over half of width + height (Eq. 7)"
    )
    mixup: Share = Field(
        0.0, description="share of the steps whose strong views are laid over each other in pairs (MixPL)"
    )
    ema_momentum: float = Field(0.999, ge=0, lt=1, description="momentum of the teacher")
    ema_ramp: bool = Field(True, description="reach it as 1 - 1/(iteration + 1); false: from the first step (paper)")
    label_model: str | None = Field(
        None, description="stac: model folder, local or s3://, whose teacher labels; none: one is trained first"
    )
    burn_in: Share = Field(0.0, description="share of the iterations with labelled images only (paper: none)")
    burn_in_cache: str | None = Field(
        None,
        description="folder or s3:// prefix where runs that differ in the method only share what burn-in made: the "
        "first leaves it there, the others start from it",
    )
    guard: bool = Field(
        True, description="when pseudo labels do harm: back to the best weights, and less of them; needs evaluate_every"
    )

    @field_validator("reliability", mode="before")
    @classmethod
    def _none_is_a_name(cls, value: Any) -> Any:
        return "none" if value is None else value  # `--set key=none` otherwise means that there is none


class TrainingSettings(_Group):
    """Optimisation."""

    iterations: int = Field(180_000, ge=1, le=10**9, description="optimizer steps")
    seed: int = Field(0, ge=0, lt=2**32, description="of weights, samplers, views and jitter")
    labeled_per_batch: int = Field(1, ge=1, description="labelled images per step and process")
    unlabeled_per_batch: int = Field(4, ge=0, description="unlabelled images per step and process")
    new_share: Share | None = Field(
        None, description="share of the unlabelled images that the last round of `collect` brought; none: as they come"
    )
    accumulate: int = Field(1, ge=1, le=1024, description="batches that make one step, for few or small GPUs")
    separate_backward: bool = Field(False, description="unlabelled images first, then labelled: less memory")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="adamw learns faster from nothing; lr about 0.001")
    reference_batch: int | None = Field(
        None,
        ge=1,
        description="images per step, all processes together, that lr, iterations and evaluate_every are meant for; "
        "another batch changes them: lr x batch/reference, the others x reference/batch; none: they stay",
    )
    lr: float = Field(0.01, gt=0, description="learning rate after warm-up")
    backbone_lr: float = Field(1.0, gt=0, le=1, description="of the backbone, over lr; pretrained ones want less")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(1e-4, ge=0, description="of either optimizer")
    warmup_iterations: int = Field(500, ge=0, description="linear warm-up of the learning rate")
    lr_schedule: Literal["step", "cosine"] = Field("step", description="how lr falls after warm-up; cosine: to 0")
    warmup_factor: float = Field(0.001, gt=0, le=1, description="learning rate at the first step, share of lr")
    lr_steps: tuple[float, ...] = Field(
        (2 / 3, 8 / 9), description="step: shares of the iterations after which lr is divided by 10"
    )
    clip_gradient: float | None = Field(None, gt=0, description="largest norm of the gradient; none: no clipping")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 autocast where the hardware has it; fp16: with loss scaling, for older GPUs"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    threads: int = Field(
        0, ge=0, le=1024, description="CPU threads; 0: one for each core that it may use. Tiny networks run best on 1"
    )
    log_every: int = Field(20, ge=1, description="iterations between two lines of training.jsonl")
    evaluate_every: int = Field(
        0, ge=0, description="iterations between two validations, the best weights are kept; 0: only at the end"
    )
    patience: int = Field(0, ge=0, description="validations without a better teacher AP until training stops; 0: never")
    checkpoint_every: int = Field(500, ge=0, description="iterations between two checkpoints; 0: only at SIGTERM")
    keep_checkpoints: int = Field(2, ge=1, le=100, description="checkpoints that are kept")
    evaluate_batch: int = Field(4, ge=1, description="images per batch in evaluation")


class ExportSettings(_Group):
    """The ONNX file."""

    image_size: tuple[Side, Side] | None = Field(
        None, description="height and width of the input; none: what holds every validation image at its test size"
    )
    max_ap_loss: float = Field(0.005, ge=0, le=1, description="an export that loses more AP than this is refused")
    engines: list[EngineName] = Field(
        ["openvino-bf16"],
        description="what else may serve the ONNX file: its AP and speed are measured; left out where it can't run",
    )


class Settings(_Group):
    """Everything that decides a run."""

    data: DataSettings = DataSettings()
    detector: DetectorSettings = DetectorSettings()
    method: MethodSettings = MethodSettings()
    training: TrainingSettings = TrainingSettings()
    export: ExportSettings = ExportSettings()

    @property
    def burn_in_steps(self) -> int:
        """The first step with unlabelled images."""
        return round(self.method.burn_in * self.training.iterations)

    def to_yaml(self, comments: bool = False) -> str:
        """The whole tree as YAML, with a comment for each key if asked for."""
        lines: list[str] = []
        for group, model in self._groups():
            lines.append(f"{group}:" + (f"  # {(type(model).__doc__ or '').strip()}" if comments else ""))
            for key, field in type(model).model_fields.items():
                value = yaml.safe_dump(model.model_dump(mode="json")[key], default_flow_style=True, width=1000)
                text = f"  {key}: {value.removesuffix(chr(10)).removesuffix(chr(10) + '...')}"
                lines.append(f"{text:<44}  # {field.description}" if comments else text)
        return "\n".join(lines) + "\n"

    def _groups(self) -> Iterator[tuple[str, _Group]]:
        for group in type(self).model_fields:
            yield group, getattr(self, group)


def presets() -> list[str]:
    """The names of the presets that come with the package."""
    found = [p.name for p in files("softteacher.presets").iterdir()]
    return sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml"))


def load_settings(preset: str | None = None, overrides: Iterable[str] = ()) -> Settings:
    """Settings of a preset with `key=value` overrides.

    Args:
        preset: one of `presets()`, or several joined by `+`, each on top of those before it; none for the defaults.
        overrides: e.g. `training.iterations=1000`, `data.scale_jitter=[0.8, 1.2]`; values are YAML, or `none`.

    Raises:
        UserError: unknown preset or key (the nearest valid one is named), or a bad value.

    Example:
        >>> load_settings("coco-10pct", ["training.seed=7"]).training.seed
        7
    """
    tree: dict[str, dict[str, Any]] = {}
    for part in preset.split("+") if preset is not None else ():
        if part not in presets():
            raise UserError(f"--preset {part}: no such preset{nearest(part, presets())}")
        text = files("softteacher.presets").joinpath(f"{part}.yaml").read_text()
        for group, values in yaml.safe_load(text).items():
            tree.setdefault(group, {}).update(values)
    for group, values in read_overrides(overrides, _keys()).items():
        tree.setdefault(group, {}).update(values)
    settings = _validated(tree, "settings")
    # not of a model's settings: it may be older than this, and its steps are done
    if odd := [share for share in settings.training.lr_steps if not 0 < share <= 1]:
        raise UserError(
            f"settings: training.lr_steps = {odd}: these are shares of training.iterations, each above 0 and at most "
            "1, e.g. [0.67, 0.89]"
        )
    return settings


def change_settings(settings: Settings, overrides: Iterable[str]) -> Settings:
    """The settings of a model with `key=value` overrides of what is not decided when it is trained.

    Raises:
        UserError: unknown key, bad value, or a setting that its weights depend on.
    """
    changes = read_overrides(overrides, _keys())
    for key in (f"{group}.{key}" for group, values in changes.items() for key in values):
        if not key.startswith("export.") and key not in AFTER_TRAINING:
            free = f"export.*, {', '.join(AFTER_TRAINING)}"
            raise UserError(f"--set {key}: is decided when the model is trained; later there are {free}")
    tree = settings.model_dump(mode="json")
    for group, values in changes.items():
        tree[group].update(values)
    return _validated(tree, "settings")


def _keys() -> list[str]:
    return [f"{group}.{key}" for group, model in Settings()._groups() for key in type(model).model_fields]


def read_settings(path: str | Path) -> Settings:
    """Settings from a `settings.yaml` as `Settings.to_yaml` writes it.

    Raises:
        UserError: missing, no YAML, or not a valid settings tree.
    """
    from softteacher import storage

    try:
        tree = yaml.safe_load(storage.read_bytes(path))
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        why = str(e).splitlines()[0]
        raise UserError(f"{path}: not valid YAML; take the file that `train` wrote ({why})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: no settings in it; take the file that `train` wrote")
    return _validated(tree, str(path))


def _validated(tree: dict[str, Any], where: str) -> Settings:
    try:
        return Settings.model_validate(tree)
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(x) for x in first["loc"] if isinstance(x, str)) or "settings"
        hint = ""
        if first["type"] == "literal_error":
            hint = nearest(
                str(first["input"]), [x.strip("'") for x in first["ctx"]["expected"].replace(" or ", ", ").split(", ")]
            )
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}: {key} = {reprlib.repr(first['input'])}: {message}{hint}") from None
