"""What `marlin_convert` offers: named, typed, documented, imported late, and silent."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import re
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import marlin_convert
from marlin_convert import MarlinConvertError, ProgressEvent
from tests.support.gptq_checkpoints import GPTQLayer, Source, two_layers, write_source

FUNCTIONS = ["convert", "plan", "prove", "push", "restore", "verify"]
PAGE = Path(__file__).parents[1] / "docs" / "reference" / "python.md"


def test_the_names() -> None:
    names = marlin_convert.__all__
    assert names == sorted(names)
    assert set(names) <= set(dir(marlin_convert))
    assert {name for name in names if getattr(marlin_convert, name) is None} == set()
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in names if name not in text and not name.startswith("_")] == []
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = marlin_convert.nothing


def test_what_is_not_public_says_so() -> None:
    """The package says it of its own modules, and each room of its."""
    assert "What is not named in `__all__`\nis not public." in str(marlin_convert.__doc__)
    rooms = list(Path(marlin_convert.__file__).parent.glob("*/__init__.py"))
    assert len(rooms) == 10
    for path in rooms:
        assert "Not public: `marlin_convert` names what is." in str(ast.get_docstring(ast.parse(path.read_text())))


def test_the_errors_are_all_there() -> None:
    def below(kind: type[MarlinConvertError]) -> set[type[MarlinConvertError]]:
        return {kind}.union(*(below(x) for x in kind.__subclasses__() if x.__module__ == "marlin_convert.errors"))

    assert {kind.__name__ for kind in below(MarlinConvertError)} <= set(marlin_convert.__all__)


def entries(section: str) -> list[str]:
    """What a section of a docstring describes: the words before the colons."""
    return [line.split(":")[0].strip() for line in section.splitlines() if re.match(r" {4}\w+:", line)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_typed_and_documented(name: str) -> None:
    function = getattr(marlin_convert, name)
    signature, text = inspect.signature(function), inspect.getdoc(function) or ""
    head, _, rest = text.partition("\n\nArgs:\n")
    arguments, _, rest = rest.partition("\n\nReturns:\n")
    returns, _, raises = rest.partition("\n\nRaises:\n")
    assert head
    assert returns
    described = [
        line.split(":")[0].strip() for line in arguments.splitlines() if line.startswith("    ") and line[4] != " "
    ]
    assert described == list(signature.parameters)
    kinds = [p.kind for p in signature.parameters.values()]
    assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) <= 2
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
    assert signature.return_annotation is not inspect.Signature.empty
    assert set(entries(raises)) <= set(marlin_convert.__all__)
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    defaults = ", ".join(
        f"{p.name}={json.dumps(str(p.default)) if isinstance(p.default, str) else p.default}"
        for p in signature.parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    )
    assert f"*, {defaults})`" in page


def test_types_resolve() -> None:
    """Of a checker's view: every annotation names something that can be imported."""
    from marlin_convert.conversion.plan import Plan
    from marlin_convert.conversion.proof import Proof
    from marlin_convert.conversion.report import Report
    from marlin_convert.conversion.restore import Restored
    from marlin_convert.conversion.verify import Verification

    names = {"Report": Report, "Plan": Plan, "Proof": Proof, "Restored": Restored, "Verification": Verification}
    for name in FUNCTIONS:
        assert typing.get_type_hints(getattr(marlin_convert, name), localns=names)["return"] in {*names.values(), str}


@pytest.mark.slow
def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, marlin_convert; dir(marlin_convert); marlin_convert.convert; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "torch", "transformers", "huggingface_hub", "click", "rich"} & set(loaded)


def test_all_of_them_in_silence(source: Source, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    planned = marlin_convert.plan(source.folder)
    report = marlin_convert.convert(source.folder, tmp_path / "out", verify=True, device="cpu")
    assert report.plan == planned
    assert report.verification is not None
    assert report.verification.ok
    assert marlin_convert.verify(source.folder, tmp_path / "out", device="cpu").ok
    restored = marlin_convert.restore(tmp_path / "out", tmp_path / "back")
    assert restored.settings_known
    before = load_file(source.folder / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(marlin_convert.SourceError, match="not a finished result"):
        marlin_convert.push(tmp_path, "someone/model")
    with pytest.raises(marlin_convert.AlreadyMarlin):
        marlin_convert.convert(tmp_path / "out", tmp_path / "again")
    with pytest.raises(marlin_convert.OptionError, match="choose auto, marlin, marlin_ext"):
        marlin_convert.plan(source.folder, format="gguf")
    assert capfd.readouterr() == ("", "")


def test_progress(tmp_path: Path) -> None:
    layers = two_layers() | {"sorted": GPTQLayer(K=256, N=256, g_idx=np.arange(256)[::-1] // 128)}
    write_source(tmp_path / "source", layers)
    events: list[ProgressEvent] = []
    report = marlin_convert.convert(
        tmp_path / "source", tmp_path / "out", verify=True, device="cpu", progress=events.append
    )
    assert list(dict.fromkeys(e.stage for e in events)) == ["converting", "verifying"]
    for stage in ("converting", "verifying"):
        mine = [e for e in events if e.stage == stage]
        assert (mine[0].bytes_done, mine[0].layers_done) == (0, 0)
        assert {(e.bytes_total, e.layers_total) for e in mine} == {(report.plan.bytes_out, 3)}
        for before, after in itertools.pairwise(mine):
            assert before.bytes_done <= after.bytes_done
            assert before.layers_done <= after.layers_done
        assert (mine[-1].bytes_done, mine[-1].layers_done) == (report.plan.bytes_out, 3)
        assert {e.layer for e in mine} >= set(layers)


def test_what_the_callback_raises_stops_the_work(source: Source, tmp_path: Path) -> None:
    def enough(event: ProgressEvent) -> None:
        if event.bytes_done:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        marlin_convert.convert(source.folder, tmp_path / "out", progress=enough)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_notebook_shows_bars(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, *, total: int, desc: str, unit: str, unit_scale: bool) -> None:
            self.total, self.desc, self.n, self.closed = total, desc, 0, False
            bars.append(self)

        def update(self, n: int) -> None:
            assert not self.closed
            self.n += n

        def close(self) -> None:
            self.closed = True

    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    marlin_convert.convert(source.folder, tmp_path / "out", verify=True, device="cpu")
    assert [bar.desc for bar in bars] == ["converting", "verifying"]
    assert all(bar.closed and bar.n == bar.total for bar in bars)
    shell.kernel = None  # IPython in a terminal
    marlin_convert.convert(source.folder, tmp_path / "again", device="cpu")
    assert len(bars) == 2
