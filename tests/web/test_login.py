"""The page as a Space: visitors log in with Gradio's own button, at a provider on loopback in place of the Hub's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from marlin_convert.cli.commands import DEMO_FOLDER
from tests.support.cli import SECRET
from tests.support.hub_server import Hub
from tests.support.web import ALICE, BOB, NEEDS_A_BROWSER, WAIT, Server, Visitor, descendants, serving, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator

    from tests.support.login import Login

pytestmark = [
    *NEEDS_A_BROWSER,
    pytest.mark.skipif(importlib.util.find_spec("authlib") is None, reason="gradio's extra for logins is missing"),
]


class SpaceVisitor(Visitor):
    """A visitor of a Space, where no field asks for a token."""

    def ask(self, source: str, token: str = "") -> None:
        assert not token
        self.page.get_by_label("Checkpoint on the Hub").fill(source)
        self.page.get_by_role("button", name="Show the plan").click()

    def answers(self, name: str) -> Locator:
        """Press the button, and return what answers the provider's question.

        Where the server is slow, Gradio takes it for gone and loads its page again, over what the button began.
        """
        from playwright.sync_api import TimeoutError as NothingCame

        link = self.page.get_by_role("link", name=name, exact=True)
        with suppress(NothingCame):
            self.page.get_by_role("button", name="Sign in with Hugging Face").click()
            link.wait_for(timeout=WAIT / 5)
            return link
        self.page.get_by_role("button", name="Sign in with Hugging Face").click()
        return link

    def log_in(self, name: str) -> None:
        self.load(self.answers(name).click)
        self.page.get_by_role("button", name=f"Logout ({name})").wait_for()

    def log_out(self, name: str) -> None:
        self.load(self.page.get_by_role("button", name=f"Logout ({name})").click)
        self.page.get_by_role("button", name="Sign in with Hugging Face").wait_for()


@pytest.fixture
def login() -> Iterator[Login]:
    from tests.support.login import Login

    with Login({"alice": ALICE, "bob": BOB}) as provider:
        yield provider


@pytest.fixture
def space(filled: Hub, login: Login, tmp_path: Path) -> Iterator[Server]:
    """The page as it is in a Space; at the end, no token is in its log, and no job has left anything."""
    # A login of the Space's own must serve no visitor.
    with serving(filled, tmp_path, "--host", "0.0.0.0", HF_TOKEN=f"{SECRET}_space", **login.settings) as running:
        running.address = f"http://127.0.0.1:{urlsplit(running.address).port}"
        yield running
        running.stop()
    assert SECRET not in running.log.read_text()
    assert login.secret not in running.log.read_text()
    assert running.left() == []


@pytest.fixture
def visit(chromium: Browser, space: Server) -> Iterator[Callable[..., SpaceVisitor]]:
    contexts = []

    def visit(**options: Any) -> SpaceVisitor:
        contexts.append(chromium.new_context(**options))
        return SpaceVisitor(contexts[-1].new_page(), space.address)

    yield visit
    for context in contexts:
        context.close()


def test_a_login_a_conversion_and_a_logout(filled: Hub, login: Login, visit: Callable[..., SpaceVisitor]) -> None:
    filled.add("alice/private", DEMO_FOLDER, private=True, members={ALICE})
    visitor = visit()
    assert visitor.page.get_by_label("Hugging Face token").count() == 0
    visitor.ask("org/gptq")
    visitor.plan()
    assert not any(request.token for request in filled.requests)
    visitor.convert()
    assert visitor.problem("#progress").startswith("Log in: the result is published in your account")
    visitor.ask("alice/private")
    assert "no such repository" in visitor.problem("#plan")

    visitor.log_in("alice")
    assert login.asked[0]["scope"] == "openid profile read-repos write-repos"
    visitor.ask("alice/private")
    visitor.plan()
    visitor.convert(name="mine", private=True)
    assert visitor.published().inner_text() == "alice/mine"
    assert {r.token for r in filled.requests if r.path.endswith("/whoami-v2")} == {ALICE}

    visitor.log_out("alice")
    visitor.ask("alice/private")
    assert "no such repository" in visitor.problem("#plan")
    assert not any(cookie["name"] == "session" for cookie in visitor.page.context.cookies())


def test_two_who_are_logged_in(filled: Hub, visit: Callable[..., SpaceVisitor]) -> None:
    filled.add("bob/secret", DEMO_FOLDER, private=True, members={BOB})
    first, second = visit(), visit()
    first.log_in("alice")
    second.log_in("bob")
    first.ask("org/gptq")
    second.ask("bob/secret")
    first.plan()
    second.plan()
    filled.rate = 5e5
    first.convert()
    first.page.locator("#progress progress").first.wait_for()
    second.convert()
    second.page.get_by_text("1 conversion is ahead of it").wait_for()
    filled.rate = None
    for visitor in (first, second):
        visitor.published()
    assert {"alice/gptq-marlin", "bob/secret-marlin"} <= set(filled.repositories)
    for request in filled.requests:
        owner = next((name for name in ("alice", "bob") if name in request.path), None)
        if owner is not None:
            assert request.token == {"alice": ALICE, "bob": BOB}[owner], request.path
    first.ask("bob/secret")
    assert "no such repository" in first.problem("#plan")


def test_where_the_token_is(filled: Hub, space: Server, tmp_path: Path, visit: Callable[..., SpaceVisitor]) -> None:
    """In the visitor's own session cookie, which no script can read, and in the process of their conversion."""
    visitor = visit()
    visitor.log_in("alice")
    visitor.ask("org/gptq")
    visitor.plan()
    filled.rate = 2e5
    visitor.convert()
    visitor.page.locator("#progress progress").first.wait_for()
    for pid in [space.process.pid, *descendants(space.process.pid)]:
        for what in ("environ", "cmdline"):
            assert ALICE.encode() not in Path(f"/proc/{pid}/{what}").read_bytes()
    for path in tmp_path.rglob("*"):
        with suppress(FileNotFoundError):  # it is at work
            assert not path.is_file() or ALICE.encode() not in path.read_bytes(), path
    cookies = visitor.page.context.cookies()
    assert [cookie["name"] for cookie in cookies if cookie["httpOnly"] and cookie["secure"]] == ["session"]
    assert "session" not in visitor.page.evaluate("document.cookie")
    assert ALICE not in visitor.page.evaluate("JSON.stringify(localStorage) + JSON.stringify(sessionStorage)")
    assert ALICE not in visitor.page.content()
    filled.rate = None
    visitor.published()


def test_who_says_no_finds_back_to_the_page(visit: Callable[..., SpaceVisitor]) -> None:
    visitor = visit()
    visitor.answers("No").click()
    visitor.page.get_by_text("You are not logged in: The user said no.").wait_for()
    visitor.load(visitor.page.get_by_role("link", name="Back to the page").click)
    visitor.page.get_by_role("button", name="Sign in with Hugging Face").wait_for()
    visitor.ask("org/gptq")
    visitor.plan()


def test_a_login_that_has_ended(filled: Hub, login: Login, visit: Callable[..., SpaceVisitor]) -> None:
    """The page asks for another login, and lets nothing be done with the old one."""
    login.lasts = 1
    visitor = visit()
    visitor.load(visitor.answers("alice").click)
    visitor.ask("org/gptq")
    visitor.plan()

    def refused() -> bool:
        visitor.convert()
        return "Log in:" in visitor.problem("#progress")

    until(refused)
    assert set(filled.repositories) == {"org/gptq"}
