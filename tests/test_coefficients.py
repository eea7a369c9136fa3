"""Adaptive distillation weights."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cila_bound import Geometry, cila_weight, dual_price_weight, moment_step

LOSSES = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=8)


def test_first_distilled_task_has_weight_one() -> None:
    assert [cila_weight([], [], 3.0, mode) for mode in ("max", "pure", "min")] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("kappa", "expected"), [(1.0, (1.0, 0.5, 0.5)), (4.0, (2.0, 2.0, 1.0))])
def test_modes(kappa: float, expected: tuple[float, ...]) -> None:
    """ratio (1 + 2) / (2 + 4) = 0.5."""
    weights = [cila_weight([1.0, 2.0], [2.0, 4.0], kappa, mode) for mode in ("max", "pure", "min")]
    assert tuple(weights) == pytest.approx(expected)


@given(LOSSES, st.floats(0.01, 100.0), st.floats(0.1, 10.0))
def test_order_and_scale(losses: list[float], kappa: float, scale: float) -> None:
    """min <= pure <= max, one of the ends is 1, and scaling the contrastive loss divides the ratio (the scale trap)."""
    distillation = [loss * (1 + i) for i, loss in enumerate(losses)]
    low, pure, high = (cila_weight(distillation, losses, kappa, mode) for mode in ("min", "pure", "max"))
    assert low <= pure <= high
    assert low == 1.0 or high == 1.0
    scaled = cila_weight(distillation, [scale * loss for loss in losses], kappa, "pure")
    assert scaled == pytest.approx(pure / scale)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [], 1.0), "got 1 and 0 values"),
        (([1.0], [0.0], 1.0), "contrastive_history sums to 0"),
        (([-1.0], [1.0], 1.0), "distillation_history must hold finite losses >= 0, got -1.0"),
        (([1.0], [math.inf], 1.0), "contrastive_history .* got inf"),
        (([1.0], [1.0], 0.0), "kappa must be .* got 0.0"),
        (([1.0], [1.0], 1.0, "mean"), "mode must be 'max', 'pure' or 'min', got 'mean'"),
    ],
)
def test_cila_weight_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cila_weight(*arguments)


def test_dual_price_is_the_moment_steps_beta() -> None:
    geometry = Geometry(0.5, 1)
    prices = dual_price_weight([0.3, 0.6], [0.02, 0.05], geometry, max_weight=100.0)
    expected = [moment_step(contrastive=x, drift=k, geometry=geometry).beta for x, k in ((0.3, 0.02), (0.6, 0.05))]
    assert prices == pytest.approx(expected)


def test_dual_price_at_its_ends() -> None:
    """No drift: infinitely dear, cut. So much drift that the bound is vacuous: free."""
    geometry = Geometry(0.5, 1)
    assert dual_price_weight([0.3], [0.0], geometry, max_weight=7.0) == (7.0,)
    assert dual_price_weight([2.0], [3.0], geometry) == (0.0,)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], []), {}, "got 0 and 0 values"),
        (([0.3], [0.1, 0.2]), {}, "got 1 and 2 values"),
        (([99.0], [0.1]), {}, "contrastive must lie in .* got 99.0"),
        (([0.3], [0.1]), {"max_weight": -1.0}, "max_weight"),
    ],
)
def test_dual_price_refuses(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dual_price_weight(*arguments, Geometry(0.5, 1), **options)
