"""Does a certificate hold on the data? A bound that fails beyond sampling error is a bug in the bound, the log or the
model's norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cila_bound.certificate import Certificate, certify
from cila_bound.losslog import LossLog
from cila_bound.means import allowance

ROUNDING = 1e-6  # relative error of logged means that the check on a bound's own tuples allows, as of float32 code


@dataclass(frozen=True)
class Violation:
    """A measured loss outside [lower, upper] of a certificate by more than the margin. Losses in nats.

    ``task`` is a task's name or "total". ``measured`` is the mean loss, ``margin`` the room it was given, and
    ``bound`` the side it still crossed, from logged means moved outwards. ``measured_on`` is "test", or "bound" for
    the very tuples that the bound was computed from, where it must hold exactly.
    """

    task: str
    side: Literal["upper", "lower"]
    measured: float
    margin: float
    bound: float
    measured_on: Literal["test", "bound"]


def find_violations(log: LossLog, certificate: Certificate, sigmas: float = 3.0) -> tuple[Violation, ...]:
    """All violations of a certificate of this log, empty if it holds.

    Test losses have a margin of ``sigmas`` standard errors (for few tuples, enlarged as Student's t is), and so has
    every logged mean in a plug-in bound that they are compared with; a certificate at a confidence has its own. With
    ``fixed_tuples`` and held-out data the bound is also compared with the loss on its own tuples, where it holds
    without sampling error: the margin is rounding.
    """

    def widened(*, standard_errors: float = 0.0, rounding: float = 0.0) -> Certificate:
        return certify(
            log,
            certificate.step,
            chain=certificate.chain,
            data=certificate.data,
            after_task=certificate.after_task,
            standard_errors=standard_errors,
            rounding=rounding,
        )

    wide = widened(standard_errors=sigmas) if certificate.kind == "plug_in" else certificate
    found: list[Violation] = []
    means, margins = [], []
    for task, name in enumerate(certificate.tasks, start=1):
        if certificate.measured[task - 1] is None:
            continue
        test = log.test(certificate.after_task, task)
        means.append(test.contrastive.mean)
        margins.append(allowance(test.contrastive, test.n_effective, sigmas))
        bounds = wide.lower_per_task[task - 1], wide.per_task[task - 1]
        found += _outside(name, means[-1], margins[-1], *bounds, "test")
    if len(means) == len(certificate.tasks):  # tasks may share images: errors add up, not their squares
        found += _outside("total", math.fsum(means), math.fsum(margins), wide.lower_total, wide.total, "test")
    if log.header.fixed_tuples and certificate.data == "heldout":
        exact = widened(rounding=ROUNDING)
        for task, name in enumerate(certificate.tasks, start=1):
            loss = log.measurement(certificate.after_task, task, "heldout").contrastive.mean
            bounds = exact.lower_per_task[task - 1], exact.per_task[task - 1]
            found += _outside(name, loss, ROUNDING * (1.0 + loss), *bounds, "bound")
    return tuple(found)


def _outside(
    name: str, loss: float, margin: float, lower: float, upper: float, measured_on: Literal["test", "bound"]
) -> list[Violation]:
    if loss - margin > upper:
        return [Violation(name, "upper", loss, margin, upper, measured_on)]
    if loss + margin < lower:
        return [Violation(name, "lower", loss, margin, lower, measured_on)]
    return []
