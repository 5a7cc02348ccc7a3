"""Training batches: the batch of step t is a pure function of (seed, t), so a run can go on anywhere."""

from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from softteacher import distributed, storage
from softteacher.config import Settings
from softteacher.data.cache import ImageCache
from softteacher.data.check import read_image
from softteacher.data.coco import CocoDataset
from softteacher.data.images import PAD, BadImage, original_size
from softteacher.data.masks import draw_masks
from softteacher.data.views import View, labeled_view, largest_short_side, project_boxes, strong_view, weak_view
from softteacher.errors import UserError

STRIDE = 32  # batches are padded to a multiple of it


@dataclass
class Views:
    """A padded batch of views.

    Attributes:
        images: [B, 3, H, W] uint8, RGB; views at the top left, padded with grey.
        sizes: [B, 2] int64, (height, width) of each view before padding.
        matrices: [B, 3, 3] float64, original -> view.
        boxes: B x [n, 4] float32, xyxy in view pixels; an empty list without labels. Weak views have the hidden labels
            of unlabelled images, if their json has any: for diagnostics, never for a loss.
        labels: B x [n] int64.
        seeds: B seeds of what a method draws for an image (samples, jitter), below 2**32.
        masks: B x [n, h, w] bool, of the boxes, at the view's size before padding; none unless the detector has masks.
    """

    images: torch.Tensor
    sizes: torch.Tensor
    matrices: torch.Tensor
    boxes: list[torch.Tensor]
    labels: list[torch.Tensor]
    seeds: list[int]
    masks: list[torch.Tensor] | None = None

    def noise(self) -> list[torch.Generator]:
        """A generator for each image, so that its draws don't depend on what else is in the batch."""
        return [torch.Generator(self.images.device).manual_seed(seed) for seed in self.seeds]

    def to(self, device: torch.device) -> Views:
        """The same views on another device."""
        return Views(
            self.images.to(device, non_blocking=True),
            self.sizes.to(device),
            self.matrices.to(device),
            [b.to(device) for b in self.boxes],
            [n.to(device) for n in self.labels],
            self.seeds,
            None if self.masks is None else [m.to(device, non_blocking=True) for m in self.masks],
        )


@dataclass
class Batch:
    """The images of one training step, or a part of them.

    `broken` names images that could not be read and were replaced by others.
    """

    labeled: Views | None
    weak: Views | None = None
    strong: Views | None = None
    broken: dict[str, list[str]] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        labeled, weak, strong = (v and v.to(device) for v in (self.labeled, self.weak, self.strong))
        return replace(self, labeled=labeled, weak=weak, strong=strong)

    def parts(self) -> list[Batch]:
        """The unlabelled images, where there are any, and the labelled ones, each a batch by itself."""
        labeled = replace(self, weak=None, strong=None)
        return [replace(self, labeled=None), labeled] if self.strong else [labeled]


def batches(
    labeled: CocoDataset, unlabeled: CocoDataset | None, settings: Settings, start: int, burn_in: int = 0
) -> Iterator[Batch]:
    """The batches of the steps `start .. training.iterations`, `training.accumulate` of them a step.

    Of many processes each gets its part: together they see the images, views and draws that one process with
    their whole batch would see.

    Args:
        labeled: images with boxes.
        unlabeled: images; none: labelled batches only.
        settings: batch sizes, views, seed, workers.
        start: first step.
        burn_in: first step with unlabelled images.

    Raises:
        UserError: the store can't be read, or not one readable image is left.
    """
    loader = DataLoader(
        _Steps(labeled, unlabeled, settings, burn_in),
        batch_size=None,
        sampler=range(
            start * settings.training.accumulate, settings.training.iterations * settings.training.accumulate
        ),
        num_workers=settings.data.workers,
        prefetch_factor=4 if settings.data.workers else None,
        worker_init_fn=_start_worker,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Steps(Dataset):
    """Item n is this process's batch n. Errors are handed over as values: a worker would wrap them in a traceback."""

    def __init__(self, labeled: CocoDataset, unlabeled: CocoDataset | None, settings: Settings, burn_in: int) -> None:
        self.labeled, self.unlabeled, self.settings, self.burn_in = labeled, unlabeled, settings, burn_in
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.cache = ImageCache(settings.data.cache_mb, settings.data.cache_dir)
        self.orders: dict[str, tuple[int, np.ndarray]] = {}
        new = np.array([i.new for i in unlabeled.images] if unlabeled is not None else [], bool)
        self.new, self.known = np.flatnonzero(new), np.flatnonzero(~new)
        self.short_side = largest_short_side(settings.data)

    def __getitem__(self, number: int) -> Batch | UserError:
        try:
            return self._batch(*divmod(number, self.settings.training.accumulate))
        except UserError as e:
            return e

    def _batch(self, step: int, part: int) -> Batch:
        training, data = self.settings.training, self.settings.data
        broken: dict[str, list[str]] = {}
        views, rows, seeds, originals = [], [], [], []
        for position, rng in self._draws(step, part, 0, training.labeled_per_batch):
            index, image = self._image(self.labeled, "labeled", position, broken)
            seeds.append(int(rng.integers(2**32)))
            views.append(labeled_view(image, rng, data))
            rows.append(index)
            originals.append(original_size(image)[::-1])
        collated = _collate(views, seeds, *_targets(self.labeled, rows, views))
        if self.settings.detector.masks:
            collated.masks = _masks(self.labeled, rows, views, originals)
        batch = Batch(collated, broken=broken)
        if self.unlabeled is not None and step >= self.burn_in and training.unlabeled_per_batch:
            weak, strong, rows, seeds = [], [], [], []
            for position, rng in self._draws(step, part, 1, training.unlabeled_per_batch):
                index, image = self._unlabeled_image(position, broken)
                rows.append(index)
                seeds.append(int(rng.integers(2**32)))
                weak.append(weak_view(image, rng, data))
                strong.append(strong_view(image, rng, data))
            # what the json says of an unlabelled image is for diagnostics, or what STAC's teacher found
            known = len(self.unlabeled.annotations) > 0
            batch.weak = _collate(weak, seeds, *(_targets(self.unlabeled, rows, weak) if known else ()))
            taught = known and self.settings.method.name == "stac"
            batch.strong = _collate(strong, seeds, *(_targets(self.unlabeled, rows, strong) if taught else ()))
        return batch

    def _draws(self, step: int, part: int, kind: int, count: int) -> Iterator[tuple[int, np.random.Generator]]:
        """Place in the endless sequence of images, and random numbers, of each image of a batch."""
        first = (part * self.world_size + self.rank) * count
        whole = self.settings.training.accumulate * self.world_size * count
        for slot in range(first, first + count):
            yield step * whole + slot, np.random.default_rng([self.settings.training.seed, step, kind, slot])

    def _unlabeled_image(self, position: int, broken: dict[str, list[str]]) -> tuple[int, Image.Image]:
        """The image at a position of the endless sequence, in which new and known ones take turns by `new_share`."""
        assert self.unlabeled is not None
        share = self.settings.training.new_share
        if share is None or not len(self.new) or len(self.new) == len(self.unlabeled):
            return self._image(self.unlabeled, "unlabeled", position, broken)
        before = math.floor(position * share)  # of the new ones, up to this position
        if math.floor((position + 1) * share) > before:
            return self._image(self.unlabeled, "unlabeled-new", before, broken, self.new)
        return self._image(self.unlabeled, "unlabeled-known", position - before, broken, self.known)

    def _image(
        self,
        dataset: CocoDataset,
        part: str,
        position: int,
        broken: dict[str, list[str]],
        among: np.ndarray | None = None,
    ) -> tuple[int, Image.Image]:
        """The image at a position of the endless shuffled sequence of all or some images, or the next readable one."""
        count = len(dataset) if among is None else len(among)
        for offset in range(count):
            epoch, place = divmod(position + offset, count)
            index = int(self._order(part, epoch, count)[place])
            index = index if among is None else int(among[index])
            try:
                return index, read_image(dataset, index, self.cache.read, self.short_side)[0]
            except (BadImage, storage.MissingFile) as e:
                broken.setdefault(part.partition("-")[0], []).append(str(e))
        raise UserError(f"{dataset.source}: not one of its {count} images can be read; check the image folder")

    def _order(self, part: str, epoch: int, count: int) -> np.ndarray:
        """The shuffled indices of an epoch; the last one is kept, as a million take a while."""
        if self.orders.get(part, (-1, None))[0] != epoch:
            rng = np.random.default_rng([self.settings.training.seed, epoch, len(part)])
            self.orders[part] = epoch, rng.permutation(count)
        return self.orders[part][1]


def pad(images: list[np.ndarray]) -> torch.Tensor:
    """Stack images [h, w, 3] uint8 at the top left of a grey batch [B, 3, H, W] whose sides divide by 32."""
    height, width = (max(-(-i.shape[axis] // STRIDE) * STRIDE for i in images) for axis in (0, 1))
    batch = np.empty((len(images), height, width, 3), np.uint8)
    grey = np.tile(np.array(PAD, np.uint8), (width, 1))  # numpy fills by rows many times faster than by pixels
    for row, image in zip(batch, images, strict=True):
        h, w = image.shape[:2]
        row[:h, :w] = image
        row[:h, w:] = grey[w:]
        row[h:] = grey
    return torch.from_numpy(batch).permute(0, 3, 1, 2)


def _targets(dataset: CocoDataset, rows: list[int], views: list[View]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Boxes and labels of images in their views; boxes that are hardly in it are left out."""
    boxes, labels = [], []
    for row, view in zip(rows, views, strict=True):
        box, label = dataset.targets(row)
        projected, keep = _visible(box, view)
        boxes.append(projected[keep])
        labels.append(torch.from_numpy(label)[keep])
    return boxes, labels


def _masks(
    dataset: CocoDataset, rows: list[int], views: list[View], originals: list[tuple[int, int]]
) -> list[torch.Tensor]:
    """The masks of the boxes that `_targets` gives; originals: (height, width) of the images."""
    masks = []
    for row, view, original in zip(rows, views, originals, strict=True):
        kept = list(itertools.compress(dataset.segmentations(row), _visible(dataset.targets(row)[0], view)[1].tolist()))
        masks.append(torch.from_numpy(draw_masks(kept, original, view.matrix, view.image.size[::-1])))
    return masks


def _visible(box: np.ndarray, view: View) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes of the original image in a view, and which of them are not hardly in it."""
    size = torch.tensor(view.image.size[::-1])
    projected = project_boxes(torch.from_numpy(box), torch.from_numpy(view.matrix), size)
    return projected, (projected[:, 2:] - projected[:, :2]).amin(1) > 1


def _collate(
    views: list[View],
    seeds: list[int],
    boxes: list[torch.Tensor] | None = None,
    labels: list[torch.Tensor] | None = None,
) -> Views:
    sizes = torch.tensor([v.image.size[::-1] for v in views])
    matrices = torch.from_numpy(np.stack([v.matrix for v in views]))
    return Views(pad([np.asarray(v.image) for v in views]), sizes, matrices, boxes or [], labels or [], seeds)


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches it too, and so does a SIGTERM to the whole process group, but the training decides when to end: it
    # needs the images of the step under way. A second one, or ten minutes, end a worker that nobody ends otherwise.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def once(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(600)

    signal.signal(signal.SIGTERM, once)
