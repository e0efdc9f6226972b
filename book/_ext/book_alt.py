"""An image without alt text fails the build, which says where it is and what to do."""

from html.parser import HTMLParser

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)
SHOW = "end the cell with style.show(figure, alt='what it shows')"


class _Images(HTMLParser):
    """Collect the images of raw HTML that have no alt text."""

    def __init__(self) -> None:
        super().__init__()
        self.bare: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "img" and not (given.get("alt") or "").strip():
            self.bare.append((given.get("src") or "")[:60])

    handle_startendtag = handle_starttag


def bare_images(html: str) -> list[str]:
    """Return the sources of images in `html` that have no alt text.

    >>> bare_images('<img src="a.png" alt="a cat"><img src="b.png">')
    ['b.png']
    """
    parser = _Images()
    parser.feed(html)
    return parser.bare


def cell(node: nodes.Element) -> nodes.Element | None:
    """Return the code cell that a node belongs to, None outside of code cells."""
    while node is not None and node.get("nb_element") != "cell_code":
        node = node.parent
    return node


def check(app: Sphinx, document: nodes.document, page: str) -> None:
    """Warn of each image without alt text; `make book` takes a warning for an error."""
    for image in document.findall(nodes.image):
        code = cell(image)
        if code is not None:
            kind = "a figure that is a bare image, which can have no alt text"
            warn(page, code, f"{kind}: {SHOW}", image)
        elif not image.get("alt", "").strip():
            what = f"image {image['uri'][:60]} has no alt text"
            warn(page, None, f"{what}: write ![what it shows](file)", image)
    for raw in document.findall(nodes.raw):
        if "html" in raw.get("format", ""):
            for source in bare_images(raw.astext()):
                code = cell(raw)
                cure = SHOW if code is not None else 'write <img alt="what it shows" ...>'
                warn(page, code, f"<img> without alt text ({source}...): {cure}", raw)


def warn(page: str, code: nodes.Element | None, what: str, node: nodes.Element) -> None:
    """Warn, and name the cell by its number and its first line."""
    where = ""
    if code is not None:
        source = next(code.findall(nodes.literal_block), None)
        line = source.astext().strip().split("\n")[0] if source is not None else "(hidden)"
        where = f"cell {code['cell_index'] + 1} ({line[:60]}): "
    LOGGER.warning("page %s: %s%s", page, where, what, location=node, type="book", subtype="alt")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-resolved", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
