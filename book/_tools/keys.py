"""Exercise keys for instructors: `make keys` writes a page a chapter, which the site never links.

    python book/_tools/keys.py [--out FOLDER]

For each exercise: the statement, what is checked, the worked solution, the hints, and each known
wrong answer with what the check tells the student, as the check says it today. HTML to read and
print, Markdown to cut from.
"""

import argparse
import contextlib
import html
import io
import shutil
import sys
from pathlib import Path

from chapters import BOOK, chapters, stem_of
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

from minids.learn import check as checks
from minids.learn.check import Exercise, check

MATHJAX = "tex-svg.js"  # one file with its glyphs, from the wheel
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 56rem; padding: 0 1rem; }
pre { border: 1px solid #7a7a7a66; border-radius: 6px; overflow-x: auto; padding: .6rem .8rem; }
code, pre { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre code { background: none !important; }
h2 { border-bottom: 2px solid #0077bb; margin-top: 2.5rem; }
h4 { margin-bottom: .3rem; }
@media print { h2 { break-before: page; } pre { break-inside: avoid; white-space: pre-wrap; } }
"""


def verdict(which: str, exercise: Exercise, source: str) -> str:
    """Run an answer's source as a student would, and return what the check says."""
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(source, f"<{which}>", "exec"), names)
        return check(which, names[exercise.name]).text


def key(which: str, exercise: Exercise) -> str:
    """Return the key of one exercise in Markdown; ValueError where this copy has no solutions."""
    if not exercise.solution:
        raise ValueError(f"{which}: this copy leaves solutions out; keys need the full repository")
    parts = [f"## {which}: {exercise.title}", exercise.statement, "### Checked"]
    parts.append("\n".join(f"{n}. {p.name}" for n, p in enumerate(exercise.properties, start=1)))
    parts += ["### Solution", fenced(exercise.solution, "python")]
    parts += ["### Hints", "\n".join(f"{n}. {h}" for n, h in enumerate(exercise.hints, start=1))]
    parts.append("### Wrong answers, and what students are told")
    for mistake, source in exercise.wrong.items():
        told = verdict(which, exercise, source)
        parts += [f"#### {mistake}", fenced(source, "python"), fenced(told, "text")]
    return "\n\n".join(parts)


def fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def page(notebook: Path) -> str:
    """Return the keys of a chapter in Markdown."""
    stem = stem_of(notebook)
    number = notebook.stem.partition("_")[0]
    intro = "For instructors: not on the book's site, and not in the students' copy."
    exercises = enumerate(checks.chapter(stem), start=1)
    keys = [key(f"{stem}.{n}", exercise) for n, exercise in exercises]
    return "\n\n".join([f"# Keys {number}: {stem}", intro, *keys]) + "\n"


def coloured(code: str, language: str, _attributes: str) -> str:
    return highlight(code, get_lexer_by_name(language or "text"), HtmlFormatter(nowrap=True))


def delimited(formula: str, options: dict[str, bool]) -> str:
    """Return a formula as MathJax finds it in a page."""
    display = options["display_mode"]
    return html.escape(rf"\[{formula}\]" if display else rf"\({formula}\)")


def to_html(markdown: str) -> str:
    """Return a page that needs no more than MathJax beside it."""
    tool = MarkdownIt("commonmark", {"highlight": coloured}).enable("table")
    tool.use(dollarmath_plugin, renderer=delimited)
    title = markdown.partition("\n")[0].removeprefix("# ")
    code = HtmlFormatter(style="default").get_style_defs("code")
    dark = HtmlFormatter(style="github-dark").get_style_defs("code")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}{code}@media (prefers-color-scheme: dark) {{ {dark} }}</style>"
        f'<script async src="{MATHJAX}"></script></head>\n'
        f"<body>\n{tool.render(markdown)}</body></html>\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 where this copy has no solutions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=BOOK / "_build" / "keys")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(BOOK / "_ext"))
    from book_mathjax import source

    options.out.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source() / MATHJAX, options.out)
    for notebook in chapters().values():
        if stem_of(notebook) not in checks.chapters():
            continue
        try:
            markdown = page(notebook)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        for suffix, text in ((".md", markdown), (".html", to_html(markdown))):
            (options.out / f"{notebook.stem}{suffix}").write_text(text, encoding="utf-8")
        print(options.out / f"{notebook.stem}.html")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
