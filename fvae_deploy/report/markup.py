"""Small pieces of the page: escaped text, tables, sections, numbers as people read them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

COLOURS = ("#2f6fde", "#d9662b", "#2a9d6f", "#8b5bd6", "#b8860b", "#c2378a")  # of the methods


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def esc(content: Any) -> Markup:
    """Return text escaped for HTML; what is HTML already stays."""
    return content if isinstance(content, Markup) else Markup(html.escape(str(content)))


def join(*parts: Any) -> Markup:
    """Put pieces one after the other."""
    return Markup("".join(map(esc, parts)))


def tag(name: str, *content: Any, **attributes: Any) -> Markup:
    """Return an element; `class_` and `data_x` become class and data-x."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{join(*content)}</{name}>")


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """Return a number with this many decimals, a dash where there is none."""
    if value is None:
        return "–"
    text = f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"
    return "0" + text[2:] if float(text.replace(",", "")) == 0 and sign else text


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str = "") -> Markup:
    """Return a table; the first column holds names, the others numbers."""
    top = tag("tr", *(tag("th", cell) for cell in head))
    body = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    title = tag("caption", caption) if caption else ""
    inner = join(title, tag("thead", top), tag("tbody", *body))
    return tag("div", tag("table", inner), class_="scroll")


def section(name: str, title: str, lead: str, *body: Any) -> Markup:
    """Return a section with a sentence or two that say how to read it."""
    return tag("section", tag("h2", title), tag("p", lead, class_="lead"), *body, id=name)


def note(text: Any) -> Markup:
    """Return a remark in small letters."""
    return tag("p", text, class_="note")


def method_name(name: str, methods: Sequence[str]) -> Markup:
    """Return the name of a method with its colour."""
    colour = COLOURS[methods.index(name) % len(COLOURS)]
    return tag("span", tag("i", style=f"background:{colour}"), name, class_="method")
