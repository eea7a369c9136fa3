import colorsys
from typing import get_args

import pytest
import torch
from torch import Tensor

from experiments.augment import Augmentation, AugmentationName

_NAMES = get_args(AugmentationName)
_MEAN, _STD = (0.1, 0.5, 0.4), (0.3, 0.2, 0.25)


def _images(n: int, channels: int = 3, side: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, channels, side, side), dtype=torch.uint8, generator=generator)


def _view(name: AugmentationName, images: Tensor) -> Tensor:
    """A view of seed 0, in the images' units."""
    channels, side = images.shape[1:3]
    torch.manual_seed(0)
    return Augmentation(name, side, [0.0] * channels, [1 / 255] * channels)(images)


@pytest.fixture
def _colour_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.augment._WINDOWS", {})


@pytest.fixture
def _window_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.augment._colour", lambda *_: ())


@pytest.mark.parametrize("name", _NAMES)
def test_views_are_seeded_and_per_sample(name: AugmentationName) -> None:
    images = _images(1).repeat(8, 1, 1, 1)
    augmentation = Augmentation(name, 12, _MEAN, _STD)
    views = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        views.append(augmentation(images))
    first, again, other = views
    assert first.shape == images.shape and first.dtype == torch.float32
    assert torch.equal(first, again)
    if name in ("none", "features"):  # features take values of other rows, which are the same here
        assert torch.equal(first, augmentation.plain(images)) and torch.equal(first, other)
    else:
        assert not torch.isclose(first, other).all(dim=(1, 2, 3)).any()
        assert all(not torch.allclose(a, b) for i, a in enumerate(first) for b in first[:i])


@pytest.mark.parametrize("name", _NAMES)
def test_views_are_normalised_last(name: AugmentationName) -> None:
    images = _images(64)
    torch.manual_seed(0)
    view = Augmentation(name, 12, _MEAN, _STD)(images)
    unit = view * torch.tensor(_STD).view(-1, 1, 1) + torch.tensor(_MEAN).view(-1, 1, 1)
    assert torch.allclose(unit * 255, _view(name, images), atol=1e-2)
    assert unit.min() >= -1e-5 and unit.max() <= 1 + 1e-5
    assert unit.min() < 0.1 and unit.max() > 0.9


@pytest.mark.parametrize("name", ["none", "generic"])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_plain_is_the_normalised_image(name: AugmentationName, channels: int) -> None:
    images = _images(4, channels)
    mean, std = torch.linspace(0.1, 0.5, channels), torch.linspace(0.2, 0.3, channels)
    augmentation = Augmentation(name, 12, mean.tolist(), std.tolist())
    plain = augmentation.plain(images)
    back = (plain * std.view(-1, 1, 1) + mean.view(-1, 1, 1)) * 255
    assert torch.equal(back.round().to(torch.uint8), images) and plain.dtype == torch.float32
    assert augmentation(images).shape == images.shape


def _windows(name: AugmentationName) -> tuple[Tensor, Tensor]:
    """The affine maps (n, 2, 2) from view to image and the centres (n, 2), half the side being 1: read from views of
    an image whose channels are its own coordinates.
    """
    ramp = (4 * torch.arange(64, dtype=torch.uint8)).expand(64, 64)
    coordinates = torch.stack([ramp, ramp.T, torch.zeros_like(ramp)]).repeat(600, 1, 1, 1)
    view = ((_view(name, coordinates) / 4 + 0.5) / 32 - 1)[:, :2, 31:33, 31:33]
    along_x, along_y = view.diff(dim=3).mean((2, 3)), view.diff(dim=2).mean((2, 3))
    return 32 * torch.stack([along_x, along_y], 2), view.mean((2, 3))


def _spans(values: Tensor, low: float, high: float) -> bool:
    """Whether values lie in [low, high] and reach within 3% of both ends."""
    slack = 0.03 * (high - low)
    minimum, maximum = values.min().item(), values.max().item()
    return low - 1e-3 <= minimum <= low + slack and high - slack <= maximum <= high + 1e-3


def test_small_affine_rotates_zooms_and_shifts() -> None:
    matrix, centre = _windows("small-affine")
    assert _spans(torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]).rad2deg(), -15, 15)
    assert _spans(matrix[:, :, 0].norm(dim=1), 0.85, 1.15)
    assert torch.allclose(matrix[:, 0, 0], matrix[:, 1, 1], atol=1e-3)
    assert torch.allclose(matrix[:, 0, 1], -matrix[:, 1, 0], atol=1e-3)
    assert _spans(centre[:, 0], -0.25, 0.25) and _spans(centre[:, 1], -0.25, 0.25)


def test_small_affine_continues_the_border() -> None:
    assert torch.allclose(_view("small-affine", torch.full((9, 1, 8, 8), 200, dtype=torch.uint8)), torch.tensor(200.0))


@pytest.mark.usefixtures("_window_only")
@pytest.mark.parametrize(
    ("name", "smallest"), [("mnist", 0.7), ("cifar10", 0.2), ("tiny-imagenet", 0.1), ("generic", 0.5)]
)
def test_crops_lie_inside_the_image(name: AugmentationName, smallest: float) -> None:
    matrix, centre = _windows(name)
    sides = matrix.norm(dim=1)
    assert _spans(sides.prod(dim=1), smallest, 1.0)
    aspect = sides[:, 0] / sides[:, 1]
    assert aspect.log().abs().max() <= torch.tensor(4 / 3).log() + 1e-3
    assert aspect.min() < 0.78 and aspect.max() > 1.29
    room = 1 - sides
    assert (centre.abs() <= room + 1e-3).all()
    large = room.min(dim=1).values > 0.03
    assert _spans((centre / room)[large], -1, 1)


@pytest.mark.usefixtures("_window_only")
@pytest.mark.parametrize(
    ("name", "share"), [("small-affine", 0), ("mnist", 0), ("cifar10", 0.5), ("tiny-imagenet", 0.5), ("generic", 0.5)]
)
def test_half_of_the_natural_images_are_mirrored(name: AugmentationName, share: float) -> None:
    matrix, _ = _windows(name)
    assert (matrix[:, 0, 0] < 0).float().mean().item() == pytest.approx(share, abs=0.05)
    assert (matrix[:, 1, 1] > 0).all()


@pytest.mark.usefixtures("_colour_only")
@pytest.mark.parametrize(("name", "channels"), [("cifar10", 3), ("tiny-imagenet", 3), ("generic", 3), ("generic", 1)])
def test_brightness_and_contrast_of_four_fifths_are_jittered(name: AugmentationName, channels: int) -> None:
    """A grey image of two halves, which hue, saturation and greyness leave alone."""
    images = torch.cat([torch.full((1, 1, 6, 12), tone, dtype=torch.uint8) for tone in (80, 120)], 2)
    view = _view(name, images.expand(2000, channels, 12, 12))
    low, high = view[:, :, 0].mean((1, 2)), view[:, :, -1].mean((1, 2))
    if name == "tiny-imagenet":
        low, high = view[:, :, :3].mean((1, 2, 3)), view[:, :, -3:].mean((1, 2, 3))  # a blur moves the rest
    brightness = (low + high) / 200
    contrast = (high - low) / 40 / brightness
    jittered = (brightness - 1).abs() > 1e-4
    assert jittered.float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert _spans(brightness[jittered], 0.6, 1.4) and _spans(contrast[jittered], 0.6, 1.4)
    assert torch.allclose(contrast[~jittered], torch.tensor(1.0), atol=1e-4)


@pytest.mark.usefixtures("_colour_only")
@pytest.mark.parametrize("name", ["cifar10", "tiny-imagenet"])
def test_hue_and_saturation_are_jittered_and_a_fifth_is_grey(name: AugmentationName) -> None:
    """A plain image of hue 1/12, which brightness, contrast, saturation and blur do not turn."""
    images = torch.tensor([120, 100, 80], dtype=torch.uint8).view(1, 3, 1, 1).expand(2000, 3, 12, 12)
    view = _view(name, images).mean((2, 3))
    grey = (view.max(1).values - view.min(1).values) < 1e-3
    assert grey.float().mean().item() == pytest.approx(0.2, abs=0.03)
    hue = torch.tensor([colorsys.rgb_to_hsv(*colour)[0] for colour in view[~grey].tolist()])
    assert _spans((hue - 1 / 12 + 0.5) % 1 - 0.5, -0.1, 0.1)
    colourful = (view.max(1).values - view.min(1).values)[~grey] / view.mean(1)[~grey] / 0.4
    assert 0.36 * 0.8 < colourful.min() < 0.5 and 1.5 < colourful.max() < 1.96 * 1.2  # contrast alone: 0.6 to 1.4


@pytest.mark.usefixtures("_colour_only")
@pytest.mark.parametrize(("side", "radius"), [(48, 2), (8, 1)])
def test_half_of_the_tiny_imagenet_images_are_blurred(side: int, radius: int) -> None:
    images = torch.zeros(300, 3, side, side, dtype=torch.uint8)
    centre = side // 2
    images[:, :, centre, centre] = 200
    row = _view("tiny-imagenet", images)[:, 0, centre]
    spread = (row - row[:, :1]).abs() > 1e-2
    assert spread[:, centre + 1].float().mean().item() == pytest.approx(0.46, abs=0.05)  # all but the least widths
    assert spread[:, centre + radius].any()
    assert not spread[:, centre + radius + 1 :].any() and not spread[:, : centre - radius].any()
    assert not _view("cifar10", images)[:, 0, centre].diff(dim=1)[:, centre + 1 :].abs().max() > 1e-2


def test_two_fifths_of_the_features_are_those_of_other_rows() -> None:
    """Value r of feature j in row r: what a view shows says from which row it is."""
    rows = torch.arange(250, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 1, 30)
    torch.manual_seed(0)
    augmentation = Augmentation("features", 1, [0.0], [1 / 255])
    views = [augmentation(rows).round().long().view(250, 30) for _ in range(2)]
    own = torch.arange(250)[:, None]
    foreign = [view != own for view in views]
    assert not torch.equal(*views)
    for view, other in zip(views, foreign, strict=True):
        counts = other.sum(1)
        assert counts.max() == 12 and counts.float().mean().item() == pytest.approx(
            12, abs=0.2
        )  # a row may draw itself
        assert other.float().mean(0).std() < 0.05  # every feature as often
        assert all(len(row[mask].unique()) > 8 for row, mask in zip(view, other, strict=True))  # each from its own row
        drawn = view[other].double()
        assert drawn.min() < 5 and drawn.max() > 244 and abs(drawn.mean().item() - 124.5) < 5
    assert (~foreign[0] & ~foreign[1]).float().mean().item() == pytest.approx(0.36, abs=0.02)


@pytest.mark.parametrize("name", sorted(set(_NAMES) - {"none", "features"}))
def test_rows_of_features_are_no_images(name: AugmentationName) -> None:
    with pytest.raises(ValueError, match=f"{name} is for images, not for rows of features: use features"):
        Augmentation(name, 1, [0.5], [0.5])


def test_rows_of_features_may_have_any_length() -> None:
    augmentation = Augmentation("features", 1, [0.5], [0.5])
    for n, d in ((1, 7), (5, 1)):
        rows = torch.full((n, 1, 1, d), 255, dtype=torch.uint8)
        assert torch.equal(augmentation(rows), torch.ones(n, 1, 1, d)) and augmentation.plain(rows).shape == rows.shape
    with pytest.raises(ValueError, match=r"give uint8 ones of shape \(n, 1, 1, 7\)"):
        augmentation(torch.zeros(2, 1, 7, 7, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["cifar10", "tiny-imagenet"])
@pytest.mark.parametrize("channels", [1, 4])
def test_colours_need_three_channels(name: AugmentationName, channels: int) -> None:
    with pytest.raises(ValueError, match=f"{name} jitters colours and needs 3 channels, not {channels}: use generic"):
        Augmentation(name, 32, [0.5] * channels, [0.5] * channels)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="mean has 3 channels, std 1: give one value of each per channel"):
        Augmentation("none", 8, _MEAN, [0.5])
    augmentation = Augmentation("none", 12, _MEAN, _STD)
    for wrong in (_images(2).float(), _images(2, channels=1), _images(2, side=8)):
        for method in (augmentation, augmentation.plain):
            with pytest.raises(ValueError, match=r"give uint8 ones of shape \(n, 3, 12, 12\)"):
                method(wrong)
