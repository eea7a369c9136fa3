"""The examples of the documentation run as they stand."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cila_bound.cli import main
from experiments.presets import preset
from experiments.spec import load_spec
from experiments.streams import build_stream

ROOT = Path(__file__).parents[1]


def code(document: str, language: str = "python") -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


def test_losslog_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code("docs/losslog.md"), "docs/losslog.md", "exec"), {})
    assert main(["evaluate", "losses.jsonl"]) == 0
    assert "2 of 2 tasks" in capsys.readouterr().out


def test_sweep_example(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(code("docs/experiments.md", "toml"))
    configs = load_spec(tmp_path / "spec.toml")
    assert len(configs) == 12
    assert configs[-1].name == "digits/cila-pure-buffer_size=100-kappa=1.0-seed2"


def test_data_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x, site = rng.integers(0, 256, (48, 8, 8), np.uint8), np.repeat(["Bonn", "Leeds"], 24)
    np.savez("solar.npz", x=x, defects=np.arange(48) % 4 / 2, site=site)
    exec(compile(code("docs/experiments.md"), "docs/experiments.md", "exec"), {})
    assert "48 images of 8 x 8 pixels, grey" in capsys.readouterr().out
    config = dataclasses.replace(preset("custom"), dataset="cells.npz", scenario="task-column")
    assert [task.name for task in build_stream(config, tmp_path).tasks] == ["Leeds", "Bonn"]


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), f"{document}: {target}"


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
