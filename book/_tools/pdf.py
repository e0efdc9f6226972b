"""A chapter on paper: `make pdf CH=04` lets Chromium print its page.

    python book/_tools/pdf.py CHAPTER [--site FOLDER] [--out FOLDER]

A4, with the title on top and page numbers below. Figures that can be dragged are printed as they
first look. The site is what `make book` built; nothing is fetched.
"""

import argparse
import html
import sys
from pathlib import Path

from chapters import BOOK, chapter
from chromium_program import MISSING, find_chromium, is_root

STYLE = """
  .copybtn, #jb-print-toc { display: none !important; }
  html, body { font-size: 10.5pt; background: #fff !important; }
  .bd-main, .bd-content, .bd-article-container, .bd-article, .bd-container, .bd-container__inner
    { display: block !important; margin: 0 !important; padding: 0 !important;
      max-width: none !important; width: auto !important; }
  h1 { font-size: 20pt !important; text-align: left !important; margin: 0 0 6mm !important; }
  h2 { font-size: 15pt !important; }
  h3 { font-size: 12.5pt !important; }
  h1, h2, h3, h4 { break-after: avoid; }
  img, svg, tr, mjx-container, .mn-fig, .mn-readout, div.math { break-inside: avoid; }
  img { max-height: 22cm; }
  pre { break-inside: avoid-page; white-space: pre-wrap !important; overflow-wrap: anywhere; }
  .cell_output pre { max-height: none !important; }
  p, li { orphans: 3; widows: 3; }
  .mn-fig button { display: none; }
"""
FOOTER = (
    '<div style="font: 8px sans-serif; width: 100%; text-align: center; color: #555">'
    '<span class="pageNumber"></span> / <span class="totalPages"></span></div>'
)
HEADER = (
    '<div style="font: 8px sans-serif; width: 100%; margin: 0 16mm; display: flex; color: #555;'
    ' justify-content: space-between"><span>{title}</span><span>minids</span></div>'
)


def to_pdf(page: Path, out: Path) -> Path:
    """Print a page of the built site to the file `out`; links go to the web, not to this disk."""
    from playwright.sync_api import sync_playwright

    flags = ["--disable-gpu", *(["--no-sandbox"] if is_root() else [])]
    out.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=flags)
        tab = browser.new_context(offline=True, color_scheme="light").new_page()
        tab.goto(page.resolve().as_uri())
        tab.evaluate("() => window.MathJax?.startup?.promise?.then(() => null)")
        tab.add_style_tag(content=STYLE)
        tab.evaluate("() => { document.documentElement.dataset.theme = 'light'; }")
        tab.evaluate(UNLINK)
        title = tab.locator("h1").first.inner_text().rstrip("#").strip()
        tab.evaluate("title => { document.title = title; }", title)
        tab.pdf(
            path=str(out), format="A4", print_background=True, display_header_footer=True,
            header_template=HEADER.format(title=html.escape(title)), footer_template=FOOTER,
            margin={"top": "20mm", "bottom": "18mm", "left": "16mm", "right": "16mm"},
            outline=True, tagged=True,
        )  # fmt: skip
        browser.close()
    return out


UNLINK = """() => {
  for (const link of document.querySelectorAll("a[href]")) {
    const address = new URL(link.href);
    if (address.protocol === "file:" && address.pathname !== location.pathname) {
      link.removeAttribute("href");
    }
  }
  for (const details of document.querySelectorAll("details")) details.open = true;
}"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 where something is missing, and say what."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("chapter", nargs="?", default="")
    parser.add_argument("--site", type=Path, default=BOOK / "_build" / "html")
    parser.add_argument("--out", type=Path, default=BOOK / "_build" / "pdf")
    options = parser.parse_args(arguments)
    try:
        stem = chapter(options.chapter).stem
        if find_chromium() is None:
            raise FileNotFoundError(MISSING)
        if not (page := options.site / f"{stem}.html").exists():
            raise FileNotFoundError(f"{page} is missing: `make book` builds it")
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    out = to_pdf(page, options.out / f"{stem}.pdf")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
