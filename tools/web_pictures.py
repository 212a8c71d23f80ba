"""Take the pictures of the web page in docs/images, with a Hub on loopback: `python -m tools.web_pictures`.

Needs Gradio, Playwright and Chromium, and nothing from the network.
"""

import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from marlin_convert.cli.commands import DEMO_FOLDER
from tests.support.hub_server import Account, Hub
from tests.support.web import Visitor, browser, serving

IMAGES = Path(__file__).parents[1] / "docs" / "images"
TOKEN = "hf_of_the_picture"


def take() -> None:
    with Hub() as hub, tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        hub.add("demo/shakespeare-gptq", DEMO_FOLDER)
        hub.accounts[TOKEN] = Account("you")
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        with serving(hub, Path(folder)) as server:
            for name, options in (
                ("web", {"viewport": {"width": 900, "height": 800}}),
                ("web-phone", {"viewport": {"width": 390, "height": 844}, "is_mobile": True}),
            ):
                visitor = Visitor(chromium.new_context(**options).new_page(), server.own_address)
                visitor.ask("demo/shakespeare-gptq", TOKEN)
                visitor.plan()
                visitor.page.get_by_role("button", name="Convert and publish").wait_for()
                if name == "web-phone":
                    visitor.page.screenshot(path=IMAGES / f"{name}.png")
                    continue
                visitor.page.screenshot(path=IMAGES / "web-plan.png", full_page=True)
                visitor.convert()
                visitor.published()
                part = visitor.page.locator("#result")
                part.screenshot(path=IMAGES / "web-result.png")
            server.stop()
        chromium.close()


if __name__ == "__main__":
    take()
    print(IMAGES)
