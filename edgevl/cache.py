"""The one directory that the user did not name: `$EDGEVL_CACHE`, else `$XDG_CACHE_HOME/edgevl`, else `~/.cache/edgevl`.

Holds what can be made again: the assembled demo checkpoint, and notes of which bundles were verified on this machine.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """The cache directory; it may not exist yet."""
    own = os.environ.get("EDGEVL_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "edgevl"
