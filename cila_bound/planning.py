"""How many tuples a certificate would take."""

from __future__ import annotations

import bisect
import math

from cila_bound.certificate import StepName, certify
from cila_bound.chain import Chain, evaluate
from cila_bound.losslog import LossLog
from cila_bound.means import Hypothetical

_RATIO = 1.01
_SIZES = range(math.ceil(math.log(1e9, _RATIO)))  # powers of the ratio, up to a billion


def tuples_needed(
    log: LossLog,
    step: StepName = "moment",
    *,
    chain: Chain = "full",
    below: float | None = None,
    confidence: float = 0.95,
    selections: int = 1,
    after_task: int | None = None,
) -> int | None:
    """The number of independent held-out tuples of each task, to one percent, with which every task's bound would be
    below ``below`` nats (default: the ceiling, so that none is vacuous), were the logged means to stay what they are.

    By Chernoff's bound on every mean, which needs no more than means; betting may take fewer where losses vary little,
    or more where nearly all are at an end. A plan, no statement of confidence. None if a billion would not do, as where
    the plug-in bound is not below either.

    Raises what :func:`certify` raises.
    """
    plan = certify(log, step, chain=chain, after_task=after_task, confidence=confidence, selections=selections)
    delta, last = plan.delta, plan.after_task
    assert step != "theorem1" and delta is not None  # certify refuses the one and sets the other
    limit = log.geometry.ceiling if below is None else below

    def suffices(power: int) -> bool:
        reading = Hypothetical(delta, _size(power))
        bounds = (evaluate(log, task, last, step, chain, "heldout", reading) for task in range(1, last + 1))
        return all(bound.upper < limit for bound in bounds)

    power = bisect.bisect_left(_SIZES, True, key=suffices)
    return None if power == len(_SIZES) else _size(power)


def _size(power: int) -> int:
    return math.ceil(_RATIO**power)
