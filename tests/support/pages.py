"""Pages, taken apart by Python's HTML parser."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """The tags of a page with their attributes, and its texts; scripts and styles apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.code: list[str] = []
        """Scripts and styles."""
        self.opened: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.opened.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.opened:
            while self.opened.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        inside = self.opened[-1:] in (["script"], ["style"])
        (self.code if inside else self.texts).append(data)


def texts_of(page: str) -> str:
    """Return what a reader sees of a page, titles and labels too."""
    read = Page(page)
    shown = [
        value
        for _, attrs in read.tags
        for name, value in attrs.items()
        if name in ("title", "aria-label", "placeholder")
    ]
    return "\n".join([*read.texts, *(value or "" for value in shown)])
