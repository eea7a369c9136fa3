"""One validated call: the tensors, ids, labels and temperatures that every implementation starts from."""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MissingPositive = Literal["error", "ignore"]
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SMALLEST_TEMPERATURE = 1e-30  # its inverse is a float32 number
_SHOWN = 10  # rows named in an error


@dataclass(frozen=True)
class Inputs:
    """Validated arguments: query (N, D), key (M, D), teacher_query (N, D'), teacher_key (M, D'), 0-d temperatures;
    positives as indices (N,) or labels, labels and ids of queries (N,) and keys (M,) as int64; ``needs_positive`` (N,)
    marks the rows whose contrastive loss is used (default: all)."""

    query: Tensor
    key: Tensor
    teacher_query: Tensor | None
    teacher_key: Tensor | None
    positive: Tensor | None
    query_label: Tensor | None
    key_label: Tensor | None
    query_id: Tensor | None
    key_id: Tensor | None
    temperature: Tensor
    student_temperature: Tensor
    teacher_temperature: Tensor
    on_missing_positive: MissingPositive
    needs_positive: Tensor | None
    allow_tf32: bool

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 input, else float32: half precision is accumulated in float32."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


def check(
    query: Tensor,
    key: Tensor,
    teacher_query: Tensor | None,
    teacher_key: Tensor | None,
    *,
    positive: Tensor | None,
    query_label: Tensor | None,
    key_label: Tensor | None,
    query_id: Tensor | None,
    key_id: Tensor | None,
    temperature: float | Tensor,
    student_temperature: float | Tensor | None,
    teacher_temperature: float | Tensor | None,
    on_missing_positive: MissingPositive,
    needs_positive: Tensor | None,
    strict: bool,
    allow_tf32: bool,
) -> Inputs:
    """Checks what can be wrong with the arguments, in O((N + M) D); ValueError or TypeError names the value and the
    remedy."""
    if on_missing_positive not in ("error", "ignore"):
        raise ValueError(f"on_missing_positive must be 'error' or 'ignore', got {on_missing_positive!r}")
    _check_embeddings("query", query, "key", key, strict)
    n, m, device = query.shape[0], key.shape[0], query.device
    if (teacher_query is None) != (teacher_key is None):
        raise ValueError("teacher_query and teacher_key go together: give both, or neither for InfoNCE alone")
    if teacher_query is not None and teacher_key is not None:
        _check_embeddings("teacher_query", teacher_query, "teacher_key", teacher_key, strict)
        if (teacher_query.shape[0], teacher_key.shape[0]) != (n, m):
            raise ValueError(
                f"the teacher must embed the same {n} queries and {m} keys, "
                f"got {teacher_query.shape[0]} and {teacher_key.shape[0]}"
            )
        if teacher_query.device != device:
            raise ValueError(
                f"all tensors must be on one device, got query on {device} and teacher_query on {teacher_query.device}"
            )
        if teacher_query.requires_grad or teacher_key.requires_grad:
            raise ValueError(
                "the teacher is frozen, but its embeddings require grad: compute them under no_grad or detach them"
            )

    query_id, key_id = _check_pair("query_id", query_id, n, "key_id", key_id, m, device)
    query_label, key_label = _check_pair("query_label", query_label, n, "key_label", key_label, m, device)
    if (positive is None) == (query_label is None):
        raise ValueError("give the positives either as key indices (positive) or as labels (query_label and key_label)")
    if positive is not None:
        positive = _check_vector("positive", positive, n, device)
    if query_id is None:
        _check_candidates(query, key)

    own_temperature = _check_temperature("temperature", temperature, device)
    student = (
        own_temperature
        if student_temperature is None
        else _check_temperature("student_temperature", student_temperature, device)
    )
    teacher = (
        student
        if teacher_temperature is None
        else _check_temperature("teacher_temperature", teacher_temperature, device)
    )
    if teacher_temperature is not None and teacher.requires_grad:
        raise ValueError("the teacher is frozen, but teacher_temperature requires grad: detach it")
    return Inputs(
        query=query,
        key=key,
        teacher_query=teacher_query,
        teacher_key=teacher_key,
        positive=positive,
        query_label=query_label,
        key_label=key_label,
        query_id=query_id,
        key_id=key_id,
        temperature=own_temperature,
        student_temperature=student,
        teacher_temperature=teacher.detach(),
        on_missing_positive=on_missing_positive,
        needs_positive=needs_positive,
        allow_tf32=allow_tf32,
    )


def found(mask: Tensor) -> bool:
    """Whether any entry is true. False while torch.compile traces: no branch may depend on values there."""
    return not torch.compiler.is_compiling() and bool(mask.any())


def check_row_vector(name: str, value: Tensor, n: int, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A tensor of shape (n,) of one of ``dtypes`` on ``device``; ValueError or TypeError otherwise."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        raise TypeError(
            f"{name} must have a dtype of {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {value.dtype}"
        )
    if value.device != device:
        raise ValueError(f"all tensors must be on one device, got query on {device} and {name} on {value.device}")
    return value


def _check_vector(name: str, value: Tensor, n: int, device: torch.device) -> Tensor:
    return check_row_vector(name, value, n, device, _INTEGERS).long()


def _check_pair(
    query_name: str, query: Tensor | None, n: int, key_name: str, key: Tensor | None, m: int, device: torch.device
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if query is None and key is None:
        return None, None
    if query is None or key is None:
        raise ValueError(f"{query_name} and {key_name} go together: give both or neither")
    return _check_vector(query_name, query, n, device), _check_vector(key_name, key, m, device)


def _check_embeddings(query_name: str, query: Tensor, key_name: str, key: Tensor, strict: bool) -> None:
    for name, value in ((query_name, query), (key_name, key)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.ndim != 2 or value.shape[0] == 0 or value.shape[1] == 0:
            raise ValueError(f"{name} must be a non-empty matrix (rows, width), got shape {tuple(value.shape)}")
        if value.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    if query.shape[1] != key.shape[1]:
        raise ValueError(f"{query_name} and {key_name} must have one width, got {query.shape[1]} and {key.shape[1]}")
    if query.dtype != key.dtype:
        raise TypeError(f"{query_name} and {key_name} must have one dtype, got {query.dtype} and {key.dtype}")
    if query.device != key.device:
        raise ValueError(
            f"all tensors must be on one device, got {query_name} on {query.device} and {key_name} on {key.device}"
        )
    tolerance = 1e-3 if query.dtype in (torch.float32, torch.float64) else 2e-2
    for name, value in ((query_name, query), (key_name, key)):
        with torch.no_grad():
            norm = torch.linalg.vector_norm(value, dim=1, dtype=torch.promote_types(value.dtype, torch.float32))
        not_finite = ~torch.isfinite(norm)
        if found(not_finite):
            raise ValueError(
                f"{name} is not finite in {rows_of(not_finite)}: a NaN or infinity came out of the encoder"
            )
        if found((norm - 1.0).abs() > tolerance):
            message = (
                f"{name} is not unit-norm (norms {norm.min():.4g} to {norm.max():.4g}): "
                "normalise it, or the bounds do not apply"
            )
            if strict:
                raise ValueError(message)
            _warn_once("unit-norm", message)


def _check_candidates(query: Tensor, key: Tensor) -> None:
    if query is key:
        _warn_once(
            "self",
            "query and key are one tensor and no ids are given: every row is a candidate of itself; "
            "pass query_id and key_id (for example torch.arange(N) twice) to exclude it",
        )


_warned: set[str] = set()


def _warn_once(kind: str, message: str) -> None:
    """Once per process and kind, whatever the values in the message; points to the caller of the package."""
    if kind not in _warned and not torch.compiler.is_compiling():
        _warned.add(kind)
        level = 1
        while sys._getframe(level).f_globals.get("__name__", "").startswith("cila_kernels."):
            level += 1
        warnings.warn(message, UserWarning, stacklevel=level + 1)


def _check_temperature(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        if value.ndim != 0 or not value.is_floating_point():
            raise ValueError(
                f"{name} must be a float or a 0-d float tensor, got {value.dtype} of shape {tuple(value.shape)}"
            )
        if torch.compiler.is_compiling():
            return value.to(device)
        number, tensor = value.item(), value
    elif isinstance(value, numbers.Real):
        number, tensor = float(value), torch.tensor(float(value), dtype=torch.float64)
    else:
        raise TypeError(f"{name} must be a float or a 0-d float tensor, got {value!r}")
    if not (math.isfinite(number) and number >= _SMALLEST_TEMPERATURE):
        raise ValueError(f"{name} must be finite and at least {_SMALLEST_TEMPERATURE:g}, got {number!r}")
    return tensor.to(device)


def rows_of(mask: Tensor) -> str:
    """The rows of a mask, for a message."""
    rows = mask.nonzero().flatten().tolist()
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:_SHOWN]))}{more}"
