"""One live source and what was last said of it. Called by `edgevl.camera.appliance`."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgevl.camera.capture import Capture
from edgevl.camera.gate import ChangeGate
from edgevl.camera.health import Status


@dataclass
class Watched:
    """One source and what was last said of it."""

    capture: Capture
    gate: ChangeGate
    due: float = 0.0
    number: int = 0  # of the newest frame that was looked at
    captions: int = 0
    stale: bool = False
    refused: str = ""
    caption_time: str | None = None  # of the line that still describes the scene
    caption_sequence: int = 0
    told: float = field(default=float("-inf"))  # monotonic; when a line last said how the scene is

    def status(self) -> Status:
        """This source's part of the status file."""
        capture, shot = self.capture, self.capture.latest
        return {
            "name": capture.source.name,
            "connected": capture.connected,
            "frames": capture.frames,
            "captions": self.captions,
            "losses": capture.losses,
            "stale": self.stale,
            "age_seconds": None if shot is None else round(shot.age, 3),
            "reason": capture.reason,
        }
