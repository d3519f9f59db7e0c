"""A real browser without a window, and a proxy that writes down what a page asks the network for."""

from __future__ import annotations

import shutil
import socketserver
import subprocess
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

NAMES = ("chromium-headless-shell", "chromium", "google-chrome", "chrome", "chromium-browser")


def find_browser() -> str | None:
    """The first that is on PATH."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


BROWSER = find_browser()
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on PATH; `make browser` installs one")


class Opened(NamedTuple):
    """What became of a page."""

    dom: str
    console: list[str]
    """Errors and messages of scripts, and what the page's policy forbade."""
    requests: list[str]
    """The first line of each request that reached the network's door."""


class _Proxy(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True

    def __init__(self) -> None:
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.server.requests.append(self.rfile.readline().decode(errors="replace").strip())
        self.wfile.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def _run(browser: str, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    common += ["--no-first-run", f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    return subprocess.run(
        [browser, *common, *options], capture_output=True, text=True, timeout=120, check=True, errors="replace"
    )


def open_page(browser: str, page: Path, folder: Path) -> Opened:
    """Load a file; every request but that for the file itself must pass the proxy."""
    with _Proxy() as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        through = [f"--proxy-server=127.0.0.1:{proxy.server_address[1]}", "--proxy-bypass-list=<-loopback>"]
        done = _run(browser, folder / "profile", *through, "--dump-dom", page.resolve().as_uri())
        proxy.shutdown()
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Opened(done.stdout, console, proxy.requests)


def screenshot(browser: str, page: Path, picture: Path, *, width: int, height: int) -> None:
    """A PNG of the page's top, that many pixels large."""
    _run(
        browser, picture.parent / "profile", "--hide-scrollbars", f"--window-size={width},{height}",
        f"--screenshot={picture}", page.resolve().as_uri(),
    )  # fmt: skip
