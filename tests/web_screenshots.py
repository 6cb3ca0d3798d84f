"""Write a picture of the web page of a running service, under some load.

python tests/web_screenshots.py http://localhost:8000/ docs/images
"""

import argparse
import io
import json
import random
import threading
import time
import urllib.request
from pathlib import Path

from helpers.browser import DESKTOP, chromium, visit
from PIL import Image
from playwright.sync_api import Browser, expect

PROMPTS = ("Once upon a time", "The little dog", "It was raining, and Tom was sad.")
CLIENTS = 12
SCALE = 1.5  # screen pixels per CSS pixel
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
    parser.add_argument("url", help="URL of the page, with the final slash")
    parser.add_argument("directory", type=Path, help="directory for web-desktop.png")
    parser.add_argument("--load-s", type=float, default=62.0, help="seconds of load before the picture")
    arguments = parser.parse_args()
    target = arguments.directory / "web-desktop.png"
    with chromium() as chosen:
        target.write_bytes(_compressed(take(chosen, arguments.url, arguments.load_s)))
    print(f"{target} ({target.stat().st_size // 1024} kB)")
