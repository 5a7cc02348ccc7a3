"""Pictures: masks are half-transparent in the colour of their class."""

import numpy as np
import pytest
from PIL import Image

from softteacher.detections import Detections
from softteacher.evaluation.draw import TILE, draw, tile


def test_masks_are_half_transparent():
    image = Image.new("RGB", (480, 320), (100, 100, 100))
    found = Detections(np.array([[50.0, 60, 250, 200]]), np.array([0.9]), np.array([0]))
    mask = np.zeros((320, 480), bool)
    mask[100:150, 100:200] = True
    plain, masked = (np.asarray(draw(image, found, ["cat"], masks=m), int) for m in ((), [mask]))
    changed = (plain != masked).any(-1)
    assert (changed == mask).all()
    colour = plain[130, 50]  # of the box
    np.testing.assert_allclose(masked[mask], np.broadcast_to((100 + colour) / 2, (mask.sum(), 3)), atol=2)


def test_a_tile_has_the_masks_at_its_own_size():
    image = Image.new("RGB", (2 * TILE, TILE), (100, 100, 100))
    box, score, label = np.array([[200.0, 100, 600, 400]]), np.array([0.9]), np.array([0])
    cells = np.zeros((1, 28, 28))
    cells[:, :, 14:] = 1  # the right half
    plain, masked = (
        np.asarray(tile(image, Detections(box, score, label, m), ["cat"], "x"), int) for m in (None, cells)
    )
    rows, columns = np.nonzero((plain != masked).any(-1))
    assert (rows.min(), rows.max()) == pytest.approx((50, 199), abs=2)
    assert (columns.min(), columns.max()) == pytest.approx((200, 299), abs=2)
