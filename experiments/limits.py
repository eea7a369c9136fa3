"""What a dataset may take of this machine's memory: checked against what a file declares, before it is read."""

from __future__ import annotations

import os

_SMALL = 1 << 26
_HIGHEST_RATIO = 200


def memory_limit() -> int:
    """In bytes: a quarter of this machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return 1 << 31


def check_size(what: object, unpacked: int, packed: int | None = None) -> None:
    """Raises ValueError if ``what`` would take more than ``memory_limit``, or if 64 MiB or more of it are packed into
    less than a two-hundredth, as only a decompression bomb is.
    """
    if unpacked > memory_limit():
        raise ValueError(
            f"{what} would take {unpacked / 2**30:,.2f} GiB, more than a quarter of this machine's memory "
            f"({memory_limit() / 2**30:,.2f} GiB): keep fewer or smaller samples"
        )
    if packed is not None and unpacked >= _SMALL and unpacked > _HIGHEST_RATIO * packed:
        raise ValueError(
            f"{what} declares {unpacked:,} bytes packed into {packed:,}, as a decompression bomb does: write it again, "
            "uncompressed"
        )
