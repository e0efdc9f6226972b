"""The box under a chapter's title is a table without header words; here it becomes a box.

Its empty header row goes, its first column names the rows, and the class `chapter-box` is styled in
_static/custom.css. Every table scrolls inside itself on a narrow screen.
"""

from docutils import nodes
from sphinx.application import Sphinx


def headless(table: nodes.table) -> nodes.thead | None:
    """Return the header of a table if there is not a word in it."""
    head = next(table.findall(nodes.thead), None)
    return head if head is not None and not head.astext().strip() else None


def shape(app: Sphinx, document: nodes.document) -> None:
    """Make boxes of tables without header words, and the first one under the title the header."""
    first = next(document.findall(nodes.section), None)
    for table in list(document.findall(nodes.table)):
        if (head := headless(table)) is None:
            continue
        head.parent.remove(head)
        next(table.findall(nodes.colspec))["stub"] = 1
        table["classes"].append("plain-box")
        if table.parent is first:
            table["classes"].append("chapter-box")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", shape)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
