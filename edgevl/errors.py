"""The exceptions that users meet, and the exit code of each.

    EdgevlError                 exit 1   something failed that the user did not cause
    ├── UsageError              exit 2   the input is wrong; the sentence says what, by which rule, and the way out
    │   ├── CheckpointError              a model directory, GGUF file or hub id that cannot be used
    │   ├── BundleError                  a bundle that is damaged, foreign or of another format
    │   ├── ImageError                   a picture that cannot be read or is refused
    │   ├── PromptError                  messages that do not make a prompt
    │   └── CapacityError                a request that cannot fit the plan
    └── MissingExtraError       exit 1   a package of an extra is not installed

Every message is one sentence or two: the value, the rule, the way out. `assert` is kept for our own bugs.
"""

from __future__ import annotations


class EdgevlError(Exception):
    """Anything edgevl reports without a traceback."""

    exit_code = 1


class UsageError(EdgevlError):
    """The input cannot be used."""

    exit_code = 2


class CheckpointError(UsageError):
    """A checkpoint is missing, incomplete, or differs from what its architecture promises."""


class BundleError(UsageError):
    """A bundle is damaged, made for another target, or of another format version."""


class ImageError(UsageError):
    """A picture cannot be decoded or is outside the limits."""


class PromptError(UsageError):
    """The messages of a request do not make a valid prompt."""


class CapacityError(UsageError):
    """A request needs more than the bundle's plan allows."""


class MissingExtraError(EdgevlError):
    """Something needs a package that is not installed; `install` is what pip must be given."""

    def __init__(self, what: str, package: str, install: str) -> None:
        super().__init__(f"{what} needs the package {package}, which is missing; `pip install {install}` adds it")
