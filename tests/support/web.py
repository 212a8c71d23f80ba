"""The web page in a browser: the server as a process of its own, and what a visitor does."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.cli import PATIENCE, SECRET, running
from tests.support.hub_server import Hub

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

#: Where Debian and others put what Playwright does not bring itself.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

#: Milliseconds for which a visitor waits before something is taken to hang.
WAIT = 1000 * PATIENCE


def browser() -> str | None:
    """Return a Chromium that is installed; CHROMIUM names another."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


#: The marks of tests that use the page.
NEEDS_A_BROWSER = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
    pytest.mark.skipif(browser() is None, reason="no Chromium is installed"),
]

#: Whose token is whose.
ALICE, BOB, READER = f"{SECRET}_alice", f"{SECRET}_bob", f"{SECRET}_reader"


class Server:
    """`marlin-convert web`, serving at `address`; `own_address` has the key of this computer's own user."""

    def __init__(self, process: subprocess.Popen[str], own_address: str, log: Path, work_dir: Path) -> None:
        self.process, self.own_address, self.log, self.work_dir = process, own_address, log, work_dir
        self.address = own_address.split("?")[0]

    def left(self) -> list[Path]:
        """Return the folders of jobs, of this server and of others before it."""
        return [path for path in self.work_dir.glob(".server.*/*") if path.name != ".lock"]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(PATIENCE) == 130


@contextmanager
def serving(hub: Hub, folder: Path, *arguments: object, **environment: str) -> Iterator[Server]:
    """The page of a computer that is logged in nowhere, with `hub` as the Hub."""
    log, work_dir = folder / "server.log", folder / "work"
    env = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "", "NO_PROXY": "*", "HF_HOME": str(folder / "hf-home"), "GRADIO_ANALYTICS_ENABLED": "0",
        **environment,
    }  # fmt: skip
    command = [sys.executable, "-m", "marlin_convert.cli", "web", "--port", 0, "--no-browser", "--work-dir", work_dir]
    with (
        log.open("a") as stderr,
        running([*command, *arguments], env=env, stdout=subprocess.PIPE, stderr=stderr, cwd=folder) as process,
    ):
        # In a Space, Gradio says something of its own before.
        said = iter(process.stdout or ())
        found = next((x for x in (re.search(r"http://\S+", line) for line in said) if x), None)
        assert found, log.read_text()
        yield Server(process, found[0], log, work_dir)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have."""
    found = []
    for path in Path("/proc").glob(f"{pid}/task/*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found


class Visitor:
    """One browser's page, used by what is written on it."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        page.set_default_timeout(WAIT)
        self.load(lambda: page.goto(address))

    def load(self, by: Callable[[], object]) -> None:
        """Do what loads the page, and wait until it obeys: it is drawn before, and is ready only when its own first
        request has been answered."""
        self.page.evaluate("window.before = true")
        by()
        self.page.wait_for_function(READY)

    def ask(self, source: str, token: str = "") -> None:
        """Give a token and a source, and ask for the plan."""
        self.page.get_by_label("Hugging Face token").fill(token)
        self.page.get_by_label("Checkpoint on the Hub").fill(source)
        self.page.get_by_role("button", name="Show the plan").click()

    def plan(self) -> str:
        """Return the text of the plan, once it is there."""
        self.page.locator("#plan h3").wait_for()
        return self.text("#plan")

    def convert(self, **fields: Any) -> None:
        """Press the button, after filling in `fields` by their ids."""
        button = self.page.get_by_role("button", name="Convert and publish")
        button.wait_for()
        for name, value in fields.items():
            field = self.page.locator(f"#{name}").locator("input, textarea")
            field.set_checked(value) if isinstance(value, bool) else field.fill(value)
        button.click()

    def published(self) -> Locator:
        """Return the link to the result, once there is one; what goes wrong before is the error of the test."""
        link = self.page.locator("#result h3 a")
        link.or_(self.page.locator("#progress [role=alert]")).first.wait_for()
        assert link.count(), self.text("#progress")
        return link

    def problem(self, where: str) -> str:
        """Return the error that is shown in the part `where` of the page, once there is one."""
        shown = self.page.locator(f"{where} [role=alert]")
        shown.wait_for()
        return shown.inner_text()

    def text(self, where: str) -> str:
        return self.page.locator(where).inner_text()

    def everything_kept(self) -> str:
        """Return what the browser keeps of this page, all of it."""
        return str(self.page.evaluate(KEPT)) + str(self.page.context.cookies())


#: Whether this is another document than the one that was marked, and has had an answer.
READY = """() => !window.before && performance.getEntriesByType("resource").some(
  entry => /gradio_api\\/(run|queue)/.test(entry.name) && entry.responseEnd > 0)"""

#: Local and session storage, and every entry of every IndexedDB.
KEPT = """async () => {
  const found = [JSON.stringify(localStorage), JSON.stringify(sessionStorage)];
  for (const {name} of await indexedDB.databases()) {
    const db = await new Promise((ok, no) => { const r = indexedDB.open(name); r.onsuccess = () => ok(r.result);
                                               r.onerror = no; });
    for (const store of db.objectStoreNames) {
      const all = await new Promise((ok, no) => { const r = db.transaction(store).objectStore(store).getAll();
                                                  r.onsuccess = () => ok(r.result); r.onerror = no; });
      found.push(name, JSON.stringify(all));
    }
    db.close();
  }
  return found.join("\\n");
}"""
