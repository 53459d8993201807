"""The browser that the page is tested in: found, or installed where that is allowed.

Run as a program (`make setup` does) it installs Debian's Chromium when there is no browser, the user is root and apt is
there. Exit status 1 without a browser: the page tests are skipped then, and the last line of the run says so.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOW_TO_GET = "apt-get install chromium, or name a Chromium or Chrome in CHROMIUM, then run the tests again"


def find_browser() -> str | None:
    """The program named in `CHROMIUM`, else the first Chromium or Chrome on the PATH or among Playwright's own."""
    named = os.environ.get("CHROMIUM")
    if named:
        return shutil.which(named)
    found = next(filter(None, map(shutil.which, NAMES)), None)
    cache = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", Path.home() / ".cache" / "ms-playwright"))
    return found or next((str(path) for path in sorted(cache.glob("chromium-*/chrome-linux*/chrome"))), None)


def install_browser() -> None:
    """Debian's Chromium, by apt."""
    print("installing Chromium for the page tests", flush=True)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in ("update", "install --yes --no-install-recommends chromium"):
        subprocess.run(["apt-get", "-qq", *command.split()], env=environment, check=False, **quiet)  # type: ignore[call-overload]


if __name__ == "__main__":
    if find_browser() is None and os.geteuid() == 0 and shutil.which("apt-get"):
        install_browser()
    browser = find_browser()
    print(f"page tests: {browser}" if browser else f"page tests: no browser, they will be skipped; {HOW_TO_GET}")
    sys.exit(browser is None)
