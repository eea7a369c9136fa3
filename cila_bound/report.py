"""All bounds of one log, as a table for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from cila_bound.certificate import ASSUMPTIONS, Certificate, StepName, certify
from cila_bound.chain import Chain, Data
from cila_bound.losslog import LossLog
from cila_bound.means import Inequality, standard_error
from cila_bound.planning import tuples_needed
from cila_bound.violations import Violation, find_violations

_MEANING = {"full": "from each task's own model, one step per later task", "refreshed": "the last step alone"}
_PLANNED = ("moment", "pointwise", "direct")
_SOURCE = {"heldout": "held-out tuples", "training": "training and buffer tuples"}


@dataclass(frozen=True)
class Report:
    """Certificates of one log, what they violate, and the bounds that the log has no records for."""

    log: LossLog
    certificates: list[Certificate]
    violations: list[tuple[Certificate, Violation]]
    skipped: list[str]
    sigmas: float

    @staticmethod
    def of(
        log: LossLog,
        *,
        steps: Sequence[StepName] | None = None,
        chains: Sequence[Chain] = ("full", "refreshed"),
        data: Data = "heldout",
        after_task: int | None = None,
        confidence: float | None = None,
        inequality: Inequality = "auto",
        selections: int = 1,
        rigorous: bool = False,
        sigmas: float = 3.0,
    ) -> Report:
        """Evaluates ``steps`` (default: all that the log holds records for) on ``chains``, as estimates or, with a
        ``confidence``, as certificates.

        Raises ValueError if nothing can be evaluated or what was asked for cannot be certified, and LookupError if a
        step that was asked for lacks records.
        """
        options: dict[str, Any] = {
            "data": data,
            "after_task": after_task,
            "confidence": confidence,
            "inequality": inequality,
            "selections": selections,
            "rigorous": rigorous,
        }
        if log.last_task == 0:
            raise ValueError("the log holds a header and no records: train at least one task")
        certificates: list[Certificate] = []
        skipped: list[str] = []
        lacking: list[str] = []
        for chain in chains:
            for step in steps or get_args(StepName):
                if (step, chain) in (("theorem1", "refreshed"), ("pointwise", "full"), ("direct", "full")):
                    continue
                if step == "direct" and confidence is None and not steps:
                    continue  # the held-out loss itself: of use beside certificates only
                if step == "theorem1" and confidence is not None and not steps:
                    skipped.append(f"{step} ({chain}): it takes training losses, which no certificate can rest on")
                    continue
                try:
                    certificates.append(certify(log, step, chain=chain, **options))
                except LookupError as error:
                    if steps:
                        raise
                    skipped.append(f"{step} ({chain}): {error}")
                    lacking.append(str(error))
        if not certificates:
            absent = f"{', '.join(steps or ())} does not exist for the {', '.join(chains)} chain"
            cut_short = after_task is None and any(reason.startswith("the log has no record") for reason in lacking)
            earlier = log.last_task - 1 if cut_short else 0
            remedy = f"; if the run was cut short, bound the model after task {earlier} (after_task)" if earlier else ""
            raise ValueError(f"no bound can be evaluated: {'; '.join([*dict.fromkeys(lacking)][:3]) or absent}{remedy}")
        violations = [(c, violation) for c in certificates for violation in find_violations(log, c, sigmas)]
        return Report(log, certificates, violations, skipped, sigmas)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite bound is the string "inf"."""
        header, geometry = self.log.header, self.log.geometry
        return _finite(
            {
                "method": header.method,
                "seed": header.seed,
                "temperature": header.temperature,
                "n_negatives": header.n_negatives,
                "floor": geometry.floor,
                "chance": geometry.chance,
                "ceiling": geometry.ceiling,
                "holds": not self.violations,
                "certificates": [_certificate_json(certificate) for certificate in self.certificates],
                "violations": [
                    {"step": certificate.step, "chain": certificate.chain, **dataclasses.asdict(violation)}
                    for certificate, violation in self.violations
                ],
                "skipped": self.skipped,
            }
        )

    def as_text(self, title: str) -> str:
        header, geometry, first = self.log.header, self.log.geometry, self.certificates[0]
        negatives = f"{header.n_negatives} negative{'s' if header.n_negatives > 1 else ''}"
        lines = [
            f"{title}: {header.method}, seed {header.seed}, after task {first.after_task} of {len(header.tasks)}",
            f"temperature {header.temperature:g}, {negatives}; floor {geometry.floor:.4g}, "
            f"chance {geometry.chance:.4g}, ceiling {geometry.ceiling:.4g} nats; {_worth(first)}",
        ]
        for chain in get_args(Chain):
            columns = [c for c in self.certificates if c.chain == chain]
            if columns:
                data = sorted({c.data for c in columns if not c.theorem})
                source = f", from {_SOURCE[data[0]]}" if data else ""
                lines += ["", f"{chain} chain: {_MEANING[chain]}{source}", *self._table(columns)]
        lines += [
            "",
            "measured: mean +- standard error on test tuples; total: of the bounds clipped at the ceiling; lower: the "
            "total's lower bound",
            "each bound needs unit-norm embeddings and",
        ]
        lines += [f"  {step:<10}  {ASSUMPTIONS[step]}" for step in dict.fromkeys(c.step for c in self.certificates)]
        lines += [f"not evaluated: {reason}" for reason in self.skipped]
        if first.confidence is not None:
            lines += ["", *self._grounds()]
        return "\n".join([*lines, "", *self._verdict()])

    def _grounds(self) -> list[str]:
        """What each certificate rests on, and how many tuples would be needed for more."""
        lines = [
            "each column rests on one-sided confidence bounds on means",
            "(needs: independent tuples a task for every task's bound to be below the ceiling / below chance)",
        ]
        for c in self.certificates:
            assert c.confidence is not None and c.delta is not None
            used = " and ".join(sorted({statement.inequality for statement in c.statements}))
            line = f"  {c.step + ', ' + c.chain:<21}  {len(c.statements)}, each wrong with probability <= {c.delta:.2g}"
            line = f"{line}, by {used}"
            if c.step not in _PLANNED:
                lines.append(line)
                continue
            needed = [
                tuples_needed(
                    self.log,
                    c.step,
                    chain=c.chain,
                    below=below,
                    confidence=c.confidence,
                    selections=c.selections,
                    after_task=c.after_task,
                )
                for below in (self.log.geometry.ceiling, self.log.geometry.chance)
            ]
            numbers = " / ".join("no number suffices" if n is None else f"{n:,}" for n in needed)
            lines.append(f"{line} (needs {numbers})")
        return lines

    def _verdict(self) -> list[str]:
        lines = []
        for certificate, violation in self.violations:
            tuples = "test tuples" if violation.measured_on == "test" else "the bound's own tuples"
            lines.append(
                f"VIOLATED: {certificate.step} ({certificate.chain}), {violation.task}: loss {violation.measured:.6g} "
                f"on {tuples} (margin {violation.margin:.2g}), {violation.side} bound {violation.bound:.6g}"
            )
            if certificate.data == "training":
                lines.append(
                    "  (from losses on data that the models were fitted to: this may be the generalisation gap)"
                )
        if lines:
            return lines
        losses = self.certificates[0].measured
        compared = sum(loss is not None for loss in losses)
        if not compared:
            return ["no measured test losses in the log: nothing to compare the bounds with"]
        lines = [
            f"all bounds evaluated hold on the measured test losses of {compared} of {len(losses)} tasks, "
            f"within {self.sigmas:g} standard errors"
        ]
        outside, cells = self._point_estimates()
        if outside:
            lines.append(
                f"{outside} of {cells} point estimates lie on the wrong side of the measured loss, by sampling error"
            )
        return lines

    def _point_estimates(self) -> tuple[int, int]:
        """How many upper and lower bounds per task the measured mean contradicts, without margin, and of how many."""
        pairs = [
            (low, loss, high)
            for c in self.certificates
            if not c.theorem
            for low, loss, high in zip(c.lower_per_task, c.measured, c.per_task, strict=True)
            if loss is not None
        ]
        return sum((loss > high) + (loss < low) for low, loss, high in pairs), 2 * len(pairs)

    def _table(self, columns: list[Certificate]) -> list[str]:
        first = columns[0]
        steps = [first.after_task - task for task in range(1, first.after_task + 1)]
        if first.chain == "refreshed":
            steps = [min(step, 1) for step in steps]
        rows = [["task", "steps", "measured", *(c.step for c in columns)]]
        for index, name in enumerate(first.tasks):
            cells = ["-" if c.theorem else _task_cell(c, index) for c in columns]
            rows.append([name, str(steps[index]), self._measured(first, index + 1), *cells])
        truth = "-" if first.measured_total is None else f"{first.measured_total:.4g}"
        rows.append(["total", "", truth, *(_cell(c.total, c.vacuous_total, c.tightness_total) for c in columns)])
        rows.append(["unclipped", "", "", *(f"{c.unclipped_total:.3g}" for c in columns)])
        rows.append(["lower", "", "", *(f"{c.lower_total:.4g}" for c in columns)])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]

    def _measured(self, certificate: Certificate, task: int) -> str:
        if certificate.measured[task - 1] is None:
            return "-"
        test = self.log.test(certificate.after_task, task)
        return f"{test.contrastive.mean:.4g} +- {standard_error(test.contrastive, test.n_effective):.2g}"


def _worth(certificate: Certificate) -> str:
    if certificate.confidence is None:
        return "plug-in, no confidence level"
    among = f" for any of {certificate.selections} models" if certificate.selections > 1 else ""
    return f"certified: each column holds with probability >= {certificate.confidence:g}{among}"


def _task_cell(c: Certificate, index: int) -> str:
    bound = c.unclipped_per_task[index] if c.vacuous[index] else c.per_task[index]
    return _cell(bound, c.vacuous[index], c.tightness[index])


def _cell(bound: float, vacuous: bool, tightness: float | None) -> str:
    if vacuous:
        return f"{bound:.3g} vac"
    return f"{bound:.3g}" if tightness is None else f"{bound:.3g} ({tightness:.1f}x)"


def _certificate_json(certificate: Certificate) -> dict[str, Any]:
    fields = {field.name: getattr(certificate, field.name) for field in dataclasses.fields(certificate)}
    del fields["geometry"]  # the report says it once
    fields["statements"] = [dataclasses.asdict(statement) for statement in certificate.statements]
    if certificate.theorem is not None:
        theorem = certificate.theorem
        fields["theorem"] = {name: getattr(theorem, name) for name in ("alpha", "eta", "gammas", "terms")}
    derived = ("mean", "vacuous", "vacuous_total", "measured_total", "tightness", "tightness_total")
    return fields | {name: getattr(certificate, name) for name in derived}


def _finite(value: Any) -> Any:
    """Infinite numbers as the strings "inf" and "-inf": JSON has none."""
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
