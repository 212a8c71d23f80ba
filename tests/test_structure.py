"""The order of the modules, and what is imported when: the command line must answer at once, and converting on a CPU
must not load what only other devices and other formats need.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gptq import Source

import marlin_convert
from marlin_convert import ops

PACKAGE = Path(marlin_convert.__file__).parent
MODULES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__")}

#: A module imports from lower floors only; within a floor, modules do not know each other.
FLOORS = (
    ("errors", "layout", "progress", "scales"),
    ("checkpoint", "config", "device", "hub", "repack", "stream"),
    ("cuda", "download", "ops", "publish", "shards", "upload"),
    ("linear", "plan"),
    ("source", "supply"),
    ("hf", "verify", "vllm"),
    ("card",),
    ("convert",),
    ("bench", "generate", "restore"),
    ("tokens",),
    ("render",),
    ("cli",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}

HEAVY = ("torch", "transformers", "numpy", "rich", "huggingface_hub", "safetensors", "tqdm")


def own_imports(path: Path) -> Iterator[str]:
    """Modules of this package that the file imports anywhere: at the top, inside functions, for types only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            elif node.module and node.module.split(".")[0] == "marlin_convert":
                yield from node.module.split(".")[1:2] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("marlin_convert."))


def imports_at_the_top(path: Path) -> set[str]:
    """What importing the file imports: first names of packages, own modules with a dot before them; without what only
    type checkers see."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found.update("." * node.level + name.split(".")[0] for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_every_module_has_a_floor() -> None:
    assert MODULES.keys() == FLOOR.keys()
    assert sum(map(len, FLOORS)) == len(FLOOR)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_from_lower_floors_only(name: str) -> None:
    used = {n for n in own_imports(MODULES[name]) if n in MODULES}
    wrong = {n for n in used if FLOOR[n] >= FLOOR[name]}
    assert not wrong, f"{name} (floor {FLOOR[name]}) imports {sorted((n, FLOOR[n]) for n in wrong)}"


def test_own_imports_sees_all_of_them() -> None:
    """The check above can fail only if imports are found: these are known."""
    assert {"repack", "layout"} <= set(own_imports(MODULES["ops"]))  # repack: inside functions
    assert {"convert", "render", "errors"} <= set(own_imports(MODULES["cli"]))  # render: for types and in functions
    assert set(own_imports(MODULES["scales"])) == set()


#: Modules of torch tensors through and through, themselves imported late.
TORCH_MODULES = {"bench", "cuda", "hf", "linear", "shards", "tokens", "vllm"}


@pytest.mark.parametrize("name", sorted(set(MODULES) - TORCH_MODULES))
def test_torch_and_the_like_are_imported_late(name: str) -> None:
    assert not imports_at_the_top(MODULES[name]) & {"torch", "transformers", "huggingface_hub", "safetensors", "tqdm"}


@pytest.mark.parametrize("name", sorted(set(MODULES) - TORCH_MODULES))
def test_modules_of_torch_tensors_are_imported_late(name: str) -> None:
    assert not imports_at_the_top(MODULES[name]) & {f".{module}" for module in TORCH_MODULES}


def loaded_after(code: str, *arguments: object, **environment: str) -> set[str]:
    """Top-level packages that a new Python has loaded after running `code`."""
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    process = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return set(json.loads(process.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments",
    [None, ["--help"], ["--version"], ["convert", "--help"], ["verify", "--help"], ["demo", "--help"], ["verify"],
     ["push", "--help"],
     ["source", "out", "--no-such-option"], ["source", "out", "--max-shard-size", "many"], ["bench", "--help"],
     ["bench", "--batch", "0"], ["bench", "--tokens"], ["generate", "--help"], ["generate", "out"],
     ["generate", "x", "--prompt", "x", "--top-k", "0"]],
    ids=lambda arguments: " ".join(arguments or ["import"]),
)  # fmt: skip
def test_the_command_line_answers_without_heavy_imports(arguments: list[str] | None) -> None:
    code = "import marlin_convert.cli"
    if arguments is not None:
        code += f"\ntry: marlin_convert.cli.main({arguments!r})\nexcept SystemExit: pass"
    loaded = loaded_after(code)
    assert {"marlin_convert", "click"} <= loaded
    assert not loaded & set(HEAVY)


CONVERT = """
from marlin_convert.convert import Options, convert
assert convert(sys.argv[1], sys.argv[2], Options(verify=True, device="cpu")).verification.ok
"""


def test_converting_and_verifying_load_no_torch(source: Source, tmp_path: Path) -> None:
    if not ops.native_available():
        pytest.skip("without the native library, torch does the work")
    loaded = loaded_after(CONVERT, source.folder, tmp_path / "out")
    assert "numpy" in loaded
    assert not loaded & {"torch", "transformers"}
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_without_the_native_library_torch_does_the_work(source: Source, tmp_path: Path) -> None:
    """And so the test above would see it."""
    loaded = loaded_after(CONVERT, source.folder, tmp_path / "out", **{ops.NO_NATIVE: "1"})
    assert "torch" in loaded
    assert "transformers" not in loaded
