"""The site that `make book` builds: offline, linked, readable in light, in dark and on a phone.

The pages themselves are opened, and a small book with everything that a chapter may hold, once
whole and once with every mistake that must fail a build.
"""

import json
import re
import shutil
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import book_alt
import book_bibliography
import book_equations
import book_links
import book_parts
import browser
import chromium_program
import pytest

from minids import count, preset
from minids.count import REPORTED_HOURS, attention_parameters, expert_parameters
from minids.formats.bits import E4M3, E5M2
from minids.formats.groups import BLOCK, TILE
from minids.learn import explore

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "urls"
]["Repository"]
FIVE = {"min": 1, "max": 5, "label": "five"}  # what a test's figure is made from
AA = 4.5  # WCAG 2.2, 1.4.3: contrast of text


# Pages as text


class Html(HTMLParser):
    """What a page links to, which ids and images it has, and its text without scripts."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.ids, self.images, self.words = [], set(), [], []
        self.silent = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        self.links += [given[key] for key in ("href", "src") if given.get(key)]
        self.images += [given] if tag == "img" else []
        self.silent += tag in ("script", "style")

    def handle_endtag(self, tag):
        self.silent -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.silent:
            self.words.append(data)


def pages(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.html") if "_static" not in path.parts)


def broken_links(folder: Path) -> list[str]:
    """Return the links of a built site that lead to no file or to no place in it."""
    read = {path.resolve(): Html(path) for path in pages(folder)}
    broken = []
    for path, page in read.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            wanted = unquote(parts.fragment)
            known = read[target].ids if target in read else {wanted}
            if not target.is_file() or (wanted and wanted not in known):
                broken.append(f"{path.name}: {link}")
    return broken


def outside_of_links(folder: Path) -> list[str]:
    """Return what pages load from elsewhere: anything but the target of an <a>."""
    loads = r"<(?:script|img|link|iframe|source|video)\b[^>]*?\b(?:src|href)=\"(?:https?:)?//[^\"]*"
    return [
        f"{path.name}: {found}"
        for path in pages(folder)
        for found in re.findall(loads, path.read_text(encoding="utf-8"))
        if 'rel="canonical"' not in found
    ]


# A small book with everything in it


def markdown(*lines: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": "\n".join(lines)}


def code(source: str, data: dict | None = None, text: str = "", tags: tuple = ()) -> dict:
    outputs = [{"output_type": "stream", "name": "stdout", "text": text}] if text else []
    if data:
        outputs = [{"output_type": "display_data", "metadata": {}, "data": data}]
    return {
        "cell_type": "code",
        "execution_count": 1,
        "metadata": {"tags": list(tags)},
        "outputs": outputs,
        "source": source,
    }


def notebook(*cells: dict) -> str:
    numbered = [cell | {"id": f"cell-{n}"} for n, cell in enumerate(cells)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return json.dumps(
        {"cells": numbered, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    )


HEADER = [
    "# 04 MLA: a planted chapter", "", "What is the question?", "", "| | |", "|---|---|",
    "| Goals | see everything |", "| Know first | [the glossary](glossary.md) |",
    "| Time | 1 min to read, 1 s to run |", "| Report | section 2.1.1 |",
    "| Package | [`minids/mla.py`](../minids/mla.py), [learn](../minids/learn), "
    "[README](../README.md#the-book) |",
    "| Open in | [![Open in Colab](_static/colab.svg)](https://colab.research.google.com/x) |",
]  # fmt: skip
SLIDER = """
const box = ui.controls(root);
const five = ui.slider(box, {...data, name: "five", step: 1, value: 2});
const out = ui.readout(root, {name: "square", label: "its square"});
ui.on([five], () => { out.textContent = five.current ** 2; });
"""


def planted_figure() -> dict:
    """Return the output of an interactive figure with one slider."""
    figure = explore("count", {}, alt="a slider and its square")
    head, _, _ = figure.script.partition("function figure(")
    figure.script = f"{head}function figure(root, data, ui) {{{SLIDER}}}"
    figure.data = FIVE
    return {"text/html": figure._repr_html_(), "text/plain": repr(figure)}


def chapter() -> str:
    """Return a notebook with every kind of thing that a chapter may hold."""
    widget = {"model_id": "0", "version_major": 2, "version_minor": 0}
    svg = "data:image/svg+xml;base64,PHN2ZyB4bWxucz0iaHR0cDovL3d3dy53My5vcmcvMjAwMC9zdmciLz4="
    return notebook(
        markdown(*HEADER),
        code("install_on_colab()", tags=("remove-cell",)),
        markdown(
            "## Formulas", "",
            "The [latent](glossary.md#term-latent) of [the report](references.md#deepseek-v3):",
            "", r"$$ c_t = W^{DKV} h_t \tag{4.1} $$", "",
            r"$$\begin{aligned} k_t &= W^{UK} c_t \\ v_t &= W^{UV} c_t \end{aligned}\tag{4.2}$$",
            "", "By (4.1) and (4.2) $k$ has rank $C$; `(4.1)` is code, and (4.9) is no equation.",
            "", rf"$$ y = {' + '.join(f'x_{{{n}}}' for n in range(60))} \tag{{4.3}} $$",
        ),
        code("print(x)  " + "#" * 78, text="wide " * 60),
        code("show()", {"text/html": f'<img alt="a chart" src="{svg}">', "text/plain": "Picture"}),
        code("explore()", planted_figure()),
        code(
            "live()",
            {
                "application/vnd.jupyter.widget-view+json": widget,
                "text/html": '<p class="mn-asleep">a cockpit <em>Run it live.</em></p>',
                "text/plain": "Live('a cockpit')",
            },
        ),
        code('check("mla.1", f)', text="mla.1: not answered yet\n"),
        markdown("|" + " a number |" * 9, "|" + "--:|" * 9, "|" + " 70,272,000 |" * 9),
    )  # fmt: skip


def plant(folder: Path, chapters: dict[str, str]) -> Path:
    """Write a book of the real pages and planted chapters; return its folder."""
    source = folder / "book"
    shutil.copytree(BOOK / "_static", source / "_static")
    (folder / "figures").mkdir()
    shutil.copy(ROOT / "figures/count.svg", folder / "figures")
    for name in ("index.md", "glossary.md", "references.md", "references.bib"):
        shutil.copy(BOOK / name, source)
    for name, text in chapters.items():
        (source / name).write_text(text, encoding="utf-8")
    return source


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """Return the built site of a small book with one planted chapter."""
    folder = tmp_path_factory.mktemp("planted")
    source = plant(folder, {"04_mla.ipynb": chapter()})
    built = browser.build_site(source, folder / "html", "-W")
    assert built.returncode == 0, built.stderr
    return folder / "html"


# The whole book, as files


def test_site_is_built_without_a_warning(site):
    assert site.warnings == ""


def test_site_is_built_in_under_a_minute(site):
    assert site.cpu_s < 60


@pytest.mark.slow
def test_makefile_builds_it_the_same_way(site):
    """`make book` and the tests call Sphinx alike, and `make book` makes a warning an error."""
    rule = re.search(r"^book:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert rule
    assert "-m sphinx -q -W --keep-going" in rule[1]


def test_every_link_leads_somewhere(site):
    assert broken_links(site.folder) == []


def test_pages_name_nothing_outside_that_they_load(site):
    assert outside_of_links(site.folder) == []


def test_every_image_has_words(site):
    for path in pages(site.folder):
        assert [image for image in Html(path).images if not image.get("alt")] == [], path.name


def test_every_chapter_and_page_is_in_the_contents(site):
    linked = set(Html(site.folder / "index.html").links)
    written = {path.stem for path in BOOK.glob("*.ipynb")} | {"glossary", "references"}
    assert {f"{stem}.html" for stem in written} <= linked


def test_keys_and_settings_are_not_published(site):
    names = {path.name for path in site.folder.rglob("*") if path.is_file()}
    assert not names & {"conf.py", "conftest.py", "nbval.cfg"}
    assert not [name for name in names if "key" in name or name.startswith("demo")]


def test_launch_buttons_lead_to_the_repository(site):
    owner = urlsplit(REPOSITORY).path.strip("/")
    for path in BOOK.glob("*.ipynb"):
        links = Html(site.folder / f"{path.stem}.html").links
        colab = f"https://colab.research.google.com/github/{owner}/blob/main/book/{path.name}"
        binder = f"https://mybinder.org/v2/gh/{owner}/main?urlpath=lab/tree/book/{path.name}"
        assert {colab, binder, f"{REPOSITORY}/edit/main/book/{path.name}"} <= set(links)
        assert f"_sources/{path.name}" in links  # the download button


def test_mathjax_is_pruned_and_whole(site):
    folder = site.folder / "_static/mathjax"
    assert (folder / "tex-chtml.js").is_file()
    assert list((folder / "output/chtml/fonts").rglob("*.woff"))
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 5e6


# The whole book, in a browser


def no_raw_formula(page) -> list[str]:
    """Return what looks like a formula that was not set."""
    text = page.evaluate(
        """() => {
            const copy = document.querySelector('article, main').cloneNode(true);
            const code = 'pre, code, script, style, mjx-container';
            copy.querySelectorAll(code).forEach(e => e.remove());
            return copy.textContent;
        }"""
    )
    return re.findall(r"\\\(|\\\[|\$\$|\\(?:frac|mathrm|tag|sum|text)\b", text)


def wide(page) -> int:
    """Return how many pixels of the page lie beyond the screen."""
    return page.evaluate("() => document.documentElement.scrollWidth - innerWidth")


def test_every_page_on_a_desk_and_on_a_phone(site, site_page):
    page = site_page("index.html")
    for path in pages(site.folder):
        name = path.relative_to(site.folder).as_posix()
        page.set_viewport_size(browser.DESKTOP["viewport"])
        page.goto(f"{site.url}/{name}")
        browser.settle(page)
        assert no_raw_formula(page) == [], name
        assert page.locator("mjx-container").count() >= page.locator(".math").count(), name
        assert page.locator("mjx-merror").count() == 0, name
        assert wide(page) <= 0, name
        page.set_viewport_size(browser.PHONE["viewport"])
        assert wide(page) <= 0, name


def test_search_finds_a_word(site_page):
    page = site_page("index.html")
    page.goto(page.url.replace("index.html", "search.html?q=latent"))
    page.get_by_role("link", name="Glossary").and_(page.locator(".search a")).first.wait_for()


CONTRAST = """e => {
    const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
    const paint = canvas.getContext('2d', {willReadFrequently: true});
    const layers = [];
    for (let n = e; n; n = n.parentElement) layers.unshift(getComputedStyle(n).backgroundColor);
    const over = (...colours) => {
        paint.fillStyle = 'white';
        paint.fillRect(0, 0, 1, 1);
        for (const colour of colours) { paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1); }
        const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].map(
            v => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const [ink, paper] = [over(...layers, getComputedStyle(e).color), over(...layers)];
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
}"""


# A planted chapter, in a browser


@pytest.fixture
def planted_page(planted, visitor):
    """Return a function that opens the planted site as files, with the network off."""

    def open_page(name: str = "04_mla.html", **options):
        return browser.settle(visitor.open((planted / name).as_uri(), offline=True, **options))

    return open_page


def test_equations_carry_their_numbers(planted_page):
    page = planted_page()
    for number in ("4.1", "4.2", "4.3"):
        shown = page.locator(f"#{book_equations.anchor(number)} mjx-assistive-mml")
        assert f"({number})" in shown.text_content()
    links = page.locator("a .equation").all_inner_texts()
    assert links == ["(4.1)", "(4.2)"]  # not the code, not the number without an equation
    page.locator("a", has_text="(4.2)").click()
    assert page.url.endswith("#eq-4-2")


def test_equations_carry_their_numbers_in_jupyterlab(lab, lab_page):
    (lab.folder / "planted.ipynb").write_text(chapter(), encoding="utf-8")
    page = lab_page("planted.ipynb")
    page.locator("mjx-assistive-mml", has_text="(4.2)").wait_for(state="attached")
    for number in ("4.1", "4.2", "4.3"):
        assert page.locator("mjx-assistive-mml", has_text=f"({number})").count() == 1
    assert page.locator("mjx-merror").count() == 0


def test_header_is_a_box(planted_page):
    page = planted_page()
    rows = page.locator("table.chapter-box tr > th").all_inner_texts()
    assert rows == ["Goals", "Know first", "Time", "Report", "Package", "Open in"]
    assert page.locator("table.chapter-box thead").count() == 0
    assert page.locator("table.chapter-box img[alt='Open in Colab']").count() == 1


def test_links_of_a_chapter_lead_to_pages_and_to_the_repository(planted_page):
    page = planted_page()
    for text, end in {
        "minids/mla.py": f"{REPOSITORY}/blob/main/minids/mla.py",
        "learn": f"{REPOSITORY}/tree/main/minids/learn",
        "README": f"{REPOSITORY}/blob/main/README.md#the-book",
        "latent": "glossary.html#term-latent",
        "the report": "references.html#deepseek-v3",
        "the glossary": "glossary.html",
    }.items():
        link = page.locator("article a", has_text=re.compile(f"^{text}$")).first
        assert link.get_attribute("href") == end


def test_a_widget_that_needs_a_kernel_leaves_its_words(planted, planted_page):
    page = planted_page()
    assert page.locator("p.mn-asleep").inner_text() == "a cockpit Run it live."
    source = (planted / "04_mla.html").read_text(encoding="utf-8")
    assert not re.search(r"require(\.min)?\.js|html-manager|widget-view", source)
    assert "install_on_colab" not in source


def test_a_figure_moves_by_mouse_and_keys(planted_page):
    page = planted_page()
    slider, square = page.locator("[data-name=five]"), page.locator("[data-name=square]")
    assert square.inner_text() == "4"
    browser.drag(slider, 1)
    assert square.inner_text() == "25"
    slider.press("ArrowLeft")
    assert square.inner_text() == "16"
    browser.drag(slider, 0)
    assert square.inner_text() == "1"


def test_a_figure_moves_by_touch_on_a_phone(planted_page):
    page = planted_page(**browser.PHONE)
    assert wide(page) <= 0
    formula = page.locator("#eq-4-3 mjx-container").bounding_box()
    assert formula["x"] >= 0, "a long formula begins on the screen"
    assert formula["width"] > browser.PHONE["viewport"]["width"]
    browser.swipe(page.locator("[data-name=five]"), 1)
    assert page.locator("[data-name=square]").inner_text() == "25"
    browser.shot(page, "planted-phone", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(planted_page, scheme):
    page = planted_page(color_scheme=scheme)
    assert page.locator("html").get_attribute("data-theme") == scheme
    for place in (
        "article p", "article p a", "h1", "h2", "table.chapter-box th", "table.chapter-box td",
        "table.chapter-box td a", ".cell_output pre", "p.mn-asleep", ".mn-fig label span",
        ".mn-readout output", ".bd-sidebar-primary nav a", ".bd-sidebar-secondary a",
        "mjx-container", "article p > code",
    ):  # fmt: skip
        assert page.locator(place).first.evaluate(CONTRAST) >= AA, place
    for shown in page.locator(".cell_output .text_html, .cell_output img, article img").all():
        paper = shown.evaluate("e => getComputedStyle(e).backgroundColor")
        assert paper == "rgba(0, 0, 0, 0)"  # the page's own: no white box on a dark page
    browser.shot(page, f"planted-{scheme}", full_page=True)


def test_dark_mode_is_a_button(planted_page):
    page = planted_page(color_scheme="light")
    before = page.locator("article p").first.evaluate("e => getComputedStyle(e).color")
    page.locator("button.theme-switch-button:visible").first.click()
    page.locator("button[data-mode=dark]:visible, a[data-mode=dark]:visible").first.click()
    after = page.locator("article p").first.evaluate("e => getComputedStyle(e).color")
    assert page.locator("html").get_attribute("data-theme") == "dark"
    assert before != after


def test_a_folder_works_with_the_network_off(planted_page):
    page = planted_page("index.html")
    page.locator("article a", has_text="04 MLA").click()
    page.wait_for_url("**/04_mla.html")
    browser.settle(page)
    assert page.locator("mjx-container").count() == page.locator(".math").count() > 3
    page.goto(page.url.replace("04_mla.html", "search.html?q=latent"))
    page.locator(".search a", has_text="Glossary").first.wait_for()


# The browser of the tests


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("document.body.append(Object.assign(new Image(), {src: 'https://a.org/b'}))", "asked for"),
        ("fetch('http://a.org/').catch(() => {})", "asked for http://a.org/"),
        ("console.error('torn')", "console: torn"),
        ("setTimeout(() => { throw new Error('lost') })", "console: lost"),
    ],
)
def test_a_page_that_reaches_out_or_complains_fails(planted, chromium, script, told):
    guest = browser.Visitor(chromium)
    page = guest.open((planted / "index.html").as_uri())
    page.evaluate(f"() => {{ {script} }}")
    page.wait_for_timeout(200)
    with pytest.raises(pytest.fail.Exception, match=told):
        guest.leave()


# What must fail a build

BARE = "a figure that is a bare image"
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect/></svg>'
# a cell, and what the build must say of it
MISTAKES = {
    "an image without alt": (markdown("![](_static/colab.svg)"), r"has no alt text: write !\["),
    "an <img> without alt": (
        code("show()", {"text/html": '<img src="data:,">'}),
        r"cell 2 \(show\(\)\): <img> without alt text",
    ),
    "an <img> in the text": (
        markdown('<img src="_static/colab.svg">'),
        "<img> without alt text .*: write <img alt",
    ),
    "a bare PNG": (code("plot()", {"image/png": PIXEL}), rf"cell 2 \(plot\(\)\): {BARE}"),
    "a bare SVG": (code("draw()", {"image/svg+xml": SVG}), rf"cell 2 \(draw\(\)\): {BARE}"),
    "a link to no page": (markdown("[x](99_nothing.ipynb)"), "99_nothing.ipynb"),
    "a link to no file": (markdown("[x](../minids/nothing.py)"), "nothing.py"),
    "a link to no term": (markdown("[x](glossary.md#term-nothing)"), "term-nothing"),
    "a link to no paper": (markdown("[x](references.md#nothing)"), "'nothing'"),
    "a number twice": (
        markdown(r"$$a \tag{9.1}$$", "", r"$$b \tag{9.1}$$"),
        r"equation number 9\.1 is taken",
    ),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """Return what Sphinx says of a book with each mistake in a chapter of its own."""
    folder = tmp_path_factory.mktemp("mistakes")
    chapters = {
        f"{n:02}_mistake.ipynb": notebook(markdown("# A title"), cell)
        for n, (cell, _) in enumerate(MISTAKES.values())
    }
    return browser.build_site(plant(folder, chapters), folder / "html", "-W")


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_fails_the_build_and_is_told(refused, name):
    page = f"{list(MISTAKES).index(name):02}_mistake"
    assert refused.returncode != 0
    said = [line for line in refused.stderr.splitlines() if page in line]
    assert len(said) == 1, refused.stderr
    assert re.search(MISTAKES[name][1], said[0])


@pytest.mark.slow
def test_a_good_book_says_nothing(planted):
    """What the tests above rely on: the mistakes alone are what is told."""
    assert broken_links(planted) == []
    assert outside_of_links(planted) == []


# Pieces


def test_broken_links_are_seen(tmp_path):
    (tmp_path / "a.html").write_text('<p id="x"><a href="b.html">b</a> <a href="#x">x</a>')
    (tmp_path / "b.html").write_text('<a href="c.html">c</a> <a href="a.html#y">y</a>')
    assert broken_links(tmp_path) == ["b.html: c.html", "b.html: a.html#y"]


def test_what_a_page_loads_from_elsewhere_is_seen(tmp_path):
    (tmp_path / "a.html").write_text('<a href="https://a.org"></a><img src="//b.org/c.png">')
    assert outside_of_links(tmp_path) == ['a.html: <img src="//b.org/c.png']


def test_images_without_words_are_found():
    assert book_alt.bare_images('<img src="a" alt="a cat"><img src="b"/><img src="c" alt=" ">') == [
        "b", "c",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "page", "path"),
    [
        ("../minids/mla.py", "04_mla", "minids/mla.py"),
        ("../../minids", "teach/mla", "minids"),
        ("LICENSE", "04_mla", "book/LICENSE"),
        ("../minids/nothing.py", "04_mla", None),
        ("../../../etc/passwd", "04_mla", None),
    ],
)
def test_a_relative_link_names_a_file_of_the_repository(target, page, path):
    assert book_links.in_repository(target, page) == path


def test_files_and_folders_have_addresses():
    assert book_links.on_the_web("minids", "https://x/y/", "main") == "https://x/y/tree/main/minids"
    assert (
        book_links.on_the_web("LICENSE", "https://x/y", "main") == "https://x/y/blob/main/LICENSE"
    )


def test_chapters_stand_in_their_parts(tmp_path):
    for name in ("00_start.ipynb", "04_mla.ipynb", "08_balance.ipynb", "glossary.md"):
        (tmp_path / name).write_text("")
    assert book_parts.contents(tmp_path) == {
        "Start": ["00_start"],
        "Attention": ["04_mla"],
        "Experts": ["08_balance"],
        "Beside the chapters": ["glossary"],
    }
    assert book_parts.part_of(19) == "The whole"


def test_titles_of_papers_keep_their_capitals(site):
    text = " ".join("".join(Html(site.folder / "references.html").words).split())
    assert "Mixture-of-Experts Language Model" in text
    assert "[deepseek-v3]" in text
    assert book_bibliography.KeyLabels  # the labels are the keys


def test_a_browser_is_looked_for_and_its_absence_is_told(monkeypatch, tmp_path):
    program = tmp_path / "chromium"
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert chromium_program.find_chromium([]) == str(program)
    monkeypatch.setenv("PATH", "")
    assert chromium_program.find_chromium([str(program)]) == str(program)
    assert chromium_program.find_chromium([]) is None
    monkeypatch.setenv("CHROMIUM", str(tmp_path / "nothing"))  # who names one means that one
    assert chromium_program.find_chromium([str(program)]) is None
    monkeypatch.delenv("CHROMIUM")
    monkeypatch.setattr(chromium_program, "PLACES", [])
    assert chromium_program.install() == chromium_program.MISSING


# The glossary


def glossary() -> dict[str, str]:
    """Return each term of the glossary with its text."""
    text = (BOOK / "glossary.md").read_text(encoding="utf-8")
    body = text.split(":::{glossary}\n")[1].split("\n:::")[0]
    entries = (entry.partition("\n") for entry in re.split(r"\n\n(?=\S)", body))
    return {term: " ".join(words.split()) for term, _, words in entries}


def test_glossary_is_sorted_and_names_chapters():
    terms = glossary()
    assert list(terms) == sorted(terms, key=str.lower)
    for term, text in terms.items():
        chapters = re.search(r"\*Chapters? (\d\d(?:, \d\d)*)\.\*$", text)
        assert chapters, f"{term} names no chapter"
        assert all(int(chapter) < 20 for chapter in chapters[1].split(", ")), term


V3 = preset("v3")
COUNTS = count(V3)
MOE = V3.n_layers - V3.n_dense_layers
NUMBERS = {
    "active parameters": [
        COUNTS.active["with head"], COUNTS.active["with both tables"],
        COUNTS.active["with neither"], COUNTS.total,
        f"{COUNTS.active['with head'] / COUNTS.total:.2%}".replace("%", " %"),
    ],
    "balancing bias": [V3.n_routed_experts, COUNTS.parts["gate biases"]],
    "bias rule": [V3.bias_speed],
    "block": [" x ".join(map(str, BLOCK))],
    "centroid": [V3.dim],
    "decoupled key": [V3.qk_rope_head_dim, V3.n_heads],
    "dense layer": [V3.n_dense_layers, V3.inter_dim, MOE],
    "E4M3": [int(E4M3.max)],
    "E5M2": [int(E5M2.max)],
    "embedding": [V3.vocab_size, V3.dim],
    "FLOP": [f"{COUNTS.flops_training / 1e9:.1f} GFLOP", COUNTS.seq_len],
    "gate weight": [V3.n_activated_experts, V3.route_scale],
    "GPU-hour": [sum(REPORTED_HOURS.values()), *REPORTED_HOURS.values()],
    "group limit": [
        V3.n_routed_experts, V3.n_expert_groups, V3.experts_per_group, V3.n_limited_groups,
        V3.n_activated_experts,
    ],
    "head": [V3.n_heads, V3.qk_head_dim, V3.qk_nope_head_dim, V3.qk_rope_head_dim],
    "KV cache": [V3.cache_dim, COUNTS.cache_bytes, V3.n_layers],
    "latent": [V3.kv_lora_rank],
    "load": [f"{V3.n_activated_experts} / {V3.n_routed_experts}"],
    "MHA": [
        (mha := count(preset("v3", attn="mha")).cache_bytes),
        f"{mha / COUNTS.cache_bytes:.1f} times",
    ],
    "MLA": [attention_parameters(V3)],
    "MoE": [MOE, V3.n_layers, V3.n_routed_experts, V3.n_activated_experts, V3.n_shared_experts],
    "MQA": [V3.cache_dim],
    "MTP": [COUNTS.mtp],
    "promotion": [TILE[1]],
    "query latent": [V3.q_lora_rank],
    "rank": [V3.kv_lora_rank],
    "routed expert": [
        V3.moe_inter_dim, expert_parameters(V3), V3.n_routed_experts,
        f"{COUNTS.parts['routed experts'] / COUNTS.total:.1%}".replace("%", " %"),
    ],
    "router": [V3.n_activated_experts, V3.n_routed_experts],
    "scale": [int(E4M3.max)],
    "sequence-wise loss": [f"{V3.seq_loss_alpha:.4f}", V3.n_routed_experts],
    "shared expert": [V3.n_shared_experts],
    "tile": [TILE[1]],
    "top-k": [V3.n_activated_experts, V3.n_routed_experts],
    "underflow": [int(2 * E4M3.max / E4M3.min_subnormal)],  # half of the smallest becomes 0
}  # fmt: skip


@pytest.mark.parametrize("term", NUMBERS)
def test_numbers_of_the_glossary_are_counted(term):
    text = glossary()[term]
    for number in NUMBERS[term]:
        shown = f"{number:,}" if isinstance(number, int) else str(number)
        assert re.search(rf"(?<![\d,.]){re.escape(shown)}(?!,?\d)", text), f"{shown}: {text}"


def test_numbers_of_the_glossary_are_all_checked():
    """An entry with a number of three digits or more is in the list above."""
    plain = {
        term: re.sub(r"\$[^$]*\$|`[^`]*`|\*Chapters?[^*]*\*|Eqs?\. \d+", "", text)
        for term, text in glossary().items()
    }
    loose = [t for t, text in plain.items() if re.search(r"\d{3}|\d,\d", text)]
    assert set(loose) - set(NUMBERS) <= {"bias rule"}
