"""Settings of the site that `make book` builds from these notebooks and pages.

Nothing is executed: pages show the outputs that the notebooks hold, which the tests have verified.
What Sphinx and its extensions lack is in _ext, one idea a file.
"""

import sys
import tomllib
from pathlib import Path

BOOK = Path(__file__).parent
sys.path.insert(0, str(BOOK / "_ext"))
_project = tomllib.loads((BOOK.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = _project["name"]
author = "The minids authors"
copyright = "the minids authors. Text: CC BY 4.0; code: Apache-2.0"
version = release = _project["version"]
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.githubpages",  # .nojekyll: GitHub would leave out _static
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
    "book_mathjax",
    "book_parts",
    "book_links",
    "book_equations",
    "book_tables",
    "book_alt",
    "book_bibliography",
]
exclude_patterns = ["_*", "demos", "teach/_*", "**.ipynb_checkpoints"]
if not (BOOK / "teach/index.md").exists():
    exclude_patterns.append("teach")

# the one address of the repository, for links from pages and for the launch buttons
repository_url = _project["urls"]["Repository"]
repository_branch = "main"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_dmath_double_inline = True  # $$...$$ within a line is set on its own, as in JupyterLab
myst_heading_anchors = 3

nb_execution_mode = "off"
nb_merge_streams = True
# an ipywidget needs a kernel: a page shows the text that stands for it, and loads no script for it
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
nb_ipywidgets_js = {}

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "minids"

html_theme = "sphinx_book_theme"
html_title = "minids: DeepSeek-V3 from nothing"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_js_files = ["file.js"]
html_copy_source = True  # the download button's notebook
html_show_sourcelink = False
html_theme_options = {
    "navbar_persistent": [],  # else the theme puts a second search bar on top of each page
    "repository_url": repository_url,
    "repository_branch": repository_branch,
    "path_to_docs": "book",
    "use_repository_button": True,
    "use_issues_button": True,
    "use_edit_page_button": True,
    "use_download_button": True,
    "launch_buttons": {
        "notebook_interface": "jupyterlab",
        "colab_url": "https://colab.research.google.com",
        "binderhub_url": "https://mybinder.org",
    },
    "show_toc_level": 2,
}
copybutton_exclude = ".linenos, .gp, .go"
