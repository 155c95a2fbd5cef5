"""A real browser for tests of pages: Chromium, driven by playwright.

`open_page` fails the test where the page is at fault: an error on its console, an uncaught exception, or a request to
anything but this machine. Set VLMFAST_SCREENSHOTS=FOLDER to look at what `shoot` saw.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, ConsoleMessage, Page

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",  # whatever is asked for stays here
]
HERE = ("127.0.0.1", "localhost", "::1")
WITHIN = ("data", "blob", "about", "file")  # schemes that ask nobody
PATIENCE = 60_000  # ms until something that does not come is an error


@contextmanager
def open_page(
    url: str, width: int = 1280, height: int = 800, dark: bool = False, provoked: Sequence[str] = ()
) -> Iterator[Page]:
    """A page of a fresh browser, showing `url` (http://127.0.0.1:... or file://...) in a window of width x height.

    dark: the colour scheme that the system asks for. Whatever the page did wrong fails the test at the end of the
    block, but what contains one of the `provoked` texts, which are the test's own doing. Further tabs come from
    `page.context.new_page()` and are watched, too. Blocks cannot be nested.
    """
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "tests marked browser need Chromium: apt-get install chromium"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        try:
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
            )
            context.set_default_timeout(PATIENCE)
            faults = watch(context)
            page = context.new_page()
            page.goto(url)
            try:
                yield page
            finally:
                print("\n".join(faults))  # beside whatever else went wrong
        finally:
            browser.close()
    faults = [fault for fault in faults if not any(text in fault for text in provoked)]
    if faults:
        pytest.fail(f"{url} is at fault:\n" + "\n".join(faults))


def watch(context: BrowserContext) -> list[str]:
    """A list that fills with what any page of the context does wrong."""
    faults: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        if message.type == "error":
            faults.append(f"console: {message.text}")

    def ask(url: str) -> None:
        if leaves(url):
            faults.append(f"request to {url}")

    context.on("console", hear)
    context.on("weberror", lambda error: faults.append(f"uncaught: {error.error}"))
    context.on("request", lambda request: ask(request.url))
    context.on("page", lambda page: page.on("websocket", lambda socket: ask(socket.url)))
    return faults


def leaves(url: str) -> bool:
    """Whether a request for this address goes beyond this machine."""
    parts = urlsplit(url)
    return parts.scheme not in WITHIN and parts.hostname not in HERE


def sideways(page: Page) -> int:
    """Pixels by which the page is wider than its window: more than 0 and the whole page scrolls sideways."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def shoot(page: Page, name: str, whole: bool = True) -> None:
    """Write NAME.png of the page into the folder VLMFAST_SCREENSHOTS, if set; whole: beyond the window, too."""
    folder = os.environ.get("VLMFAST_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=whole)
