"""Data flows one way, and so do imports."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "cila_bound": ROOT / "cila_bound",
    "cila_kernels": ROOT / "kernels/cila_kernels",
    "experiments": ROOT / "experiments",
    "paper_figures": ROOT / "paper_figures",
}
STANDARD = set(sys.stdlib_module_names)
ALLOWED = {
    "cila_bound": {"cila_bound", "flint", "numpy", "scipy"},  # flint in functions of the rigorous mode only
    "cila_kernels": {"cila_kernels", "torch", "triton"},
    "experiments": {
        *("experiments", "cila_bound", "cila_kernels"),
        *("torch", "numpy", "scipy", "sklearn", "tqdm", "tyro", "joblib", "filelock"),
        *("PIL", "distributed", "kornia", "pooch", "pyarrow"),
    },
    "paper_figures": {"paper_figures", "cila_bound", "jinja2", "matplotlib", "numpy", "scipy", "tyro"},
}


def imported(path: Path) -> Iterator[str]:
    """Top-level names of every import in a file, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_imports_only_what_it_may(package: str) -> None:
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    for path in files:
        foreign = set(imported(path)) - STANDARD - ALLOWED[package]
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"


def test_private_modules_stay_private() -> None:
    """No package imports another's underscore modules."""
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module:
                    owner, *rest = node.module.split(".")
                    if owner in PACKAGES and owner != package:
                        assert not any(part.startswith("_") for part in rest), f"{path}: {node.module}"


def test_the_bounds_load_without_torch_or_matplotlib_or_flint() -> None:
    script = (
        "import cila_bound, cila_bound.cli, cila_bound.rigorous, sys;"
        "print(sorted({'torch', 'matplotlib', 'sklearn', 'flint'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_kernels_is_no_package() -> None:
    """A top-level module named kernels would shadow another project's of that name."""
    assert not (ROOT / "kernels/__init__.py").exists()


def test_public_names_exist() -> None:
    import cila_bound
    import cila_kernels

    for module in (cila_bound, cila_kernels):
        assert sorted(module.__all__) == list(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)
