"""report.html: one file with everything in it, to be looked at. Plots first, then tables.

matplotlib draws SVG; its black becomes the page's own text colour, so the plots follow light and dark. Knows the fields
of report.json and nothing of how they came about. Called by `quantize.report`.
"""

from __future__ import annotations

import importlib.util
import io
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from edgevl.console import bytes_text
from edgevl.errors import MissingExtraError

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_INK = "#010203"  # drawn in this, shown in the page's text colour
_COLOURS = ("#c2542d", "#2f7ed8", "#3f9b5c", "#9a5fc4", "#c79a1e", "#2aa3a3", "#d0568f")


@dataclass(frozen=True)
class Picture:
    """|weights| of a linear, pooled by maximum: rows are out-features, columns in-features."""

    layer: int
    group: str
    linear: str
    map: NDArray[np.float32]


def check_plots() -> None:
    """Raise `MissingExtraError` when the report could not be drawn; asked before hours are spent."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("the report of edgevl quantize", "matplotlib", "'edgevl[quantize]'")


def draw_page(report: dict[str, Any], pictures: list[Picture]) -> str:
    """The whole page. A report without blocks, of a checkpoint that another tool made, shows the measurement alone."""
    check_plots()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["size"] = bytes_text
    environment.filters["duration"] = _duration
    environment.filters["digits"] = lambda value, count=3: f"{value:.{count}g}"
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    blocks = report["blocks"]
    plots = {}
    if blocks:
        plots = {
            "errors": _svg(lambda axes: _errors(axes[0, 0], blocks), (1, 1), 3.2),
            "groups": _svg(lambda axes: _groups(axes, blocks), (1, 4), 2.4),
            "scales": _svg(lambda axes: _scales(axes[0, 0], blocks), (1, 1), 3.0),
        }
        if blocks[0]["clips"]:
            plots["clips"] = _svg(lambda axes: _clips(axes[0, 0], blocks), (1, 1), 3.0)
        if blocks[0].get("reconstruction"):
            plots["reconstruction"] = _svg(lambda axes: _reconstruction(axes[0, 0], blocks), (1, 1), 3.0)
    by_place = {(p.layer, p.group): p for p in pictures}
    worst = []
    for entry in report["worst"]:
        picture = by_place.get((entry["layer"], entry["group"]))
        worst.append({**entry, "picture": picture, "plot": _worst(entry, picture)})
    return template.render(report=report, plots=plots, worst=worst, quality=report.get("quality"))


def _svg(draw: Callable[[Any], None], grid: tuple[int, int], height: float) -> str:
    """A figure that `draw` fills, 9 inches wide, as inline SVG in its own frame; text stays text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor")
    style: dict[str, Any] = dict.fromkeys(keys, _INK)
    style |= {"svg.fonttype": "none", "svg.hashsalt": "edgevl", "font.size": 9, "axes.spines.top": False}
    style |= {"axes.spines.right": False, "legend.frameon": False, "axes.titlesize": 9, "font.family": ["sans-serif"]}
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=(9, height))
        figure.patch.set_alpha(0)
        axes = figure.subplots(*grid, squeeze=False)
        for axis in axes.flat:
            axis.patch.set_alpha(0)
        draw(axes)
        figure.subplots_adjust(
            left=0.085,
            right=0.96 if height < 3 and grid[1] == 2 else 0.985,
            bottom=0.48 / height,
            top=1 - 0.3 / height,
            wspace=0.4 if grid[1] > 2 else 0.3,
        )
        stream = io.StringIO()
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})  # type: ignore[no-untyped-call]
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)
    # ids are unique in one figure; several figures share the page
    salt = f"g{zlib.crc32(text.encode())}-"
    text = re.sub(r'\bid="', f'id="{salt}', text)
    text = re.sub(r"url\(#", f"url(#{salt}", text)
    text = re.sub(r'href="#', f'href="#{salt}', text)
    return f'<div class="scroll">{text}</div>'  # on a narrow screen, so that its words stay readable


def _logarithmic(axis: Any) -> None:
    """Plain numbers at the powers of ten, and at 2 and 5 in between where there are few of those."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 200 else (1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.25)


def _errors(axis: Any, blocks: list[dict[str, Any]]) -> None:
    layers = [block["layer"] for block in blocks]
    axis.plot(layers, [b["error"] for b in blocks], color=_COLOURS[1], marker="o", markersize=3, label="this block")
    if blocks[0].get("drift") is not None:
        drift = [block["drift"] for block in blocks]
        axis.plot(layers, drift, color=_COLOURS[0], marker="s", markersize=3, label="all blocks so far, held-out text")
    axis.set(xlabel="layer", ylabel="relative error")
    _logarithmic(axis)
    axis.legend(fontsize=7)


def _groups(axes: Any, blocks: list[dict[str, Any]]) -> None:
    layers = [block["layer"] for block in blocks]
    for i, axis in enumerate(axes.flat):
        entries = [block["groups"][i] for block in blocks]
        axis.plot(layers, [e["error_rounded"] for e in entries], color=_COLOURS[0], label="rounded to nearest")
        axis.plot(layers, [e["error_chosen"] for e in entries], color=_COLOURS[1], label="with the scale chosen")
        axis.set(title=entries[0]["group"], xlabel="layer")
        _logarithmic(axis)
        if i == 0:
            axis.set_ylabel("relative error")
            axis.legend(fontsize=7)


def _scales(axis: Any, blocks: list[dict[str, Any]]) -> None:
    for i, entry in enumerate(blocks[0]["groups"]):
        where = [block["layer"] + 0.12 * (i - 1.5) for block in blocks]
        ratios = [block["groups"][i]["ratio"] for block in blocks]
        axis.plot(where, ratios, "o", color=_COLOURS[i], markersize=4.5, alpha=0.85, label=entry["group"])
    axis.legend(fontsize=7, ncols=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axis.set(xlabel="layer", ylabel="exponent", ylim=(-0.05, 1.05))
    axis.grid(alpha=0.25)


def _clips(axis: Any, blocks: list[dict[str, Any]]) -> None:
    for i, entry in enumerate(blocks[0]["clips"]):
        name = entry["linear"].rsplit(".", 1)[-1].removesuffix("_proj")
        layers = [block["layer"] for block in blocks]
        shrinks = [100 * block["clips"][i]["shrink"] for block in blocks]
        axis.plot(layers, shrinks, color=_COLOURS[i % len(_COLOURS)], label=name, marker=".", markersize=4)
    axis.set(xlabel="layer", ylabel="% of the range cut, mean")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, ncols=5)


def _reconstruction(axis: Any, blocks: list[dict[str, Any]]) -> None:
    layers, done = [block["layer"] for block in blocks], [block["reconstruction"] for block in blocks]
    axis.plot(layers, [d["error_before"] for d in done], color=_COLOURS[0], label="as rounded")
    kept = [d["error_after"] if d["kept"] else d["error_before"] for d in done]
    axis.plot(layers, kept, color=_COLOURS[1], label="reconstructed")
    axis.set(xlabel="layer", ylabel="relative error")
    _logarithmic(axis)
    axis.legend(fontsize=7)


def _worst(entry: dict[str, Any], picture: Picture | None) -> str:
    """Activations and weights of the channels, and the weights as a picture."""

    def draw(axes: Any) -> None:
        axis = axes[0, 0]
        for values, name, colour in (("activation", "activations", 0), ("weight", "weights", 1)):
            given = np.asarray(entry[values], float)
            axis.plot(given / max(given.mean(), 1e-30), color=_COLOURS[colour], label=name, linewidth=0.9)
        axis.set(xlabel="channels", ylabel="mean |value| / its mean")
        axis.legend(fontsize=7)
        _logarithmic(axis)
        if picture is not None:
            shown = axes[0, 1].imshow(picture.map, aspect="auto", cmap="viridis", interpolation="nearest")
            axes[0, 1].set(title=f"largest |weight|, {picture.linear}", xlabel="in-features", ylabel="out-features")
            axes[0, 1].set(xticks=[], yticks=[])
            axes[0, 1].figure.colorbar(shown, ax=axes[0, 1], fraction=0.05)

    return _svg(draw, (1, 1 if picture is None else 2), 2.6)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
