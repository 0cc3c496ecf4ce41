"""The status page, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Page
from serving import Server, toy

from shoestring.server import page


def test_the_page_is_self_contained(server: Server) -> None:
    answer = server.http.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2
    text = answer.text
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|@import|url\(", text)
    assert not re.search(r" on\w+=| style=|innerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert len(page.html()) < 40_000


def test_the_ledger(server: Server) -> None:
    before = server.http.get("/v1/ledger").json()
    server.chat(max_tokens=9)
    after = server.http.get("/v1/ledger").json()
    assert after["tokens"]["generated"] - before["tokens"]["generated"] == 9
    assert after["energy"]["joules"] > before["energy"]["joules"] > 0 and after["energy"]["status"] == "modelled"
    assert after["requests"]["open"] == 0 and after["state"] == "ready" and after["models"] == ["toy"]
    assert server.http.get("/version").json()["version"] == after["version"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    opened = Page(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def test_the_page_shows_and_chats(browser: Page, tmp_path: Path) -> None:
    with toy(seconds=0.01, engine={"prefix_cache": False}) as running:
        running.runner.recites = b"A sea <b>is</b> deep."
        browser.call("Page.navigate", url=f"{running.url}/")
        browser.until("document.getElementById('state')?.textContent === 'ready'")
        browser.until("document.querySelector('#model option') !== null")
        browser.run("at('words').value = 'What is a sea?'; at('form').requestSubmit()")
        browser.until("running !== null && at('said').innerText.includes('A sea')")
        browser.until("running === null")
        assert "A sea <b>is</b> deep." in browser.run("at('said').innerText")  # as text, not as a tag
        assert "tokens, first after" in browser.run("at('said').querySelector('small').textContent")
        browser.until("at('generated').textContent.startsWith('22 written')")
        assert "J" in browser.run("at('energy').textContent")
        running.runner.recites, running.runner.seconds = b"", 0.05
        browser.run("at('words').value = 'Go on'; at('form').requestSubmit()")
        browser.until("at('send').textContent === 'Stop' && at('said').lastChild.textContent.length > 5")
        browser.until("at('running').textContent === '1 of 16'")
        browser.run("at('form').requestSubmit()")
        browser.until("running === null && at('send').textContent === 'Send'")
        running.settled()
        for width, scheme in ((1100, "light"), (400, "dark")):
            browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            browser.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
            )
            assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        colours = browser.run("getComputedStyle(document.body).backgroundColor")
        assert colours == "rgb(22, 21, 19)"
        assert browser.errors == []
    browser.until("document.getElementById('state').textContent === 'no answer'")
