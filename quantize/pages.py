"""Freed memory stays with the process: giving it back and taking it again costs a fifth of a run.

Every step of the search and of learning frees and takes the same few tens of megabytes, and the system clears each page
anew. Between the two it is given back, since they take pieces of other sizes. Called by `quantize.job`.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's numbers of `mallopt`
KEPT = 128 << 20  # bytes that may stay unused at the end of the heap
_MAPPED = 32 << 20  # bytes of one piece from which on it is returned at once; glibc allows no more


def keep_pages() -> bool:
    """Ask the C library to keep what is freed; False where it has no such setting."""
    try:
        choose = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc: musl, macOS, Windows
        return False
    settings = ((_TRIM_THRESHOLD, KEPT), (_TOP_PAD, KEPT // 4), (_MMAP_THRESHOLD, _MAPPED))
    answers = [choose(option, size) for option, size in settings]
    return answers == [1] * len(settings)


def give_back() -> None:
    """Return what is free now, if the C library can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
