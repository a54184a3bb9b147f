"""Temperature and power of the machine, where Linux exposes them, and the wider spacing of captions when it is hot.

Reads `sys/class/thermal`, `sys/class/hwmon` (INA3221 rails of a Jetson) and `nvpmodel -q`. Called by
`edgevl.camera.appliance`.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_LIMIT = 150.0  # °C; a zone beyond that, or below -40, is a sensor that is not there
_COOLER = 5.0  # °C below the limit before captions come closer again
_WIDEST = 16.0


def temperatures(root: Path = Path("/")) -> dict[str, float]:
    """°C of each thermal zone by its type; empty where there are none."""
    found: dict[str, float] = {}
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        try:
            celsius = int((zone / "temp").read_text(encoding="ascii")) / 1000
            name = (zone / "type").read_text(encoding="utf-8").strip()
        except (OSError, ValueError):  # some zones of a Jetson refuse to be read
            continue
        if -40 < celsius < _LIMIT:
            found[name] = max(celsius, found.get(name, celsius))
    return found


def watts(root: Path = Path("/")) -> float | None:
    """The power that the board draws (rail VDD_IN), or None where there is no such sensor."""
    for monitor in sorted(root.glob("sys/class/hwmon/hwmon*")):
        for label in sorted(monitor.glob("in*_label")):
            rail = label.name.removeprefix("in").removesuffix("_label")
            try:
                if label.read_text(encoding="utf-8").strip() != "VDD_IN":
                    continue
                millivolts = int((monitor / f"in{rail}_input").read_text(encoding="ascii"))
                return millivolts * int((monitor / f"curr{rail}_input").read_text(encoding="ascii")) / 1e6
            except (OSError, ValueError):
                continue
    return None


def power_mode() -> str | None:
    """The name of a Jetson's power mode, or None elsewhere."""
    tool = shutil.which("nvpmodel")
    if tool is None:
        return None
    try:
        said = subprocess.run([tool, "-q"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    names = [line.split(":", 1)[1].strip() for line in said.splitlines() if line.startswith("NV Power Mode:")]
    return names[0] if names else None


class Governor:
    """How much further apart captions come while the machine is hot: twice as far at each look, at most 16 times."""

    def __init__(self, limit: float | None) -> None:
        """`limit` in °C; None never spaces out."""
        self.limit = limit
        self.factor = 1.0

    def look(self, celsius: float | None) -> bool:
        """Take the hottest zone into account; whether the spacing changed."""
        before = self.factor
        if self.limit is None or celsius is None:
            self.factor = 1.0
        elif celsius >= self.limit:
            self.factor = min(2 * self.factor, _WIDEST)
        elif celsius <= self.limit - _COOLER:
            self.factor = max(self.factor / 2, 1.0)
        return self.factor != before
