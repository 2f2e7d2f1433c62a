"""Figures as SVG, drawn in the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fxmerge.barrier import Barrier
from fxmerge.depth import Link
from fxmerge.markup import Html, element, joined

WIDTH, HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 14, 34


def _figure(label: str, *content: object, height: int = HEIGHT) -> Html:
    box = f"0 0 {WIDTH} {height}"
    return element("svg", element("title", label), *content, class_="figure", role="img", viewBox=box, aria_label=label)


def _text(x: float, y: float, said: object, anchor: str = "middle", **attributes: object) -> Html:
    return element("text", said, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, **attributes)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return element("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values in the range, about ``count`` of them."""
    step = (high - low) / count
    scale = 10 ** math.floor(math.log10(step))
    step = next(m * scale for m in (1, 2, 5, 10) if m * scale >= step)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) for i in range(count + 2) if (first + i) * step <= high + 1e-9 * step]


class _Axis:
    """From values to heights."""

    def __init__(self, values: Sequence[float], log: bool = False) -> None:
        self.log = log
        found = [self._of(v) for v in values]
        low, high = min(found), max(found)
        pad = 0.06 * (high - low) or 0.5 * (abs(high) or 1.0)
        self.low, self.high = low - pad, high + pad

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (self.high - self._of(value)) / (self.high - self.low)

    def grid(self) -> list[Html]:
        if self.log:
            bases = [m * 10.0**e for e in range(math.floor(self.low), math.ceil(self.high) + 1) for m in (1, 2, 5)]
            marks = [m for m in bases if self.low <= math.log10(m) <= self.high]
            marks = [m for m in marks if math.log10(m).is_integer()] if len(marks) > 8 else marks
        else:
            marks = ticks(self.low, self.high)
        lines = [_line(LEFT, self(m), WIDTH - RIGHT, self(m), "grid") for m in marks]
        return lines + [_text(LEFT - 8, self(m) + 4, f"{m:g}", "end", class_="tick") for m in marks]


def variances(found: Mapping[str, tuple[float, float]]) -> Html | None:
    """Per layer the variance of its activations over the parents', before and after the repair, on a log scale."""
    shown = {n: v for n, v in found.items() if all(0 < x < math.inf for x in v)}
    if not shown:
        return None
    axis = _Axis([1.0, *(x for v in shown.values() for x in v)], log=True)
    step = (WIDTH - LEFT - RIGHT) / len(shown)
    radius = min(4.5, max(1.6, 0.3 * step))
    parts = [*axis.grid(), _line(LEFT, axis(1), WIDTH - RIGHT, axis(1), "one")]
    for i, (name, (before, after)) in enumerate(shown.items()):
        x = LEFT + (i + 0.5) * step
        dots = [
            _line(x, axis(before), x, axis(after), "stem"),
            element("circle", cx=f"{x:.1f}", cy=f"{axis(before):.1f}", r=f"{radius:.1f}", class_="before"),
            element("circle", cx=f"{x:.1f}", cy=f"{axis(after):.1f}", r=f"{radius:.1f}", class_="after"),
        ]
        parts.append(element("g", element("title", f"{name}: {before:.3g} before, {after:.3g} after"), *dots))
    parts.append(
        _text(
            (LEFT + WIDTH - RIGHT) / 2,
            HEIGHT - 10,
            f"{len(shown)} layers, from the input to the output",
            class_="label",
        )
    )
    return _figure("Variance of activations over the parents', before and after repair", *parts)


def curve(t: Sequence[float], values: Sequence[float], name: str) -> Html:
    """One quantity on the line between two networks, with the straight line between its ends."""
    inside = [(x, v) for x, v in zip(t, values, strict=True) if math.isfinite(v)]
    axis = _Axis([v for _, v in inside] or [0.0])
    place = [(LEFT + 8 + (WIDTH - LEFT - RIGHT - 16) * x, axis(v)) for x, v in inside]
    parts = axis.grid()
    if len(inside) == len(t):
        parts.append(_line(*place[0], *place[-1], "one"))
    parts.append(element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in place), class_="curve"))
    for (x, y), (at, v) in zip(place, inside, strict=True):
        dot = element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="4", class_="after")
        parts.append(element("g", element("title", f"t = {at:.3g}: {v:.5g}"), dot))
    for at, said, anchor in ((0, "first network", "start"), (0.5, "halfway", "middle"), (1, "second network", "end")):
        x = LEFT + 8 + (WIDTH - LEFT - RIGHT - 16) * at
        parts.append(_text(x, HEIGHT - 10, said, anchor, class_="label"))
    caption = element("figcaption", name)
    return element("figure", caption, _figure(f"{name} on the line between the two networks", *parts))


def barriers(barrier: Barrier) -> Html:
    both = [curve(barrier.t, barrier.loss, "Loss")]
    if barrier.metric:
        both.append(curve(barrier.t, barrier.metric, "Metric"))
    return joined(both)


def costs(link: Link) -> Html:
    """What it costs to let one layer stand for another, as a table: dark cells are cheap, framed ones were chosen."""
    rows = link.costs.tolist()
    finite = [c for row in rows for c in row if math.isfinite(c)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    head = element("tr", element("td"), *(element("th", name, scope="col") for name in link.long))
    body = []
    for i, (name, row) in enumerate(zip(link.short, rows, strict=True)):
        cells = []
        for j, cost in enumerate(row):
            near = 1 - (cost - low) / ((high - low) or 1) if math.isfinite(cost) else 0.0
            chosen = "chosen" if link.chosen[i] == j else None
            style = f"--near:{100 * near:.0f}%"
            cells.append(element("td", f"{cost:.2f}" if math.isfinite(cost) else "–", style=style, class_=chosen))
        body.append(element("tr", element("th", name, scope="row"), *cells))
    return element("table", element("thead", head), element("tbody", *body), class_="costs")
