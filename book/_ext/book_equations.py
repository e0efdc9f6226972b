r"""Equations carry their numbers themselves, as in a notebook: `$$ y = W x \tag{4.1} $$`.

MathJax shows the tag in JupyterLab as on the page. On the page, "(4.1)" in any chapter's text is a
link to the equation. A number that two equations claim is a warning, and so fails the build.
"""

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

TAG = re.compile(r"\\tag\{([^}]+)\}")
MENTION = re.compile(r"\((\d+\.\d+[a-z]?)\)")
LOGGER = logging.getLogger(__name__)


def collect(app: Sphinx, document: nodes.document) -> None:
    """Give each display formula to MathJax as it is, and note which numbers are where."""
    for block in document.findall(nodes.math_block):
        text = block.astext()
        if "amsmath" not in block["classes"]:
            # Sphinx would wrap lines in an environment, where a tag is an error
            block.children = [nodes.Text(rf"\[{text}\]")]
            block["nowrap"] = True
        for tag in TAG.findall(text):
            block["ids"].append(anchor(tag))
            note(app.env, tag, block)


def anchor(tag: str) -> str:
    """Return the id of an equation: 4.1 is at #eq-4-1."""
    return "eq-" + re.sub(r"\W+", "-", tag)


def note(env: BuildEnvironment, tag: str, block: nodes.Element) -> None:
    """Remember where an equation is; warn where another one has its number."""
    if page := equations(env).get(tag):
        message = "equation number %s is taken on page %s: give each its own"
        LOGGER.warning(message, tag, page, location=block, type="book", subtype="equation")
    equations(env)[tag] = env.docname


def equations(env: BuildEnvironment) -> dict[str, str]:
    """Return the page of each equation number."""
    if not hasattr(env, "book_equations"):
        env.book_equations = {}
    return env.book_equations


def forget(app: Sphinx, env: BuildEnvironment, page: str) -> None:
    """Forget the equations of a page that is read again."""
    env.book_equations = {tag: on for tag, on in equations(env).items() if on != page}


def link(app: Sphinx, document: nodes.document, page: str) -> None:
    """Turn "(4.1)" into a link where there is such an equation."""
    known = equations(app.env)
    for text in list(document.findall(nodes.Text)):
        inside = (nodes.reference, nodes.literal, nodes.literal_block, nodes.math, nodes.title)
        parent = text.parent
        if isinstance(parent, (*inside, nodes.math_block, nodes.raw)):
            continue
        parts, end = [], 0
        for found in MENTION.finditer(text):
            if (tag := found[1]) in known:
                words = nodes.inline("", found[0], classes=["equation"])
                target = make_refnode(app.builder, page, known[tag], anchor(tag), words)
                parts += [nodes.Text(text[end : found.start()]), target]
                end = found.end()
        if parts:
            parent.replace(text, [*parts, nodes.Text(text[end:])])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", collect)
    app.connect("doctree-resolved", link)
    app.connect("env-purge-doc", forget)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
