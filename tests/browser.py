"""A page in a headless Chromium, where there is one."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

QUIET = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync")  # fmt: skip
"""Options against requests of Chromium's own: where there is no network they take minutes to fail."""


def browse(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page with a profile in ``folder``; without a Chromium the test is skipped."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", *QUIET, f"--user-data-dir={folder / 'profile'}",
               "--enable-logging=stderr", "--virtual-time-budget=8000", *options, page.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the page wrote on the console, but for the library's greetings."""
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line and "[bokeh" not in line]


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    """What the test's own script left in the page, in ``<pre id="told">``, of ``--dump-dom``."""
    return json.loads(html.unescape(re.findall(r'<pre id="told"[^>]*>(.*?)</pre>', done.stdout, re.DOTALL)[0]))
