"""The page that explains the model, in a real Chromium, on the real service."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.browser import DESKTOP, LAYOUT_SHIFT, barriers, visit
from openai import DefaultHttpxClient
from playwright.sync_api import Browser, Page, Route, expect

from tinylm import LLM

SENTENCE = "Once upon a time, there was a little"
PARTS = ("tokens", "embedding", "layer", "lens", "scores", "sampling", "next", "cache", "int8", "batch")
MINUS = "\N{MINUS SIGN}"
BUSY = "503"  # a refused question is an error in the browser's log
PHONE = {"width": 390, "height": 844}
NARROW = {"width": 320, "height": 640}
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 0.0},
    {"temperature": 2.0, "top_k": 7},
    {"temperature": 0.6, "top_p": 0.5, "top_k": 40, "min_p": 0.05},
    {"temperature": 1.3, "min_p": 0.2, "repetition_penalty": 1.5},
    {"temperature": 0.05, "top_p": 0.05, "top_k": 1, "min_p": 1.0, "repetition_penalty": 2.0},
]
DEFAULTS = {"temperature": 0.8, "top_k": 0, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.0}
CHOOSE = """async ([settings, ids]) => {
  const { state } = await import("./explain/state.js");
  const { choose } = await import("./explain/sampler.js");
  const seen = new Set(state.tokens.slice(1).map(({ id }) => id));
  const { stages, greedy } = choose(state.logits, seen, settings, 0.5);
  const of_ids = ({ name, n_kept, probabilities }) => ({ name, n_kept, shares: ids.map(id => probabilities[id]) });
  return { greedy, stages: stages.map(of_ids) };
}"""
CODE = """async () => (await import("./explain/questions.js")).QUESTIONS.map(({ code, part }) => [...code, part])"""
# Both in one call, because the page draws the line again when it learns the name of the picked token.
BOXES_OF_LINE_AND_PICKED = """() => [".shares", ".shares .picked"].map(at => {
  const { x, width } = document.querySelector(at).getBoundingClientRect();
  return { x, width };
})"""
expect.set_options(timeout=30_000)  # ms; only ends a wait that would never end
pytestmark = pytest.mark.parametrize("shared_service", ["serve.yaml"], indirect=True)


@contextmanager
def explain(browser: Browser, url: str, **options: object) -> Iterator[Page]:
    """Open the page, and wait until its overview is complete."""
    with visit(browser, f"{url}explain", expected_errors=BUSY, origin=url, **options) as page:
        wait_for_overview(page)
        yield page


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    with explain(browser, url) as page:
        yield page


def wait_for_overview(page: Page) -> None:
    expect(page.locator("#overview")).to_have_attribute("aria-busy", "false")
    for name, caption in (("next", ".word"), ("lens", "i"), ("scores", ".bar-of")):
        expect(page.locator(f"[data-mini={name}] {caption}").first).to_be_attached()
    expect(page.locator("[data-says=embedding]")).to_have_text(re.compile(r"^\d+ numbers"))
    expect(page.locator("[data-says=layer]")).to_have_text(re.compile(r"^layer \d+, head \d+"))


def open_part(page: Page, name: str) -> None:
    """Open a part by its picture in the overview, if it is not open yet, and wait for its content."""
    if not page.locator(f"#{name}").evaluate("part => part.open"):
        page.locator(f".path a[href='#{name}']").click()
    if name != "batch":  # it shows nothing before a request
        expect(page.locator(f"#{name}")).to_have_attribute("aria-busy", "false")
    expect(page.locator(f"#{name} .body > .error")).to_have_count(0)


def type_sentence(page: Page, text: str) -> None:
    page.get_by_label("The sentence", exact=True).fill(text)
    page.get_by_role("button", name="Follow it").click()
    expect(page.locator("[data-mini=text]")).to_have_text(text if len(text) <= 24 else f"… {text[-22:]}")
    wait_for_overview(page)


def ask(http: DefaultHttpxClient, url: str, piece: str, **fields: object) -> Any:
    """Return a piece of the explanation. Ask again while a replica is busy."""
    while True:
        response = http.post(f"{url}explain/{piece}", json=fields)
        if response.status_code != 503:
            return response.raise_for_status().json()
        time.sleep(float(response.headers["retry-after"]))


# --- the sentence and the parts


def test_a_typed_sentence_is_in_every_part(page: Page, url: str, http: DefaultHttpxClient, stories: LLM) -> None:
    type_sentence(page, SENTENCE)
    for name in PARTS:
        open_part(page, name)
    ids = stories.tokenizer.encode_document(SENTENCE)
    assert page.locator("#tokens tbody td:nth-child(2)").all_text_contents() == [str(token) for token in ids]
    assert page.locator("#embedding canvas").evaluate("({ width, height }) => [width, height]") == [192, len(ids)]
    assert page.locator("#layer .all-heads input").count() == 96
    lens = ask(http, url, "lens", prompt=SENTENCE, top=3)
    assert page.locator("#lens tbody td:nth-child(2)").all_text_contents() == [str(row[-1]) for row in lens["ranks"]]
    answer = lens["answers"][-1]["text"].strip()
    expect(page.locator("#lens .finding")).to_contain_text(f"answers “{answer}”")
    expect(page.locator("#scores tbody tr").first).to_contain_text(answer)
    scores = ask(http, url, "scores", prompt=SENTENCE)
    shown = page.locator("#scores tbody td:nth-child(2)").all_text_contents()
    assert [float(text.replace(MINUS, "-")) for text in shown] == [
        pytest.approx(x, abs=0.006) for x in scores["logits"][:10]
    ]
    cache = ask(http, url, "cache", prompt=SENTENCE)
    expect(page.locator("#cache .finding")).to_contain_text(f"{cache['used_bytes'] // len(ids):,} bytes for each")
    matmul = ask(http, url, "matmul", prompt=SENTENCE, layer=3, name="qkv", position=len(ids) - 1)
    shown = page.locator("#int8 [data-is=table] tbody td:nth-child(3)").all_text_contents()
    assert [int(text.replace(MINUS, "-")) for text in shown] == matmul["values"][0][:8]


def test_a_chosen_head_and_token_show_what_the_service_says(page: Page, url: str, http: DefaultHttpxClient) -> None:
    open_part(page, "layer")
    page.get_by_label("Mark the heads").select_option("before")
    marked = page.locator("#layer .marked input")
    expect(marked).to_have_count(5)
    page.locator("#layer .all-heads input[value='8.2']").click()
    page.locator("#layer .chooser input[value='4']").click()
    expect(page.locator("[data-is=head-title]")).to_have_text("Layer 8, head 2")
    sentence = page.get_by_label("The sentence", exact=True).input_value()
    (rows,) = ask(http, url, "attention", prompt=sentence, layer=8, head=2)["weights"]
    best = max(rows[4]) / 255
    expect(page.locator("[data-is=reads] tbody tr").first).to_contain_text(f"{100 * best:.0f} %")
    expect(page.locator("[data-says=layer]")).to_have_text("layer 8, head 2")  # the overview follows
    page.locator("#layer .all-heads input[value='8.2']").press("ArrowDown")
    expect(page.locator("[data-is=head-title]")).to_have_text("Layer 10, head 2")


# --- settings


def test_moving_the_temperature_changes_the_distribution(page: Page, url: str, http: DefaultHttpxClient) -> None:
    open_part(page, "sampling")
    page.get_by_label("Top p", exact=True).fill("1")
    sentence = page.get_by_label("The sentence", exact=True).input_value()
    for temperature in (0.5, 1.5):
        page.get_by_label("Temperature").fill(str(temperature))
        scores = ask(http, url, "scores", prompt=sentence, temperature=temperature, top_p=1.0)
        expected = [100 * shares[-1] for shares in scores["probabilities"][:3]]
        shown = page.locator("#sampling tbody td:nth-child(3)").all_text_contents()[:3]
        assert [float(text.removesuffix(" %")) for text in shown] == [pytest.approx(x, abs=0.51) for x in expected]
    page.get_by_label("Temperature").fill("0")
    expect(page.locator("#sampling .finding")).to_contain_text("1 of 4,096 tokens can be chosen")
    page.get_by_role("button", name="Back to the defaults").click()
    assert page.get_by_label("Temperature").input_value() == "0.8"


def test_settings_give_the_probabilities_of_the_service(page: Page, url: str, http: DefaultHttpxClient) -> None:
    sentence = "The dog saw a big dog. The"
    type_sentence(page, sentence)
    for changes in SETTINGS:
        settings = {**DEFAULTS, **changes}
        expected = ask(http, url, "scores", prompt=sentence, top=100, **settings)
        ids = [token["id"] for token in expected["tokens"]]
        found = page.evaluate(CHOOSE, [settings, ids])
        assert found["greedy"] == expected["greedy"]["id"]
        of_service = {stage["name"]: (i, stage) for i, stage in enumerate(expected["stages"])}
        for stage in found["stages"]:
            column, of_name = of_service[stage["name"]]
            assert stage["n_kept"] == of_name["n_kept"], (settings, stage["name"])
            shares = np.array(expected["probabilities"])[:, column]
            np.testing.assert_allclose(
                stage["shares"], shares, rtol=1e-5, atol=1e-9, err_msg=f"{settings} {stage['name']}"
            )


def test_a_taken_token_joins_the_sentence(page: Page) -> None:
    before = page.get_by_label("The sentence", exact=True).input_value()
    open_part(page, "next")
    open_part(page, "sampling")
    page.get_by_label("Temperature").fill("0")
    taken = page.locator("#sampling tbody th .word").first.text_content().replace("␣", " ")
    n_before = int(re.match(r"\d+", page.locator("[data-says=tokens]").text_content())[0])
    page.get_by_role("button", name="Take “").click()
    expect(page.get_by_label("The sentence", exact=True)).to_have_value(before + taken)
    expect(page.locator("#busy")).to_have_text(f"“{taken.strip()}” joined the sentence.")
    expect(page.locator("[data-says=tokens]")).to_have_text(f"{n_before + 1} tokens")
    page.get_by_role("button", name="Take the last token back").click()
    expect(page.get_by_label("The sentence", exact=True)).to_have_value(before)


def test_a_refused_question_is_asked_again(browser: Browser, url: str) -> None:
    """The first answers of the page are those of a busy replica."""
    with explain(browser, url) as page:
        refused = []

        def refuse_once(route: Any) -> None:
            if refused:
                return route.continue_()
            refused.append(route.request.url)
            body = '{"error": {"message": "no explanation now", "code": "busy"}}'
            route.fulfill(status=503, headers={"Retry-After": "1"}, content_type="application/json", body=body)

        page.route("**/explain/logits", refuse_once)
        type_sentence(page, SENTENCE)
        open_part(page, "scores")
        assert refused
        page.unroute_all(behavior="wait")


def test_a_wrong_sentence_is_an_error_and_the_page_still_works(browser: Browser, url: str) -> None:
    with visit(browser, f"{url}explain", expected_errors=f"400|{BUSY}", origin=url) as page:
        wait_for_overview(page)
        page.get_by_label("The sentence", exact=True).fill(" dog" * 65)
        page.get_by_role("button", name="Follow it").click()
        expect(page.get_by_role("alert")).to_contain_text("The sentence has 65 tokens: it must have 1 to 64")
        page.get_by_label("The sentence", exact=True).fill("")
        page.get_by_role("button", name="Follow it").click()
        expect(page.get_by_role("alert")).to_have_text("Type a sentence first.")
        type_sentence(page, SENTENCE)
        expect(page.get_by_role("alert")).to_be_hidden()
        open_part(page, "tokens")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=lambda size: str(size["width"]))
def test_the_mark_lies_on_the_picked_token(browser: Browser, url: str, size: dict[str, int]) -> None:
    with explain(browser, url, viewport=size) as page:
        type_sentence(page, "Tom ate the")
        open_part(page, "next")
        for number in (0.0, 0.02, 0.25, 0.48, 0.5, 0.9, 0.999):
            page.get_by_label("Random number").fill(str(number))
            expect(page.locator("#random-output")).to_have_text(f"{number:.3f}")
            line, picked = page.evaluate(BOXES_OF_LINE_AND_PICKED)
            place = line["x"] + number * line["width"]
            assert picked["x"] - 2 <= place <= picked["x"] + picked["width"] + 2, number


def test_the_address_has_the_part_and_the_sentence(browser: Browser, url: str) -> None:
    with visit(browser, f"{url}explain", expected_errors=f"400|{BUSY}", origin=url) as page:
        wait_for_overview(page)
        page.locator("#lens summary").click()
        expect(page).to_have_url(re.compile("explain#lens&text=One%20day"))
        page.locator("#lens summary").click()
        expect(page).to_have_url(re.compile("explain#text=One%20day"))
        page.evaluate("location.hash = '#scores&text=The%20sun'")  # as a reader who pastes a link
        expect(page.get_by_label("The sentence", exact=True)).to_have_value("The sun")
        expect(page.locator("#scores")).to_have_attribute("open", "")
        wait_for_overview(page)
        too_long = "%20dog" * 65
        page.evaluate(f"location.hash = '#text={too_long}'")
        expect(page.get_by_role("alert")).to_contain_text("The sentence has 65 tokens")
        assert page.evaluate("location.hash") == f"#text={too_long}"


# --- the batch


def test_the_reader_s_request_is_in_the_batch_under_load(page: Page, url: str) -> None:
    ended = threading.Event()

    def load() -> None:
        with DefaultHttpxClient(trust_env=False, timeout=60) as http:
            while not ended.is_set():
                body = {"prompt": "Once upon a time", "max_tokens": 100, "ignore_eos": True}
                http.post(f"{url}v1/completions", json=body)

    clients = [threading.Thread(target=load) for _ in range(8)]
    for client in clients:
        client.start()
    try:
        open_part(page, "batch")
        page.get_by_role("button", name="Send it alone").click()
        about = page.locator("#batch [data-is=about]")
        expect(about).to_contain_text("Your request is number")
    finally:
        ended.set()
        for client in clients:
            client.join()
    number = re.search(r"number (\d+)", about.text_content())[1]
    expect(page.locator("#batch [data-is=requests] tr.chosen th")).to_have_text(f"{number} (yours)")
    assert page.locator("#batch .own rect").count() > 0
    assert page.locator("#batch .other rect").count() > 0
    times = page.locator("#batch [data-is=times] tbody td:last-child").all_text_contents()
    shares = [float(re.search(r"· (?:< )?([\d.]+) %", text)[1]) for text in times]
    assert len(shares) == 3
    assert sum(shares) == pytest.approx(100, abs=1.5)


def test_the_reader_s_request_shares_steps_with_the_others_of_the_page(page: Page) -> None:
    """Even on a service without load."""
    open_part(page, "batch")
    page.get_by_role("button", name="Send it with 15 others").click()
    about = page.locator("#batch [data-is=about]")
    expect(about).to_contain_text(re.compile(r"It shared \d+ of them, with up to \d+ others? at once"))


def test_a_late_look_still_finds_the_request(page: Page) -> None:
    """A slow browser looks when all requests have ended. The last steps hold them until others come."""

    def answer_late(route: Route) -> None:
        time.sleep(2)  # a request takes less than half a second
        route.continue_()

    open_part(page, "batch")
    page.route("**/explain/batch", answer_late)
    page.get_by_role("button", name="Send it with 15 others").click()
    expect(page.locator("#batch [data-is=about]")).to_contain_text(re.compile(r"It shared \d+ of them"))


# --- for everybody


def test_the_tour_can_be_finished_from_the_keyboard(browser: Browser, url: str) -> None:
    with explain(browser, url, reduced_motion="reduce") as page:
        press, result = page.keyboard.press, page.locator("#tour-result")

        def tab_to(selector: str, key: str = "Tab") -> None:
            for _ in range(80):
                if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                    assert page.evaluate("getComputedStyle(document.activeElement).visibility") == "visible"
                    return
                press(key)
            raise AssertionError(f"{key} does not reach {selector}")

        def try_until_solved(selector: str, key: str, most: int) -> Callable[[], None]:
            def answer() -> None:
                tab_to(selector)
                for _ in range(most):
                    press(key)
                    expect(page.locator("details[aria-busy=true]")).to_have_count(0)
                    page.wait_for_timeout(30)
                    if result.text_content():
                        return

            return answer

        def from_the_end(selector: str) -> Callable[[], None]:
            def answer() -> None:
                tab_to(selector)
                press("End")
                try_until_solved(selector, "ArrowLeft", 16)()

            return answer

        def write(text: str) -> Callable[[], None]:
            def answer() -> None:
                tab_to("#sentence", "Shift+Tab")
                press("Control+A")
                page.keyboard.type(text)
                press("Enter")

            return answer

        answers = [
            try_until_solved("#tokens .chooser input", "ArrowRight", 8),
            write("The astrolabe"),
            try_until_solved("#embedding .chooser input", "ArrowLeft", 8),
            try_until_solved("[name=one-head]", "ArrowRight", 96),
            try_until_solved("#layer .chooser input", "ArrowLeft", 8),
            from_the_end("#layer-number"),
            try_until_solved("[name=layer-of-lens]", "ArrowDown", 16),
            write("One day, Tom ate a"),
            try_until_solved("#slider-temperature", "ArrowRight", 40),
            try_until_solved("#slider-temperature", "ArrowLeft", 40),
            try_until_solved("#slider-top_p", "ArrowLeft", 20),
            try_until_solved("#take", "Enter", 1),
            try_until_solved("#length", "ArrowRight", 255),
            try_until_solved("[name=matmul]", "ArrowRight", 4),
            try_until_solved("[data-send='15']", "Enter", 1),
        ]
        tab_to("#tour-start")
        press("Enter")
        for number, answer in enumerate(answers, 1):
            expect(page.locator("#tour-number")).to_have_text(f"Question {number} of {len(answers)}")
            expect(page.locator("#question")).to_be_focused()
            expect(result).to_be_empty()
            expect(page.locator("[aria-busy=true]")).to_have_count(0)
            answer()
            expect(result).to_contain_text("Yes.")
            expect(page.locator("#tour-code")).to_contain_text("In the code")
            tab_to("#tour-next", "Shift+Tab" if number not in (2, 8) else "Tab")
            press("Enter")
        expect(page.locator("#busy")).to_have_text("You have finished the tour.")
        expect(page.locator("#tour-start")).to_be_focused()


def test_the_layer_that_adds_the_most_is_the_service_s(page: Page, url: str, http: DefaultHttpxClient) -> None:
    sentence = "The sun"  # the first layer adds the most
    type_sentence(page, sentence)
    lengths = np.array(ask(http, url, "norms", prompt=sentence)["norms"])[:, -1]
    expected = 1 + int(np.diff(lengths).argmax())
    go_to_question(page, 6)
    for layer in (expected % 16 + 1, expected):
        expect(page.locator("#tour-result")).to_be_empty()
        page.get_by_label("Layer", exact=True).fill(str(layer))
        expect(page.locator("#layer")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#tour-result")).to_contain_text("Yes.")


@pytest.mark.parametrize("number", [9, 11])
def test_a_question_without_an_answer_uses_the_first_sentence(page: Page, number: int) -> None:
    """After this sentence, one token has most of the probability at every setting."""
    first = page.get_by_label("The sentence", exact=True).input_value()
    type_sentence(page, "One day, Tom went to the park with")
    go_to_question(page, number)
    expect(page.get_by_label("The sentence", exact=True)).to_have_value(first)
    page.get_by_role("button", name="Show me").click()
    expect(page.locator("#tour-result")).to_contain_text("Yes.")


def go_to_question(page: Page, number: int) -> None:
    page.get_by_role("button", name="Start the tour").click()
    for skipped in range(1, number):
        expect(page.locator("#tour-number")).to_have_text(f"Question {skipped} of 15")
        expect(page.locator("[aria-busy=true]")).to_have_count(0)
        page.locator("#tour-next").click()
    expect(page.locator("#tour-number")).to_have_text(f"Question {number} of 15")
    expect(page.locator("[aria-busy=true]")).to_have_count(0)


def test_every_question_names_code_that_exists(page: Page) -> None:
    questions = page.evaluate(CODE)
    assert len(questions) == 15
    for file, name, part in questions:
        assert f"def {name}(" in Path(file).read_text(encoding="utf-8"), (file, name)
        assert part in PARTS
    assert {part for *_, part in questions} == set(PARTS)


@pytest.mark.parametrize("size", [DESKTOP, PHONE, NARROW], ids=lambda size: str(size["width"]))
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_barrier(browser: Browser, url: str, size: dict[str, int], scheme: str) -> None:
    options = {"viewport": size, "is_mobile": size != DESKTOP, "has_touch": size != DESKTOP, "color_scheme": scheme}
    with explain(browser, url, reduced_motion="reduce", **options) as page:
        assert barriers(page) == []
        for name in PARTS:
            open_part(page, name)
        page.get_by_role("button", name="Send it alone").click()
        expect(page.locator("#batch [data-is=timeline]")).to_be_visible()
        page.get_by_role("button", name="Start the tour").click()
        assert barriers(page) == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE, NARROW], ids=lambda size: str(size["width"]))
def test_nothing_is_wider_than_the_window(browser: Browser, url: str, size: dict[str, int]) -> None:
    with explain(browser, url, viewport=size, is_mobile=size != DESKTOP, has_touch=size != DESKTOP) as page:
        type_sentence(page, "W" * 20 + " and the dog" * 10)
        for name in PARTS:
            open_part(page, name)
        page.get_by_role("button", name="Start the tour").click()
        assert page.evaluate("document.documentElement.scrollWidth") == size["width"]


def test_nothing_moves_while_the_page_loads(browser: Browser, url: str) -> None:
    """Google calls a cumulative layout shift of up to 0.1 good."""
    for size in (DESKTOP, PHONE):
        with explain(browser, url, viewport=size) as page:
            assert page.evaluate(LAYOUT_SHIFT) < 0.05


def test_forced_colours_and_reduced_motion_keep_what_matters(browser: Browser, url: str) -> None:
    with explain(browser, url, forced_colors="active", reduced_motion="reduce") as page:
        for name in ("layer", "sampling", "next"):
            open_part(page, name)
        outline = "label => getComputedStyle(label).outlineStyle"
        assert page.locator(".chooser label:has(:checked)").first.evaluate(outline) == "solid"
        assert page.locator(".chooser label:not(:has(:checked))").first.evaluate(outline) == "none"
        background = "bar => getComputedStyle(bar).backgroundImage"
        assert "linear-gradient" in page.locator("#sampling .bar-of").first.evaluate(background)
        colours = page.locator(".shares span").evaluate_all(
            "all => all.map(one => getComputedStyle(one).backgroundColor)"
        )
        assert len(set(colours)) == 2  # the picked token, and the others
        moving = page.evaluate("document.getAnimations().length")
        assert moving == 0
