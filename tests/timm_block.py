"""timm's vision transformer block, without timm's package imports.

`import timm` needs torchvision, which has no build that goes with every torch; the block itself does not. Stand-ins
for the packages around it let the one module load.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any


class _Anything(types.ModuleType):
    """A module in which every public name is there, as None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)


def timm_block() -> Any:
    """The class `timm.models.vision_transformer.Block`."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        raise RuntimeError("timm is not installed; `make test` installs it with --no-deps")
    root = Path(spec.origin).parent
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("timm", "torchvision")}
    stand_ins = {
        name: _Anything(name) for name in ("timm", "timm.models", "timm.data", "torchvision", "torchvision.ops")
    }
    stand_ins["timm"].__path__ = [str(root)]
    stand_ins["timm"].__dict__["__version__"] = "0"
    stand_ins["timm.models"].__path__ = [str(root / "models")]
    stand_ins["torchvision"].__path__ = []
    stand_ins["torchvision.ops"].__path__ = []
    misc = types.ModuleType("torchvision.ops.misc")
    misc.__dict__["FrozenBatchNorm2d"] = object
    sys.modules.update({**stand_ins, "torchvision.ops.misc": misc})
    try:
        from timm.models.vision_transformer import Block

        return Block
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] in ("timm", "torchvision")]:
            del sys.modules[name]
        sys.modules.update(kept)
