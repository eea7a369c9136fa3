"""Block sizes of the Triton kernels, and their launch.

Every configuration is free of register spills and fits in shared memory on compute capability 8.0 and 9.0;
kernels/resources.csv is the evidence and lists the instructions that result. The first of a list is the default. The
choice by time may differ from run to run, and with it the order of sums: torch.use_deterministic_algorithms(True) keeps
the default.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
TUNED = not INTERPRETED  # the interpreter has nothing to time

Arithmetic = Literal["half", "tf32", "ieee"]


class Blocks(NamedTuple):
    """Rows and columns of a tile, warps and pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int


# kernel, arithmetic, whether an embedding is wider than 128 -> (elsewhere, on compute capability 9.x and 10.x)
_BLOCKS: dict[tuple[str, Arithmetic, bool], tuple[tuple[Blocks, ...], tuple[Blocks, ...]]] = {
    ("statistics_kernel", "half", False): (
        (Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2)),
        (Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 2)),
    ),
    ("statistics_kernel", "half", True): (
        (Blocks(64, 64, 8, 3), Blocks(64, 64, 8, 2)),
        (Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 3)),
    ),
    ("statistics_kernel", "tf32", False): ((Blocks(64, 64, 8, 2),), (Blocks(128, 64, 8, 2),)),
    ("statistics_kernel", "tf32", True): ((Blocks(64, 64, 8, 2),), (Blocks(128, 64, 8, 3),)),
    ("statistics_kernel", "ieee", False): ((Blocks(64, 64, 8, 2),), (Blocks(64, 64, 8, 2),)),
    ("statistics_kernel", "ieee", True): ((Blocks(64, 64, 8, 2),), (Blocks(64, 64, 8, 2),)),
    ("gradient_kernel", "half", False): (
        (Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2)),
        (Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2)),
    ),
    ("gradient_kernel", "half", True): ((Blocks(64, 32, 8, 2),), (Blocks(64, 64, 8, 2),)),
    ("gradient_kernel", "tf32", False): ((Blocks(64, 32, 8, 2),), (Blocks(64, 32, 8, 2),)),
    ("gradient_kernel", "tf32", True): ((Blocks(64, 32, 8, 2),), (Blocks(64, 32, 8, 2),)),
    ("gradient_kernel", "ieee", False): ((Blocks(32, 32, 4, 2),), (Blocks(32, 32, 4, 2),)),
    ("gradient_kernel", "ieee", True): ((Blocks(32, 32, 4, 2),), (Blocks(32, 32, 4, 2),)),
    ("similarity_gradient_kernel", "half", True): (
        (Blocks(64, 128, 8, 3), Blocks(64, 64, 4, 3)),
        (Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 4)),
    ),
    ("similarity_gradient_kernel", "tf32", True): ((Blocks(64, 64, 8, 3),), (Blocks(128, 64, 8, 3),)),
    ("similarity_gradient_kernel", "ieee", False): ((Blocks(64, 64, 8, 2),), (Blocks(64, 64, 8, 2),)),
    ("similarity_gradient_kernel", "ieee", True): ((Blocks(64, 64, 8, 2),), (Blocks(64, 64, 8, 2),)),
}


def padded(width: int) -> int:
    """The power of two that holds a width, at least the 16 of a tensor core."""
    return max(triton.next_power_of_2(width), 16)


def arithmetic_of(*dtypes: torch.dtype, allow_tf32: bool) -> Arithmetic:
    """How a kernel multiplies embeddings of these dtypes."""
    if torch.float32 in dtypes:
        return "tf32" if allow_tf32 else "ieee"
    return "half"


def fits_registers(width: int, arithmetic: Arithmetic) -> bool:
    """Whether the gradient of embeddings of a width is summed in registers, beside the tile it comes from."""
    return padded(width) <= (64 if arithmetic == "ieee" else 128)


def configurations(
    kernel: str, width: int, teacher_width: int, arithmetic: Arithmetic, capability: int
) -> tuple[triton.Config, ...]:
    """What to launch a kernel with, for embeddings of these widths (0: no teacher) on compute capability
    ``capability`` (major version)."""
    wide = max(width, teacher_width) > 128
    a, b = ("BLOCK_A", "BLOCK_B") if kernel == "gradient_kernel" else ("BLOCK_N", "BLOCK_M")
    resident, piece = (128, 64) if arithmetic == "half" else (64, 32)

    def block(width: int) -> int:
        return padded(width) if padded(width) <= resident else piece

    pieces = {
        "BLOCK_D": padded(width) if kernel == "gradient_kernel" else block(width),
        "BLOCK_D_TEACHER": block(teacher_width),
    }
    large = capability in (9, 10)  # shared memory: 227 KiB a block; 12.x has 99
    return tuple(
        triton.Config({a: blocks.rows, b: blocks.columns, **pieces}, num_warps=blocks.warps, num_stages=blocks.stages)
        for blocks in _BLOCKS[kernel, arithmetic, wide][large]
    )


def launch(
    kernel: Any,
    grid: Callable[[dict[str, int]], tuple[int, int]],
    arguments: tuple[Any, ...],
    student: tuple[Tensor, Tensor],
    teacher: Tensor | None,
    flags: dict[str, bool],
    allow_tf32: bool,
) -> None:
    """Runs a kernel on its arguments, with the fastest configuration for sizes like these, timed once and cached.

    ``student``: the two matrices whose similarities it takes; ``teacher``: one of the teacher's, or None.
    """
    first, second = student
    width, teacher_width = first.shape[1], 0 if teacher is None else teacher.shape[1]
    dtypes = {first.dtype, first.dtype if teacher is None else teacher.dtype}
    arithmetic = arithmetic_of(*dtypes, allow_tf32=allow_tf32)
    constants = {
        **flags,
        "D": width,
        "D_TEACHER": teacher_width,
        "TEACHER": teacher is not None,
        "PRECISION": "tf32" if allow_tf32 else "ieee",
        "UPCAST": INTERPRETED,
    }
    capability = torch.cuda.get_device_capability(first.device)[0] if first.device.type == "cuda" else 9
    choices = configurations(kernel.fn.__name__, width, teacher_width, arithmetic, capability)
    with torch.cuda.device_of(first):
        if not TUNED or len(choices) == 1 or torch.are_deterministic_algorithms_enabled():
            kernel[grid](*arguments, **constants, **choices[0].all_kwargs())
        else:
            buckets = triton.next_power_of_2(first.shape[0]), triton.next_power_of_2(second.shape[0])
            _tuned(kernel, width, teacher_width, arithmetic, capability, buckets)[grid](*arguments, **constants)


@cache
def _tuned(
    kernel: Any,
    width: int,
    teacher_width: int,
    arithmetic: Arithmetic,
    capability: int,
    buckets: tuple[int, int],
) -> Any:
    """A tuner for one kernel and one bucket of sizes; it times again for other flags and dtypes."""
    del buckets  # part of the key
    choices = list(configurations(kernel.fn.__name__, width, teacher_width, arithmetic, capability))
    flags = ["IDS", "SHARED", "TEACHER"] + [f for f in ("SLOPES", "OF_KEYS") if f in kernel.fn.arg_names]
    return triton.autotune(configs=choices, key=flags)(kernel)
