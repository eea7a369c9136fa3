"""The range of every loss: attained, never left, and refused input."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cila_bound import Geometry
from tests.simulate import softmax


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("n_negatives", [1, 2, 3])
def test_range_is_that_of_all_corners(temperature: float, n_negatives: int) -> None:
    """-log q_0 is monotone in each logit, so its extremes over the box are among the corners."""
    corners = np.array(list(itertools.product([-1.0, 1.0], repeat=1 + n_negatives))) / temperature
    q = softmax(corners)[:, 0]
    geometry = Geometry(temperature, n_negatives)
    assert geometry.p_min == pytest.approx(q.min(), rel=1e-12)
    assert geometry.p_max == pytest.approx(q.max(), rel=1e-12)
    assert geometry.ceiling == pytest.approx(-np.log(q.min()), rel=1e-12)
    assert geometry.floor == pytest.approx(-np.log(q.max()), rel=1e-6)  # the oracle loses digits near log(1)
    assert geometry.chance == pytest.approx(-np.log(softmax(np.zeros(1 + n_negatives))[0]))


def test_known_values() -> None:
    geometry = Geometry(0.5, 1)
    assert geometry.max_gap == 4.0
    assert (geometry.floor, geometry.chance, geometry.ceiling) == pytest.approx(
        (0.0181499, 0.6931472, 4.0181499), abs=1e-7
    )


@given(st.floats(0.004, 1000.0), st.integers(1, 10**12))
def test_order_and_consistency(temperature: float, n_negatives: int) -> None:
    geometry = Geometry(temperature, n_negatives)
    assert 0.0 < geometry.floor <= geometry.chance <= geometry.ceiling < math.inf
    assert 0.0 < geometry.p_min <= geometry.p_max <= 1.0
    low, high = geometry.log_odds
    assert low <= high
    assert math.log1p(math.exp(-low)) == pytest.approx(geometry.ceiling, rel=1e-12)


@pytest.mark.parametrize(
    ("temperature", "n_negatives", "message"),
    [
        (0.0, 1, "temperature must be .* got 0.0"),
        (-0.5, 1, "got -0.5"),
        (math.nan, 1, "got nan"),
        ("0.5", 1, "got '0.5'"),
        (0.001, 1, "in \\[0.004, 1000\\]"),
        (0.5, 0, "n_negatives must be an integer"),
        (0.5, 1.5, "got 1.5"),
    ],
)
def test_refuses(temperature: float, n_negatives: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Geometry(temperature, n_negatives)
