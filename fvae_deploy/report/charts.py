"""Charts of the page as SVG: lines, and points with lines across."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fvae_deploy.report.markup import Markup, esc, join, tag

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 44


@dataclass(frozen=True)
class Series:
    """Points (x, y) in one colour; `dashed` lines are originals."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    labels: Sequence[str] = ()


def lines(
    series: Sequence[Series], x_title: str, y_title: str, across: Sequence[tuple[float, str]] = ()
) -> Markup:
    """Return a chart of lines with a legend below; `across` are values marked from side to side."""
    return _chart(series, x_title, y_title, across, dots=False)


def points(
    series: Sequence[Series], x_title: str, y_title: str, across: Sequence[tuple[float, str]] = ()
) -> Markup:
    """Return a chart of points, whose labels show under the mouse."""
    return _chart(series, x_title, y_title, across, dots=True)


def _chart(
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    across: Sequence[tuple[float, str]],
    dots: bool,
) -> Markup:
    xs = [value for one in series for value in one.x]
    ys = [value for one in series for value in one.y] + [value for value, _ in across]
    if not xs:
        return Markup("")
    (x0, x1, xt), (y0, y1, yt) = _axis(xs), _axis(ys)

    def px(value: float) -> float:
        return round(LEFT + (value - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), 1)

    def py(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [_line(LEFT, py(t), WIDTH - RIGHT, py(t), "grid") for t in yt]
    parts += [_text(LEFT - 6, py(t) + 4, f"{t:.6g}", "end") for t in yt]
    parts += [_text(px(t), HEIGHT - BOTTOM + 16, f"{t:.6g}", "middle") for t in xt]
    for value, name in across:
        parts.append(_line(LEFT, py(value), WIDTH - RIGHT, py(value), "across"))
        parts.append(_text(WIDTH - RIGHT - 2, py(value) - 4, name, "end"))
    for one in series:
        pairs = list(zip(map(px, one.x), map(py, one.y), strict=True))
        if dots:
            labels = one.labels or [""] * len(pairs)
            parts += [
                tag("circle", tag("title", label), cx=x, cy=y, r=4, fill=one.colour, class_="dot")
                for (x, y), label in zip(pairs, labels, strict=True)
            ]
        else:
            path = "M" + "L".join(f"{x},{y}" for x, y in pairs)
            dash = "5 4" if one.dashed else None
            parts.append(tag("path", d=path, stroke=one.colour, stroke_dasharray=dash))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_title, "middle", "title"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turn = f"rotate(-90 14 {middle})"
    parts.append(tag("text", y_title, x=14, y=middle, transform=turn, class_="title middle"))
    drawing = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")
    return tag("figure", drawing, legend(series), class_="chart")


def legend(series: Sequence[Series]) -> Markup:
    """Return the names of the series with their colours."""
    keys = [
        tag(
            "span",
            tag("i", style=f"border-top:3px {'dashed' if one.dashed else 'solid'} {one.colour}"),
            one.name,
        )
        for one in series
        if one.name
    ]
    return tag("figcaption", *keys)


def _axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Return the ends of an axis and its ticks, at round numbers."""
    low, high = min(values), max(values)
    if high - low < 1e-9:
        low, high = low - 1, high + 1
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [k * step for k in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _text(x: float, y: float, content: str, anchor: str, kind: str = "") -> Markup:
    return tag("text", esc(content), x=x, y=y, class_=f"{anchor} {kind}".strip())


def side_by_side(*charts: Markup) -> Markup:
    """Put charts next to each other where there is room."""
    return tag("div", join(*charts), class_="charts")
