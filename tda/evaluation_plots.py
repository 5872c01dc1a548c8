"""Plots of what `tda evaluate` finds, as PNG or SVG files."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from tda.artifacts import whole
from tda.lds import CONFIDENCE

INK, MUTED, GRID = "#1f2933", "#66727f", "#e3e7eb"
SINGLE, ENSEMBLE = "#9db4cc", "#1f4e79"
COLOURS = ["#1f4e79", "#c8553d", "#3a7d44", "#8a5a9e", "#b8860b", "#2a9d8f", "#5b6770"]
BASELINE, DASHES = "#87929e", [(0, (4, 2)), (0, (1, 1.5))]
LINE, LINE_HEIGHT = 30, 0.17  # of a method's name: characters, inches
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.hashsalt": "tda",
}


@contextmanager
def figure(path: Path, *, width: float, height: float, title: str, subtitle: str) -> Iterator[Axes]:
    """An empty plot in inches, titled, that is written to `path` (.png or .svg) when the block ends; equal plots, equal bytes."""
    with mpl.rc_context(STYLE):
        canvas, axes = plt.subplots(figsize=(width, height), layout="constrained")
        try:
            axes.set_title(f"{title}\n", loc="left", fontsize=12, fontweight="bold", color=INK)
            below = {"xycoords": "axes fraction", "textcoords": "offset points"}  # as far in a tall plot as in a low one
            axes.annotate(subtitle, (0, 1), (0, 5), **below, fontsize=9, color=MUTED, va="bottom")
            yield axes
            kind = path.suffix.removeprefix(".")
            with whole(path) as part:
                canvas.savefig(part, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
        finally:
            plt.close(canvas)


def plot_lds(result: dict, path: Path) -> None:
    """Every method's LDS, single runs and their ensemble, with intervals; the ceiling as a line."""
    methods = sorted(result["methods"].items(), key=lambda item: item[1]["single"]["mean"])
    bank, seeds = result["bank"], len(result["seeds"])
    names = [folded(label) for label, _method in methods]
    with figure(
        path,
        width=7.0,
        height=1.7 + max(0.5, *(LINE_HEIGHT * (1 + name.count("\n")) for name in names)) * len(methods),
        title=f"Linear datamodeling score on {bank['name']}",
        subtitle=f"mean over {bank['queries']} queries with {CONFIDENCE:.0%} interval; {bank['subsets']} subsets × "
        f"{bank['repeats']} repeats",
    ) as axes:
        kinds = [("single", "single run", SINGLE, 0.16), ("ensemble", f"mean of {seeds} runs", ENSEMBLE, -0.16)]
        for kind, words, colour, shift in kinds:
            shown = [(place, method[kind]) for place, (_label, method) in enumerate(methods) if method[kind]]
            if shown:
                _intervals(axes, shown, label=words, colour=colour, shift=shift if seeds > 1 else 0.0)
        if result["ceiling"] is not None:
            axes.axvline(result["ceiling"], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="noise ceiling")
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_yticks(range(len(methods)), names, color=INK)
        axes.set_ylim(-0.6, len(methods) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.tick_params(length=0)
        axes.set_xlabel("LDS")
        axes.set_xlim(left=min(-0.05, axes.get_xlim()[0]), right=1.0)
        axes.figure.legend(loc="outside lower center", ncols=3, fontsize=9)


def folded(label: str) -> str:
    """A method's name on as many lines as it takes, broken before its settings and the members of an ensemble."""
    lines = [""]
    for part in re.split(r"(?=[:+])", label):
        if lines[-1] and len(lines[-1] + part) > LINE:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _intervals(axes: Axes, shown: Sequence[tuple[int, dict]], *, label: str, colour: str, shift: float) -> None:
    places = [place + shift for place, _value in shown]
    means = [value["mean"] for _place, value in shown]
    errors = [
        [value["mean"] - value["low"] for _place, value in shown],
        [value["high"] - value["mean"] for _place, value in shown],
    ]
    axes.errorbar(means, places, xerr=errors, fmt="o", markersize=5.5, color=colour, elinewidth=1.8, label=label)
    for place, (_place, value) in zip(places, shown, strict=True):
        number = f"{value['mean']:.2f}".replace("-0.00", "0.00").replace("-", "−")
        axes.annotate(
            number,
            (value["high"], place),
            (4, -0.5),
            textcoords="offset points",
            fontsize=8,
            color=INK,
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},  # the ceiling's line stops at a number
        )


def plot_curves(
    curves: dict[str, dict],
    path: Path,
    *,
    title: str,
    subtitle: str,
    x_label: str,
    y_label: str,
    baselines: Sequence[str] = (),
    percent: bool = False,
    markers: bool = True,
) -> None:
    """Lines of `mean` over `x`, where there are `low` and `high` with a band; those named in `baselines` in grey, the rest named
    from the highest down.
    """
    with figure(path, width=7.0, height=4.2, title=title, subtitle=subtitle) as axes:
        height = {label: sum(curve["mean"]) for label, curve in curves.items()}
        methods = sorted((label for label in curves if label not in baselines), key=lambda label: -height[label])
        looks = {label: (COLOURS[place % len(COLOURS)], "-") for place, label in enumerate(methods)}
        looks |= {label: (BASELINE, DASHES[place % len(DASHES)]) for place, label in enumerate(baselines) if label in curves}
        for label, (colour, dashes) in looks.items():
            curve = curves[label]
            axes.plot(
                curve["x"],
                curve["mean"],
                color=colour,
                linestyle=dashes,
                linewidth=2,
                marker="o" if markers else "",
                markersize=4,
                label=folded(label),
            )
            if "low" in curve:
                axes.fill_between(curve["x"], curve["low"], curve["high"], color=colour, alpha=0.1, linewidth=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.tick_params(length=0)
        if percent:
            axes.yaxis.set_major_formatter("{x:.0%}")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, borderaxespad=0)
