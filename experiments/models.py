"""Encoders, each with a projection head onto the unit sphere or with a linear classifier."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

ModelName = Literal["small", "strided", "mnist-cnn", "resnet18", "mlp"]


class Outputs(NamedTuple):
    """Of n images: ``representation`` (n, width), ``embedding`` (n, d) float32 of unit norm, ``logits`` (n, classes) or
    None.
    """

    representation: Tensor
    embedding: Tensor
    logits: Tensor | None


class Model(nn.Module):
    """An encoder with a projection head, a classifier or neither; without a head the embedding is the normalised
    representation.

    Embeddings that are logged, probed or distilled from are those of eval mode.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module | None, classifier: nn.Linear | None) -> None:
        super().__init__()
        self.encoder, self.head, self.classifier = encoder, head, classifier

    def outputs(self, images: Tensor) -> Outputs:
        """All outputs for images (n, channels, height, width)."""
        representation = self.encoder(images)
        embedding = representation if self.head is None else self.head(representation)
        logits = None if self.classifier is None else self.classifier(representation)
        # in half precision, which autocast may yield, the norm is 1 to three digits only
        return Outputs(representation, functional.normalize(embedding.float(), dim=1), logits)

    def forward(self, images: Tensor) -> Tensor:
        """Unit-norm embeddings (n, d)."""
        return self.outputs(images).embedding


class Logits(nn.Module):
    """A model's logits (n, classes) as its forward pass; the model must have a classifier."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model.outputs(images).logits
        assert logits is not None
        return logits


def build_model(
    name: ModelName, shape: tuple[int, int, int], *, width: int | None = None, n_classes: int | None = None
) -> Model:
    """A model for images of ``shape`` (channels, height, width): with a head, or with a classifier of ``n_classes``.

    - ``small``: three 3 x 3 convolutions and a layer of ``width`` (128), batch-normalised: it keeps supervised
      contrastive training from collapsing when a new task's images all fall on one point. Embedding: 64.
    - ``strided``: the same with convolutions of 16, 32 and 64 filters that all halve the image: for images of about
      28 x 28 on a CPU, where it is several times as fast. Embedding: 64.
    - ``mnist-cnn``: LeNet with 20 and 50 filters of 5 x 5 and a layer of ``width`` (500). Embedding: ``width``.
    - ``resnet18``: He et al. (2016) with the stem for small images, a 3 x 3 convolution without pooling; ``width`` (64)
      is that of the first of the four stages, the representation has 8 times as many. Embedding: 128.
    - ``mlp``: two layers of ``width`` (256), batch-normalised, for rows of features (1, 1, d). Embedding: 64.

    Raises ValueError for a ``width`` or ``n_classes`` below 1, for images too small for ``mnist-cnn``, and for rows of
    features to a network that convolves.
    """
    for option, value in {"width": width, "n_classes": n_classes}.items():
        if value is not None and value < 1:
            raise ValueError(f"{option} is {value}: give at least 1, or None for the default")
    if shape[1] == 1 and name != "mlp":
        raise ValueError(f"{name} convolves images, but features have no neighbours: use the model mlp")
    match name:
        case "small":
            size, embedding = width or 128, 64
            encoder = _small(shape, size)
        case "strided":
            size, embedding = width or 128, 64
            encoder = _small(shape, size, filters=(16, 32, 64), strides=(2, 2, 2))
        case "mnist-cnn":
            size = embedding = width or 500
            encoder = _mnist_cnn(shape, size)
        case "resnet18":
            size, embedding = 8 * (width or 64), 128
            encoder = _resnet18(shape[0], size // 8)
        case "mlp":
            size, embedding = width or 256, 64
            encoder = _mlp(math.prod(shape), size)
    if n_classes is not None:
        return Model(encoder, None, nn.Linear(size, n_classes))
    normalisation = [nn.BatchNorm1d(size)] if name in ("small", "strided", "mlp") else []
    head = nn.Sequential(nn.Linear(size, size), *normalisation, nn.ReLU(), nn.Linear(size, embedding))
    return Model(encoder, head, None)


def layout(name: ModelName, device: torch.device) -> torch.memory_format:
    """Of weights and images in training: channels last, but for ``resnet18`` on a CPU, where PyTorch 2.13 writes beyond
    its memory in backward passes of strided 1 x 1 convolutions of few channels in that layout.
    """
    return torch.contiguous_format if name == "resnet18" and device.type == "cpu" else torch.channels_last


def _small(
    shape: tuple[int, int, int],
    width: int,
    filters: tuple[int, ...] = (32, 64, 64),
    strides: tuple[int, ...] = (1, 2, 2),
) -> nn.Sequential:
    channels, height, breadth = shape
    layers: list[nn.Module] = []
    for out, stride in zip(filters, strides, strict=True):
        layers += [*_convolution(channels, out, stride=stride, bias=True), nn.ReLU()]
        channels, height, breadth = out, math.ceil(height / stride), math.ceil(breadth / stride)
    return nn.Sequential(*layers, nn.Flatten(), *_dense(channels * height * breadth, width))


def _mlp(features: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), *_dense(features, width), *_dense(width, width))


def _dense(features: int, width: int) -> list[nn.Module]:
    return [nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU()]


def _mnist_cnn(shape: tuple[int, int, int], width: int) -> nn.Sequential:
    channels, *sides = shape
    if min(sides) < 16:
        raise ValueError(
            f"images of {sides[0]} x {sides[1]} are too small for mnist-cnn, which needs 16 x 16: use the model small"
        )
    height, breadth = (((side - 4) // 2 - 4) // 2 for side in sides)
    return nn.Sequential(
        nn.Conv2d(channels, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * height * breadth, width),
        nn.ReLU(),
    )


def _resnet18(channels: int, width: int) -> nn.Sequential:
    encoder = nn.Sequential(
        *_convolution(channels, width, stride=1),
        nn.ReLU(),
        *_stage(width, width, stride=1),
        *_stage(width, 2 * width, stride=2),
        *_stage(2 * width, 4 * width, stride=2),
        *_stage(4 * width, 8 * width, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return encoder


def _stage(channels: int, out: int, *, stride: int) -> list[nn.Module]:
    return [_Block(channels, out, stride=stride), _Block(out, out, stride=1)]


class _Block(nn.Module):
    """The basic residual block, its shortcut a 1 x 1 convolution where the shape changes."""

    def __init__(self, channels: int, out: int, *, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *_convolution(channels, out, stride=stride), nn.ReLU(), *_convolution(out, out, stride=1)
        )
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolution(channels, out, stride=stride, side=1))

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(self.residual(images) + self.shortcut(images))


def _convolution(channels: int, out: int, *, stride: int, side: int = 3, bias: bool = False) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, side, stride, padding=side // 2, bias=bias), nn.BatchNorm2d(out)]
