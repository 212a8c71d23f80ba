"""The page in a real browser, headless, against a Hub on loopback."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from marlin_convert.cli.commands import DEMO_FOLDER
from marlin_convert.options import REPORT_FILE, VERIFY_FILE
from tests.support.cli import SECRET
from tests.support.gptq_checkpoints import GPTQLayer, two_layers, write_source
from tests.support.hub_server import Hub
from tests.support.web import ALICE, BOB, NEEDS_A_BROWSER, READER, Server, Visitor, descendants, serving, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = NEEDS_A_BROWSER


@pytest.fixture
def server(filled: Hub, tmp_path: Path) -> Iterator[Server]:
    """The page; at the end, no token is in its log, and no job has left anything."""
    with serving(filled, tmp_path) as running:
        yield running
        running.stop()
    assert SECRET not in running.log.read_text()
    assert running.left() == []
    assert not list(running.work_dir.glob(".server.*"))


@pytest.fixture
def visit(chromium: Browser, server: Server) -> Iterator[Callable[..., Visitor]]:
    """Open the page in a browser of its own: no cookie and nothing kept is shared with other visitors."""
    contexts = []

    def visit(address: str = server.address, **options: Any) -> Visitor:
        contexts.append(chromium.new_context(**options))
        return Visitor(contexts[-1].new_page(), address)

    yield visit
    for context in contexts:
        context.close()


def uploads(hub: Hub) -> list[str]:
    """Who has written what to the Hub: paths of requests that change something."""
    return [r.path for r in hub.requests if r.method in ("POST", "PUT")]


def test_the_plan_comes_before_anything_travels(filled: Hub, visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask("https://huggingface.co/org/gptq")
    plan = visitor.plan()
    assert "org/gptq at commit" in plan
    assert "original Marlin format" in plan
    assert (
        "56 to convert, 18 other tensors to copy" in plan
    )  # 7 in each of 8 blocks; 2 norms in each, 1 more, embedding
    assert re.search(r"vLLM .* and Transformers 5 with marlin-convert", plan)
    assert uploads(filled) == []
    whole = (DEMO_FOLDER / "model.safetensors").stat().st_size
    read = [r.range for r in filled.requests if r.path.endswith("model.safetensors") and r.method == "GET"]
    assert all(read), "a request without a range reads the whole file"
    bounds = [tuple(map(int, str(r).removeprefix("bytes=").split("-"))) for r in read]
    assert (
        sum(end - begin + 1 for begin, end in bounds) < whole / 2
    )  # headers and scales; the rest of a file this small is mostly these


def test_a_conversion(filled: Hub, visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask("org/gptq", ALICE)
    visitor.plan()
    visitor.convert(name="mine", private=True)
    link = visitor.published()
    there = filled.repositories["alice/mine"]
    commit = there.refs["main"]
    assert link.get_attribute("href") == f"{filled.url}/alice/mine/commit/{commit}"
    assert there.private
    files = {name: content for name, content in there.commits[commit].items() if isinstance(content, bytes)}
    assert json.loads(files[VERIFY_FILE])["ok"] is True
    assert json.loads(files[REPORT_FILE])["source_commit"] == filled.repositories["org/gptq"].refs["main"]
    shown = visitor.text("#result")
    assert "56 of 56 layers exactly equal, 18 other tensors byte for byte" in shown
    assert visitor.page.locator("#result tbody tr").count() == 56
    assert visitor.page.evaluate("document.querySelector('.mc-picture').naturalWidth") > 300  # it was drawn
    assert SECRET not in visitor.everything_kept()
    assert SECRET not in "".join(str(content) for content in files.values())


def test_progress_moves_and_a_page_that_is_loaded_again_goes_on(
    filled: Hub, tmp_path: Path, visit: Callable[..., Visitor]
) -> None:
    layers = {f"model.layers.{i}.mlp.up_proj": GPTQLayer(K=2048, N=4096, seed=i) for i in range(4)}
    filled.add("org/large", write_source(tmp_path / "large", layers, shards=4, in_order=True).folder)
    visitor = visit()
    visitor.ask("org/large", ALICE)
    visitor.plan()
    filled.rate = 1.5e6
    visitor.convert()
    stage = visitor.page.locator("[data-stage='converting and verifying']")
    stage.wait_for()
    rates, bars, layers_done = set(), set(), set()

    def moved() -> bool:
        text = stage.inner_text()
        bars.add(stage.locator("progress").get_attribute("value"))
        layers_done.update(re.findall(r"(\d) of 4 layers", text))
        rates.update(re.findall(r"B of [\d.]+ MB, ([\d.]+ [kM]?B/s), \d+ s left", text))
        return len(bars) > 2 and len(layers_done) > 2 and bool(rates)

    until(moved)
    visitor.page.reload()
    stage.wait_for()
    filled.rate = None
    visitor.published()


def test_cancelling(filled: Hub, server: Server, visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask("org/gptq", ALICE)
    visitor.plan()
    filled.rate = 2e5
    visitor.convert()
    visitor.page.locator("#progress progress").first.wait_for()
    assert server.left() != []
    visitor.page.get_by_role("button", name="Cancel").click()
    visitor.page.get_by_text("Nothing was published, and nothing is left here").wait_for()
    until(lambda: server.left() == [])
    assert not any("/commit/" in path for path in uploads(filled))
    filled.rate = None
    visitor.convert()  # and once more
    visitor.published()


def test_a_refused_source_says_why_and_offers_no_conversion(
    filled: Hub, tmp_path: Path, visit: Callable[..., Visitor]
) -> None:
    layers = two_layers(bits=3, stored_zero=3)
    three_bits = write_source(tmp_path / "three", layers, quantization={"bits": 3})
    filled.add("org/three", three_bits.folder)
    visitor = visit()
    visitor.ask("org/three", ALICE)
    visitor.page.locator("#plan [role=alert]").wait_for()
    assert "3-bit weights; Marlin has 4 and 8 bits" in visitor.problem("#plan")
    assert not visitor.page.get_by_role("button", name="Convert and publish").is_visible()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("org/nothing", "org/nothing: no such repository, or it is private and needs a token of yours"),
        ("org/gated", "ask for access at"),
        ("/etc", "'/etc' is not a repository on the Hub; write it like owner/name"),
        ("..", "is not a repository on the Hub"),
        ("", "is not a repository on the Hub"),
        ("https://huggingface.co/datasets/org/data", "the address of a dataset, not of a model"),
        ("<img src=x onerror=alert(1)>", "<img src=x onerror=alert(1)>"),  # shown, not obeyed
    ],
)
def test_what_cannot_be_a_source(
    source: str, words: str, filled: Hub, tmp_path: Path, visit: Callable[..., Visitor]
) -> None:
    filled.add("org/gated", DEMO_FOLDER, gated=True)
    visitor = visit()
    visitor.ask(source)
    said = visitor.problem("#plan")
    assert words in said
    assert "--" not in said  # no option of the command line
    assert visitor.page.locator("#plan img").count() == 0


def test_tokens_that_may_not(filled: Hub, visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask("org/gptq", f"{SECRET}_unknown")
    visitor.plan()
    visitor.convert()
    wrong = visitor.problem("#progress")
    assert "the Hub refuses access (401)" in wrong
    assert "give another token" in wrong
    visitor.page.get_by_label("Hugging Face token").fill(READER)
    visitor.convert()
    visitor.page.get_by_text("the token may only read").wait_for()
    visitor.page.get_by_label("Hugging Face token").fill("")
    visitor.convert()
    visitor.page.get_by_text("give a token that may write").wait_for()
    visitor.page.get_by_label("Hugging Face token").fill(ALICE)
    visitor.convert(name="bob/theirs")
    visitor.page.get_by_text("alice may not write there").wait_for()
    assert set(filled.repositories) == {"org/gptq"}


def test_a_branch_and_a_pull_request(filled: Hub, visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask("org/gptq", ALICE)
    visitor.plan()
    visitor.page.get_by_label("a branch").check()
    visitor.convert(branch="marlin")
    visitor.published()
    assert set(filled.repositories["alice/gptq-marlin"].refs) == {"main", "marlin"}
    visitor.page.get_by_label("a pull request").check()
    visitor.convert(name="org/gptq")
    visitor.page.locator("#result h3 a", has_text="org/gptq").wait_for()
    assert "refs/pr/1" in filled.repositories["org/gptq"].refs
    assert len(filled.repositories["org/gptq"].commits) == 2  # and main is as it was


def test_two_users_at_once(filled: Hub, visit: Callable[..., Visitor]) -> None:
    """The second waits for the first; each has their own token, and sees nothing of the other's."""
    first, second = visit(), visit()
    filled.add("bob/secret", DEMO_FOLDER, private=True, members={BOB})
    first.ask("org/gptq", ALICE)
    second.ask("bob/secret", BOB)
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
    for visitor, theirs in ((first, "bob"), (second, "alice")):
        assert theirs not in visitor.page.content()
    for request in filled.requests:
        owner = next((name for name in ("alice", "bob") if name in request.path), None)
        if owner is not None:
            assert request.token == {"alice": ALICE, "bob": BOB}[owner], request.path
    # What alone bob may read, alice cannot: nothing that was read for him is kept for others.
    first.ask("bob/secret", ALICE)
    assert "no such repository" in first.problem("#plan")


def test_a_token_is_nowhere_but_in_its_process(
    filled: Hub, server: Server, tmp_path: Path, visit: Callable[..., Visitor]
) -> None:
    """While a conversion runs: in no process's environment or arguments, in no file, and no login of the computer."""
    visitor = visit()
    visitor.ask("org/gptq", ALICE)
    visitor.plan()
    filled.rate = 2e5
    visitor.convert()
    visitor.page.locator("#progress progress").first.wait_for()
    job = [
        pid
        for pid in descendants(server.process.pid)
        if b"marlin_convert.web" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert job, "the conversion has no process of its own"
    for pid in [server.process.pid, *descendants(server.process.pid)]:
        for what in ("environ", "cmdline"):
            assert ALICE.encode() not in Path(f"/proc/{pid}/{what}").read_bytes()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(server.work_dir in path.parents for path in files)
    for path in files:
        with suppress(FileNotFoundError):  # it is at work
            assert ALICE.encode() not in path.read_bytes(), path
    assert not [path for path in files if path.name in ("token", "stored_tokens")]
    filled.rate = None
    visitor.published()


def test_at_phone_width(visit: Callable[..., Visitor]) -> None:
    """Nothing sticks out: tables scroll by themselves."""
    visitor = visit(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    visitor.ask("org/gptq", ALICE)
    visitor.plan()
    visitor.convert()
    visitor.published()
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert visitor.page.locator(".mc-picture").bounding_box()["width"] <= 360


def test_only_the_own_user_has_the_login_of_the_computer(filled: Hub, chromium: Browser, tmp_path: Path) -> None:
    """The address that is printed has a key; without it, another user of the machine has only their own token."""
    with serving(filled, tmp_path, HF_TOKEN=ALICE) as server:
        for address, published in ((server.address, False), (server.own_address, True)):
            context = chromium.new_context()
            visitor = Visitor(context.new_page(), address)
            visitor.ask("org/gptq")
            visitor.plan()
            visitor.convert()
            if published:
                assert visitor.published().inner_text() == "alice/gptq-marlin"
            else:
                assert "log in, or give a token" in visitor.problem("#progress").lower()
                assert not any(r.token for r in filled.requests)
            context.close()
        server.stop()


def test_a_page_for_everybody_has_no_login(filled: Hub, chromium: Browser, tmp_path: Path) -> None:
    with serving(filled, tmp_path, "--host", "0.0.0.0", HF_TOKEN=ALICE) as server:
        assert "key=" not in server.own_address
        context = chromium.new_context()
        visitor = Visitor(context.new_page(), re.sub("//[^:]+", "//127.0.0.1", server.address))
        visitor.ask("org/gptq")
        visitor.plan()
        assert not any(request.token for request in filled.requests)
        context.close()
        server.stop()


def test_what_a_killed_server_leaves_is_removed(filled: Hub, chromium: Browser, tmp_path: Path) -> None:
    with serving(filled, tmp_path) as server:
        context = chromium.new_context()
        visitor = Visitor(context.new_page(), server.address)
        visitor.ask("org/gptq", ALICE)
        visitor.plan()
        filled.rate = 1e5
        visitor.convert()
        visitor.page.locator("#progress progress").first.wait_for()
        server.process.kill()
        server.process.wait()
        context.close()
        filled.rate = None
        until(lambda: server.left() == [])  # the conversion's process sees that nobody asks any more
        (next(iter(server.work_dir.glob(".server.*/"))) / "job").mkdir()  # as if that had been killed as well
    with serving(filled, tmp_path) as server:
        assert server.left() == []
        assert len(list(server.work_dir.glob(".server.*/"))) == 1
        server.stop()
    assert not any("/commit/" in path for path in uploads(filled))
