"""Encoders with a projection head on the unit sphere."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class SmallEncoder(nn.Module):
    """For images of 8 x 8 to 32 x 32: three 3 x 3 convolutions, ``representation`` (n, width), and a two-layer head,
    ``embedding``.

    Batch normalisation keeps supervised contrastive training from collapsing when a new task's images all fall on one
    point; embeddings that are logged, probed or distilled from are those of eval mode.
    """

    def __init__(self, channels: int, side: int, *, width: int = 128, embedding: int = 64) -> None:
        super().__init__()
        reduced = (side + 3) // 4
        self.encoder = nn.Sequential(
            *_convolution(channels, 32, stride=1),
            *_convolution(32, 64, stride=2),
            *_convolution(64, 64, stride=2),
            nn.Flatten(),
            nn.Linear(64 * reduced**2, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
        )
        self.head = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, embedding)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Unit-norm embeddings (n, embedding)."""
        return functional.normalize(self.head(self.encoder(images)), dim=1)

    @torch.no_grad()
    def represent(self, images: Tensor) -> Tensor:
        """Encoder outputs (n, width), for the linear probe."""
        representation: Tensor = self.encoder(images)
        return representation


def _convolution(channels: int, out: int, *, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, out, 3, stride=stride, padding=1), nn.BatchNorm2d(out), nn.ReLU()
