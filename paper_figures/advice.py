"""What a check's numbers mean and what to do next, in plain words."""

from __future__ import annotations

import math
from typing import Any

_WELL_CLEAR = 0.005  # a smaller change of accuracy is not worth a word
_MANY = 100_000  # tuples


def headline(found: dict[str, Any]) -> list[str]:
    """Two to four sentences: the result, what forgetting costs, what is guaranteed."""
    last, first = found["stages"][-1], found["stages"][0]
    lines = [
        f"After the last task {last['variant']} classifies {_percent(last['accuracy'])} of all tasks' held-out and "
        f"test images correctly, {first['variant']} ({first['adds']}) {_percent(first['accuracy'])}; forgetting, "
        f"from the best on each earlier task: {_points(last['forgetting'])}, {first['variant']} "
        f"{_points(first['forgetting'])}."
    ]
    kpi = found["kpi"]
    if kpi is not None:
        best = min(found["stages"], key=lambda stage: stage["cost"]["mean"])
        trivial = _average([min(both) for both in zip(kpi["all_pass"], kpi["none_pass"], strict=True)])
        lines.append(
            f"The cheapest is {best['variant']}: {_number(best['cost'])} per 1,000 items, mean over tasks, against "
            f"{short(trivial)} without any model (on each task the cheaper of passing all and none)."
        )
    lines.append(_guarantee(found))
    return lines


def _guarantee(found: dict[str, Any]) -> str:
    tightest = _tightest(found)
    level, n_tasks = f"{100 * found['confidence']:g}%", len(found["tasks"])
    loss = found["stages"][-1]["loss"]["mean"]
    text = (
        f"With {level} confidence the contrastive loss of {found['bounds_of']}, {loss:.3g} nats a task on test tuples, "
        f"is at most {_certified(tightest):.3g} ({tightest['name']})"
    )
    if tightest["below_ceiling"] == 0:
        return f"{text}, which is the ceiling: nothing is guaranteed with so few held-out tuples."
    useful = tightest["below_chance"]
    if useful == n_tasks:
        return f"{text}: better than a collapsed encoder on every task, guaranteed."
    informative = f"not vacuous for {tightest['below_ceiling']} of {n_tasks} tasks"
    return f"{text}: {informative}, better than a collapsed encoder for {useful or 'none'} of them."


def advice(found: dict[str, Any]) -> list[str]:
    """What to do next, the most pressing first."""
    return [text for rule in (_failures, _sample, _parts, _forgetting, _bounds, _seeds, _data) for text in rule(found)]


def _failures(found: dict[str, Any]) -> list[str]:
    if not found["violations"]:
        return []
    return [
        f"A bound failed on the data ({found['violations'][0]}): do not rely on this report; embeddings that are not "
        "unit-norm, an altered log or a bug in the toolkit can cause it, please report it."
    ]


def _sample(found: dict[str, Any]) -> list[str]:
    """How many held-out tuples a certificate would take, by the bound that takes fewest (by Chernoff's bound)."""
    texts = []
    fewest, per_tuple = min(found["n_tuples"]), found["geometry"]["n_negatives"] + 2
    bounds = [bound for bound in found["bounds"] if bound["certified"] is not None]
    for word, meaning in (("ceiling", "below the ceiling"), ("chance", "below chance")):
        if max(bound[f"below_{word}"] for bound in bounds) == len(found["tasks"]):
            continue
        needed = {b["name"]: n for b in bounds if (n := b["needed"][word]) is not None and n <= _MANY}
        if not needed:
            texts.append(
                f"No number of held-out images (up to {_MANY:,} tuples a task) would certify a loss {meaning} on every "
                "task while losses and drift stay what they are: train longer, or let the model drift less (more "
                "distillation, more rehearsal)."
            )
            break
        cheapest = min(needed, key=needed.__getitem__)
        if needed[cheapest] > fewest:
            texts.append(
                f"To certify a loss {meaning} on every task, hold out more: about {needed[cheapest]:,} independent "
                f"tuples a task ({cheapest}), where the smallest task has {fewest:,} now "
                f"({per_tuple * needed[cheapest]:,} held-out images if classes are balanced, more if one is rare)."
            )
    return texts


def _parts(found: dict[str, Any]) -> list[str]:
    """What each part is worth, if it can be told: by cost or accuracy, and what else it changes beyond doubt."""
    texts = []
    first = "cost" if found["kpi"] is not None else "accuracy"
    for part in found["parts"]:
        if part[first]["low"] is None:
            continue
        what = f"{part['after']} ({part['adds']}) against {part['before']}"
        interval = f"{first} {_interval(part[first], first)} over {part[first]['n']} seeds"
        other = [name for name in ("accuracy", "forgetting", "loss") if name != first and _shown(part[name])]
        if not _shown(part[first]):
            verdict, word = f"No difference in {first} shown", "But"
        elif (part[first]["mean"] > 0.0) == (first == "accuracy"):
            verdict, word = "Keep it", "Also"
        else:
            verdict, word = "Leave it out", "But"
        also = f" {word} {', '.join(f'{name} {_interval(part[name], name)}' for name in other)}." if other else ""
        texts.append(f"{verdict}: {what}, {interval}.{also}")
    return texts


def _shown(change: dict[str, Any]) -> bool:
    """Whether the interval excludes zero."""
    return bool(change["low"] > 0.0 or change["high"] < 0.0)


def _interval(change: dict[str, Any], name: str) -> str:
    scale, unit = {"cost": (1.0, ""), "loss": (1.0, " nats")}.get(name, (100.0, " points"))
    mean, low, high = (short(scale * change[end], sign="+") for end in ("mean", "low", "high"))
    return f"{mean}{unit} [{low}, {high}]"


def _forgetting(found: dict[str, Any]) -> list[str]:
    last, plan = found["stages"][-1], found["plan"]
    lost = last["forgetting"]["mean"]
    if plan["buffer_size"] >= plan["old_images"]:
        return [
            f"The buffer of {plan['buffer_size']:,} images holds all {plan['old_images']:,} training images of earlier "
            "tasks, so that nothing has to be forgotten: repeat with a smaller --buffer-size to see what the parts do."
        ]
    if lost > 0.05:
        return [
            f"{last['variant']} still loses {_points(last['forgetting'])} on old tasks: try a larger buffer "
            f"({plan['buffer_size']:,} of {plan['old_images']:,} training images of earlier tasks now) before anything "
            "else."
        ]
    if abs(lost) < _WELL_CLEAR:
        return [f"{last['variant']} forgets next to nothing here: effort is better spent on accuracy on new tasks."]
    return []


def _bounds(found: dict[str, Any]) -> list[str]:
    bounds = {bound["name"]: bound for bound in found["bounds"]}
    chain, step = bounds["moment chain"], bounds["moment, last step"]
    ceiling = found["geometry"]["ceiling"]
    texts = []
    if len(found["tasks"]) > 2 and chain["estimate"]["mean"] > 1.5 * step["estimate"]["mean"]:
        texts.append(
            f"After {len(found['tasks']) - 1} updates the chain of bounds has loosened to "
            f"{chain['estimate']['mean']:.3g} nats a task (ceiling {ceiling:.3g}); measured anew before the last update"
            f" it is {step['estimate']['mean']:.3g}: keep held-out images of old tasks and measure them every time."
        )
    theory, direct = _tightest(found), bounds["measured directly"]
    if _certified(direct) < _certified(theory):
        texts.append(
            f"Where held-out images of old tasks are at hand, measuring the new model on them certifies most "
            f"({_certified(direct):.3g} nats a task, against {_certified(theory):.3g} by the {theory['name']}): the "
            "other bounds are for whoever has the old model's loss and the drift, but not the new model's loss."
        )
    theorem = bounds["Theorem 1 form"]["formula"]["mean"]
    if theorem is None or theorem > ceiling:
        value = "infinite" if theorem is None else f"{theorem:.3g} nats a task, above the ceiling of {ceiling:.3g}"
        texts.append(f"Training losses alone guarantee nothing here (the Theorem 1 form is {value}).")
    return texts


def _tightest(found: dict[str, Any]) -> dict[str, Any]:
    """The row of the theory, without the model's own measured loss, that certifies most."""
    rows = [bound for bound in found["bounds"] if bound["certified"] is not None and bound["step"] != "direct"]
    return min(rows, key=_certified)


def _certified(bound: dict[str, Any]) -> float:
    return float(bound["certified"]["mean"])


def _seeds(found: dict[str, Any]) -> list[str]:
    n, plan = found["stages"][0]["n"], found["plan"]
    if n >= 3 and not plan.get("too_short"):
        return []
    few = f"All of this rests on {n} seed{'s' if n > 1 else ''}" if n < 3 else "Training was cut short"
    return [f"{few} ({plan['minutes']:g} minutes allowed): repeat with more --minutes before you decide on it."]


def _data(found: dict[str, Any]) -> list[str]:
    if not found["leaked"]:
        return []
    return [
        f"{found['leaked']} held-out or test images were copies of training images and were left out: find out where "
        "they come from, other near-copies would make all figures here too good."
    ]


def _average(values: list[float]) -> float:
    return sum(values) / len(values)


def _percent(summary: dict[str, Any]) -> str:
    return f"{_number(summary, 100.0)}%"


def _points(summary: dict[str, Any]) -> str:
    return f"{_number(summary, 100.0)} points"


def _number(summary: dict[str, Any], scale: float = 1.0) -> str:
    text = short(scale * summary["mean"])
    return text if summary["std"] is None else f"{text} ± {short(scale * summary['std'], digits=2)}"


def short(value: float, *, digits: int = 3, sign: str = "") -> str:
    """So many significant digits, but no exponent."""
    if abs(value) < 1e-4:
        return f"{0.0:{sign}.0f}"
    return f"{value:{sign},.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"
