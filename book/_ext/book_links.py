"""Links in notebooks are ordinary relative links; here they learn where they lead on the web.

A link to a file of the repository that is no page (`../minids/mla.py`, `../minids/learn`) leads to
the repository. `glossary.md#term-latent` and `references.md#V3` lead to the term and the entry.
"""

import os.path
import posixpath
import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).parents[2]


def in_repository(target: str, docname: str) -> str | None:
    """Return the path in the repository that a link on the page `docname` means, if it is there.

    >>> in_repository("../minids/mla.py", "04_mla")
    'minids/mla.py'
    """
    path = posixpath.normpath(posixpath.join("book", posixpath.dirname(docname), target))
    return path if not path.startswith("..") and (ROOT / path).exists() else None


def on_the_web(path: str, repository: str, branch: str) -> str:
    """Return the address of a file or folder of the repository."""
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{repository.rstrip('/')}/{kind}/{branch}/{path}"


class LinksToRepository(SphinxTransform):
    """Turn links to what is no page into links to the repository, before Sphinx copies files."""

    default_priority = 100

    def apply(self, **_: object) -> None:
        for node in list(self.document.findall(addnodes.pending_xref)):
            if node.get("reftype") == "myst" and not self.is_page(node):
                self.lead(node, node["reftarget"])
        for node in list(self.document.findall(addnodes.download_reference)):
            self.lead(node, node["reftarget"])

    def is_page(self, node: nodes.Element) -> bool:
        return node.get("refdomain") == "doc" and node["reftarget"] in self.env.found_docs

    def lead(self, node: nodes.Element, target: str) -> None:
        """Replace a link by one to the repository, if what it names is there."""
        if node.get("refdomain") == "doc":  # ../README.md: an absolute path without its suffix
            target = os.path.relpath(target, self.env.srcdir)
            target = posixpath.relpath(target, posixpath.dirname(self.env.docname) or ".")
            names = [f"{target}.md", f"{target}.ipynb"]
        else:
            names = [target.partition("#")[0]]
        found = [path for name in names if (path := in_repository(name, self.env.docname))]
        if not target or target.startswith("#") or not found:
            return
        address = on_the_web(found[0], self.config.repository_url, self.config.repository_branch)
        fragment = node.get("reftargetid") or target.partition("#")[2]
        link = nodes.reference("", "", refuri=address + (f"#{fragment}" if fragment else ""))
        link += [child.deepcopy() for child in node.children]
        node.replace_self(link)


def name_anchors(app: Sphinx, document: nodes.document) -> None:
    """Let links name a term of the glossary and an entry of the bibliography."""
    slugs = dict(app.env.metadata[app.env.docname].get("myst_slugs", {}))
    for term in document.findall(nodes.term):
        slugs |= {name: (None, name, term.astext()) for name in term["ids"]}
    if any(True for _ in document.findall(lambda node: node.tagname == "bibliography")):
        for file in app.config.bibtex_bibfiles:
            text = (Path(app.srcdir) / file).read_text(encoding="utf-8")
            slugs |= {key: (None, key, key) for key in re.findall(r"^@\w+\{([^,\s]+),", text, re.M)}
    app.env.metadata[app.env.docname]["myst_slugs"] = slugs


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("repository_url", "", "env", str)
    app.add_config_value("repository_branch", "main", "env", str)
    app.add_transform(LinksToRepository)
    app.connect("doctree-read", name_anchors)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
