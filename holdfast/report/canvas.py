"""One picture as SVG by matplotlib, in the colours of light pages and in those of dark ones.

Pictures hold only shapes and text, and pages embed them as images, in which no script runs. Names
are plain text, never math: `$` is a dollar sign.
"""

from __future__ import annotations

import base64
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.files import write_text_atomic
from holdfast.report.words import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Theme:
    ink: str
    muted: str
    grid: str
    plain: str
    colours: tuple[str, ...]  # Okabe and Ito's, which colour-blind readers tell apart

    @property
    def all(self) -> tuple[str, ...]:
        return (self.ink, self.muted, self.grid, self.plain, *self.colours)


LIGHT = Theme(
    ink="#1c2430",
    muted="#5b6675",
    grid="#e3e7ec",
    plain="#6b7684",
    colours=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00"),
)
DARK = Theme(
    ink="#e8ecf2",
    muted="#a3adba",
    grid="#323a46",
    plain="#9aa5b3",
    colours=("#56b4e9", "#f0883e", "#2fc49a", "#e59ac2", "#f0c04a", "#8fb8ff", "#d9cf6a"),
)


@dataclass(frozen=True)
class Panel:
    """One image: its own title where a picture has several, and what it says in words."""

    title: str | None
    alt: str
    light: str  # data URI
    dark: str

    def save(self, path: str | Path) -> None:
        """Write the light image as an SVG file on white ground."""
        text = base64.b64decode(self.light.split(",", 1)[1]).decode("utf-8")
        ground = '<rect width="100%" height="100%" fill="white"/>'
        end = text.index(">") + 1  # of the opening tag
        write_text_atomic(path, text[:end] + ground + text[end:])


@dataclass(frozen=True)
class Picture:
    title: str
    caption: str
    panels: list[Panel]

    def _repr_html_(self) -> str:
        """What a notebook shows; its ground is white, whatever the notebook's theme."""
        images = "".join(
            f'<img alt="{escape(panel.alt)}" src="{panel.light}" style="background: white">'
            for panel in self.panels
        )
        return f"<b>{escape(self.title)}</b><br>{images}<br>{escape(self.caption)}"


def legend(axes: Axes, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Names below the picture, in as many columns as their length allows."""
    longest = max((len(label) for label in labels), default=0)
    columns = max(1, min(len(labels), 60 // (longest + 6)))
    figure: Any = axes.figure
    figure.legend(
        handles, labels, loc="outside lower left", ncols=columns,
        frameon=False, borderaxespad=0, handletextpad=0.5, columnspacing=1.4,
    )  # fmt: skip


def label(text: str, width: int) -> str:
    """A name in a picture: short, and never taken for a hidden label (a leading underscore)."""
    text = clean(text, width=width)
    return " " + text if text.startswith("_") else text


def name_rows(axes: Axes, names: Sequence[str], width: int, measure: str) -> None:
    """Rows from top to bottom, each with its name, over an axis that shows `measure`."""
    axes.set_yticks(range(len(names)), [label(name, width) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.set_xlabel(measure)


def log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A log y axis around positive values, with plain numbers: matplotlib's own are formulas."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = min(values), max(values)
    axes.set_yscale("log")
    if high / low < 3:
        axes.set_ylim(low / 3, high * 3)
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=16))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("e-0", "e-"))


def panel(
    draw: Callable[[Axes, Theme], None], shape: tuple[float, float], title: str | None, alt: str
) -> Panel:
    light, to = _svg(draw, shape), dict(zip(LIGHT.all, DARK.all, strict=True))
    dark = re.sub(r"(?<=: )#[0-9a-f]{6}", lambda colour: to.get(colour[0], colour[0]), light)
    return Panel(title, clean(alt), _uri(light), _uri(dark))


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings about letters that the measuring font lacks: the reader's browser has its own."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _svg(draw: Callable[[Axes, Theme], None], shape: tuple[float, float]) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    theme = LIGHT
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "holdfast",
        "text.parse_math": False,
        "text.usetex": False,
        "font.family": ["DejaVu Sans"],
        "font.size": 9.5,
        "text.color": theme.ink,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": True,
        "axes.formatter.use_mathtext": False,
        "axes.formatter.useoffset": False,  # 0.8375, not 5e-3 above an axis and +0.83 beside it
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "legend.fontsize": 9,
        "legend.labelcolor": theme.ink,
    }
    out = io.StringIO()
    with _quiet(), matplotlib.rc_context(settings):
        figure = Figure(figsize=shape, layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes, theme)
        figure.savefig(
            out, format="svg",
            metadata={"Date": None, "Creator": None, "Type": None, "Format": None},
        )  # fmt: skip
    text = out.getvalue()
    return re.sub(
        r"('DejaVu Sans'|DejaVu Sans)(, ?[^;\"<]*)?(?=[;\"])", FONT, text[text.index("<svg") :]
    )


def _uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")
