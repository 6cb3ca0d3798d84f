"""A real Chromium, driven by Playwright, and axe, which finds barriers. Tests are skipped without them."""

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
DESKTOP = {"width": 1280, "height": 900}
AXE_TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
RUN_AXE = """async tags => {
  const { violations, passes } = await axe.run({ runOnly: { type: "tag", values: tags } });
  const found = violations.flatMap(({ id, nodes }) => nodes.map(node => [id, node.target, node.failureSummary]));
  return { found, n_passed: passes.length };
}"""
LAYOUT_SHIFT = """() => new Promise(resolve => {
  const sum = list => list.getEntries().reduce((total, entry) => total + entry.value, 0);
  new PerformanceObserver(list => resolve(sum(list))).observe({ type: "layout-shift", buffered: true });
  setTimeout(() => resolve(0), 1000);  // nothing moved
})"""


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
def visit(browser: Browser, url: str, expected_errors: str = "", origin: str = "", **options: object) -> Iterator[Page]:
    """Open the page in a new session. At the end, check that it used no other server and logged no error.

    origin: what the URLs of all requests begin with; without it, `url`. expected_errors: a regular expression.
    """
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
    foreign = [other for other in requested if not other.startswith(origin or url)]
    assert not foreign, foreign  # pytest shows no values of assertions in helpers
    unexpected = [error for error in errors if not expected_errors or not re.search(expected_errors, error)]
    assert not unexpected, unexpected


def barriers(page: Page) -> list[tuple[str, list[str], str]]:
    """Return what axe-core finds wrong with the page: the rule, the element, what to do."""
    package = importlib.util.find_spec("axe_playwright_python")
    if package is None or package.origin is None:
        pytest.skip("axe-core is not installed: pip install axe-playwright-python")
    page.evaluate((Path(package.origin).parent / "axe.min.js").read_text(encoding="utf-8"))
    result = page.evaluate(RUN_AXE, AXE_TAGS)
    assert result["n_passed"] > 20, "axe checked next to nothing"
    return result["found"]
