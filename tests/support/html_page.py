"""The elements, texts and data of a self-contained HTML page."""

import json
from html.parser import HTMLParser
from typing import Any

_VOID_TAGS = {"meta", "link"}


class HtmlPage(HTMLParser):
    """A page whose tags must be balanced.

    Attributes:
        elements: tag and attributes of each element, in order.
        texts: the text directly in each element, by tag.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID_TAGS:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """Return the attributes of the elements with this tag and these attributes."""
        return [
            found
            for name, found in self.elements
            if name == tag and attributes.items() <= found.items()
        ]

    @property
    def data(self) -> Any:
        """The data that the script shows."""
        _, data, _ = self.texts["script"]
        return json.loads(data)
