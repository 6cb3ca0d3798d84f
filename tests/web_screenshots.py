"""Write pictures of the web pages of a running service, the first under some load.

python tests/web_screenshots.py http://localhost:8000/ docs/images

Or measure how large and how fast the page `/explain` is, while nobody else uses the service:

python tests/web_screenshots.py http://localhost:8000/ docs/images --measure docs/results/explain-page.json
"""

import argparse
import io
import json
import random
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from helpers.browser import DESKTOP, chromium, visit
from PIL import Image
from playwright.sync_api import Browser, Page, expect

sys.path.insert(0, str(Path(__file__).parents[1]))  # before this directory, whose `tinylm` has only tests
from tinylm.system.machine import describe

PROMPTS = ("Once upon a time", "The little dog", "It was raining, and Tom was sad.")
CLIENTS = 12
SCALE = 1.5  # screen pixels per CSS pixel
VISITS = 10
PARTS = ("tokens", "embedding", "layer", "lens", "scores", "sampling", "next", "cache", "int8")
FIRST_PAINT = """() => performance.getEntriesByName("first-contentful-paint")[0].startTime"""
# Opens a part as a click does. Returns the milliseconds until it is complete and painted.
OPEN = """part => new Promise(resolve => {
  const details = document.getElementById(part);
  const began = performance.now();
  const look = () => details.getAttribute("aria-busy") === "false"
    ? requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - began)))
    : setTimeout(look, 1);
  details.querySelector("summary").click();
  look();
})"""
# Bytes of bodies: of the files as sent and unpacked, and of the answers about the first sentence.
SIZES = """() => {
  const all = [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")];
  const answers = all.filter(({ initiatorType }) => initiatorType === "fetch");
  const files = all.filter(({ initiatorType }) => initiatorType !== "fetch");
  const sum = (list, name) => list.reduce((total, entry) => total + entry[name], 0);
  return {
    files: files.length,
    files_sent: sum(files, "encodedBodySize"),
    files_unpacked: sum(files, "decodedBodySize"),
    answers: answers.length,
    answers_sent: sum(answers, "encodedBodySize"),
    total_sent: sum(all, "encodedBodySize"),
  };
}"""
_LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def take(browser: Browser, url: str, load_s: float) -> bytes:
    """Return a PNG of the page with a finished story, after `load_s` seconds of load."""
    ended = threading.Event()
    clients = [threading.Thread(target=_ask_until, args=(url, ended), daemon=True) for _ in range(CLIENTS)]
    with visit(browser, url, viewport=DESKTOP, device_scale_factor=SCALE) as page:
        for client in clients:
            client.start()
        time.sleep(load_s)
        page.get_by_role("button", name="Write").click()
        expect(page.locator("#status")).to_contain_text("Ended by")
        page.wait_for_timeout(1500)
        page.locator("#story .token[data-level='3']").nth(1).hover()
        picture = page.screenshot(full_page=True)
    ended.set()
    for client in clients:
        client.join()
    return picture


def take_explanation(browser: Browser, url: str) -> bytes:
    """Return a PNG of the page `/explain` with one head, and the settings that choose a token."""
    with visit(browser, f"{url}explain", origin=url, viewport=DESKTOP) as page:
        wait_for_explanation(page)
        for part in ("layer", "sampling"):
            page.evaluate(OPEN, part)
        page.wait_for_timeout(500)
        return page.screenshot(full_page=True)


def wait_for_explanation(page: Page) -> None:
    """Wait until the overview is complete, and the page has asked what its parts need."""
    expect(page.locator("#overview")).to_have_attribute("aria-busy", "false", timeout=60_000)
    page.wait_for_load_state("networkidle")


def measure(browser: Browser, url: str) -> dict[str, Any]:
    """Return bytes, the time of the first paint, and the time that each part takes to open, from several visits."""
    paints, overviews, opened = [], [], {part: [] for part in PARTS}
    sizes: dict[str, int] = {}
    for _ in range(VISITS):
        with visit(browser, f"{url}explain", expected_errors="503", origin=url, viewport=DESKTOP) as page:
            expect(page.locator("[data-mini=next] .word")).to_be_attached(timeout=60_000)
            overviews.append(page.evaluate("performance.now()"))
            wait_for_explanation(page)
            paints.append(page.evaluate(FIRST_PAINT))
            sizes = page.evaluate(SIZES)
            for part in PARTS:
                opened[part].append(page.evaluate(OPEN, part))
    every = np.concatenate(list(opened.values()))
    return {
        "command": " ".join(("python", "tests/web_screenshots.py", *sys.argv[1:])),
        **describe(),
        "visits": VISITS,
        "bytes": sizes,
        "first_contentful_paint_ms": _summary(np.array(paints)),
        "first_next_token_ms": _summary(np.array(overviews)),
        "open_part_ms": _summary(every),
        "open_part_ms_p95_by_part": {part: round(float(np.quantile(times, 0.95)), 1) for part, times in opened.items()},
    }


def _summary(times: np.ndarray) -> dict[str, float]:
    quantiles = {"p50": 0.5, "p95": 0.95, "max": 1.0}
    return {name: round(float(np.quantile(times, share)), 1) for name, share in quantiles.items()}


def _ask_until(url: str, ended: threading.Event) -> None:
    """Ask for one story after another, with pauses, until `ended` is set."""
    while not ended.wait(random.expovariate(3)):
        body = {"prompt": random.choice(PROMPTS), "max_tokens": random.randint(20, 200), "temperature": 0.8}
        request = urllib.request.Request(
            f"{url}v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        _LOOPBACK.open(request, timeout=30).close()


def _compressed(png: bytes) -> bytes:
    """Return the same picture with a palette, which suffices for a page with few colours."""
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="URL of the service, with the final slash")
    parser.add_argument("directory", type=Path, help="directory for web-desktop.png and web-explain.png")
    parser.add_argument("--load-s", type=float, default=62.0, help="seconds of load before the first picture")
    parser.add_argument("--measure", type=Path, help="measure /explain and write this JSON file, and no picture")
    arguments = parser.parse_args()
    with chromium() as chosen:
        if arguments.measure is not None:
            result = measure(chosen, arguments.url)
            arguments.measure.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            print(json.dumps(result))
            sys.exit()
        pictures = {
            "web-desktop.png": take(chosen, arguments.url, arguments.load_s),
            "web-explain.png": take_explanation(chosen, arguments.url),
        }
    for name, picture in pictures.items():
        target = arguments.directory / name
        target.write_bytes(_compressed(picture))
        print(f"{target} ({target.stat().st_size // 1024} kB)")
