"""The same picture in another file is found, other pictures are not."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from softteacher.collecting import hashes as module
from softteacher.collecting.hashes import look, near, repeated
from softteacher.data.images import BadImage
from tests.arrivals import SIZE, picture
from tests.helpers import SHARED


def test_look():
    data = picture(0, "JPEG")
    seen = look(data, "x")
    assert seen.sha256 == hashlib.sha256(data).digest()
    assert (len(seen.phash), seen.width, seen.height) == (32, *SIZE)
    with pytest.raises(BadImage, match="x: broken image"):
        look(data[:-200], "x")


def bits(phashes: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(phashes), np.uint8).reshape(-1, 32)


def differing(a: bytes, b: bytes) -> int:
    return int(np.unpackbits(bits([a]) ^ bits([b])).sum())


@pytest.mark.skipif(not SHARED.exists(), reason="no data sets beside the checkout")
@pytest.mark.parametrize("name", ["voc07_8cls", "coco80_mini"])
def test_the_default_parts_photographs_from_their_copies(name):
    """Compressed again and scaled at most 10 of 256 bits change in nearly all; between two photographs over 60 do."""
    files = sorted((SHARED / "datasets" / name / "images").rglob("*.jpg"))[:40]
    first, copies = [], []
    for file in files:
        data = file.read_bytes()
        first.append(look(data, "x").phash)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        for quality, scale in ((90, 1.0), (50, 1.0), (75, 0.5)):
            buffer = io.BytesIO()
            image.resize((round(image.width * scale), round(image.height * scale))).save(
                buffer, "JPEG", quality=quality
            )
            copies.append((first[-1], look(buffer.getvalue(), "x").phash))
    assert sum(differing(*pair) <= 10 for pair in copies) >= 0.97 * len(copies)
    assert min(differing(a, b) for n, a in enumerate(first) for b in first[:n]) > 60


def flipped(phash: np.ndarray, count: int, first: int = 0) -> np.ndarray:
    """A hash with `count` bits changed."""
    changed = np.unpackbits(phash)
    changed[first : first + count] ^= 1
    return np.packbits(changed)


def test_near():
    known = np.random.default_rng(0).integers(0, 256, (50, 32), np.uint8)
    asked = np.stack([flipped(known[7], n) for n in (0, 3, 4)])
    assert near(asked, known, 3).tolist() == [True, True, False]
    assert near(asked, known, 0).tolist() == [True, False, False]
    assert not near(asked, known, -1).any()
    assert not near(asked, known[:0], 3).any()
    assert len(near(asked[:0], known, 3)) == 0


@pytest.mark.parametrize("block", [1024, 3, 1])
def test_repeated(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", block)
    a, b = np.random.default_rng(0).integers(0, 256, (2, 32), np.uint8)
    # what is like a dropped one only is a kind of its own
    chain = [flipped(a, 3), flipped(a, 6), b, flipped(a, 9), flipped(b, 3, first=100), a]
    assert repeated(np.stack(chain), 3).tolist() == [False, True, False, False, True, True]
    assert not repeated(np.stack(chain), -1).any()
    assert len(repeated(np.zeros((0, 32), np.uint8), 3)) == 0
