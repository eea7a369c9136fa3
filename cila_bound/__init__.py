"""Bounds on the population loss of contrastive continual learning, from the losses that a run logs. Needs numpy and
scipy only.

log = cila_bound.read_log("losses.jsonl")
estimate = cila_bound.certify(log, "moment")
estimate.per_task, estimate.measured, estimate.tightness
certificate = cila_bound.certify(log, "moment", confidence=0.95)
certificate.per_task, certificate.statements
"""

from cila_bound.certificate import Certificate, certify
from cila_bound.coefficients import cila_weight, dual_price_weight
from cila_bound.concentration import ConfidenceBounds, betting, chernoff, effective_size, empirical_bernstein, hoeffding
from cila_bound.geometry import Geometry
from cila_bound.losslog import LogError, LogWarning, LossLog, LossLogWriter, iter_log, read_log
from cila_bound.means import ConfidenceStatement
from cila_bound.planning import tuples_needed
from cila_bound.records import Header, Measurement, Statistic, TestLoss, Training, TupleValues
from cila_bound.steps import (
    MomentStep,
    PinskerStep,
    PointwiseStep,
    Step,
    linear_step,
    moment_step,
    pinsker_step,
    pointwise_step,
    saturating_step,
)
from cila_bound.theorem import Theorem1, theorem1

__all__ = [
    "Certificate",
    "ConfidenceBounds",
    "ConfidenceStatement",
    "Geometry",
    "Header",
    "LogError",
    "LogWarning",
    "LossLog",
    "LossLogWriter",
    "Measurement",
    "MomentStep",
    "PinskerStep",
    "PointwiseStep",
    "Statistic",
    "Step",
    "TestLoss",
    "Theorem1",
    "Training",
    "TupleValues",
    "betting",
    "certify",
    "chernoff",
    "cila_weight",
    "dual_price_weight",
    "effective_size",
    "empirical_bernstein",
    "hoeffding",
    "iter_log",
    "linear_step",
    "moment_step",
    "pinsker_step",
    "pointwise_step",
    "read_log",
    "saturating_step",
    "theorem1",
    "tuples_needed",
]
