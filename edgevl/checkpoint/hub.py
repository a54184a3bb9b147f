"""Hugging Face ids: fetch a repository's weights and JSON, and never its code. The only user of huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from edgevl.errors import CheckpointError, MissingExtraError

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_ALLOWED = ["*.json", "*.safetensors", "*.jinja"]  # data only: python files are not even downloaded
_IGNORED = ["*/*"]  # the same weights in other formats live in folders


def is_hub_id(model: str) -> bool:
    """Whether a string has the form org/name or org/name@revision."""
    return _ID.fullmatch(model) is not None and ".." not in model


def fetch(model: str) -> Path:
    """The local folder of a repository, downloaded as far as it is not in the hub's cache.

    Raises `MissingExtraError` without huggingface_hub and `CheckpointError` when the repository cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as missing:
        raise MissingExtraError(f"fetching {model}", "huggingface_hub", "'edgevl[deploy]'") from missing
    match = _ID.fullmatch(model)
    assert match is not None, "is_hub_id was asked first"
    name, revision = match[1], match[2]
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=_ALLOWED, ignore_patterns=_IGNORED)
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} on Hugging Face asks for its licence to be accepted; accept it on its page, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} on Hugging Face has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{name} is neither a local folder nor a repository on Hugging Face") from error
    except Exception as error:  # the client's own errors vary with its version and its HTTP library
        raise CheckpointError(
            f"{name} is not a local folder, and Hugging Face could not be reached for it "
            f"({type(error).__name__}); check the connection or give a folder"
        ) from error
    return Path(folder)
