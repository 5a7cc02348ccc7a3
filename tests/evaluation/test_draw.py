"""Pictures: masks are half-transparent in the colour of their class."""

import numpy as np
from PIL import Image

from softteacher.detections import Detections
from softteacher.evaluation.draw import draw


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
