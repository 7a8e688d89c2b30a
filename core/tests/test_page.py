"""The page at /, used in a headless Chromium as its users do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright
from served import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = os.environ.get("PAGE_SCREENSHOTS")
"""A folder that keeps what the tests saw."""

expect.set_options(timeout=30_000)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium; apt-get install chromium")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server("--device", "cpu", "--kv-cache-bytes", "32M", "--api-key", "secret")
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """Opened, with the key given; whatever it asks of anybody else, and every error, fails the test."""
    opened = browser.new_page(viewport={"width": 1100, "height": 760})
    problems: list[str] = []
    asked: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text) if is_fault(message) else None)
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(server.url)
    opened.fill("#key", "secret")
    opened.keyboard.press("Enter")
    expect(opened.locator("#alive")).to_have_text("ready")
    yield opened
    opened.close()
    assert problems == []
    assert [url for url in asked if not url.startswith(server.url)] == []


def is_fault(message: ConsoleMessage) -> bool:
    """An error in the console, but for the answers that the tests ask for: 401 and 400."""
    return message.type == "error" and "status of 40" not in message.text


def wait_until(holds: Callable[[], bool], page: Page) -> None:
    for _ in range(300):
        if holds():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it did not come to be in 30 s")


def keep(page: Page, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")


def test_an_answer_that_comes_after_the_key_does_not_ask_for_it_again(browser, server):
    """Of two requests that went out without a key, the second is refused only after the first was given one."""
    opened = browser.new_page()
    opened.goto(server.url)
    expect(opened.locator("#key-dialog")).to_be_visible()
    late = opened.evaluate_handle("""async () => {
        const { withKey } = await import("./ui/api.js");
        let answer;
        const refused = new Promise((resolve) => { answer = resolve; });
        const sent = [];
        withKey((given) => {
            sent.push(given.Authorization ?? null);
            return sent.length === 1 ? refused : { status: 200 };
        });
        return { sent, refuse: () => answer({ status: 401 }) };
    }""")
    opened.fill("#key", "secret")
    opened.keyboard.press("Enter")
    expect(opened.locator("#alive")).to_have_text("ready")
    late.evaluate("(late) => late.refuse()")
    opened.wait_for_function("(late) => late.sent.length === 2", arg=late)
    assert late.evaluate("(late) => late.sent") == [None, "Bearer secret"]
    expect(opened.locator("#key-dialog")).to_be_hidden()
    opened.close()


def test_a_message_is_answered_as_it_comes_and_tokens_show_their_chances(page):
    page.fill("#max_tokens", "24")
    page.fill("#text", "How do I reverse a list?")
    page.keyboard.press("Enter")
    answer = page.locator("li.assistant")
    expect(answer.locator(".meta")).to_contain_text("tokens")
    answer.get_by_role("button", name="Tokens").click()
    tokens = answer.locator(".token")
    assert tokens.count() > 3
    tokens.nth(1).hover()
    expect(page.locator("#tip")).to_be_visible()
    expect(page.locator("#tip")).to_contain_text("%")
    keep(page, "chat")
    tokens.nth(2).focus()
    expect(page.locator("#tip")).to_be_visible()


def test_regenerate_replaces_the_answer_and_new_chat_forgets(page):
    page.fill("#max_tokens", "5")
    page.fill("#text", "Hello")
    page.click("#send")
    expect(page.locator("li.assistant .meta")).to_contain_text("5 tokens")
    page.click("#again")
    expect(page.locator("#again")).to_be_enabled()
    expect(page.locator("li.assistant")).to_have_count(1)
    page.click("#clear")
    expect(page.locator("#messages li")).to_have_count(0)


def test_escape_stops_and_the_engine_is_told(page, server):
    before = server.metric("anychip_request_failure_total")
    page.fill("#max_tokens", "1500")
    page.fill("#temperature", "100")
    page.uncheck("#probabilities")
    page.fill("#text", "Count for ever")
    page.click("#send")
    expect(page.locator("#stop")).to_be_enabled()
    wait_until(lambda: server.metric("anychip_num_requests_running") == 1, page)
    page.keyboard.press("Escape")
    expect(page.locator("li.assistant .meta")).to_be_attached()
    expect(page.locator("#stop")).to_be_disabled()
    # A browser may take what comes for five more seconds, in the hope of keeping the connection.
    wait_until(lambda: server.metric("anychip_num_requests_running") == 0, page)
    assert server.metric("anychip_request_failure_total") == before + 1


def test_what_the_server_refuses_is_shown(page):
    page.fill("#temperature", "500")
    page.fill("#text", "Hello")
    page.click("#send")
    expect(page.locator("li.failed")).to_contain_text("temperature is 500")


MARKDOWN = """## Lists

Call `reverse()` on **it**, or:

```python
print(items[::-1])  # <b>
```

1. slices
2. copies

| way | copies |
|---|---|
| slice | yes |

[the docs](https://docs.python.org)
"""

HOSTILE = """<script>window.hurt = 1</script><img src="http://127.0.0.1:9/a" onerror="window.hurt = 1">

![spy](http://127.0.0.1:9/b) [run](javascript:window.hurt=1) [data](data:text/html,<script>window.hurt=1</script>)

<a href="javascript:window.hurt=1">x</a> <svg onload="window.hurt=1"></svg> <iframe src="http://127.0.0.1:9/c"></iframe>

[nested](<javascript:window.hurt=1>) <style>body { display: none }</style> <form action="http://127.0.0.1:9/d">
"""


def answer_with(page: Page, *pieces: str) -> None:
    """In place of the model."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=f"{lines}data: [DONE]\n\n", content_type="text/event-stream"),
    )
    page.fill("#text", "Hello")
    page.click("#send")
    expect(page.locator("li.assistant .meta")).to_be_attached()


def test_an_answer_is_shown_as_markdown(page):
    answer_with(page, MARKDOWN[:40], MARKDOWN[40:])
    text = page.locator("li.assistant .text")
    expect(text.locator("h2")).to_have_text("Lists")
    expect(text.locator("p code")).to_have_text("reverse()")
    expect(text.locator("strong")).to_have_text("it")
    expect(text.locator("pre code")).to_have_text("print(items[::-1])  # <b>\n")
    assert text.locator("ol li").all_inner_texts() == ["slices", "copies"]
    assert text.locator("td").all_inner_texts() == ["slice", "yes"]
    assert text.locator("a").evaluate("link => [link.href, link.target, link.rel]") == [
        "https://docs.python.org/", "_blank", "noopener noreferrer nofollow"
    ]  # fmt: skip
    keep(page, "markdown")


def test_an_answer_can_neither_run_nor_load_anything(page):
    answer_with(page, HOSTILE)
    text = page.locator("li.assistant .text")
    expect(text).to_contain_text("window.hurt = 1")  # as text
    assert text.locator("script, img, iframe, svg, style, form").count() == 0
    assert [
        href for href in text.locator("a").evaluate_all("links => links.map(one => one.getAttribute('href'))") if href
    ] == []
    page.wait_for_timeout(300)
    assert page.evaluate("window.hurt") is None
    keep(page, "hostile")


def test_a_model_that_writes_html_writes_text(page):
    page.evaluate("document.querySelector('#empty').hidden = true")
    page.fill("#text", "<img src=x onerror=alert(1)>")
    page.fill("#max_tokens", "1")
    page.click("#send")
    expect(page.locator("li.user")).to_have_text("<img src=x onerror=alert(1)>")
    assert page.locator("#messages img").count() == 0


def test_the_dashboard_shows_numbers_and_works_from_the_keyboard(page):
    page.fill("#max_tokens", "40")
    page.fill("#text", "Hello")
    page.keyboard.press("Enter")
    expect(page.locator("li.assistant .meta")).to_contain_text("tokens")
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#board")).to_be_visible()
    expect(page.locator("#cards")).to_contain_text("KV blocks used")
    expect(page.locator("#memory")).to_contain_text("Weights")
    expect(page.locator("#kernels")).to_contain_text("rms_norm")
    expect(page.locator("#latency")).to_contain_text("ms")
    page.wait_for_timeout(1500)
    keep(page, "dashboard")


def test_it_fits_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.fill("#max_tokens", "20")
    page.fill("#text", "How do I sort?")
    page.click("#send")
    expect(page.locator("li.assistant .meta")).to_contain_text("tokens")
    keep(page, "phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#send").bounding_box()["y"] < 844


def test_without_the_page_there_is_nothing():
    server = Server("--device", "cpu", "--kv-cache-bytes", "32M", "--no-ui")
    try:
        assert server.client.get("/").status_code == 404
        assert server.client.get("/ui/main.js").status_code == 404
    finally:
        assert server.stop() == 0
