"""The instructor's side: demos, slides, PDF, keys, the students' copy; each tool as it is used."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import chapters as books
import demo
import keys
import normalise
import pdf
import pytest
import slides
import student
from browser import drag, free_port, shot, wait_for

from minids import check
from minids.learn.check import chapter, chapters

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
DEMOS = sorted((BOOK / "demos").glob("*.ipynb"))
ANSWERS = [
    (f"{stem}.{number}", this)
    for stem in chapters()
    for number, this in enumerate(chapter(stem), start=1)
]
HAS_KEYS = any(this.solution for _, this in ANSWERS)
needs_keys = pytest.mark.skipif(not HAS_KEYS, reason="NOT RUN: a students' copy has no solutions")
A4 = (595, 842)  # points
TELLING = 16  # characters: shorter lines, such as `return x`, are in any code


# A chapter, by number or name


@pytest.mark.parametrize("which", ["08", "8", "balance", "08_balance"])
def test_a_chapter_has_four_names(which):
    assert books.chapter(which).name == "08_balance.ipynb"


@pytest.mark.parametrize("main", [slides.main, pdf.main, demo.main], ids=lambda f: f.__module__)
@pytest.mark.parametrize("which", ["99", "chunt", ""])
def test_an_unknown_chapter_is_told_which_there_are(main, which, capsys):
    if main is demo.main and not which:
        return  # all of them
    assert main([which]) == 1
    said = capsys.readouterr().err
    assert "04 mla" in said
    assert which in said


# Slides


def text(source: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def code(source: str, *outputs: dict, tags: tuple[str, ...] = ()) -> dict:
    metadata = {"tags": list(tags)}
    return {
        "cell_type": "code", "metadata": metadata, "source": source, "outputs": list(outputs),
    }  # fmt: skip


def printed(words: str) -> dict:
    return {"output_type": "stream", "name": "stdout", "text": words}


def figure(html: str) -> dict:
    return {"output_type": "execute_result", "data": {"text/html": html, "text/plain": "F"}}


def deck(*cells: dict) -> list[slides.Section]:
    return slides.sections({"cells": [text("# 04 A\n\nWhy?"), *cells]})


def shown(*cells: dict) -> str:
    return slides.markdown(deck(*cells))


def test_a_section_is_a_stack_of_slides_that_fit():
    long = "\n\n".join(["words " * 60] * 12)
    _, section = deck(text(f"## 1. Long\n\n{long}"))
    stack = list(section.slides())
    assert len(stack) > 3
    assert all(sum(block.height for block in slide) <= slides.HEIGHT for slide in stack)
    assert sum(map(len, stack)) == 12


def test_what_is_printed_stays_with_its_code():
    """Text and code fill a slide; what the code prints would be alone on the next one."""
    source = code("x = 1\n" * 3, printed("out\n" * 5))
    _, section = deck(text("## 1. A\n\n" + "words " * 140), source)
    first, second = section.slides()
    assert len(first) == 1
    assert sum(block.height for block in [*first, second[0]]) <= slides.HEIGHT
    assert "output" in second[1].text


def test_installation_and_answers_to_type_are_left_out_and_statements_stay():
    page = shown(
        code("%pip install it", tags=("remove-cell",)),
        text("## Exercises\n\n### Exercise mla.1: Count\n\nWrite `f`."),
        code('def f():\n    raise NotImplementedError\n\n\ncheck("mla.1", f)', printed("not yet")),
    )
    assert "pip" not in page
    assert "NotImplemented" not in page
    assert "not yet" not in page
    assert "### Exercise mla.1: Count\n\nWrite `f`." in page


def test_links_to_files_become_words_and_links_to_the_web_stay():
    page = shown(text("See [latent](glossary.md#l), [code](../minids/mla.py), [V3](https://a.b)."))
    assert "See latent, code, [V3](https://a.b)." in page


def test_a_line_that_only_shows_a_figure_is_not_shown():
    page = shown(code("style.show(draw())", figure("<img alt='a' src='data:,'>")))
    assert "style" not in page
    assert "<img" in page


def test_a_widget_that_needs_python_says_where_it_is_live():
    page = shown(code("x = 1\ny = 2\nlive()\n", figure('<p class="mn-asleep">R. <em>Run it.</em>')))
    assert "R. Live with <code>make demo</code>." in page
    assert "Run it" not in page


def test_html_that_holds_fences_stays_whole():
    fence = slides.raw("a ```` b", 1).text
    assert fence.startswith("`````{raw} html\n")


def test_plan_and_cards_are_notes_of_the_section_that_they_name():
    lecture = (
        "# T\n\nA.\n\n## Plan for 50 minutes\n\n| 9 | x |\n\n## Card: B\n\nA. In section 2"
        "\n\n## Card: C\n\n**Change.** Nothing.\n\n## What goes wrong in class\n\nD"
    )
    found = deck(text("## 1. A"), text("## 20. C"), text("## 2. B"))
    slides.annotate(found, lecture)
    assert ["Card" in "".join(section.notes) for section in found] == [True, False, False, True]
    assert "| 9 | x |" in found[0].notes[0]
    assert not [note for section in found for note in section.notes if "D" in note.split()]


def test_a_deck_that_sphinx_complains_of_is_an_error(tmp_path):
    path = tmp_path / "04_a.ipynb"
    path.write_text(json.dumps({"cells": [text("# A\n\n```{nothing}\n```")]}))
    with pytest.raises(RuntimeError, match="cannot be built"):
        slides.build(path, tmp_path / "out")


@pytest.fixture(scope="module", params=books.chapters())
def deck_page(request, tmp_path_factory):
    notebook = books.chapters()[request.param]
    return slides.build(notebook, tmp_path_factory.mktemp("slides") / notebook.stem)


WALK = """async () => {
  const seen = [];
  for (let last = null; last !== Reveal.getCurrentSlide(); Reveal.next()) {
    last = Reveal.getCurrentSlide();
    await new Promise((done) => setTimeout(done, 20));
    seen.push({
      title: last.querySelector("h1, h2, h3, h4")?.textContent ?? "",
      text: last.innerText,
      over: last.scrollHeight - 720,
      wide: [...last.children].some((e) => e.offsetWidth > 1284),
      size: parseFloat(last.style.fontSize || 1),
    });
  }
  return seen;
}"""


@pytest.mark.slow
def test_slides_open_from_a_folder_offline_with_formulas_and_live_figures(deck_page, visitor):
    page = visitor.open(deck_page.as_uri(), viewport={"width": 1280, "height": 720})
    page.wait_for_function("() => window.Reveal?.isReady()")
    page.evaluate("() => MathJax.startup.promise.then(() => null)")
    stem = deck_page.stem
    source = json.loads((BOOK / f"{stem}.ipynb").read_text(encoding="utf-8"))
    prose = [
        normalise.as_text(c["source"]) for c in source["cells"] if c["cell_type"] == "markdown"
    ]
    shot(page, f"slides_{stem}_first")
    seen = page.evaluate(WALK)
    shot(page, f"slides_{stem}_last")
    titles = {slide["title"] for slide in seen}
    assert set(re.findall(r"^## (.+)$", "\n".join(prose), re.MULTILINE)) <= titles
    for slide in seen:
        assert slide["title"], slide
        assert not slide["wide"], slide
        assert slide["over"] <= 0 or slide["size"] < 0.62, f"cut off: {slide}"
        assert not re.search(r"\\\(|\$\$|\{raw\}", slide["text"]), slide
    assert page.locator("mjx-merror").count() == 0
    assert page.locator(".mn-fig section").count() == 0  # reveal.js would take it for a slide
    if any("$" in text for text in prose):
        assert page.locator("mjx-container").count() > 0
    assert page.locator("aside.notes").count() > 0
    if page.locator(".mn-fig[data-live]").count():
        a_figure_on_a_slide_is_dragged(page, stem)


def a_figure_on_a_slide_is_dragged(page, stem):
    figure = page.locator(".mn-fig[data-live]").first
    figure.evaluate("e => { const at = Reveal.getIndices(e.closest('section'));"
                    " Reveal.slide(at.h, at.v); }")  # fmt: skip
    for closed in figure.locator("details:not([open]) summary").all():
        closed.click()
    slider = figure.locator("input[type=range]:visible").first
    before = figure.inner_text()
    drag(slider, 0.8)
    assert figure.inner_text() != before
    place, value = page.evaluate("() => Reveal.getIndices()"), slider.input_value()
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert slider.input_value() != value
    assert page.evaluate("() => Reveal.getIndices()") == place
    for choice in figure.locator("select:visible").all()[:1]:  # keys that reveal.js would take
        choice.focus()
        page.keyboard.press("ArrowDown")
        assert page.evaluate("() => Reveal.getIndices()") == place
    shot(page, f"slides_{stem}_figure")


# Paper


@pytest.mark.slow
def test_pdf_is_a4_with_its_title(site, chromium_path, tmp_path, monkeypatch):
    monkeypatch.setenv("CHROMIUM", chromium_path)
    command = [sys.executable, "book/_tools/pdf.py", "08", "--site", str(site.folder)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    data = (tmp_path / "08_balance.pdf").read_bytes()
    assert data.startswith(b"%PDF")
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", data)
    assert 8 < len(boxes) < 40
    assert all((round(float(w) - 0.5), round(float(h) - 0.5)) == A4 for w, h in boxes)
    assert b"/Title (08 Balance: busy experts" in data


def test_a_page_to_be_printed_has_no_bars_and_no_figure_is_cut(site_page):
    page = site_page("08_balance.html", viewport={"width": 680, "height": 960})
    page.emulate_media(media="print")
    page.add_style_tag(content=pdf.STYLE)
    bars = [".bd-sidebar-primary", ".bd-sidebar-secondary", ".bd-header", ".bd-header-article"]
    for bar in [*bars, ".bd-footer", ".prev-next-footer", ".copybtn", "#jb-print-toc"]:
        assert not [place for place in page.locator(bar).all() if place.is_visible()], bar
    assert page.locator("mjx-container").first.is_visible()
    assert page.locator(".mn-fig[data-live] svg").first.is_visible()
    tall = "es => es.map(e => [getComputedStyle(e).breakInside, e.getBoundingClientRect().height])"
    for kind, height in page.locator("article img, article .mn-fig").evaluate_all(tall):
        assert kind == "avoid"
        assert height < 960  # a page
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 680


def test_links_of_a_printed_page_lead_to_the_web_or_nowhere(site, visitor):
    page = visitor.open((site.folder / "08_balance.html").as_uri())
    page.evaluate(pdf.UNLINK)
    links = page.locator("article a[href]").evaluate_all("es => es.map(e => e.href)")
    assert any(link.startswith("https://") for link in links)
    assert all(link.startswith(("https://", page.url.partition("#")[0])) for link in links)


def test_pdf_without_a_browser_or_a_site_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CHROMIUM", "no-such-browser")
    assert pdf.main(["04", "--site", str(tmp_path)]) == 1
    assert "set CHROMIUM" in capsys.readouterr().err
    monkeypatch.setenv("CHROMIUM", sys.executable)
    assert pdf.main(["04", "--site", str(tmp_path)]) == 1
    assert "make book" in capsys.readouterr().err


# Keys


@needs_keys
@pytest.mark.slow
def test_keys_have_every_solution_and_what_each_wrong_answer_is_told(tmp_path, capsys):
    assert keys.main(["--out", str(tmp_path)]) == 0
    pages = {path.stem: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.md")}
    assert sorted(pages) == sorted(books.chapters())
    for which, this in ANSWERS:
        page = next(text for name, text in pages.items() if name.endswith(which.partition(".")[0]))
        key = page.partition(f"## {which}: ")[2].partition(f"\n## {which[:-1]}")[0]
        wanted = [this.title, this.statement, this.solution.rstrip(), *this.hints]
        wanted += [source.rstrip() for source in this.wrong.values()]
        assert not [text for text in [*wanted, *this.wrong] if text not in key]
        assert key.count(f"✗ {which}: not yet.") == len(this.wrong)
    for path in tmp_path.glob("*.html"):
        assert (tmp_path / keys.MATHJAX).exists()
        assert "<h3>Solution</h3>" in path.read_text(encoding="utf-8")


def test_formulas_of_keys_are_as_mathjax_reads_them():
    page = keys.to_html("# A\n\n$a < b$\n\n$$c$$\n")
    assert r"\(a &lt; b\)" in page
    assert r"\[c\]" in page
    assert "<title>A</title>" in page


@needs_keys
def test_the_site_shows_no_key(site):
    pages = {path: path.read_text(encoding="utf-8") for path in site.folder.rglob("*.html")}
    assert (site.folder / "teach/index.html") in pages
    for path, text in pages.items():
        assert not re.search(r'href="[^"]*keys/', text), path
        assert not [which for which, this in ANSWERS if this.solution.strip() in text], path


# The students' copy


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """Make the students' copy as `make student` does, and unpack it."""
    if not (ROOT / ".git").exists():
        pytest.skip("NOT RUN: the students' copy is made from a git repository")
    out = tmp_path_factory.mktemp("dist")
    archive = student.build(ROOT, out)
    with tarfile.open(archive) as file:
        file.extractall(out / "unpacked", filter="data")
    return out / "unpacked" / student.NAME


def run(folder: Path, *command: str, **options) -> subprocess.CompletedProcess[str]:
    """Run Python in the copy, on the copy's own minids."""
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True,
        timeout=300, **options,
    )  # fmt: skip


def telling(source: str, start: str) -> list[str]:
    """Return the lines of an answer that give it away: not the student's own start, no import."""
    lines = [line.strip() for line in source.splitlines()]
    return [
        line
        for line in lines
        if len(line) >= TELLING and line not in start and not line.startswith(("import", "from"))
    ]


@needs_keys
def test_students_copy_has_no_line_of_a_solution_and_no_wrong_answer(copy):
    texts = [
        path.read_text(encoding="utf-8").replace('\\"', '"')
        for path in copy.rglob("*")
        if path.is_file() and path.suffix != ".png"
    ]
    assert len(texts) > 100
    found = [
        (which, line)
        for which, this in ANSWERS
        for line in telling(this.solution, this.start)
        if any(line in text for text in texts)
    ]
    assert found == []
    wrong = [(which, source) for which, this in ANSWERS for source in this.wrong.values()]
    # a wrong answer of one line can be a line of the chapter; of several, it is one left in
    left = [
        which
        for which, source in wrong
        if len(telling(source, "")) > 2 and any(source.strip() in text for text in texts)
    ]
    assert left == []
    assert not (copy / "book/teach").exists()
    assert not (copy / "book/demos").exists()


@needs_keys
def test_students_copy_checks_hints_and_refuses_solutions(copy):
    which, this = ANSWERS[0]
    program = (
        "import minids; from minids import check, hint; from minids.learn import solution\n"
        f"exec({this.solution!r})\n"
        f"print(minids.__file__); print(check({which!r}, {this.name}))\n"
        f"print(hint({which!r})); print(solution({which!r}))"
    )
    done = run(copy, "-c", program)
    assert done.returncode == 0, done.stderr
    assert str(copy) in done.stdout
    assert f"✓ {which}: right" in done.stdout
    assert "hint 1 of 3" in done.stdout
    assert "this copy leaves solutions out; your instructor has them" in done.stdout


@needs_keys
@pytest.mark.slow
def test_students_copy_passes_its_tests_and_refuses_keys(copy):
    tests = ["tests/test_exercises.py", "tests/test_book.py::test_every_chapter_has_a_lecture_page"]
    done = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "a students' copy has no solutions" in done.stdout
    made = run(copy, "book/_tools/keys.py", "--out", "keys")
    assert made.returncode == 1
    assert "leaves solutions out" in made.stderr


@needs_keys
@pytest.mark.slow
def test_students_copy_builds_its_site(copy):
    done = run(copy, "-m", "sphinx", "-q", "-W", "--keep-going", "book", "book/_build/html")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (copy / "book/_build/html/04_mla.html").exists()
    assert not (copy / "book/_build/html/teach").exists()


BRACKETS = '''E = (
    Exercise(
        hints=("ü",),
        solution=(
            "def f():\\n"
            "    return 42  # secret\\n"
        ),
        wrong={"a": "secret", "b": """
secret
"""},
    ),
    check.Exercise(solution="secret" + "secret", wrong=dict(a="secret"), name="ü"),
)
'''


def test_solutions_are_cut_wherever_they_stand():
    cut = student.blanked(BRACKETS)
    assert "secret" not in cut
    assert cut.count('solution=""') == cut.count("wrong={}") == 2
    compile(cut, "cut", "exec")
    assert student.blanked(cut) == cut


@pytest.mark.parametrize("source", ["Exercise(solution='a')", "Exercise('a', wrong={})"])
def test_a_solution_that_would_be_left_in_is_an_error(source):
    with pytest.raises(ValueError, match="left in"):
        student.blanked(source)


def test_outside_of_git_it_is_said(tmp_path):
    with pytest.raises(ValueError, match="git repository"):
        student.build(tmp_path, tmp_path / "dist")


# Demos


def test_there_is_a_demo_of_each_chapter_with_a_widget_on_one_question():
    if not DEMOS:
        pytest.skip("NOT RUN: a students' copy has no demos")
    assert {"balance", "count", "fp8", "kernels", "mla"} <= {path.stem for path in DEMOS}
    for path in DEMOS:
        text = path.read_text(encoding="utf-8")
        assert text == normalise.to_text(normalise.normalise(json.loads(text))), path
        first, *rest = json.loads(text)["cells"]
        assert re.search(r"\*\*[^*]+\?\*\*", normalise.as_text(first["source"])), "the question"
        assert any("widget(" in normalise.as_text(cell["source"]) for cell in rest)
        assert not [cell for cell in rest if cell.get("outputs")], "run where it is opened"


def test_demo_of_a_chapter_without_one_says_which_there_are():
    if DEMOS:
        with pytest.raises(ValueError, match="count, fp8, kernels, mla"):
            demo.demo("00")


def test_who_can_open_a_demo_is_said():
    assert "on this machine alone" in demo.addresses("127.0.0.1", 1)
    assert "Everybody in this network" in demo.addresses("0.0.0.0", 1)
    assert "Ctrl-C" in demo.addresses("192.168.0.2", 1)


def test_a_demo_is_served_to_this_machine_alone_unless_told(monkeypatch):
    started = []
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(demo.subprocess, "run", lambda line, **_: started.append(line) or done)
    assert demo.main([]) == demo.main(["--host", "0.0.0.0"]) == 0
    assert ["--Voila.ip=127.0.0.1" in line for line in started] == [True, False]
    assert "--Voila.ip=0.0.0.0" in started[1]


@pytest.fixture(scope="module")
def demos(tmp_path_factory, chromium_path):
    if not DEMOS:
        pytest.skip("NOT RUN: a students' copy has no demos")
    port, log = free_port(), tmp_path_factory.mktemp("voila") / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            demo.command(demo.demo(""), "127.0.0.1", port),
            env=demo.environment(), stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            from urllib.request import urlopen

            url = f"http://127.0.0.1:{port}"
            wait_for(partial(urlopen, url, timeout=5), log)
            yield url
        finally:
            server.terminate()
            server.wait(30)


@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.stem)
def test_demo_opens_and_moves_with_no_request_outside(path, demos, visitor):
    page = visitor.open(demos)
    page.get_by_role("link", name=path.stem).click()
    page.set_default_timeout(90_000)  # a Python starts and imports torch
    figures = page.locator(".mn-fig[data-live]")
    figures.first.wait_for()
    assert page.locator(".jp-InputArea-editor:visible, .input_area:visible").count() == 0
    for figure in figures.all():
        before = figure.inner_text()
        drag(figure.locator("input[type=range]:visible").first, 0.9)
        assert figure.inner_text() != before
    if path.stem == "balance":
        live = page.locator(".widget-slider, .noUi-handle").first
        live.wait_for()
        live.scroll_into_view_if_needed()
    shot(page, f"demo_{path.stem}")


# The page for instructors


def test_page_for_instructors_names_every_lecture_and_every_command():
    path = BOOK / "teach/index.md"
    if not path.exists():
        pytest.skip("NOT RUN: a students' copy has no lecture pages")
    page, makefile = path.read_text("utf-8"), (ROOT / "Makefile").read_text("utf-8")
    for lecture in (BOOK / "teach").glob("*.md"):
        assert lecture == path or f"]({lecture.name})" in page
        assert lecture == path or f"\n{lecture.stem}\n" in page
    for target in ("demo", "slides", "pdf", "keys", "student", "book", "learn"):
        assert f"`make {target}" in page
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "CC BY 4.0" in page


@pytest.mark.skipif(not shutil.which("make"), reason="NOT RUN: no make here")
@pytest.mark.parametrize("target", ["slides", "pdf", "demo"])
def test_make_hands_on_the_chapter(target):
    done = subprocess.run(
        ["make", "-n", target, "CH=mla"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.search(rf"book/_tools/{target}\.py mla", done.stdout)


@needs_keys
def test_an_answer_of_the_key_is_right():
    """The verdicts in the keys are the check's own, not copied words."""
    which, this = ANSWERS[-1]
    assert keys.verdict(which, this, this.solution) == check(which, _value(this)).text


def _value(this):
    names: dict[str, object] = {}
    exec(this.solution, names)
    return names[this.name]
