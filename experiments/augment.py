"""Random views of batches of images, each sample with its own parameters, computed on the images' device.

Parameters are drawn by the CPU's global generator, whatever the device: ``torch.manual_seed`` determines the views, and
a GPU does not wait for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from kornia import augmentation
from torch import Tensor, nn
from torch.nn import functional

AugmentationName = Literal["none", "small-affine", "mnist", "cifar10", "tiny-imagenet", "generic", "features"]


class Augmentation(nn.Module):
    """Turns uint8 images (n, channels, side, side) into normalised float32 ones: ``(images / 255 - mean) / std``, with
    one ``mean`` and ``std`` per channel. Those of a ``side`` of 1 are rows of features (n, 1, 1, d).

    - ``none``: nothing else.
    - ``small-affine``: rotated by up to 15 degrees, scaled by 0.85 to 1.15, shifted by up to 1/8 of the side.
    - ``mnist``: a crop of 0.7 to 1 of the area.
    - ``cifar10``: as SimCLR (Chen et al., 2020) on CIFAR-10: a crop of 0.2 to 1 of the area, mirrored, colours
      jittered, grey.
    - ``tiny-imagenet``: the same with a crop of 0.1 to 1, and blurred.
    - ``generic``: for any number of channels: a crop of 0.5 to 1, mirrored, brightness and contrast jittered.
    - ``features``: two fifths of the values, drawn at random, replaced by those of other rows of the batch, each from a
      row of its own (Bahri et al., 2022: three fifths in one of the two views; here 0.36 of the values are left alone
      in both).

    Raises ValueError for a ``mean`` and ``std`` of different lengths, for colours of images that have none, and for
    rows of features that are to be seen as images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: AugmentationName, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"mean has {len(mean)} channels, std {len(std)}: give one value of each per channel")
        if side == 1 and name not in ("none", "features"):
            raise ValueError(f"the augmentation {name} is for images, not for rows of features: use features")
        if name in ("cifar10", "tiny-imagenet") and len(mean) != 3:
            raise ValueError(
                f"the augmentation {name} jitters colours and needs 3 channels, not {len(mean)}: use generic"
            )
        self._side, self._window = side, _WINDOWS.get(name)
        self._corrupted = 0.4 if name == "features" else 0.0
        self._colour = _colour(name, side)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """One random view of each image; raises ValueError as ``plain``."""
        view = self._unit(images)
        if self._corrupted:
            view = _corrupted(view, self._corrupted)
        if self._window is not None:
            view = self._window.resample(view)
        for change in self._colour:
            view = change(view)
        return (view - self.mean) / self.std

    def plain(self, images: Tensor) -> Tensor:
        """The images, normalised only.

        Raises ValueError for images of another shape or type than those declared.
        """
        return (self._unit(images) - self.mean) / self.std

    def _unit(self, images: Tensor) -> Tensor:
        declared = (len(self.mean), self._side, images.shape[-1] if self._side == 1 else self._side)
        if images.dtype != torch.uint8 or images.shape[1:] != declared:
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}: give uint8 ones of shape (n, "
                f"{declared[0]}, {declared[1]}, {declared[2]}), or build the augmentation for theirs"
            )
        return images.float() / 255


def _corrupted(values: Tensor, share: float) -> Tensor:
    """With round(share x d) of the d values of each row from rows of the batch drawn with replacement, one by one."""
    flat = values.flatten(1)
    n, d = flat.shape
    replaced = torch.rand(n, d).argsort(1) < round(share * d)
    donor = torch.randint(n, (n, d)).to(values.device, non_blocking=True)
    return torch.where(replaced.to(values.device, non_blocking=True), flat.gather(0, donor), flat).view_as(values)


@dataclass(frozen=True)
class _Window:
    """What part of an image a view shows: a rectangle of a random size and aspect (at most 4 : 3), wherever it fits,
    and from there zoomed, shifted by a share of the side, rotated about its own centre and, every second, mirrored.

    One resampling does it all; beyond the border the image's edge goes on.
    """

    degrees: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0
    smallest_area: float = 1.0
    mirrored: bool = False

    def resample(self, images: Tensor) -> Tensor:
        n = len(images)
        angle, zoom, aspect, mirror = 2 * torch.rand(4, n) - 1
        place, shift = 2 * torch.rand(2, n, 2) - 1
        area = 1 - (1 - self.smallest_area) * torch.rand(n)
        log_aspect = aspect * (-area.log()).clamp(max=math.log(4 / 3))  # those with both sides within the image
        sides = (torch.stack([log_aspect, -log_aspect], 1).exp() * area[:, None]).sqrt()
        centre = place * (1 - sides) + 2 * self.shift * shift
        width, height = (sides * (1 + self.zoom * zoom[:, None])).unbind(1)
        if self.mirrored:
            width = torch.where(mirror < 0, -width, width)
        cos, sin = torch.cos(math.radians(self.degrees) * angle), torch.sin(math.radians(self.degrees) * angle)
        rows = [torch.stack([cos * width, -sin * height], 1), torch.stack([sin * width, cos * height], 1)]
        matrix = torch.cat([torch.stack(rows, 1), centre[:, :, None]], 2).to(images.device, non_blocking=True)
        grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
        return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


_WINDOWS: dict[AugmentationName, _Window] = {
    "small-affine": _Window(degrees=15, zoom=0.15, shift=0.125),
    "mnist": _Window(smallest_area=0.7),
    "cifar10": _Window(smallest_area=0.2, mirrored=True),
    "tiny-imagenet": _Window(smallest_area=0.1, mirrored=True),
    "generic": _Window(smallest_area=0.5, mirrored=True),
}


def _colour(name: AugmentationName, side: int) -> tuple[nn.Module, ...]:
    """In a tuple and so not submodules: kornia's modules draw on the device to which they are moved, and then ask it
    what they drew.
    """
    match name:
        case "none" | "small-affine" | "mnist" | "features":
            return ()
        case "generic":
            return (augmentation.ColorJitter(0.4, 0.4, p=0.8),)
    jitter = augmentation.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
    grey = augmentation.RandomGrayscale(p=0.2)
    if name == "cifar10":
        return jitter, grey
    kernel = 2 * max(1, round(side / 20)) + 1
    return jitter, grey, augmentation.RandomGaussianBlur(kernel, (0.1, 2.0), p=0.5)
