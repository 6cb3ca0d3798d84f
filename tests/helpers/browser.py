"""A real Chromium, driven by Playwright. Without Chromium, its tests are skipped."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
DESKTOP = {"width": 1280, "height": 900}


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run Chromium during the `with` block, or skip the test if it is not installed."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} is on the PATH (Debian: apt install chromium)")
    arguments = ["--no-proxy-server", *(["--no-sandbox"] if os.getuid() == 0 else [])]  # the sandbox refuses root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


@contextmanager
def visit(browser: Browser, url: str, expected_errors: str = "", **options: object) -> Iterator[Page]:
    """Open the page in a new session. At the end, check that it used no other server and logged no error."""
    context = browser.new_context(**{"viewport": DESKTOP, **options})  # type: ignore[arg-type]
    context.set_default_timeout(30_000)
    page = context.new_page()
    requested: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    try:
        page.goto(url)
        yield page
    finally:
        context.close()
    assert [other for other in requested if not other.startswith(url)] == []
    assert [error for error in errors if not expected_errors or expected_errors not in error] == []
