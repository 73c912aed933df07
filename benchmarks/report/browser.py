"""A headless Chromium: what a page looks like, and what it says of itself once its scripts have run."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from stages.errors import UserError

NAMES = ("chromium", "chromium-browser", "google-chrome")
LIMIT_S = 180
# No network, no first-run pages; WebGL in software; eight seconds of the page's own time for its scripts.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--virtual-time-budget=8000",
)


def find_browser() -> str | None:
    """Return the path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def look(page: Path, *more: str, size: tuple[int, int] = (1400, 1800)) -> str:
    """Open a page in a window of that width and height and return what Chromium prints.

    Args:
        more: further flags, such as --dump-dom or --screenshot=FILE.
    Raises: UserError where there is no Chromium or it fails.
    """
    browser = find_browser()
    if browser is None:
        raise UserError("no Chromium", f"none of {', '.join(NAMES)} is on the PATH", "install Chromium")
    with tempfile.TemporaryDirectory() as profile:
        window = (f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}")
        command = [browser, *FLAGS, *window, *more, page.absolute().as_uri()]
        try:
            process = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
        except (subprocess.SubprocessError, OSError) as error:
            last_line = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
            raise UserError(f"{browser} cannot show {page}", " ".join(last_line), "open the page yourself") from None
    return process.stdout


def take_picture(page: Path, picture: Path, *, size: tuple[int, int] = (1400, 1800)) -> Path:
    """The top of a page as a PNG of that width and height. Raises: UserError as `look`."""
    look(page, f"--screenshot={picture.absolute()}", size=size)
    return picture
