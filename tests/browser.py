"""A browser for tests: Debian's Chromium, on the built site and in JupyterLab, offline.

`tests/conftest.py` hands these fixtures to every test. A page that asks for anything outside of
this machine fails its test; so does an error in its console. book/_tools/chromium_program.py gets
Chromium where it may; where there is none, tests of pages are skipped, and the end of the run says
so. To look at a page, use `shot`; to test against a site that is built already, set MINIDS_SITE to
its folder.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from chromium_program import MISSING, find_chromium, is_root

if TYPE_CHECKING:  # a machine that runs no page, such as a server with a GPU, can do without
    from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Route

ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "runs" / "screenshots"
FLAGS = [
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
DESKTOP = {"viewport": {"width": 1400, "height": 1000}}
# errors in the console that are none of ours, each with its reason
KNOWN_ERRORS = {
    "Got invalid theme mode: . Resetting to auto": "the theme, once in each fresh profile",
}
START_S = 60  # for a server on a busy machine
WAIT_MS = 30_000  # for anything on a page


# The servers


@dataclass
class Site:
    """The built book: its folder, its address, what Sphinx warned of and how long it worked."""

    folder: Path
    url: str
    warnings: str
    cpu_s: float


@dataclass
class Lab:
    """A running JupyterLab over a copy of the notebooks, trusted and never run."""

    folder: Path
    url: str
    token: str

    def request(self, path: str, method: str = "GET") -> Any:
        """Ask the server's REST interface."""
        address = f"{self.url}/api/{path}?token={self.token}"
        with urllib.request.urlopen(
            urllib.request.Request(address, method=method), timeout=10
        ) as answer:
            return json.loads(answer.read() or b"null")

    def stop_kernels(self) -> None:
        for session in self.request("sessions"):
            self.request(f"sessions/{session['id']}", "DELETE")


def build_site(source: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Build the pages under `source` with the book's settings; nothing is executed."""
    command = [sys.executable, "-m", "sphinx", "-q", "--keep-going", *options]
    folders = ["-c", str(ROOT / "book"), "-d", str(out.parent / "doctrees"), str(source), str(out)]
    return subprocess.run([*command, *folders], capture_output=True, text=True, timeout=300)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Keep requests out of the test's output."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A browser that closes a page in the middle of a file is no error of the server's."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Build the book once, and serve it on this machine alone."""
    warnings, start = "", os.times().children_user
    if ready := os.environ.get("MINIDS_SITE"):
        folder = Path(ready)
    else:
        folder = tmp_path_factory.mktemp("site") / "html"
        built = build_site(ROOT / "book", folder)
        warnings = built.stderr
        if built.returncode:
            pytest.fail(f"the site cannot be built:\n{built.stderr[-4000:]}", pytrace=False)
    cpu_s = os.times().children_user - start
    server = _Server(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Site(folder, f"http://127.0.0.1:{server.server_address[1]}", warnings, cpu_s)
    server.shutdown()
    server.server_close()
    thread.join()


def lab_settings(folder: Path) -> None:
    """No news over the page's corner, and cells that are there before they are scrolled to."""
    for plugin, settings in {
        "apputils-extension/notification": {
            "fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True
        },
        "notebook-extension/tracker": {"windowingMode": "none"},
    }.items():  # fmt: skip
        path = folder / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, chromium_path: str) -> Iterator[Lab]:
    """Start one JupyterLab over a trusted copy of the book."""
    home = tmp_path_factory.mktemp("lab")
    folder = home / "book"
    shutil.copytree(ROOT / "book", folder, ignore=shutil.ignore_patterns("_build", "_ext", ".*"))
    lab_settings(home / "settings")
    env = os.environ | {
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
    }
    notebooks = [str(path) for path in sorted(folder.glob("*.ipynb"))]
    trust = [sys.executable, "-m", "jupyter", "trust", *notebooks]
    subprocess.run(trust, env=env, check=True, capture_output=True, timeout=120)
    port, token = free_port(), secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder}", *(["--allow-root"] if is_root() else []),
    ]  # fmt: skip
    with (home / "lab.log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            server = Lab(folder, f"http://127.0.0.1:{port}", token)
            wait_for(partial(server.request, "status"), home / "lab.log")
            yield server
            server.stop_kernels()
        finally:
            process.terminate()
            process.wait(30)


def wait_for(ready: Callable[[], Any], log: Path) -> None:
    """Wait until a server answers; fail with the end of its log."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        try:
            ready()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"no answer in {START_S} s:\n{log.read_text()[-2000:]}", pytrace=False)


# The pages


@dataclass
class Visitor:
    """Opens pages for one test, and keeps what they asked for outside and complained of."""

    browser: Browser
    outside: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def open(self, url: str, **options: Any) -> Page:
        """Open a page in a fresh profile; options are Playwright's, such as color_scheme."""
        context = self.browser.new_context(**(DESKTOP | options))
        context.set_default_timeout(WAIT_MS)
        context.route(re.compile(r"^(?!http://127\.0\.0\.1[:/])[a-z]+://"), self.refuse)
        page = context.new_page()
        page.on("console", self.listen)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(url)
        return page

    def refuse(self, route: Route) -> None:
        """Stop a request that leaves this machine, and remember it."""
        if route.request.url.startswith("file://"):
            route.continue_()
            return
        self.outside.append(route.request.url)
        route.abort()

    def listen(self, message: ConsoleMessage) -> None:
        known = any(re.search(pattern, message.text) for pattern in KNOWN_ERRORS)
        if message.type == "error" and not known:
            self.errors.append(f"{message.text} ({message.location.get('url', '')})")

    def leave(self) -> None:
        """Close all pages, and fail for what they did."""
        for context in self.browser.contexts:
            context.close()
        said = [f"asked for {url}" for url in self.outside]
        said += [f"console: {error}" for error in self.errors]
        if said:
            pytest.fail("a page " + "\nand ".join(said), pytrace=False)


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """Return the browser's program, or skip with what to do."""
    path = find_chromium()
    if path is None:
        pytest.skip(MISSING)
    return path


# not for the whole session: while it lives, an event loop runs in this thread, which nbval needs
@pytest.fixture(scope="module")
def chromium(chromium_path: str) -> Iterator[Browser]:
    """Start the browser once for each file of tests."""
    from playwright.sync_api import sync_playwright

    flags = [*FLAGS, *(["--no-sandbox"] if is_root() else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visitor(chromium: Browser) -> Iterator[Visitor]:
    """Open pages that may not reach out or complain, and close them after the test."""
    guest = Visitor(chromium)
    yield guest
    guest.leave()


def settle(page: Page) -> Page:
    """Wait until the formulas of a page are set."""
    page.wait_for_load_state("load")  # MathJax's own script is there from then on
    page.evaluate("() => window.MathJax?.startup?.promise?.then(() => null)")
    return page


@pytest.fixture
def site_page(site: Site, visitor: Visitor) -> Callable[..., Page]:
    """Return a function that opens a page of the built site: `site_page("04_mla.html")`."""

    def open_page(name: str, **options: Any) -> Page:
        return settle(visitor.open(f"{site.url}/{name}", **options))

    return open_page


@pytest.fixture
def touch_page(site_page: Callable[..., Page]) -> Callable[..., Page]:
    """Return a function that opens a page of the built site on a phone."""
    return partial(site_page, **PHONE)


@pytest.fixture
def lab_page(lab: Lab, visitor: Visitor) -> Iterator[Callable[..., Page]]:
    """Return a function that opens a trusted notebook in JupyterLab, with no cell run."""

    def open_notebook(name: str, **options: Any) -> Page:
        address = f"{lab.url}/lab/tree/{name}?reset&token={lab.token}"
        page = visitor.open(address, **options)
        n_cells = len(json.loads((lab.folder / name).read_text(encoding="utf-8"))["cells"])
        page.wait_for_function(READ, arg=n_cells)
        return page

    yield open_notebook
    lab.stop_kernels()


@pytest.fixture(params=["site", "lab"])
def surface(request: pytest.FixtureRequest) -> str:
    """Return where a chapter is read: on the built page, then in JupyterLab."""
    return request.param


@pytest.fixture
def open_chapter(surface: str, request: pytest.FixtureRequest) -> Callable[..., Page]:
    """Return a function that opens a chapter by its stem, on the page and in JupyterLab in turn."""
    suffix = {"site": "html", "lab": "ipynb"}[surface]
    opener = request.getfixturevalue(f"{surface}_page")
    return lambda stem, **options: opener(f"{stem}.{suffix}", **options)


# What a reader does


def shot(page: Page | Locator, name: str, **options: Any) -> Path:
    """Keep a screenshot under runs/screenshots, to be looked at."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    path = SCREENSHOTS / f"{name}.png"
    page.screenshot(path=str(path), **options)
    return path


def thumb(slider: Locator, to: float | None = None) -> tuple[float, float]:
    """Return where a slider's thumb is, or is when it stands at the share `to` of its range."""
    slider.scroll_into_view_if_needed()
    if to is None:
        to = slider.evaluate("e => (e.value - e.min) / (e.max - e.min)")
    box = None
    while box != (now := slider.bounding_box()):  # JupyterLab still lays out what came into view
        box = now
        slider.page.wait_for_timeout(100)
    assert box is not None
    return box["x"] + 8 + to * (box["width"] - 16), box["y"] + box["height"] / 2


def drag(slider: Locator, to: float) -> None:
    """Drag a slider with the mouse to a share of its range: 0 is its left end, 1 its right."""
    mouse = slider.page.mouse
    mouse.move(*thumb(slider))
    mouse.down()
    mouse.move(*thumb(slider, to), steps=8)
    mouse.up()


def swipe(slider: Locator, to: float) -> None:
    """Drag a slider with a finger, on a page that `touch_page` opened."""
    (x, y), (end, _) = thumb(slider), thumb(slider, to)
    session = slider.page.context.new_cdp_session(slider.page)

    def touch(kind: str, *points: dict[str, float]) -> None:
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": list(points)})

    touch("touchStart", {"x": x, "y": y})
    for step in range(1, 9):
        touch("touchMove", {"x": x + (end - x) * step / 8, "y": y})
    touch("touchEnd")
    session.detach()


READ = """n => !document.querySelector('.jp-NotebookPanel .jp-Spinner')
    && document.querySelectorAll('.jp-Notebook .jp-Cell:not(.jp-mod-noInput)').length >= n"""
STARTED = r"""() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]
    .some(prompt => /\[(\*|\d+)\]/.test(prompt.innerText))"""
FINISHED = r"""() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]
    .every(prompt => /\[\d+\]/.test(prompt.innerText))"""


def run_all(page: Page, timeout_s: float = 180) -> None:
    """Run all cells of the notebook that is open in JupyterLab, and wait for the last one."""
    menu = partial(page.get_by_role, "menuitem", exact=True)
    page.locator("#jp-main-statusbar").get_by_text("| Idle").first.wait_for(state="attached")
    menu(name="Edit").click()
    menu(name="Clear Outputs of All Cells").click()
    for _ in range(4):  # a command given before the kernel is attached is dropped without a word
        menu(name="Run").click()
        menu(name="Run All Cells").click()
        try:
            page.wait_for_function(STARTED, timeout=5000)
            break
        except Exception:  # Playwright's TimeoutError: try again
            continue
    page.wait_for_function(FINISHED, timeout=timeout_s * 1000)
