"""What a quantization run is asked to do, checked before any work."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from edgevl.config import ModelConfig
from edgevl.errors import UsageError
from edgevl.models.names import text_parts

GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Recipe:
    """What quantization is made of; an effort is one of these, and an ablation leaves things out."""

    scales: bool = True  # AWQ's, by activations
    value_scale: bool = True  # v -> o under GQA
    clip: bool = True
    reconstruct: int = 32  # steps in which each block learns to give what the float model has after it
    image_importance: float = 0.2  # of an image token in these steps, against one of text


EFFORTS = {
    "fast": Recipe(reconstruct=0),
    "balanced": Recipe(),
    "best": Recipe(reconstruct=96),
}


@dataclass(frozen=True)
class QuantizeSettings:
    """The user's choices. `calibration` is a built-in set's name or a directory."""

    group_size: int | None = None  # Q, in-features; None: the largest that divides every width
    scheme: str = "asym"  # "asym" | "sym"
    effort: str = "balanced"  # "fast": AWQ; "balanced": and codes and scales learn; "best": longer
    calibration: str | None = None  # None: "mixed" for a vision-language model, "text" for a language model
    samples: int = 32  # sequences
    length: int = 512  # tokens of each
    device: str = "cpu"  # "cpu" | "cuda"
    seed: int = 0
    max_memory: int | None = None  # bytes the job may hold beside the interpreter; None: no limit
    max_activations: int = 2 << 30  # bytes of calibration activations held in memory; more go to the disk
    measure: bool = True  # also carry a held-out text along, and compare both models on it at the end
    resume: bool = False
    force: bool = False  # replace what lies at the output
    recipe: Recipe | None = None  # None: the effort's

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise UsageError(f"--group-size {self.group_size} is not stored by this layout; choose 128, 64 or 32")
        if self.scheme not in ("asym", "sym"):
            raise UsageError(f"--scheme {self.scheme} does not exist; choose asym or sym")
        if self.effort not in EFFORTS:
            raise UsageError(f"--effort {self.effort} does not exist; choose {', '.join(EFFORTS)}")
        if self.recipe is None:
            object.__setattr__(self, "recipe", EFFORTS[self.effort])
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f"--device {self.device} cannot be used; choose cpu or cuda")
        if not 0 <= self.seed < 1 << 31:
            raise UsageError(f"--seed {self.seed} cannot be used; choose a number from 0 to {(1 << 31) - 1}")
        if self.samples < 1:
            raise UsageError(f"--samples {self.samples} leaves nothing to calibrate on; use at least 1, better 32")
        if self.length < 16:
            raise UsageError(f"sequences of {self.length} tokens are too short to calibrate on; use at least 16")

    @property
    def paths(self) -> int:
        """The calibration goes through the quantized blocks, and for reconstruction through the float ones too."""
        return 2 if self.chosen.reconstruct else 1

    @property
    def chosen(self) -> Recipe:
        """The recipe that is followed."""
        assert self.recipe is not None
        return self.recipe

    def that_matter(self) -> dict[str, Any]:
        """The settings that decide the result; an unfinished run may only be continued with the same."""
        chosen = asdict(self)
        del chosen["resume"], chosen["force"]
        if self.max_memory is None:  # otherwise it decides how many sequences are summed up at once
            del chosen["max_activations"]
        return chosen


def choose_group_size(config: ModelConfig, wanted: int | None) -> int:
    """The group size to use: `wanted`, or the largest of 128, 64, 32 that divides every width.

    Raises `UsageError` that names the width in the way and the sizes that would work.
    """
    widths: dict[int, str] = {}
    for part in text_parts(config):
        if part.kind == "linear" and part.region == "text":
            widths.setdefault(part.shape[1], part.sources[0])
            if any(rows % 8 for rows in (part.shape[0],)):
                raise UsageError(f"{part.name} has {part.shape[0]} rows; the int4 layout packs rows by 8")
    works = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
    if wanted in works:
        return wanted
    if wanted is None and works:
        return works[0]
    for width, module in widths.items():
        if wanted is None or width % wanted:
            way = f"choose {' or '.join(map(str, works))}" if works else "none of 128, 64 and 32 divides every width"
            asked = f"groups of {wanted}" if wanted else "any group size"
            raise UsageError(f"{module} has {width} in-features, which {asked} cannot divide evenly; {way}")
    raise AssertionError("a size that works was returned above")
