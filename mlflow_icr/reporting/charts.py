"""Charts as SVG inside the page: no font, no picture, complete without a script; colours are the page's, light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlflow_icr.reporting.markup import Markup, element, images_text, joined
from mlflow_icr.reporting.scales import Scale, scale_of

WIDTH, HEIGHT = 480, 290
LEFT, RIGHT, TOP, BOTTOM = 64, 472, 20, 244  # of the plot inside the picture
MOST_POINTS = 150  # of a curve; a page of thousands of measurements would be slow, and show no more
COLOURS = 8  # that the page's style has

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A named line: (x, y) points and the (x, low, high) of its interval; `key` is the history's, `dashed` a secondary one."""

    name: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()
    colour: int = 0
    key: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at `at` with a word, and the range that it may stand in; `dotted` for a second kind of mark."""

    at: float
    text: str
    low: float | None = None
    high: float | None = None
    colour: int = 0
    dotted: bool = False


@dataclass(frozen=True)
class Frame:
    """The axes of a chart: labels, which of them are logarithmic, and bounds of y, if given."""

    title: str
    y_label: str
    log_y: bool = False
    y_bounds: tuple[float, float] | None = None
    x_label: str = "images seen (thousands)"
    log_x: bool = True
    x_unit: float = 1000.0


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about MOST_POINTS of a curve: the first, the last, and the lowest and highest of each part between them."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = -(-len(points) // (MOST_POINTS // 2))
    indices = {0, len(points) - 1}
    for start in range(0, len(points), size):
        part = range(start, min(start + size, len(points)))
        indices |= {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(indices)]


def tick_text(value: float) -> str:
    """A tick's label: no trailing zeros, powers of ten beyond six places."""
    return f"{value:g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def _drawable(curve: Curve, frame: Frame) -> Curve:
    """The points of a curve that its axes can show."""

    def fits(x: float, *ys: float) -> bool:
        return (x > 0 or not frame.log_x) and (not frame.log_y or min(ys) > 0)

    points = thinned([p for p in curve.points if fits(*p)])
    positions = {x for x, _ in points}
    band = [b for b in curve.band if fits(*b) and b[0] in positions]
    return Curve(curve.name, points, band, curve.colour, curve.key, curve.dashed)


def _axes(frame: Frame, x: Scale, y: Scale) -> Markup:
    parts = []
    for tick in y.ticks:
        at = f"{y(tick):.1f}"
        parts.append(element("line", x1=LEFT, x2=RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(element("text", tick_text(tick), x=LEFT - 6, y=f"{y(tick) + 4:.1f}", text_anchor="end"))
    below: list[Markup] = []
    for tick in x.ticks:
        at = f"{x(tick):.1f}"
        below.append(element("line", x1=at, x2=at, y1=BOTTOM, y2=BOTTOM + 5, class_="axis"))
        below.append(element("text", tick_text(tick / frame.x_unit), x=at, y=BOTTOM + 19, text_anchor="middle"))
    parts.append(element("g", below, class_="ticks"))
    parts.append(element("line", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, class_="axis"))
    middle = (TOP + BOTTOM) / 2
    parts.append(element("text", frame.x_label, x=(LEFT + RIGHT) / 2, y=HEIGHT - 8, text_anchor="middle", class_="label"))
    turned = f"rotate(-90 11 {middle:g})"
    parts.append(element("text", frame.y_label, x=11, y=middle, transform=turned, text_anchor="middle", class_="label"))
    return joined(parts)


def _marks(marks: Sequence[Mark], x: Scale) -> Markup:
    parts = []
    for mark in marks:
        colour = f"c{mark.colour % COLOURS}"
        if mark.low is not None and mark.high is not None:
            left, right = x(max(mark.low, x.low)), x(mark.high)
            width = f"{max(1.0, right - left):.1f}"
            parts.append(element("rect", x=f"{left:.1f}", y=TOP, width=width, height=BOTTOM - TOP, class_=f"band {colour}"))
        at = x(mark.at)
        style = f"mark {colour} {'dotted' if mark.dotted else 'dashed'}"
        parts.append(element("line", x1=f"{at:.1f}", x2=f"{at:.1f}", y1=TOP, y2=BOTTOM, class_=style))
        side, anchor = (-4, "end") if at > (LEFT + RIGHT) / 2 else (4, "start")
        height = TOP + (26 if mark.dotted else 12)
        text = element("text", mark.text, x=f"{at + side:.1f}", y=height, text_anchor=anchor, class_=f"word {colour}")
        parts.append(text)
    return joined(parts)


def _value_text(curve: Curve, point: Point, frame: Frame) -> str:
    what = f"{images_text(point[0])} images seen" if frame.x_unit == 1000 else f"{frame.x_label} {point[0]:g}"
    bounds = next(((low, high) for at, low, high in curve.band if at == point[0]), None)
    return f"{curve.name}, {what}: {point[1]:.4g}" + (f" ({bounds[0]:.4g} to {bounds[1]:.4g})" if bounds else "")


def _line(curve: Curve, frame: Frame, x: Scale, y: Scale) -> Markup:
    colour = f"c{curve.colour % COLOURS}"
    parts = []
    if len(curve.band) > 1:
        above = " ".join(f"{x(at):.1f},{y(high):.1f}" for at, _, high in curve.band)
        below = " ".join(f"{x(at):.1f},{y(low):.1f}" for at, low, _ in reversed(curve.band))
        parts.append(element("path", d=f"M{above} L{below} Z", class_=f"band {colour}"))
    path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in curve.points)
    if len(curve.points) > 1:
        parts.append(element("path", d=f"M{path}", class_=f"curve {colour}{' dashed' if curve.dashed else ''}"))
    for point in curve.points:
        dot = element(
            "circle",
            element("title", _value_text(curve, point, frame)),
            cx=f"{x(point[0]):.1f}",
            cy=f"{y(point[1]):.1f}",
            r=2.6 if len(curve.points) < 60 else 1.4,
            class_=f"dot {colour}",
            data_key=curve.key or None,
            data_step=f"{point[0]:g}" if point[0] != int(point[0]) else int(point[0]),
            data_value=repr(point[1]),
        )
        parts.append(dot)
    return joined(parts)


def legend(curves: Sequence[Curve]) -> Markup:
    """The names of curves beside a piece of their lines."""
    entries = []
    for curve in curves:
        line = f"curve c{curve.colour % COLOURS}{' dashed' if curve.dashed else ''}"
        swatch = element("svg", element("line", x1=0, x2=22, y1=5, y2=5, class_=line), width=22, height=10, aria_hidden="true")
        entries.append(element("li", swatch, " ", curve.name))
    return element("ul", entries, class_="legend")


def chart(frame: Frame, curves: Sequence[Curve], marks: Sequence[Mark] = (), *, named: bool = True) -> Markup:
    """A figure of curves with their intervals and, where they are `named`, a legend and the names of those without a point.

    A logarithmic axis leaves out values that are not positive, such as the start, 0 images seen.
    """
    drawn = [_drawable(curve, frame) for curve in curves]
    shown = [curve for curve in drawn if curve.points]
    missing = [curve.name for curve in drawn if not curve.points]
    heading = element("figcaption", element("strong", frame.title))
    if not shown:
        return element("figure", heading, element("p", "There is nothing to draw.", class_="quiet"), class_="chart")
    xs = [x for curve in shown for x, _ in curve.points]
    ys = [value for curve in shown for _, value in curve.points]
    ys += [bound for curve in shown for _, *bounds in curve.band for bound in bounds]
    x = scale_of(xs, LEFT, RIGHT, log=frame.log_x, margin=0.03)
    y = scale_of([*ys, *(frame.y_bounds or ())], BOTTOM, TOP, log=frame.log_y)
    inside = [mark for mark in marks if mark.at > 0 and math.isfinite(mark.at)]
    drawing = [_marks(inside, x), [_line(curve, frame, x, y) for curve in shown]]
    # An inner picture, which cuts off what a zoom moves out of the plot; it has the outer one's coordinates.
    window = {"x": LEFT - 4, "y": 0, "width": RIGHT - LEFT + 8, "height": BOTTOM + 4}
    plot = element("svg", drawing, class_="plot", viewBox=f"{LEFT - 4} 0 {RIGHT - LEFT + 8} {BOTTOM + 4}", **window)
    last = "; ".join(_value_text(curve, curve.points[-1], frame) for curve in shown[:COLOURS])
    label = f"{frame.title}. Last values: {last}"
    axis = {
        "data_low": repr(x.low),
        "data_high": repr(x.high),
        "data_log": str(x.log).lower(),
        "data_unit": f"{frame.x_unit:g}",
    }
    size = f"0 0 {WIDTH} {HEIGHT}"
    picture = element("svg", _axes(frame, x, y), plot, viewBox=size, role="img", aria_label=label, tabindex=0, **axis)
    names = legend(shown) if named and (len(shown) > 1 or shown[0].dashed) else None
    note = element("p", "Not drawn: ", ", ".join(missing), class_="quiet") if named and missing else None
    values = element("p", class_="values quiet", aria_live="polite")
    return element("figure", heading, picture, values, names, note, class_="chart")
