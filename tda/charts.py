"""Charts as small SVG strings: no scripts, no network, colours from the page's style sheet by class name."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import polars as pl
from markupsafe import Markup

HALF, WIDE, NARROW = 400, 912, 358  # widths in CSS pixels: half a column, a column, a phone
MAX_POINTS = 400  # of a line; more are averaged, a screen cannot show them
MAX_DECIMALS = 6  # of a number beside a common factor
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Number = int | float
ARMS = {"all": "All data", "curated": "Curated", "random": "Random"}


@dataclass(frozen=True)
class Frame:
    """A plotting area in pixels with the data's range on each axis."""

    left: Number
    top: Number
    right: Number
    bottom: Number
    x_range: tuple[Number, Number]
    y_range: tuple[Number, Number]

    def x(self, value: Number) -> float:
        """Pixel of a value on the horizontal axis."""
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: Number) -> float:
        """Pixel of a value on the vertical axis, which points up."""
        low, high = self.y_range
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)


def number(value: Number, digits: int = 3, *, sign: bool = False) -> str:
    """`value` for people: a true minus sign, no exponent unless it is tiny, `digits` significant ones."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    text = f"{value:+.{digits}g}" if sign else f"{value:.{digits}g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    return text.replace("-", "−")


def power_of_ten(values: Sequence[Number] | np.ndarray) -> int:
    """The exponent, a multiple of three, in which the largest of `values` is between 1 and 1000; 0 if they need none."""
    sizes = np.abs(np.asarray(values, dtype=float))
    largest = sizes[np.isfinite(sizes)].max(initial=0.0)
    if not largest:
        return 0
    exponent = math.floor(math.log10(largest) / 3) * 3
    return 0 if -3 <= exponent <= 0 and largest >= 0.01 else exponent


def scaled(value: Number, exponent: int, *, sign: bool = False) -> str:
    """`value` in units of 10 to the `exponent`, three significant digits, never with a power of ten of its own."""
    shown = value / 10.0**exponent
    if shown == 0 or not math.isfinite(shown):
        return number(shown)
    decimals = min(MAX_DECIMALS, max(0, 2 - math.floor(math.log10(abs(shown)))))
    text = f"{shown:+.{decimals}f}" if sign else f"{shown:.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if decimals else text).replace("-", "−")


def times_power(exponent: int) -> str:
    """How a unit of 10 to the `exponent` is written; empty for 0."""
    return f"× 10{str(exponent).translate(_SUPERSCRIPT)}" if exponent else ""


def ticks(low: Number, high: Number, count: int) -> list[float]:
    """About `count` round values from `low` to `high`."""
    rough = (high - low) / max(count, 1)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def svg(width: Number, height: Number, label: str, parts: Sequence[str], kind: str = "") -> Markup:
    """The image with its text alternative."""
    return Markup(
        f'<svg class="chart {kind}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _text(x: Number, y: Number, content: str, kind: str = "tick", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'


def _line(x1: Number, y1: Number, x2: Number, y2: Number, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _rect(x: Number, y: Number, width: Number, height: Number, kind: str, title: str = "") -> str:
    if width <= 0 or height <= 0:
        return ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{kind}">{_tip(title)}</rect>'


def _dot(x: Number, y: Number, radius: Number, kind: str, title: str = "") -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{kind}">{_tip(title)}</circle>'


def _path(points: Sequence[tuple[Number, Number]], kind: str) -> str:
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{kind}"/>'


def _tip(title: str) -> str:
    return f"<title>{escape(title)}</title>" if title else ""


def _padded(values: Sequence[Number], share: Number = 0.08) -> tuple[Number, Number]:
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def _bottom_axis(frame: Frame, count: int, *, label: str, grid: bool = True) -> list[str]:
    parts = []
    for value in ticks(*frame.x_range, count):
        parts += [_line(frame.x(value), frame.top, frame.x(value), frame.bottom, "grid")] * grid
        parts.append(_text(frame.x(value), frame.bottom + 16, number(value, 6), anchor="middle"))
    parts.append(_line(frame.left, frame.bottom, frame.right, frame.bottom, "axis"))
    parts.append(_text((frame.left + frame.right) / 2, frame.bottom + 34, label, "label", "middle"))
    return parts


def _left_axis(frame: Frame, count: int, *, percent: bool = False) -> list[str]:
    parts = []
    for value in ticks(*frame.y_range, count):
        parts.append(_line(frame.left, frame.y(value), frame.right, frame.y(value), "grid"))
        parts.append(_text(frame.left - 8, frame.y(value) + 4, f"{value:.0%}" if percent else number(value, 6), anchor="end"))
    return parts


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= MAX_POINTS:
        return x, y
    groups = np.array_split(np.arange(len(x)), MAX_POINTS)
    return np.array([x[group].mean() for group in groups]), np.array([y[group].mean() for group in groups])


def training(trajectory: pl.DataFrame, segments: Sequence[dict], checkpoint_steps: Sequence[int], *, width: int) -> Markup:
    """Loss above learning rate over the steps, on bands of the segments, with a mark at every checkpoint."""
    table = trajectory.sort("step")
    steps = table["step"].to_numpy().astype(float)
    losses = table["loss"].cast(pl.Float64).fill_null(math.nan).to_numpy()
    rates = table["learning_rate"].cast(pl.Float64).to_numpy()
    seen = np.isfinite(losses)
    loss_range = _padded(losses[seen].tolist()) if seen.any() else (0.0, 1.0)
    rate_exponent = math.floor(math.log10(rates.max())) if rates.max() > 0 else 0
    rates = rates / 10.0**rate_exponent
    last = max(float(steps.max()), 2.0)
    upper = Frame(44, 44, width - 8, 224, (1.0, last), loss_range)
    lower = Frame(44, 264, width - 8, 330, (1.0, last), (0.0, max(float(rates.max()) * 1.1, 1e-9)))
    parts = []
    for place, segment in enumerate(segments):
        begin, end = (
            upper.x(max(segment["first_step"], 1)),
            upper.x(min(segment["last_step"] + (place < len(segments) - 1), last)),
        )
        name = f"Segment {segment['index']}" if end - begin > 70 else str(segment["index"])
        parts.append(
            _rect(
                begin,
                28,
                end - begin,
                302,
                f"band{place % 2}",
                f"{name}: steps {segment['first_step']} to {segment['last_step']}",
            )
        )
        parts.append(_text((begin + end) / 2, 21, name, "label", "middle"))
    parts += _left_axis(upper, 4) + _left_axis(lower, 2)
    parts.append(_text(upper.left + 6, 42, "Training loss, nats per token", "heading"))
    parts.append(_text(lower.left + 6, 258, f"Learning rate {times_power(rate_exponent)}", "heading"))
    parts += [_line(upper.x(step), 48, upper.x(step), lower.bottom, "marker") for step in checkpoint_steps]
    points = list(zip(*_thin(steps[seen], losses[seen]), strict=True))
    smooth = _smoothed(losses[seen])
    parts.append(_path([(upper.x(x), upper.y(y)) for x, y in points], "line faint"))
    parts.append(_path([(upper.x(x), upper.y(y)) for x, y in zip(*_thin(steps[seen], smooth), strict=True)], "line accent"))
    parts.append(_path([(lower.x(x), lower.y(y)) for x, y in zip(*_thin(steps, rates), strict=True)], "line plain"))
    parts += [
        _dot(upper.x(step), lower.bottom, 4, "checkpoint", f"checkpoint {place}: step {step}")
        for place, step in enumerate(checkpoint_steps)
    ]
    parts += _bottom_axis(lower, 4 if width < HALF else 8, label="Optimizer step", grid=False)
    label = (
        f"Training loss over {len(table)} optimizer steps, from {number(losses[seen][0])} to {number(losses[seen][-1])} "
        f"nats per token, in {len(segments)} segments with {len(checkpoint_steps)} checkpoints; below it the learning rate."
        if seen.any()
        else f"Learning rate over {len(table)} optimizer steps in {len(segments)} segments; the losses were not recorded."
    )
    return svg(width, 370, label, parts, "wide" if width > HALF else "narrow")


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over a fiftieth of the steps, less at the ends."""
    reach = max(len(values) // 100, 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    low, high = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def histogram(table: pl.DataFrame, *, width: int, unit: str, exponent: int) -> Markup:
    """Documents per bin of the score, harmful and helpful ones apart, dropped ones solid."""
    bins = table.group_by("low", "high").agg(pl.col("documents", "dropped").sum()).sort("low")
    scale = 10.0**exponent
    x_range = (float(bins["low"].min()) / scale, float(bins["high"].max()) / scale)
    frame = Frame(48, 14, width - 8, 196, x_range, (0.0, float(bins["documents"].max()) * 1.06))
    parts = _left_axis(frame, 3)
    for row in bins.iter_rows(named=True):
        left, right = frame.x(row["low"] / scale), frame.x(row["high"] / scale)
        kind = "harm" if row["low"] < 0 else "help"
        title = f"{row['documents']:,} documents, {row['dropped']:,} dropped"
        for count, shade in ((row["documents"], f"{kind} soft"), (row["dropped"], kind)):
            parts.append(_rect(left + 0.5, frame.y(count), right - left - 1, frame.bottom - frame.y(count), shade, title))
    parts += _bottom_axis(frame, 4 if width < HALF else 8, label=f"Score {unit}".strip(), grid=False)
    if frame.x_range[0] < 0 < frame.x_range[1]:
        parts.append(_line(frame.x(0), 4, frame.x(0), frame.bottom, "zero"))
        parts.append(_text(frame.x(0) - 8, 14, "← harms", "label harm-text", "end"))
        parts.append(_text(frame.x(0) + 8, 14, "helps →", "label help-text"))
    total, dropped = int(bins["documents"].sum()), int(bins["dropped"].sum())
    label = f"Histogram of the scores of {total} documents; {dropped} dropped ones are at the harmful end."
    return svg(width, 238, label, parts, "wide" if width > HALF else "narrow")


def strip(bins: pl.DataFrame, *, source: str, x_range: tuple[Number, Number]) -> Markup:
    """One source's histogram as a small strip, on the range that all sources share."""
    frame = Frame(1, 2, 199, 30, x_range, (0.0, float(bins["documents"].max())))
    parts = []
    for row in bins.iter_rows(named=True):
        left, right = frame.x(row["low"]), frame.x(row["high"])
        kind = "harm" if row["low"] < 0 else "help"
        for count, shade in ((row["documents"], f"{kind} soft"), (row["dropped"], kind)):
            parts.append(_rect(left, frame.y(count), right - left - 0.6, frame.bottom - frame.y(count), shade))
    parts.append(_line(1, 30, 199, 30, "axis"))
    if x_range[0] < 0 < x_range[1]:
        parts.append(_line(frame.x(0), 0, frame.x(0), 32, "zero"))
    return svg(200, 33, f"Scores of source {source}", parts, "strip")


def arms(runs: pl.DataFrame, measure: str, *, title: str) -> Markup:
    """The loss of every retrained model, a row per arm, the models of one seed joined by a line."""
    names = [arm for arm in ARMS if arm in runs["arm"].unique().to_list()]
    frame = Frame(76, 12, HALF - 14, 142, _padded(runs[measure].to_list()), (0.0, 1.0))
    parts = _bottom_axis(frame, 4, label="nats per token")
    values = {(row["arm"], row["seed"]): row[measure] for row in runs.iter_rows(named=True)}
    height = {arm: 12 + 130 * (place + 0.5) / len(names) for place, arm in enumerate(names)}
    for seed in runs["seed"].unique().sort():
        parts.append(_path([(frame.x(values[arm, seed]), height[arm]) for arm in names], "line faint"))
    for arm in names:
        parts.append(_text(64, height[arm] + 4, ARMS[arm], "name strong" if arm == "curated" else "name", "end"))
        of_arm = [(seed, value) for (other, seed), value in values.items() if other == arm]
        parts += [
            _dot(
                frame.x(value),
                height[arm],
                4.5,
                "dot accent-fill" if arm == "curated" else "dot",
                f"{ARMS[arm]}, seed {seed}: {value:.4f}",
            )
            for seed, value in of_arm
        ]
        mean = float(np.mean([value for _, value in of_arm]))
        parts.append(_line(frame.x(mean), height[arm] - 11, frame.x(mean), height[arm] + 11, "mean"))
    means = ", ".join(f"{ARMS[arm]} {runs.filter(arm=arm)[measure].mean():.4f}" for arm in names)
    return svg(HALF, 182, f"{title} of every retrained model. Means: {means} nats per token.", parts)


def intervals(comparisons: Sequence[dict], *, title: str, limit: Number | None) -> Markup:
    """Paired differences: a dot per seed, the mean and its interval, against zero and, if there is one, a limit."""
    values = (
        [value for c in comparisons for value in (*c["per_seed"].values(), c["low"], c["high"])]
        + [0.0]
        + ([limit] if limit else [])
    )
    bottom = 12 + 46 * len(comparisons)
    frame = Frame(12, 12, HALF - 14, bottom, _padded(values), (0.0, 1.0))
    parts = _bottom_axis(frame, 5, label="difference, nats per token (negative is better)")
    parts.append(_line(frame.x(0), frame.top, frame.x(0), frame.bottom, "zero"))
    if limit:
        parts += [
            _line(frame.x(limit), frame.top, frame.x(limit), frame.bottom, "limit"),
            _text(frame.x(limit) - 5, bottom - 4, "limit", "label", "end"),
        ]
    for place, c in enumerate(comparisons):
        y = 12 + 46 * place + 32
        kind = "accent" if c["arm"] == "curated" else "plain"
        parts.append(_text(frame.left, y - 16, f"{ARMS[c['arm']]} minus {ARMS[c['control']].lower()}", "name halo"))
        parts.append(_line(frame.x(c["low"]), y, frame.x(c["high"]), y, f"interval {kind}"))
        parts += [_line(frame.x(c[end]), y - 5, frame.x(c[end]), y + 5, f"interval {kind}") for end in ("low", "high")]
        parts += [_dot(frame.x(value), y, 3, "dot", f"seed {seed}: {value:+.4f}") for seed, value in c["per_seed"].items()]
        parts.append(_dot(frame.x(c["mean_difference"]), y, 5.5, f"{kind}-fill", f"mean {c['mean_difference']:+.4f}"))
    said = "; ".join(f"{c['name']}: {c['mean_difference']:+.4f} ({c['low']:+.4f} to {c['high']:+.4f})" for c in comparisons)
    return svg(HALF, bottom + 40, f"{title}, paired differences with intervals. {said}.", parts)


def method_styles(methods: Sequence[str], *, decided_by: str) -> dict[str, str]:
    """Class of every method's line; the one that decided stands out and is drawn last, on top."""
    others = [method for method in methods if method != decided_by]
    return {method: f"line series{place % 6}" for place, method in enumerate(others)} | {decided_by: "line accent thick"}


def recall(curve: pl.DataFrame, *, styles: dict[str, str], share_damaged: Number) -> Markup:
    """Share of the planted damage found against the share of documents inspected, a line per method."""
    frame = Frame(46, 12, HALF - 22, 270, (0.0, 1.0), (0.0, 1.0))
    parts = _left_axis(frame, 5, percent=True)
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(_text(frame.x(value), frame.bottom + 16, f"{value:.0%}", anchor="middle"))
    parts.append(_line(frame.left, frame.bottom, frame.right, frame.bottom, "axis"))
    parts.append(
        _text((frame.left + frame.right) / 2, frame.bottom + 34, "documents inspected, most harmful first", "label", "middle")
    )
    parts.append(_path([(frame.x(0), frame.y(0)), (frame.x(share_damaged), frame.y(1)), (frame.x(1), frame.y(1))], "line ideal"))
    parts.append(_line(frame.x(0), frame.y(0), frame.x(1), frame.y(1), "line ideal"))
    for method, style in styles.items():
        points = [(frame.x(a), frame.y(b)) for a, b in curve.select("share_inspected", method).rows()]
        parts.append(_path(points, style))
    return svg(HALF, 312, "Recall of the planted damage by method; the table of methods has the numbers.", parts)


def key(style: str) -> Markup:
    """The piece of line that stands for a method in `recall`; its name stands beside it."""
    return Markup(
        f'<svg class="key" viewBox="0 0 28 10" width="28" height="10" aria-hidden="true">{_line(1, 5, 27, 5, style)}</svg>'
    )


def trend(values: Sequence[tuple[str, Number]], *, limit: Number, width: int) -> Markup:
    """A share over the audits, the newest on the right, with its limit."""
    shown = values[-30:]
    top = max(limit, *(share for _, share in shown)) * 1.12 or 1.0
    frame = Frame(46, 12, WIDE - 20, 150, (-0.5, max(len(shown) - 0.5, 0.5)), (0.0, top))
    parts = _left_axis(frame, 3, percent=True)
    parts.append(_line(frame.left, frame.bottom, frame.right, frame.bottom, "axis"))
    parts += [
        _line(frame.left, frame.y(limit), frame.right, frame.y(limit), "limit"),
        _text(frame.right, frame.y(limit) - 5, "limit", "label", "end"),
    ]
    points = [(frame.x(place), frame.y(share)) for place, (_, share) in enumerate(shown)]
    parts.append(_path(points, "line accent"))
    parts += [
        _dot(x, y, 4.5, "harm" if share > limit else "accent-fill", f"{name}: {share:.1%}")
        for (x, y), (name, share) in zip(points, shown, strict=True)
    ]
    for place in sorted({0, len(shown) - 1}):
        anchor = "middle" if len(shown) == 1 else "start" if place == 0 else "end"
        parts.append(_text(points[place][0], frame.bottom + 18, shown[place][0], anchor=anchor))
    label = f"Share of documents predicted to harm over {len(shown)} audits, last {shown[-1][1]:.1%}, limit {limit:.1%}."
    return svg(width, 174, label, parts, "wide" if width > HALF else "narrow")
