"""A marker that is drawn into an image is found in each view where the view's matrix says."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from softteacher.config import load_settings
from softteacher.data.images import PAD, decode
from softteacher.data.views import (
    View,
    color,
    erase,
    geometry_matrix,
    labeled_view,
    largest_short_side,
    project_boxes,
    strong_view,
    warp,
    weak_view,
)

BOX = (60, 30, 90, 66)  # x1, y1, x2, y2 of the marker
SIZE = (150, 100)
STILL = [
    "data.strong_color=false",
    "data.labeled_color=false",
    "data.strong_erase=false",
    "data.short_side=96",
    "data.long_side=999",
]


def marked(size=SIZE, box=BOX):
    """A grey image, like the fill colour, with a red box."""
    pixels = np.empty((size[1], size[0], 3), np.uint8)
    pixels[:] = PAD
    pixels[box[1] : box[3], box[0] : box[2]] = (255, 0, 0)
    return Image.fromarray(pixels)


def found_box(image):
    """Bounding box of the marker in an image, in continuous pixel coordinates: redness is 1 inside, 0 outside."""
    red = np.asarray(image, float)
    solid = (red[..., 0] - red[..., 1]) / 255 > 0.5
    ys, xs = np.nonzero(solid)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


def check(view, tolerance):
    box = project_boxes(torch.tensor([BOX]), torch.from_numpy(view.matrix))[0].numpy()
    np.testing.assert_allclose(found_box(view.image), box, atol=tolerance)


def settings(*overrides):
    return load_settings(None, [*STILL, *overrides]).data


@pytest.mark.parametrize("shift", [(0, 0), (7, 0), (-13, 0), (0, 9), (0, -150), (200, 0)])
def test_a_shift_by_whole_pixels_equals_the_general_warp(shift):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 150, 3), np.uint8))
    matrix = np.array([[1, 0, shift[0]], [0, 1, shift[1]], [0, 0, 1.0]])
    nearly = matrix + np.array([[1e-6, 0, 0], [0, 0, 0], [0, 0, 0]])  # takes the general way
    fast, general = (warp(View(image, np.eye(3)), m) for m in (matrix, nearly))
    np.testing.assert_allclose(np.asarray(fast.image, int), np.asarray(general.image, int), atol=1)
    np.testing.assert_array_equal(fast.matrix, matrix)


def test_views_of_an_image_that_was_decoded_smaller():
    data = settings("data.short_side=48", "data.scale_jitter=[0.5, 1.0]")
    buffer = io.BytesIO()
    marked((800, 400), (400, 80, 600, 240)).save(buffer, "JPEG", quality=95)
    whole, small = (decode(buffer.getvalue(), "x", side)[0] for side in (None, largest_short_side(data)))
    assert small.size == (100, 50)
    for seed, make in itertools.product(range(5), (labeled_view, weak_view, strong_view)):
        a, b = (make(image, np.random.default_rng(seed), data) for image in (whole, small))
        np.testing.assert_array_equal(a.matrix, b.matrix)
        assert a.image.size == b.image.size
        # a rotated or shifted edge may lie a fraction of a pixel elsewhere
        assert np.abs(np.asarray(a.image, float) - np.asarray(b.image, float)).mean() < 2


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize("scale", [[0.5, 0.5], [1, 1], [1.7, 1.7], [0.5, 1.5]])
@pytest.mark.parametrize("make", [weak_view, labeled_view])
def test_resize_and_flip(make, scale, flip):
    data = settings(f"data.scale_jitter={scale}", f"data.horizontal_flip={flip}")
    for seed in range(5):
        view = make(marked(), np.random.default_rng(seed), data)
        assert 1 - flip == (view.matrix[0, 0] > 0)
        assert min(view.image.size) in range(round(96 * scale[0]), round(96 * scale[1]) + 1)
        check(view, 1)


ANGLE = np.pi / 7
KINDS = {
    "translate x": lambda m: m[0, 2] != 0 and m[1, 2] == 0,
    "translate y": lambda m: m[1, 2] != 0 and m[0, 2] == 0,
    "rotate": lambda m: np.isclose(np.linalg.det(m[:2, :2]), 1) and m[0, 1] == -m[1, 0] != 0,
    "shear": lambda m: m[0, 0] == 1 == m[1, 1] and m[0, 1] != 0,
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_geometry_operation(kind):
    data, seen = settings(), 0
    for seed in itertools.count():
        matrix = geometry_matrix(SIZE, np.random.default_rng(seed), data)
        if not KINDS[kind](matrix):
            continue
        view = warp(View(marked(), np.eye(3)), matrix)
        assert view.image.size == SIZE
        assert (view.matrix == matrix).all()
        if kind in {"rotate", "shear"}:  # about the centre
            np.testing.assert_allclose(matrix @ [75, 50, 1], [75, 50, 1], atol=1e-9)
        else:
            assert abs(matrix[0, 2]) <= 15
            assert abs(matrix[1, 2]) <= 10
        if (project_boxes(torch.tensor([BOX]), torch.from_numpy(matrix))[0] > 0).all() and inside(view):
            check(view, 2 if kind in {"rotate", "shear"} else 1)
            seen += 1
        if seen == 8:
            return


def inside(view):
    x1, y1, x2, y2 = project_boxes(torch.tensor([BOX]), torch.from_numpy(view.matrix))[0].tolist()
    return min(x1, y1) > 0 and x2 < view.image.width and y2 < view.image.height


def test_compositions():
    """Resize, flip and geometry one after the other, as the strong view has them."""
    data = settings()
    views = [strong_view(marked(), np.random.default_rng(seed), data) for seed in range(40)]
    whole = [v for v in views if inside(v)]
    assert len(whole) > 20
    for view in whole:
        check(view, 3)


def test_weak_to_strong():
    """A point goes from the weak to the strong view by T_strong * inverse(T_weak)."""
    data = settings()
    for seed in range(10):
        rng = np.random.default_rng(seed)
        weak, strong = weak_view(marked(), rng, data), strong_view(marked(), rng, data)
        if inside(strong):
            matrix = torch.from_numpy(strong.matrix @ np.linalg.inv(weak.matrix))
            seen_by_teacher = torch.from_numpy(found_box(weak.image))[None]
            np.testing.assert_allclose(found_box(strong.image), project_boxes(seen_by_teacher, matrix)[0], atol=4)


@pytest.mark.parametrize(
    ("box", "matrix", "size", "expected"),
    [
        ([1, 2, 3, 4], np.eye(3), None, [1, 2, 3, 4]),
        ([1, 2, 3, 4], np.diag([2, 3, 1]), None, [2, 6, 6, 12]),
        ([1, 2, 3, 4], [[-1, 0, 10], [0, 1, 0], [0, 0, 1]], None, [7, 2, 9, 4]),
        ([0, 0, 2, 4], [[0, -1, 0], [1, 0, 0], [0, 0, 1]], None, [-4, 0, 0, 2]),
        ([0, 0, 2, 4], [[0, -1, 0], [1, 0, 0], [0, 0, 1]], [10, 10], [0, 0, 0, 2]),
        ([5, 5, 50, 60], np.eye(3), [20, 30], [5, 5, 30, 20]),
        ([2, 4, 6, 8], np.diag([1, 1, 2]), None, [1, 2, 3, 4]),
    ],
)
def test_project_boxes(box, matrix, size, expected):
    matrix = torch.tensor(np.asarray(matrix, float))
    found = project_boxes(torch.tensor([box]), matrix, None if size is None else torch.tensor(size))
    assert found.tolist() == [expected]
    assert project_boxes(torch.zeros(0, 4), matrix).shape == (0, 4)


def test_colour_moves_nothing():
    edges = np.zeros((40, 40, 3), np.uint8)
    edges[:, 20:] = (180, 120, 60)
    changed = 0
    for seed in range(60):
        image = np.asarray(color(Image.fromarray(edges), np.random.default_rng(seed)), int)
        assert image.shape == (40, 40, 3)
        assert (image[:, 23:] == image[0, 23]).all()  # either half stays of one colour
        assert (image[:, :17] == image[0, 0]).all()
        changed += bool((image != edges).any())
    assert changed > 30


class Chosen:
    """A generator whose operation is chosen and whose magnitudes are the largest; it notes their ranges."""

    def __init__(self, operation=0, first=0.0):
        self.operation, self.first, self.ranges = operation, first, []

    def random(self):
        return self.first

    def uniform(self, low, high):
        self.ranges.append((low, high))
        return high

    def integers(self, low, high=None):
        if high is None:
            assert low > self.operation  # so many operations there are at least
            return self.operation
        self.ranges.append((low, high - 1))
        return high - 1


# in soft-teacher.md's order; PIL's solarize and posterize take whole numbers
COLORS = {
    "identity": (lambda i: i, []),
    "autocontrast": (ImageOps.autocontrast, []),
    "equalize": (ImageOps.equalize, []),
    "solarize": (lambda i: ImageOps.solarize(i, 230), [(25, 230)]),
    "color": (lambda i: ImageEnhance.Color(i).enhance(1.72), []),
    "contrast": (lambda i: ImageEnhance.Contrast(i).enhance(1.72), []),
    "brightness": (lambda i: ImageEnhance.Brightness(i).enhance(1.72), []),
    "sharpness": (lambda i: ImageEnhance.Sharpness(i).enhance(1.72), []),
    "posterize": (lambda i: ImageOps.posterize(i, 4), [(1, 4)]),
}


@pytest.mark.parametrize("name", COLORS)
def test_each_colour_operation(name):
    expected, ranges = COLORS[name]
    image = Image.fromarray(np.random.default_rng(0).integers(20, 200, (30, 40, 3), np.uint8))
    rng = Chosen([*COLORS].index(name))
    assert (np.asarray(color(image, rng)) == np.asarray(expected(image))).all()
    assert rng.ranges == [(0.28, 1.72), *ranges]


def test_there_are_nine_colour_and_four_geometry_operations():
    for count, draw in ((9, lambda rng: color(marked(), rng)), (4, lambda rng: geometry_matrix(SIZE, rng, settings()))):
        draw(Chosen(count - 1))
        with pytest.raises(AssertionError):
            draw(Chosen(count))


@pytest.mark.parametrize(("operation", "ranges"), [(0, [(-0.1, 0.1)]), (1, [(-0.1, 0.1)]), (2, []), (3, [(-30, 30)])])
def test_magnitudes_of_the_geometry(operation, ranges):
    rng = Chosen(operation)
    matrix = geometry_matrix((200, 100), rng, load_settings("coco-10pct").data)
    assert rng.ranges == [(-30, 30), *ranges]
    sin, tan = np.sin(np.pi / 6), np.tan(np.pi / 6)
    largest = {
        0: [[1, 0], [0, 1]],
        1: [[1, 0], [0, 1]],
        2: [[3**0.5 / 2, -sin], [sin, 3**0.5 / 2]],
        3: [[1, tan], [tan, 1]],
    }
    np.testing.assert_allclose(matrix[:2, :2], largest[operation])
    if operation < 2:
        assert matrix[:2, 2].tolist() == ([20, 0] if operation == 0 else [0, 10])


@pytest.mark.parametrize("first", [0.0, 0.99])
def test_colour_and_geometry_come_in_either_order(first, monkeypatch):
    from softteacher.data import views

    order = []
    monkeypatch.setattr(views, "color", lambda image, rng: order.append("color") or image)
    monkeypatch.setattr(views, "warp", lambda view, matrix: order.append("geometry") or view)
    strong_view(marked(), Chosen(first=first), load_settings("coco-10pct").data)
    assert order == (["geometry", "color"] if first < 0.5 else ["color", "geometry"])


def test_largest_patches():
    rng = Chosen()
    erased = (np.asarray(erase(Image.new("RGB", (100, 80), "white"), rng)) == PAD).all(-1)
    assert rng.ranges[:2] == [(1, 5), (0, 0.2)]
    assert len(rng.ranges) == 1 + 5 * 3  # of each patch size, x and y
    assert erased[-16:, -20:].all()
    assert erased.sum() == 16 * 20


def test_erase_paints_up_to_five_grey_patches():
    white = Image.new("RGB", (100, 80), "white")
    shares = []
    for seed in range(50):
        erased = (np.asarray(erase(white, np.random.default_rng(seed))) == PAD).all(-1)
        shares.append(erased.mean())
    assert np.asarray(white).min() == 255  # the original stays
    assert 0 < np.mean(shares) < max(shares) <= 5 * 0.2 * 0.2


@pytest.mark.parametrize("size", [(100, 1), (1, 100), (1, 1), (3, 2)])
def test_tiny_images(size):
    image = Image.new("RGB", size, "red")
    for seed in range(20):
        view = strong_view(image, np.random.default_rng(seed), load_settings("demo").data)
        assert min(view.image.size) >= 1
