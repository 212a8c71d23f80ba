"""A browser, and a Hub with a checkpoint and some accounts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from marlin_convert.cli.commands import DEMO_FOLDER
from tests.support.hub_server import Account, Hub
from tests.support.web import ALICE, BOB, READER, browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # No name leads anywhere: the page fetches nothing that it could not do without.
        arguments = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        started = playwright.chromium.launch(executable_path=browser(), args=arguments)
        yield started
        started.close()


@pytest.fixture
def filled(hub: Hub) -> Hub:
    hub.add("org/gptq", DEMO_FOLDER)
    hub.accounts |= {ALICE: Account("alice"), BOB: Account("bob"), READER: Account("reader", role="read")}
    return hub
