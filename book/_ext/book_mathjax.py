"""MathJax from a Python wheel, served by the site itself, and no more of it than pages ask for.

The wheel is an extension too, but it copies 24 MB into every site.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

# the script, its fonts, what it loads on demand: rarer TeX commands, its menu, formulas in words
PARTS = [
    "tex-chtml.js", "output/chtml/fonts", "input/tex/extensions", "ui", "a11y",
    "sre/mathmaps/base.json", "sre/mathmaps/en.json",
]  # fmt: skip


def source() -> Path:
    """Return the folder of MathJax in the installed wheel."""
    spec = find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise ExtensionError("the site carries its own MathJax: pip install sphinx-mathjax-offline")
    return Path(spec.origin).parent / "static" / "mathjax"


def copy(app: Sphinx, error: Exception | None) -> None:
    """Put MathJax beside the other static files of a site that was built."""
    if error or app.builder.format != "html":
        return
    for part in PARTS:
        origin, place = source() / part, Path(app.outdir) / "_static" / "mathjax" / part
        place.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_dir():
            shutil.copytree(origin, place, dirs_exist_ok=True)
        else:
            shutil.copy2(origin, place)


def setup(app: Sphinx) -> dict[str, bool]:
    source()
    app.config.mathjax_path = "mathjax/tex-chtml.js"
    app.connect("build-finished", copy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
