"""The bounds that figures and tables show, each computed once per log."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from cila_bound import Certificate, LossLog, certify
from cila_bound.certificate import StepName
from cila_bound.chain import Chain

PER_TASK: dict[str, tuple[StepName, Chain]] = {
    "linear": ("linear", "full"),
    "saturating": ("saturating", "full"),
    "pinsker": ("pinsker", "full"),
    "moment": ("moment", "full"),
    "moment, refreshed": ("moment", "refreshed"),
    "pointwise, refreshed": ("pointwise", "refreshed"),
}
THEOREM1 = "Theorem 1 form"
BOUNDS: dict[str, tuple[StepName, Chain]] = {THEOREM1: ("theorem1", "full"), **PER_TASK}


@dataclass(frozen=True, eq=False)
class Losses:
    """A complete loss log and its certificates. All losses in nats."""

    log: LossLog
    _certificates: dict[str, Certificate] = field(default_factory=dict)

    def check_complete(self) -> None:
        """Raises LookupError if the log lacks a record that a figure needs."""
        last = len(self.log.header.tasks)
        for task in range(1, last + 1):
            self.log.training(task)
            self.log.test(last, task)
            for past in range(1, task + 1):
                self.log.measurement(task, past, "heldout")

    @cached_property
    def measured(self) -> tuple[float, ...]:
        """The last model's test loss on every task."""
        last = len(self.log.header.tasks)
        return tuple(self.log.test(last, task).contrastive.mean for task in range(1, last + 1))

    @property
    def measured_total(self) -> float:
        return sum(self.measured)

    @cached_property
    def has_tuples(self) -> bool:
        """Whether the per-tuple values are there that the pointwise bound needs; they are optional."""
        last = len(self.log.header.tasks)
        found = (self.log.measurement(last, task, "heldout").tuples for task in range(1, last))
        return all(tuples is not None and tuples.drift is not None for tuples in found)

    def bounds(self) -> list[str]:
        """The names of the per-task bounds that the log has what it takes for."""
        return [name for name, (step, _) in PER_TASK.items() if step != "pointwise" or self.has_tuples]

    def bound(self, name: str) -> Certificate:
        """The certificate of one of BOUNDS. Raises LookupError if the log lacks per-tuple values for it."""
        if name not in self._certificates:
            step, chain = BOUNDS[name]
            self._certificates[name] = certify(self.log, step, chain=chain)
        return self._certificates[name]

    def certified(self, name: str, confidence: float) -> Certificate:
        """The same at a confidence."""
        key = f"{name} at {confidence:g}"
        if key not in self._certificates:
            step, chain = BOUNDS[name]
            self._certificates[key] = certify(self.log, step, chain=chain, confidence=confidence)
        return self._certificates[key]

    def total(self, name: str) -> float:
        """The bound on the sum over tasks, unclipped; may be infinite."""
        return self.bound(name).unclipped_total
