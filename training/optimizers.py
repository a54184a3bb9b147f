"""What moves the weights: Muon for the tower's matrices, AdamW for everything else.

Muon learns several times as fast here (LOG.md, 2026-11-26). Called by both stages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from training.network import Eyes


class Optimizers:
    """Both as one; `torch.optim.Optimizer`'s words."""

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float, eyes: Eyes | None, muon_rate: float) -> None:
        """`parameters` are all that learn, those of `eyes` among them; `rate` and `muon_rate` are the highest."""
        matrices = [] if eyes is None else eyes.matrices()
        taken = {id(p) for p in matrices}
        self._rest = [p for p in parameters if id(p) not in taken]
        adam = torch.optim.AdamW(self._rest, lr=rate, betas=(0.9, 0.98), eps=1e-7, weight_decay=0.0, fused=True)
        self._parts: list[tuple[torch.optim.Optimizer, float]] = [(adam, rate)]
        if matrices:
            self._parts.append((torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.01), muon_rate))

    def step(self, share: float) -> None:
        """One step at `share` of the highest rates; gradients are used up."""
        torch.nn.utils.clip_grad_norm_(self._rest, 1.0)  # Muon's steps have one length whatever the gradient's
        for part, highest in self._parts:
            for group in part.param_groups:
                group["lr"] = share * highest
            part.step()
            part.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        """What is remembered between steps, by name."""
        return {
            f"{which}/{number}/{key}": torch.as_tensor(value)
            for which, (part, _) in enumerate(self._parts)
            for number, values in part.state_dict()["state"].items()
            for key, value in values.items()
        }

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state` gave."""
        for which, (part, _) in enumerate(self._parts):
            found: dict[int, dict[str, Any]] = {}
            for name, value in state.items():
                owner, number, key = name.split("/")
                if int(owner) == which:
                    found.setdefault(int(number), {})[key] = value
            part.load_state_dict({"state": found, "param_groups": part.state_dict()["param_groups"]})
