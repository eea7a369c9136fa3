"""The examples of the documentation run as they stand."""

import re
from pathlib import Path

import pytest
import torch

from cila_bound.cli import main

ROOT = Path(__file__).parents[1]


def code(document: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


def test_losslog_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code("docs/losslog.md"), "docs/losslog.md", "exec"), {})
    assert main(["evaluate", "losses.jsonl"]) == 0
    assert "2 of 2 tasks" in capsys.readouterr().out


def test_readme_example() -> None:
    encoder = torch.nn.Linear(12, 8)

    def model(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(encoder(images), dim=1)

    generator = torch.Generator().manual_seed(0)
    names = {
        "model": model,
        "previous_model": model,
        "view_1": torch.randn(6, 12, generator=generator),
        "view_2": torch.randn(6, 12, generator=generator),
        "y": torch.tensor([0, 0, 1, 1, 2, 2]),
        "is_current_task": torch.tensor([True, True, False, False, True, True]),
    }
    exec(compile(code("README.md"), "README.md", "exec"), names)
    assert encoder.weight.grad is not None
    assert encoder.weight.grad.isfinite().all()
    assert encoder.weight.grad.abs().max() > 0
