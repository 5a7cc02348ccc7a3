"""Images by what they are, not by their names: sha256 for the same file, a perceptual hash for the same picture."""

from __future__ import annotations

import hashlib
import logging
from typing import Any, NamedTuple

import imagehash
import numpy as np

from softteacher.data.images import decode, original_size

BYTES = 32  # of either hash
DECODED = 256  # pixels of the short side that the perceptual hash needs of a JPEG at most
BLOCK = 1024


class Look(NamedTuple):
    """What one look at an image tells.

    Attributes:
        sha256: of the file, 32 bytes.
        phash: perceptual hash, 32 bytes. Files of the same picture, compressed again or scaled, differ in a few of its
            256 bits; different pictures in about a hundred.
        width: in pixels.
        height: in pixels.
    """

    sha256: bytes
    phash: bytes
    width: int
    height: int


def look(data: bytes, name: str) -> Look:
    """Decode an image whole and hash it.

    Raises:
        BadImage: it can't be decoded.
    """
    image, _ = decode(data, name, DECODED)
    bits = imagehash.phash(image, hash_size=16).hash
    return Look(hashlib.sha256(data).digest(), np.packbits(bits).tobytes(), *original_size(image))


def near(hashes: np.ndarray, known: np.ndarray, bits: int) -> np.ndarray:
    """Which pictures are known.

    Args:
        hashes: [N, 32] uint8, perceptual hashes.
        known: [M, 32] uint8, of the known ones.
        bits: hashes that differ in up to so many bits are of the same picture; below 0: nothing is.

    Returns:
        [N] bool.
    """
    if bits < 0 or not len(hashes) or not len(known):
        return np.zeros(len(hashes), bool)
    index = _index(known)
    return index.search(np.ascontiguousarray(hashes), 1)[0][:, 0] <= bits


def repeated(hashes: np.ndarray, bits: int) -> np.ndarray:
    """Which pictures are like an earlier one that is not like a still earlier one itself.

    Args:
        hashes: [N, 32] uint8, perceptual hashes.
        bits: as in `near`.

    Returns:
        [N] bool.
    """
    answer = np.zeros(len(hashes), bool)
    if bits < 0:
        return answer
    kept = _index()
    for start in range(0, len(hashes), BLOCK):
        block, odd = np.ascontiguousarray(hashes[start : start + BLOCK]), answer[start : start + BLOCK]
        if kept.ntotal:
            odd |= kept.search(block, 1)[0][:, 0] <= bits
        limits, _, found = _index(block).range_search(block, bits + 1)
        for n in range(len(block)):
            others = found[limits[n] : limits[n + 1]]
            odd[n] |= bool((~odd[others[others < n]]).any())
        kept.add(np.ascontiguousarray(block[~odd]))
    return answer


def _index(hashes: np.ndarray | None = None) -> Any:
    """Exact search by the number of differing bits."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # which of its builds it takes is no news
    import faiss

    index = faiss.IndexBinaryFlat(8 * BYTES)
    if hashes is not None:
        index.add(np.ascontiguousarray(hashes))
    return index
