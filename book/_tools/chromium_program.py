"""Where Chromium or Chrome is: pages are tested and printed with it.

    python book/_tools/chromium_program.py --install

`--install` gets Debian's where it may, as `make test` asks; it never fails, and says what came of
it. CHROMIUM, if set, names the one to take.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
PLACES = [
    "/usr/bin/chromium",
    "/snap/bin/chromium",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
]
MISSING = (
    "NOT RUN: no Chromium or Chrome here. Get one: `python book/_tools/chromium_program.py "
    "--install` as root on Debian or Ubuntu, else from chromium.org; or set CHROMIUM to the program"
)


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def find_chromium(places: list[str] | None = None) -> str | None:
    """Return the program of a Chromium: CHROMIUM if that is set, else on PATH or where usual."""
    if "CHROMIUM" in os.environ:
        return shutil.which(os.environ["CHROMIUM"])
    found = [path for name in NAMES if (path := shutil.which(name))]
    found += [place for place in (PLACES if places is None else places) if Path(place).is_file()]
    return found[0] if found else None


def install() -> str:
    """Install Debian's Chromium where apt-get is there and allowed; say what came of it."""
    if path := find_chromium():
        return f"Chromium is there: {path}"
    sudo = [] if is_root() else ["sudo", "-n"]
    if not shutil.which("apt-get") or (sudo and not shutil.which("sudo")):
        return MISSING
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 600}
    offline = ["-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=20"]
    get = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", *offline]
    try:
        subprocess.run([*get, "update"], check=False, **quiet)
        subprocess.run([*get, "install", "-y", "chromium"], check=False, **quiet)
    except (OSError, subprocess.TimeoutExpired):
        return MISSING
    return f"Chromium installed: {path}" if (path := find_chromium()) else MISSING


if __name__ == "__main__":
    if sys.argv[1:] != ["--install"]:
        sys.exit("usage: python book/_tools/chromium_program.py --install")
    print(install())
