"""What moves the weights: Muon for the tower's matrices, AdamW for everything else.

Muon learns several times as fast here (LOG.md, 2026-11-26). Called by both stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from training.network import Eyes


class Optimizers:
    """Both as one; `torch.optim.Optimizer`'s words."""

    def __init__(self, parameters: Mapping[float, Iterable[nn.Parameter]], eyes: Eyes | None, muon_rate: float) -> None:
        """`parameters`: all that learn, those of `eyes` among them, by AdamW's highest rate; `muon_rate` is Muon's."""
        matrices = [] if eyes is None else eyes.matrices()
        taken = {id(p) for p in matrices}
        groups = {rate: [p for p in ps if id(p) not in taken] for rate, ps in parameters.items()}
        self._rest = [p for group in groups.values() for p in group]
        adam = torch.optim.AdamW(
            [{"params": group, "lr": rate, "highest": rate} for rate, group in groups.items()],
            betas=(0.9, 0.98),
            eps=1e-7,
            weight_decay=0.0,
            fused=True,
        )
        self._parts: list[torch.optim.Optimizer] = [adam]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.01)
            muon.param_groups[0]["highest"] = muon_rate
            self._parts.append(muon)

    def step(self, share: float) -> None:
        """One step at `share` of the highest rates; gradients are used up."""
        torch.nn.utils.clip_grad_norm_(self._rest, 1.0)  # Muon's steps have one length whatever the gradient's
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = share * group["highest"]
            part.step()
            part.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        """What is remembered between steps, by name."""
        return {
            f"{which}/{number}/{key}": torch.as_tensor(value)
            for which, part in enumerate(self._parts)
            for number, values in part.state_dict()["state"].items()
            for key, value in values.items()
        }

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state` gave."""
        for which, part in enumerate(self._parts):
            found: dict[int, dict[str, Any]] = {}
            for name, value in state.items():
                owner, number, key = name.split("/")
                if int(owner) == which:
                    found.setdefault(int(number), {})[key] = value
            part.load_state_dict({"state": found, "param_groups": part.state_dict()["param_groups"]})
