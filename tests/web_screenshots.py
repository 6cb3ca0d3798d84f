"""Pictures of the web page on a running service, under a little load of its own that makes the live view live.

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

from browser_fixtures import DESKTOP, PHONE, chromium, visit
from PIL import Image
from playwright.sync_api import Browser, expect

PROMPTS = ("Once upon a time", "The little dog", "It was raining, and Tom was sad.")
CLIENTS = 12
SIZES = {"web-desktop": (DESKTOP, 1.5), "web-phone": (PHONE, 2)}  # px of the style sheet, and of the screen for each
_LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def take(browser: Browser, url: str, directory: Path, load_s: float) -> list[Path]:
    """A picture of each size, after `load_s` seconds of load."""
    paths = []
    for name, (size, scale) in SIZES.items():
        path = directory / f"{name}.png"
        path.write_bytes(_compressed(_picture(browser, url, size, scale, load_s)))
        paths.append(path)
    return paths


def _picture(browser: Browser, url: str, size: dict[str, int], scale: float, load_s: float) -> bytes:
    is_phone = size == PHONE
    ended = threading.Event()
    clients = [threading.Thread(target=_ask_until, args=(url, ended), daemon=True) for _ in range(CLIENTS)]
    with visit(browser, url, viewport=size, device_scale_factor=scale, is_mobile=is_phone, has_touch=is_phone) as page:
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
    """One client: a story, a pause, another."""
    while not ended.wait(random.expovariate(3)):
        body = {"prompt": random.choice(PROMPTS), "max_tokens": random.randint(20, 200), "temperature": 0.8}
        request = urllib.request.Request(
            f"{url}v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        _LOOPBACK.open(request, timeout=30).close()


def _compressed(png: bytes) -> bytes:
    """The same picture with a palette: a page has few colours."""
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the page, with its last slash")
    parser.add_argument("directory", type=Path, help="where the pictures go")
    parser.add_argument("--load-s", type=float, default=62.0, help="seconds of load before each picture")
    arguments = parser.parse_args()
    with chromium() as chosen:
        for written in take(chosen, arguments.url, arguments.directory, arguments.load_s):
            print(f"{written} ({written.stat().st_size // 1024} kB)")
