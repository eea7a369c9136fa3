"""What each kernel configuration becomes on a GPU: registers, spills, shared memory, tensor-core instructions.

    python kernels/benchmarks/resources.py            # writes kernels/resources.csv; needs triton and no GPU

Every configuration of every kernel is compiled for compute capability 8.0 and 9.0 at the widths below, teacher and
student equally wide, with self-exclusion. Rows of other Triton versions in the file are kept. Exit status 1 if a
configuration spills registers, exceeds shared memory, or has no tensor-core instruction where it should.
"""

from __future__ import annotations

import csv
import itertools
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cila_kernels import _triton_kernels
from cila_kernels._tuning import INTERPRETED, Arithmetic, configurations, fits_registers

WIDTHS = (64, 128, 256, 512, 768, 1024)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may use, CUDA C++ programming guide, table of limits
TABLE = Path(__file__).parents[1] / "resources.csv"


class Job(NamedTuple):
    """One kernel configuration: ``choice`` counts from the default, 0."""

    kernel: str
    of_keys: bool
    width: int
    arithmetic: Arithmetic
    capability: int
    choice: int
    slopes: bool


class Resources(NamedTuple):
    """A row of the table; ``spilled`` and ``shared`` in bytes, per thread and per block."""

    triton: str
    kernel: str
    width: int
    arithmetic: str
    capability: int
    blocks: str
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    tensor_core: int

    def faults(self) -> list[str]:
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > SHARED_MEMORY[self.capability]:
            found.append(f"needs {self.shared} bytes of shared memory, has {SHARED_MEMORY[self.capability]}")
        if self.arithmetic != "ieee" and not self.tensor_core:
            found.append("uses no tensor core")
        return found


def jobs(arithmetics: tuple[Arithmetic, ...] = ("half", "tf32", "ieee"), *, defaults_only: bool = False) -> list[Job]:
    """All configurations that a launch can choose."""
    found = []
    kernels = (
        ("statistics_kernel", False),
        ("gradient_kernel", False),
        ("gradient_kernel", True),
        ("similarity_gradient_kernel", False),
    )
    for (kernel, of_keys), width, arithmetic, capability in itertools.product(
        kernels, WIDTHS, arithmetics, SHARED_MEMORY
    ):
        if kernel != "statistics_kernel" and (kernel == "gradient_kernel") != fits_registers(width, arithmetic):
            continue
        choices = len(configurations(kernel, width, width, arithmetic, capability // 10))
        found += [
            Job(kernel, of_keys, width, arithmetic, capability, choice, slopes)
            for choice in range(1 if defaults_only else choices)
            for slopes in ((False, True) if kernel == "statistics_kernel" and not defaults_only else (False,))
        ]
    return found


def compile_job(job: Job, **changes: Any) -> Resources:
    """Compiles one configuration; the driver is not needed. ``changes``: other constants of the kernel, or arguments
    that are constant: None for a matrix that is absent, 1 for a size of 1, as Triton specialises them."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled in this process")
    kernel: Any = getattr(_triton_kernels, job.kernel).fn
    width, teacher_width = (changes.get(name, job.width) for name in ("D", "D_TEACHER"))
    config = configurations(job.kernel, width, teacher_width, job.arithmetic, job.capability // 10)[job.choice]
    constants = {
        "D": width,
        "D_TEACHER": teacher_width,
        "TEACHER": True,
        "IDS": True,
        "SHARED": False,
        "SLOPES": job.slopes,
        "OF_KEYS": job.of_keys,
        "EVEN": False,
        "PRECISION": "tf32" if job.arithmetic == "tf32" else "ieee",
        "UPCAST": False,
        **config.kwargs,
        **changes,
    }
    element = "bf16" if job.arithmetic == "half" else "fp32"
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in ("N", "M", "A", "B", "SPLIT", "FIRST", "LAST"):
            signature[name] = "i32"
        elif name in ("scale", "terms") or (name == "out" and job.kernel != "similarity_gradient_kernel"):
            signature[name] = "*fp32"
        else:
            signature[name] = "*i32" if name.endswith(("_id", "_group")) else f"*{element}"
        if signature[name] != "i32" or name == "SPLIT":
            aligned[(position,)] = [["tt.divisibility", 16]]
    names = {(kernel.arg_names.index(name),): value for name, value in constants.items() if name in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=names, attrs=aligned),
        target=GPUTarget("cuda", job.capability, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    usage, assembly = _disassemble(compiled.asm["cubin"])
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))  # type: ignore[index]
    rows, columns = list(config.kwargs.values())[:2]
    label = job.kernel + (" of keys" if job.of_keys else "") + (" with slopes" if job.slopes else "")
    return Resources(
        triton.__version__,
        label,
        job.width,
        job.arithmetic,
        job.capability,
        f"{rows} x {columns} x {config.kwargs['BLOCK_D']}",
        config.num_warps,
        config.num_stages,
        registers,
        stack,
        compiled.metadata.shared,
        len(re.findall(r"\b(?:HGMMA|HMMA)\b", assembly)),
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, instructions), by the tools that Triton ships."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        outputs = [
            subprocess.run([tools / tool, *options, file.name], capture_output=True, text=True, check=True).stdout
            for tool, options in (("cuobjdump", ["-res-usage"]), ("nvdisasm", []))
        ]
    return outputs[0], outputs[1]


def main() -> int:
    with ProcessPoolExecutor() as pool:
        work = jobs()
        rows = list(tqdm(pool.map(compile_job, work, chunksize=4), total=len(work), desc="configurations"))
    table = [[str(value) for value in row] for row in rows]
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            table += [row for row in csv.reader(file) if row[0] not in ("triton", triton.__version__)]
    fresh = TABLE.with_suffix(".tmp")
    with fresh.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Resources._fields, *sorted(table, key=lambda row: row[0])])
    fresh.replace(TABLE)
    faults = [f"{row}: {', '.join(row.faults())}" for row in rows if row.faults()]
    print(
        f"{TABLE}: {len(rows)} configurations with Triton {triton.__version__}, {len(faults)} at fault",
        *faults,
        sep="\n",
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
