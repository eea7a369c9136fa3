"""Random views of small images: rotation, scale and shift, each sample its own, in one batched resampling."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def random_affine(
    images: Tensor, generator: torch.Generator, *, degrees: float = 15.0, scale: float = 0.15, shift: float = 0.125
) -> Tensor:
    """One view of each image (n, channels, height, width): uniform in +-degrees, 1 +- scale and +-shift (share of the
    side).
    """
    n = images.shape[0]
    unit = 2.0 * torch.rand(4, n, generator=generator, device=images.device) - 1.0
    angle, zoom = unit[0] * math.radians(degrees), 1.0 + unit[1] * scale
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    matrix = torch.stack(
        [torch.stack([cos, -sin, 2 * shift * unit[2]], 1), torch.stack([sin, cos, 2 * shift * unit[3]], 1)], 1
    )
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
