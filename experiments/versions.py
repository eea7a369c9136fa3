"""What a result was made with: packages, processor and commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import numpy as np
import scipy
import sklearn
import torch


def versions() -> dict[str, str]:
    """Names to texts, for a log's header; "unknown" where the system does not say."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "scikit-learn": sklearn.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
        "commit": _commit(),
    }


def made_with(texts: dict[str, str]) -> str:
    """The two versions that matter most, of a stored ``versions()``."""
    return ", ".join(f"{name} {texts.get(name, 'unknown')}" for name in ("commit", "torch"))


def changes(old: dict[str, str], new: dict[str, str]) -> str:
    """Every entry that differs, as "name old -> new"; empty if none does."""
    names = [name for name in old | new if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name, 'unknown')} -> {new.get(name, 'unknown')}" for name in names)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _commit() -> str:
    """Commit of this checkout, with "-dirty" if files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
