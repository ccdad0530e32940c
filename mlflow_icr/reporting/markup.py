"""HTML with automatic escaping: text that is not `Markup` is escaped when it is inserted."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Union

VOID = frozenset({"br", "circle", "hr", "img", "line", "meta", "path", "rect"})  # elements that are written without an end

Child = Union[str, int, float, None, "Iterable[Child]"]  # None and empty iterables are nothing


class Markup(str):
    """Text that is HTML: only `element` and `joined`, and constants of this package, make it."""

    __slots__ = ()


def _text(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return str(child)
    if isinstance(child, (str, int, float)):
        return escape(str(child))
    return "".join(_text(part) for part in child)


def joined(*children: Child) -> Markup:
    """Children one after the other, escaped where they are plain text."""
    return Markup(_text(children))


def element(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """An element with its children; attributes: `class_` is class, `data_key` data-key, True stands alone, None is left out.

    Names are the caller's constants; children and values of attributes are escaped.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        plain = key.rstrip("_").replace("_", "-")
        words.append(plain if value is True else f'{plain}="{escape(str(value))}"')
    start = f"<{' '.join(words)}"
    if name in VOID and not children:
        return Markup(f"{start}>" if name in ("br", "hr", "img", "meta") else f"{start}/>")
    return Markup(f"{start}>{_text(children)}</{name}>")


def images_text(step: float) -> str:
    """A number of images seen with separators: 130,032."""
    return f"{step:,.0f}"


def number(value: float, *, key: str = "", step: float | None = None, digits: int = 3) -> Markup:
    """A number to `digits` significant places, with its exact value in the element `data` for programs and on hovering."""
    text = images_text(value) if value == int(value) and abs(value) >= 1000 else f"{value:#.{digits}g}".rstrip(".")
    if value == int(value) and abs(value) < 1000:
        text = f"{value:g}"
    at = None if step is None else f"{step:.0f}"
    return element("data", text, value=repr(value), title=repr(value), data_key=key or None, data_step=at)


def interval(low: float, high: float, key: str, step: float) -> Markup:
    """The bounds of a value in brackets, each exact on hovering."""
    bounds = (number(low, key=f"{key}_low", step=step), number(high, key=f"{key}_high", step=step))
    return joined(element("span", "(", bounds[0], " to ", bounds[1], ")", class_="interval"))


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], **attributes: str | None) -> Markup:
    """A table that scrolls sideways on a narrow screen; the first cell of a row is its heading."""
    top = element("thead", element("tr", [element("th", cell, scope="col") for cell in head]))
    body = []
    for cells in rows:
        first, *rest = cells
        body.append(element("tr", element("th", first, scope="row"), [element("td", cell) for cell in rest]))
    return element("div", element("table", top, element("tbody", body), **attributes), class_="scroll", tabindex="0")


def fold(heading: str, *children: Child, opened: bool = False) -> Markup:
    """A part that is folded until the reader opens it."""
    return element("details", element("summary", heading), *children, open=opened)
