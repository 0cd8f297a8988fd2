"""The page at /, in a real browser: send, stream, stop, settings, wrong keys, a server gone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.runtime.server.conftest import Server

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: chromium)")
_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
KEY = "s3cret"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def long(endless: Path) -> Iterator[Server]:
    running = Server(endless, "--slots", "2")
    yield running
    running.stop()


@pytest.fixture
def page(browser: Any, long: Server) -> Iterator[Any]:
    context = browser.new_context(bypass_csp=True)  # to wait for conditions; the page has its own
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.goto(long.root + "/")
    opened.wait_for_function("document.getElementById('slots').textContent == '2'")
    yield opened
    context.close()
    assert wrong == []


def ask(page: Any, text: str) -> None:
    page.fill("#question", text)
    page.keyboard.press("Enter")


def idle(page: Any) -> None:
    page.wait_for_function("!document.getElementById('send').disabled", timeout=30_000)


def test_an_answer_streams_and_its_speed_is_told(page: Any) -> None:
    page.fill("#max_tokens", "30")
    ask(page, "hello")
    idle(page)
    assert page.locator(".turn.user").inner_text().endswith("hello")
    assert len(page.locator(".turn.assistant span").inner_text()) > 5
    speed = page.inner_text("#speed")
    assert "tokens/s" in speed and "first token after" in speed and "30 tokens" in speed
    assert page.inner_text("#model") == "long"
    assert page.inner_text("#kernels")
    assert page.evaluate("document.activeElement.id") == "question"


@pytest.mark.parametrize("how", ["button", "escape"])
def test_an_answer_can_be_stopped(page: Any, long: Server, how: str) -> None:
    page.fill("#max_tokens", "100000")
    ask(page, "hello")
    page.wait_for_function(
        "document.querySelector('.turn.assistant span')?.textContent.length > 20"
    )
    assert long.status()["running"] == 1
    page.wait_for_function("document.getElementById('running').textContent == '1'")
    if how == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    idle(page)
    page.wait_for_function("document.getElementById('running').textContent == '0'")
    kept = page.locator(".turn.assistant span").inner_text()
    assert len(kept) > 20
    assert page.inner_text("#notice") == ""


def test_settings_are_what_is_asked(page: Any) -> None:
    asked: list[Any] = []
    page.on("request", lambda r: asked.append(r.post_data_json) if r.method == "POST" else None)
    for name, value in (
        ("temperature", "1.5"),
        ("max_tokens", "24"),
        ("seed", "7"),
        ("top_k", "90"),
    ):
        page.fill(f"#{name}", value)
    page.fill("#system", "be brief")
    ask(page, "one")
    idle(page)
    ask(page, "two")
    idle(page)
    assert asked[0]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
    ]
    assert (asked[0]["temperature"], asked[0]["max_tokens"], asked[0]["seed"]) == (1.5, 24, 7)
    assert [m["role"] for m in asked[1]["messages"]] == ["system", "user", "assistant", "user"]
    page.click("#clear")
    assert page.locator(".turn").count() == 0
    page.fill("#temperature", "9")
    ask(page, "three")
    page.wait_for_function("document.getElementById('notice').textContent.includes('temperature')")


def test_a_talk_is_cleared_while_its_answer_is_awaited(browser: Any, endless: Path) -> None:
    """No slot is free, so that no token has come: the page goes on all the same."""
    server = Server(endless, "--slots", "1")
    opened = browser.new_context(bypass_csp=True).new_page()
    try:
        opened.goto(server.root + "/")
        opened.wait_for_function("document.getElementById('model').textContent == 'long'")
        body = {"model": "long", "prompt": "a", "max_tokens": 100_000, "stream": True}
        with httpx.stream("POST", f"{server.url}/completions", json=body) as other:
            lines = other.iter_lines()  # kept: without it httpx closes the connection
            next(lines)
            ask(opened, "first")
            opened.wait_for_function("document.getElementById('waiting').textContent == '1'")
            opened.click("#clear")
            idle(opened)
            assert opened.locator(".turn").count() == 0
            ask(opened, "second")
            opened.keyboard.press("Escape")
            idle(opened)
            assert opened.input_value("#question") == "second"  # it goes back to be asked anew
            assert opened.locator(".turn").count() == 0
        ask(opened, "third")
        opened.wait_for_function(
            "document.querySelector('.turn.assistant span')?.textContent.length > 0"
        )
    finally:
        opened.close()
        server.stop()


def test_keys(browser: Any, endless: Path) -> None:
    """Without one the browser asks; a wrong one is told, and the right one mends it."""
    server = Server(endless, "--api-key", KEY)
    try:
        bare = browser.new_context().new_page()
        with pytest.raises(Exception, match="AUTH"):  # headless, nobody types a password
            bare.goto(server.root + "/")
        context = browser.new_context(
            bypass_csp=True, http_credentials={"username": "me", "password": KEY}
        )
        opened = context.new_page()
        opened.goto(server.root + "/")
        opened.wait_for_function("document.getElementById('model').textContent == 'long'")
        opened.fill("#key", "wrong")
        opened.press("#key", "Tab")
        opened.wait_for_function(
            "document.getElementById('notice').textContent.includes('API key')"
        )
        opened.fill("#key", KEY)
        opened.press("#key", "Tab")
        opened.wait_for_function("document.getElementById('notice').textContent == ''")
        opened.fill("#max_tokens", "3")
        ask(opened, "hello")
        idle(opened)
        assert opened.locator(".turn.assistant").count() == 1
    finally:
        server.stop()


def test_a_server_that_is_gone_is_told(browser: Any, endless: Path) -> None:
    server = Server(endless)
    opened = browser.new_context(bypass_csp=True).new_page()
    opened.goto(server.root + "/")
    opened.wait_for_function("document.getElementById('model').textContent == 'long'")
    server.stop()
    ask(opened, "hello")
    text = "document.getElementById('notice').textContent"
    opened.wait_for_function(f"{text}.includes('does not answer')")
    idle(opened)
    assert opened.locator(".turn.assistant").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_it_fits_and_names_everything(browser: Any, long: Server, scheme: str, width: int) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    opened = context.new_page()
    opened.goto(long.root + "/")
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    ground = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    unnamed = opened.evaluate(
        "[...document.querySelectorAll('input, textarea')].filter(e => !e.labels.length).length"
    )
    assert unnamed == 0
    context.close()
