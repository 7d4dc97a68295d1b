"""HTML elements that escape their text, so that a sample of a model cannot become markup."""

import html
import re
from collections.abc import Iterable

_VOID_TAGS = {"input", "meta"}
# Control characters and lone surrogates: invalid in HTML or impossible to encode.
_INVALID = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """HTML whose text is already escaped."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """Return text as HTML; Markup stays as it is. Invalid characters become U+FFFD."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(_INVALID.sub("\ufffd", text)))


def join(parts: Iterable[str]) -> Markup:
    """Concatenate texts and elements."""
    return Markup("".join(map(escape, parts)))


def element(tag: str, *children: str, **attributes: str | float | bool | None) -> Markup:
    """Return an HTML or SVG element.

    In attribute names, "_" becomes "-" and a trailing "_" is dropped (`class_`). True gives an
    attribute without value; False and None leave it out.
    """
    written = "".join(
        f" {name.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{escape(str(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    if tag in _VOID_TAGS:
        return Markup(f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{join(children)}</{tag}>")
