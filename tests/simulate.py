"""Synthetic tuples and logs with known losses, independent of the package: numpy, straight from the definitions."""

from __future__ import annotations

import numpy as np

from cila_bound import Header, LossLog, Measurement, Statistic, TestLoss, Training, TupleValues


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, accurate where a probability is near 1."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    top = shifted.argmax(axis=-1)[..., None]
    others = np.exp(shifted)
    np.put_along_axis(others, top, 0.0, axis=-1)
    return shifted - np.log1p(others.sum(axis=-1, keepdims=True))


def tuple_logits(rng: np.random.Generator, n: int, n_negatives: int, temperature: float, kind: str) -> np.ndarray:
    """(n, 1 + K) logits in [-1/temperature, 1/temperature]: cosines of random vectors, corners of the box, or a mix."""
    shape = (n, 1 + n_negatives)
    cosines = {
        "uniform": rng.uniform(-1.0, 1.0, shape),
        "corners": rng.choice([-1.0, 1.0], shape),
        "good": np.concatenate([np.ones((n, 1)), -np.ones((n, n_negatives))], axis=1),
        "bad": np.concatenate([-np.ones((n, 1)), np.ones((n, n_negatives))], axis=1),
    }
    if kind == "mix":
        choice = rng.integers(0, len(cosines), (n, 1))
        return np.choose(choice, list(cosines.values())) / temperature
    return cosines[kind] / temperature


def losses(student: np.ndarray, teacher: np.ndarray | None) -> dict[str, np.ndarray]:
    """Per-tuple values of every field of a Measurement, from logits (n, 1 + K) with the positive first."""
    log_q = log_softmax(student)
    result = {"contrastive": -log_q[:, 0], "miss_probability": 1.0 - np.exp(log_q[:, 0])}
    if teacher is not None:
        log_p = log_softmax(teacher)
        p = np.exp(log_p)
        result |= {
            "distillation": -(p * log_q).sum(1),
            "teacher_entropy": -(p * log_p).sum(1),
            "drift": (p * ((log_p - log_q) + np.expm1(log_q - log_p))).sum(1),  # adds sum(q - p) = 0: no cancellation
            "teacher_contrastive": -log_p[:, 0],
            "teacher_miss_probability": 1.0 - p[:, 0],
        }
    return result


def header(n_tasks: int, n_negatives: int, temperature: float, *, fixed_tuples: bool = True) -> Header:
    return Header(
        temperature=temperature,
        n_negatives=n_negatives,
        tasks=tuple(f"task {i}" for i in range(1, n_tasks + 1)),
        seed=0,
        method="simulated",
        fixed_tuples=fixed_tuples,
        config={"note": "synthetic"},
        versions={"numpy": np.__version__},
        data_fingerprint="none",
    )


def simulate(
    n_tasks: int = 4,
    n_negatives: int = 3,
    temperature: float = 0.5,
    *,
    n: int = 60,
    n_effective: int | None = None,
    drift: float = 0.2,
    distill_weight: float = 1.0,
    seed: int = 0,
) -> LossLog:
    """The log of models that drift at random: tuples of each task start well separated, then every cosine moves by
    about ``drift`` a step. Held-out, buffer, training and test tuples are one and the same sample, so every inequality
    that holds for all distributions must hold on the log without sampling error.
    """
    rng = np.random.default_rng(seed)
    log = LossLog(header(n_tasks, n_negatives, temperature))
    cosines: dict[int, np.ndarray] = {}
    counts = n, n_effective or n
    for t in range(1, n_tasks + 1):
        own = rng.uniform(-1.0, 0.3, (n, 1 + n_negatives))
        own[:, 0] = rng.uniform(0.2, 1.0, n)
        cosines[t] = np.clip(own + rng.normal(0.0, drift, own.shape), -1, 1)  # f_{t-1} on the new task
        before = {i: value.copy() for i, value in cosines.items()}
        for i in cosines:
            moved = own if i == t else cosines[i] + rng.normal(0.0, drift, cosines[i].shape)
            cosines[i] = np.clip(moved, -1.0, 1.0)
        values = {i: losses(cosines[i] / temperature, before[i] / temperature if t > 1 else None) for i in cosines}
        for i in cosines:
            statistics = {name: Statistic.of(value) for name, value in values[i].items()}
            for split in ("heldout", "train" if i == t else "buffer"):
                per_tuple = None
                if t > i and split == "heldout":
                    columns = values[i]["teacher_contrastive"], values[i]["drift"]
                    per_tuple = TupleValues(*(tuple(column.tolist()) for column in columns), block=1)
                log.add(Measurement(t, i, split, *counts, **statistics, tuples=per_tuple))  # type: ignore[arg-type]
            log.add(TestLoss(t, i, *counts, statistics["contrastive"]))
        shares = tuple(1.0 / t for _ in range(t))
        contrastive = float(values[t]["contrastive"].mean())
        weight = distill_weight if t > 1 else 0.0
        distillation = float(np.mean([values[i]["distillation"].mean() for i in cosines])) if t > 1 else None
        log.add(
            Training(
                t,
                contrastive + weight * (distillation or 0.0),
                contrastive,
                distillation,
                1.0,
                weight,
                shares,
                "current",
            )
        )
    return log


class Population:
    """Tuples of every task with their losses under each of ``n_tasks`` models, from which logs are drawn.

    ``truth[t, i]`` are the exact means of all statistics of f_t on D_i. Models start good and drift, so that losses
    have a heavy tail: most tuples are near the floor, few near the ceiling.
    """

    def __init__(self, n_tasks: int, n_negatives: int, temperature: float, *, size: int = 20_000, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.n_tasks, self.header = n_tasks, header(n_tasks, n_negatives, temperature)
        self.values: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        cosines = {}
        for i in range(1, n_tasks + 1):
            logits = tuple_logits(rng, size, n_negatives, 1.0, "good")
            hard = rng.random(size) < 0.05
            cosines[i] = np.where(hard[:, None], tuple_logits(rng, size, n_negatives, 1.0, "mix"), logits)
        for t in range(1, n_tasks + 1):
            for i in range(1, t + 1):
                before = cosines[i]
                if t > 1:
                    cosines[i] = np.clip(before + rng.normal(0.0, 0.15, before.shape), -1.0, 1.0)
                teacher = before / temperature if t > 1 else None
                self.values[t, i] = losses(cosines[i] / temperature, teacher)
        self.truth = {key: {name: float(v.mean()) for name, v in value.items()} for key, value in self.values.items()}
        self.size = size

    def log(self, rng: np.random.Generator, n: int, *, tuples: bool = False) -> LossLog:
        """Held-out records of ``n`` independent tuples a task, the same after every task."""
        log = LossLog(self.header)
        drawn = {i: rng.integers(self.size, size=n) for i in range(1, self.n_tasks + 1)}
        for (t, i), values in self.values.items():
            own = {name: value[drawn[i]] for name, value in values.items()}
            statistics = {name: Statistic.of(value) for name, value in own.items()}
            columns = ("contrastive", "teacher_contrastive", "distillation", "drift")
            per_tuple = TupleValues(**{name: tuple(own[name].tolist()) for name in columns if name in own}, block=1)
            log.add(Measurement(t, i, "heldout", n, n, **statistics, tuples=per_tuple if tuples else None))  # type: ignore[arg-type]
        return log
