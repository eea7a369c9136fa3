"""Samples that occur more than once, found by the SHA-256 of their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def digests(samples: np.ndarray) -> list[bytes]:
    """SHA-256 of each sample along the first axis."""
    return [hashlib.sha256(np.ascontiguousarray(sample).data).digest() for sample in samples]


def seen_before(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Per part a mask of its samples that occur in an earlier part too."""
    seen: set[bytes] = set()
    masks = []
    for part in parts:
        own = digests(part)
        masks.append(np.array([digest in seen for digest in own], bool))
        seen.update(own)
    return masks
