"""`space/`, the page as a Space: what it asks for is what the package needs."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "space"


def needed(text: str, name: str) -> set[str]:
    """The requirements in a list of pyproject.toml."""
    found = re.search(rf"^{name} = \[(.*?)\]$", text, re.M | re.S)
    assert found, name
    return set(re.findall(r'"([^"]+)"', found[1]))


def test_requirements() -> None:
    """The package's own, and those of its page but for Gradio, which the Space's SDK brings."""
    project = (ROOT / "pyproject.toml").read_text()
    asked = {line for line in (SPACE / "requirements.txt").read_text().splitlines() if line and line[0] != "#"}
    page = needed(project, "web")
    (gradio,) = (x for x in page if x.startswith("gradio"))
    assert asked == needed(project, "dependencies") | page - {gradio}
    metadata = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert metadata["sdk"] == "gradio"
    (least,) = re.findall(r">=([\d.]+)$", gradio)
    assert tuple(map(int, str(metadata["sdk_version"]).split("."))) >= tuple(map(int, least.split(".")))


def test_metadata() -> None:
    """What is said to the Hub about the app and the login of its visitors."""
    metadata = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert (SPACE / metadata["app_file"]).is_file()
    assert metadata["hf_oauth"] is True
    assert set(metadata["hf_oauth_scopes"]) == {"read-repos", "gated-repos", "write-repos", "manage-repos"}
    least = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert least
    assert int(metadata["python_version"].split(".")[1]) >= int(least[1])
