"""The web page in a real Chromium, on the real service."""

import math
import re
from collections.abc import Iterator

import pytest
from helpers.browser import DESKTOP, LAYOUT_SHIFT, visit
from openai import DefaultHttpxClient
from playwright.sync_api import Browser, Page, expect

from tinylm import LLM, SamplingParams

PROMPT = "The little dog"
PARAMS = SamplingParams(max_tokens=40, seed=7, logprobs=5)
LEVELS = [0.5, 0.25, 0.1, 0.03]  # the same as in story.js
WIDEST = {"th": "WMWMWMWM", "td span": "1024/1024", "td:nth-child(3)": "1,024", "td:nth-child(4)": "123,456"}
FILL_AND_MEASURE = """values => {
  for (const [cell, text] of Object.entries(values))
    document.querySelectorAll(`#replicas ${cell}`).forEach(found => found.textContent = text);
  return document.documentElement.scrollWidth;
}"""
LEVELS_AND_STYLES = "tokens => tokens.map(token => [token.dataset.level, getComputedStyle(token).textDecoration])"
EDGE_AND_PAPER = "field => [getComputedStyle(field).borderTopColor, getComputedStyle(document.body).backgroundColor]"
SHOW_ALTERNATIVES = """async top => {
  const { showAlternatives } = await import("./alternatives.js");
  showAlternatives(document.querySelector("#story .token:last-child"), -1, top);
}"""
pytestmark = pytest.mark.parametrize("shared_service", ["serve.yaml"], indirect=True)


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    with visit(browser, url) as page:
        yield page


def write(page: Page, prompt: str = PROMPT, params: SamplingParams = PARAMS) -> None:
    """Let the page write a story to its end."""
    if not page.locator("#settings").evaluate("settings => settings.open"):
        page.locator("summary").click()
    page.get_by_label("Begin a story").fill(prompt)
    page.get_by_label("Length", exact=True).fill(str(params.max_tokens))
    page.get_by_label("Seed", exact=True).fill(str(params.seed))
    page.get_by_role("button", name="Write").click()
    wait_for_end(page)


def wait_for_end(page: Page) -> None:
    expect(page.locator("#status")).to_contain_text("Ended by", timeout=30_000)


def test_the_story_shows_each_token_tinted_by_probability(page: Page, stories: LLM) -> None:
    write(page)
    expected = stories.generate(PROMPT, PARAMS)[0]
    assert page.locator("#story").text_content() == PROMPT + expected.text
    tokens = page.locator("#story .token")
    assert tokens.all_text_contents() == [stories.tokenizer.decode([token]) for token in expected.token_ids]
    shares = [math.exp(entry.logprob) for entry in expected.logprobs]
    levels = tokens.evaluate_all("tokens => tokens.map((token) => Number(token.dataset.level))")
    clear = [not any(abs(share - limit) < 1e-3 for limit in LEVELS) for share in shares]
    assert [level for level, sure in zip(levels, clear, strict=True) if sure] == [
        sum(share < limit for limit in LEVELS) for share, sure in zip(shares, clear, strict=True) if sure
    ]
    assert len(set(levels)) > 2, "the story has only one tint"
    expect(page.locator("#timing")).to_contain_text(f"{len(expected.token_ids)} tokens")
    for word in ("ms", "tokens/s"):
        expect(page.locator("#timing")).to_contain_text(word)


def test_text_held_back_for_a_stop_string_reaches_its_tokens(page: Page, stories: LLM) -> None:
    whole = stories.generate(PROMPT, PARAMS)[0].text
    page.get_by_label("Stop at").fill(whole[10:30] + "#")  # the text nearly matches the stop string
    write(page)
    tokens = page.locator("#story .token").all_text_contents()
    assert "".join(tokens) == whole
    assert all(tokens)
    page.get_by_label("Stop at").fill(whole[20:30])
    write(page)
    assert page.locator("#story").text_content() == PROMPT + whole[: whole.index(whole[20:30])]
    expect(page.locator("#timing")).to_contain_text("the model")


def test_hover_and_focus_show_the_likeliest_tokens(page: Page, stories: LLM) -> None:
    write(page)
    expected = stories.generate(PROMPT, PARAMS)[0]
    alternatives = page.get_by_role("tooltip")
    tokens = page.locator("#story .token")

    def assert_shown(place: int) -> None:
        chosen, entry = expected.token_ids[place], expected.logprobs[place]
        words = {stories.tokenizer.decode([token]) for token in (chosen, *(token for token, _ in entry.top))}
        expect(alternatives).to_be_visible()
        shown = [
            word.replace("␣", " ").replace("↵", "\n") for word in alternatives.locator(".word").all_text_contents()
        ]
        assert set(shown) == words
        assert alternatives.locator(".chosen .word").count() == 1
        box = alternatives.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= DESKTOP["width"]

    expect(alternatives).to_be_hidden()
    tokens.nth(5).hover()
    assert_shown(5)
    page.get_by_role("heading", name="TinyLM").hover()
    expect(alternatives).to_be_hidden()
    tokens.nth(0).focus()
    assert_shown(0)
    page.keyboard.press("ArrowRight")
    assert_shown(1)
    page.keyboard.press("End")
    assert_shown(len(expected.token_ids) - 1)
    page.keyboard.press("Escape")
    expect(alternatives).to_be_hidden()


def test_everything_can_be_done_from_the_keyboard(page: Page, stories: LLM) -> None:
    """With Tab, arrows, Enter and Escape. The focus is always visible."""
    seen: list[str] = []

    def tab_to(wanted: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            focused = page.evaluate(
                "(({ id, className, textContent: text }) => ({ id, className, text }))(document.activeElement)"
            )
            seen.append(page.evaluate("getComputedStyle(document.activeElement).outlineStyle"))
            if wanted in (focused["id"], focused["className"], focused["text"]):
                return
        raise AssertionError(f"Tab does not reach {wanted}")

    tab_to("prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type(PROMPT)
    tab_to("setting-max_tokens")
    page.keyboard.press("Home")
    for _ in range(9):
        page.keyboard.press("ArrowRight")
    tab_to("setting-temperature")
    page.keyboard.press("Home")
    page.keyboard.press("Control+Enter")
    wait_for_end(page)
    expected = stories.generate(PROMPT, SamplingParams(max_tokens=10, temperature=0))[0]
    assert page.locator("#story").text_content() == PROMPT + expected.text
    page.locator("#prompt").focus()
    tab_to("go")
    page.keyboard.press("Enter")
    wait_for_end(page)
    tab_to("token")
    expect(page.get_by_role("tooltip")).to_be_visible()
    tab_to("Back to the defaults")
    page.keyboard.press("Enter")
    assert page.locator("#setting-temperature").input_value() == "0.8"
    assert "none" not in seen


@pytest.mark.parametrize("size", [DESKTOP, {"width": 320, "height": 640}], ids=lambda size: str(size["width"]))
def test_nothing_is_wider_than_the_window(browser: Browser, url: str, size: dict[str, int]) -> None:
    with visit(browser, url, viewport=size, is_mobile=size != DESKTOP, has_touch=size != DESKTOP) as page:
        write(page, "W" * 150)  # cannot be broken into lines
        expect(page.locator("#replicas tr")).to_have_count(4)
        page.locator("#story .token").last.hover()
        assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
        assert page.evaluate(FILL_AND_MEASURE, WIDEST) == size["width"]
        page.evaluate(SHOW_ALTERNATIVES, {"W" * 16: -1})
        assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
        assert page.locator("#go").bounding_box()["height"] >= 32


@pytest.mark.parametrize("size", [DESKTOP, {"width": 390, "height": 800}], ids=lambda size: str(size["width"]))
def test_nothing_moves_while_the_page_loads(browser: Browser, url: str, size: dict[str, int]) -> None:
    """Google calls a cumulative layout shift of up to 0.1 good."""
    with visit(browser, url, viewport=size) as page:
        expect(page.locator("#replicas tr")).to_have_count(4)
        assert page.evaluate(LAYOUT_SHIFT) < 0.02


def test_forced_colours_keep_the_levels_apart(browser: Browser, url: str) -> None:
    with visit(browser, url, forced_colors="active") as page:
        write(page)
        styles = dict(page.locator("#story .token").evaluate_all(LEVELS_AND_STYLES))
        assert len(set(styles.values())) == len(styles) > 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fields_stand_out_from_the_paper(browser: Browser, url: str, scheme: str) -> None:
    """WCAG 2.2 asks for a contrast of 3 to 1."""
    with visit(browser, url, color_scheme=scheme) as page:
        for field in ("#prompt", "input[type=text]"):
            colours = page.locator(field).first.evaluate(EDGE_AND_PAPER)
            brighter, darker = sorted((luminance(colour) for colour in colours), reverse=True)
            assert (brighter + 0.05) / (darker + 0.05) >= 3


def luminance(colour: str) -> float:
    """Return the relative luminance of 'rgb(1, 2, 3)', as WCAG 2.2 defines it."""
    shares = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_live_view_counts_the_whole_service(page: Page, url: str, http: DefaultHttpxClient) -> None:
    rows = page.locator("#replicas tr")
    expect(rows).to_have_count(4)
    expect(page.locator("#live-state")).to_have_text("4 replicas")
    before = http.get(f"{url}live").json()
    for _ in range(3):
        write(page)
    expect(page.locator("#histogram rect").first).to_be_visible()
    expect(page.locator("#histogram p")).to_contain_text("answers: half within")
    assert page.locator("[data-name=tokens] polyline").count() == 1

    after = http.get(f"{url}live").json()
    assert after["complete"]

    def total(view: dict, name: str) -> int:
        return sum(replica[name] for replica in view["replicas"])

    assert total(after, "requests") - total(before, "requests") == 3
    assert total(after, "tokens") - total(before, "tokens") >= 3 * PARAMS.max_tokens
    assert total(after, "running") == total(after, "waiting") == 0
    assert {len(replica["latency_counts"]) for replica in after["replicas"]} == {len(after["latency_bounds_s"]) + 1}


def test_an_error_is_shown_and_the_page_still_works(browser: Browser, url: str) -> None:
    with visit(browser, url, expected_errors="400") as page:
        page.get_by_label("Begin a story").fill("word " * 300)
        page.get_by_role("button", name="Write").click()
        expect(page.get_by_role("alert")).to_contain_text("context")
        write(page)
        expect(page.get_by_role("alert")).to_be_hidden()


def test_every_setting_has_a_meaning_and_valid_limits(page: Page) -> None:
    fields = page.locator(".field input")
    names = fields.evaluate_all("inputs => inputs.map((input) => input.name)")
    assert set(names) == {
        *("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "seed"),
        *("presence_penalty", "frequency_penalty"),
    }
    for name, field in zip(names, fields.all(), strict=True):
        meaning = page.locator(f"#{field.get_attribute('aria-describedby')}")
        assert len(meaning.text_content() or "") > 20
        if field.get_attribute("type") == "range":
            for limit in ("min", "max", "value"):
                value = float(field.evaluate(f"input => input.{limit}"))
                given = getattr(SamplingParams(), name)
                SamplingParams(**{name: type(given)(value)})
                assert limit != "value" or value == given or name == "max_tokens"


def test_files_have_types_etags_and_a_strict_policy(url: str, http: DefaultHttpxClient) -> None:
    types = {
        "": "text/html",
        "explain": "text/html",
        "explain/main.js": "text/javascript",
        "main.js": "text/javascript",
        "base.css": "text/css",
        "icon.svg": "image/svg+xml",
    }
    for path, content_type in types.items():
        response = http.get(url + path)
        assert response.status_code == 200
        assert response.headers["content-type"].partition(";")[0] == content_type
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "://" not in response.text.replace('xmlns="http://www.w3.org/2000/svg"', "")
        plain = http.get(url + path, headers={"Accept-Encoding": "identity"})
        assert (plain.headers.get("content-encoding"), response.headers["content-encoding"]) == (None, "gzip")
        assert plain.text == response.text
        assert http.get(url + path, headers={"If-None-Match": response.headers["etag"]}).status_code == 304
    for path in (
        "__init__.py",
        "explain/index.html",
        "explain/nothing.js",
        "index.html/",
        "../pyproject.toml",
        "nothing",
    ):
        assert http.get(url + path).status_code == 404
