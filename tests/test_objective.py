"""What a batch is trained on, against loops over the equations; the key queue; the weights of every method."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from cila_bound import Header, LossLog, Measurement, Statistic, dual_price_weight
from experiments.config import RunConfig
from experiments.methods import METHODS
from experiments.moco import KeyQueue
from experiments.models import build_model
from experiments.objective import contrastive_loss, replay_loss
from experiments.world import World
from tests.test_kernels import triple_loop

CONFIG = RunConfig(contrastive_scale=3.0)
LABEL = torch.tensor([0, 1, 1, 0, 2, 2]).repeat(2)
TASK = torch.tensor([2, 2, 1, 2, 1, 1]).repeat(2)
TEMPERATURES = {name: getattr(CONFIG, name) for name in ("temperature", "student_temperature", "teacher_temperature")}


def embeddings(rows: int, seed: int, width: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, width, generator=generator), dim=1)


@pytest.mark.parametrize("weights", [(2.0, 2.0), (0.5, 3.0)])
def test_objective_against_the_equations(weights: tuple[float, ...]) -> None:
    """scale x SupCon over anchors of the current task + lambda x distillation of all rows, two views, self excluded."""
    z, teacher = embeddings(12, 0), embeddings(12, 1)
    result = contrastive_loss(CONFIG, METHODS["co2l"], z, LABEL, TASK, teacher, current_task=2, weights=weights)
    ids = torch.arange(12)
    options: dict[str, Any] = {"query_label": LABEL, "key_label": LABEL, "query_id": ids, "key_id": ids}
    rows = triple_loop([z, z, teacher, teacher], options | TEMPERATURES)
    contrastive = np.array(rows["contrastive"])[(TASK == 2).numpy()]
    price = np.array(weights)[TASK.numpy() - 1]
    assert result.terms["contrastive"].tolist() == pytest.approx(contrastive.tolist(), rel=1e-5)
    assert result.terms["distillation"].tolist() == pytest.approx(rows["distillation"], rel=1e-5)
    expected = 3.0 * contrastive.mean() + np.mean(price * np.array(rows["distillation"]))
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)


def test_distillation_only_has_no_contrastive_term_after_task_1() -> None:
    z, teacher = embeddings(12, 0).requires_grad_(), embeddings(12, 1)
    method = METHODS["distillation-only"]
    result = contrastive_loss(CONFIG, method, z, LABEL, TASK, teacher, current_task=2, weights=(2.0, 2.0))
    assert result.terms.keys() == {"distillation"}
    assert result.loss.item() == pytest.approx(2.0 * result.terms["distillation"].mean().item(), rel=1e-5)
    first = contrastive_loss(CONFIG, method, z, LABEL, torch.ones_like(TASK), current_task=1)
    assert first.terms.keys() == {"contrastive"}


def test_positives_can_be_the_other_view() -> None:
    """SimCLR: whatever the labels say."""
    z = embeddings(12, 0)
    config = dataclasses.replace(CONFIG, positives="view", contrastive_scale=1.0)
    result = contrastive_loss(config, METHODS["finetune"], z, LABEL, torch.ones_like(TASK), current_task=1)
    similarity = (z @ z.T / config.temperature).fill_diagonal_(-torch.inf)
    expected = functional.cross_entropy(similarity, torch.arange(12).roll(6), reduction="none")
    assert result.terms["contrastive"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_queue_adds_keys_of_the_momentum_encoder_and_of_the_teacher() -> None:
    torch.manual_seed(0)
    model = build_model("small", (1, 8, 8))
    queue = KeyQueue(model, size=10, momentum=0.9)
    z, teacher = embeddings(12, 0, 64), embeddings(12, 1, 64)
    alone = contrastive_loss(
        CONFIG, METHODS["co2l"], z, LABEL, TASK, teacher, current_task=2, weights=(1.0, 1.0), queue=queue
    )
    start = {name: value.clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for value in model.parameters():
            value += 1.0
    views = torch.randn(6, 1, 8, 8)
    for label in (torch.full((6,), 7), torch.tensor([0, 1, 2, 0, 1, 2])):
        queue.advance(model, views, embeddings(6, 2, 64), label)
    for name, value in queue.encoder.named_parameters():
        assert torch.allclose(value, start[name] + 1.0 - 0.9**2, atol=1e-5)
    assert queue.key.shape == (10, 64) and queue.label.tolist() == [7, 7, 7, 7, 0, 1, 2, 0, 1, 2]
    assert not queue.key.requires_grad
    longer = contrastive_loss(
        CONFIG, METHODS["co2l"], z, LABEL, TASK, teacher, current_task=2, weights=(1.0, 1.0), queue=queue
    )
    ids = torch.arange(22)
    keys = torch.cat([z, queue.key]), torch.cat([teacher, queue.teacher_key])
    options = {"query_label": LABEL, "key_label": torch.cat([LABEL, queue.label]), "query_id": ids[:12], "key_id": ids}
    rows = triple_loop([z, keys[0], teacher, keys[1]], options | TEMPERATURES)
    assert longer.terms["distillation"].tolist() == pytest.approx(rows["distillation"], rel=1e-4)
    contrastive = np.array(rows["contrastive"])[(TASK == 2).numpy()]
    assert longer.terms["contrastive"].tolist() == pytest.approx(contrastive.tolist(), rel=1e-4)
    assert not torch.allclose(longer.terms["contrastive"], alone.terms["contrastive"])
    copy = KeyQueue(build_model("small", (1, 8, 8)), size=10, momentum=0.9)
    copy.load_state(queue.state())
    assert torch.equal(copy.key, queue.key) and torch.equal(copy.teacher_key, queue.teacher_key)


@pytest.mark.parametrize(("ranks", "expected"), [(3, [[0, 3], [1, 4], [2]]), (2, [[0, 1, 2], [3, 4]])])
def test_each_rank_takes_its_own_queue_back(ranks: int, expected: list[list[int]]) -> None:
    """Saved by three ranks, of which one has a key less; two ranks share all of it."""
    model = build_model("small", (1, 8, 8))
    parts = [torch.tensor(part) for part in ([0, 3], [1, 4], [2])]
    saved = {"encoder": model.state_dict(), "label": parts, "key": [part[:, None].float() for part in parts]}
    for rank in range(ranks):
        queue = KeyQueue(model, size=10, momentum=0.9, world=World(rank, ranks))
        queue.load_state(saved)
        assert queue.label is not None and queue.key is not None and queue.teacher_key is None
        assert queue.label.tolist() == expected[rank]
        assert queue.key[:, 0].tolist() == expected[rank]


def test_replay_losses_against_their_equations() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, replayed, target = (torch.randn(n, 5, generator=generator) for n in (4, 6, 6))
    label, old = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 3, 2, 1, 0, 4])
    config = dataclasses.replace(CONFIG, der_alpha=0.3, der_beta=0.7)

    def cross_entropy(values: torch.Tensor, labels: torch.Tensor) -> float:
        exponentials = np.exp(values.double().numpy())
        p = exponentials / exponentials.sum(1, keepdims=True)
        return float(np.mean([-np.log(p[i, label]) for i, label in enumerate(labels.tolist())]))

    first = replay_loss(config, METHODS["der++"], logits, label)
    assert first.loss.item() == pytest.approx(cross_entropy(logits, label), rel=1e-5)
    er = replay_loss(config, METHODS["er"], logits, label, replayed, old)
    assert er.loss.item() == pytest.approx(
        cross_entropy(torch.cat([logits, replayed]), torch.cat([label, old])), rel=1e-5
    )
    der = replay_loss(config, METHODS["der++"], logits, label, replayed, old, target)
    expected = (
        cross_entropy(logits, label)
        + 0.3 * ((replayed[:3] - target[:3]) ** 2).mean().item()
        + 0.7 * cross_entropy(replayed[3:], old[3:])
    )
    assert der.loss.item() == pytest.approx(expected, rel=1e-5)


def test_dual_prices_are_those_of_the_last_logged_losses() -> None:
    """Tasks 1 and 2 have drifted after task 3, task 3 is taken to drift as they do; task 2 may be missing."""
    drifts, losses = {1: 0.02, 2: 0.01}, {1: 0.5, 2: 0.3, 3: 0.2}

    def log(measured: tuple[int, ...]) -> LossLog:
        header = Header(0.5, 1, ("a", "b", "c", "d"), 0, "dual-price", True, {}, {}, "")
        result = LossLog(header)

        def statistic(mean: float) -> Statistic:
            return Statistic(mean, 0.0)

        for i in measured:
            result.add(
                Measurement(
                    3,
                    i,
                    "buffer",
                    5,
                    5,
                    statistic(losses[i]),
                    statistic(0.1),
                    distillation=statistic(0.1 + drifts[i]),
                    teacher_entropy=statistic(0.1),
                    drift=statistic(drifts[i]),
                    teacher_contrastive=statistic(0.3),
                    teacher_miss_probability=statistic(0.1),
                )
            )
        result.add(
            Measurement(
                3,
                3,
                "train",
                5,
                5,
                statistic(losses[3]),
                statistic(0.1),
                distillation=statistic(0.2),
                teacher_entropy=statistic(0.1),
                drift=statistic(0.1),
                teacher_contrastive=statistic(0.3),
                teacher_miss_probability=statistic(0.1),
            )
        )
        return result

    both = log((1, 2))
    expected = dual_price_weight([0.5, 0.3, 0.2], [0.02, 0.01, 0.015], both.geometry)
    per_task, mean = METHODS["dual-price-per-task"].weights, METHODS["dual-price"].weights
    assert per_task(both, 4, CONFIG) == pytest.approx((*expected, np.mean(expected)))
    assert mean(both, 4, CONFIG) == pytest.approx((np.mean(expected),) * 4)
    one = log((1,))
    price = dual_price_weight([0.5, 0.2], [0.02, 0.02], one.geometry)
    assert per_task(one, 4, CONFIG) == pytest.approx((price[0], np.mean(price), price[1], np.mean(price)))
    assert per_task(log(()), 4, CONFIG) == (1.0,) * 4


def test_constant_weight_is_an_option() -> None:
    config = dataclasses.replace(CONFIG, distill_weight=0.3)
    assert METHODS["co2l"].weights(None, 3, config) == (0.3,) * 3
