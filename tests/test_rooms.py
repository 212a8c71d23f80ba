"""The order of the rooms, and what is imported when: the command line must answer at once, and converting on a CPU
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

import marlin_convert
from marlin_convert.native import cpu
from tests.support.cli import PATIENCE
from tests.support.gptq_checkpoints import Source

PACKAGE = Path(marlin_convert.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
}

#: Who may import whom: a room from those that stand below it, and any module from its own room or the ground. The
#: ground are the modules of no room, but for the doors, which only pass names on.
ROOMS = (
    ("cli",),
    ("bench", "fleet", "web"),
    ("engines",),
    ("conversion",),
    ("native", "hub"),
    ("formats", "checkpoint"),
    ("ground",),
)
LEVEL = {room: level for level, rooms in enumerate(reversed(ROOMS)) for room in rooms}
DOORS = {"_api", "hf", "sglang", "vllm"}

HEAVY = ("torch", "transformers", "numpy", "rich", "huggingface_hub", "safetensors", "tqdm")


def room(module: str) -> str:
    """The room that a module, named from the package on, belongs to."""
    first, _, rest = module.partition(".")
    return first if rest else "ground"


def statements(name: str, everywhere: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements of a module: all of them, or those that run when it is imported (neither inside functions nor
    for type checkers only)."""

    def visit(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        late = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if everywhere or not (late or for_types):
            for child in ast.iter_child_nodes(node):
                yield from visit(child)

    yield from visit(ast.parse(MODULES[name].read_text(encoding="utf-8")))


def imported(name: str, everywhere: bool) -> set[str]:
    """Full names that a module imports, from this package or another: `a.b` for `import a.b`, and both `a.b` and
    `a.b.c` for `from a.b import c`, which may be a module as well."""
    parents = ["marlin_convert", *name.split(".")]
    found: set[str] = set()
    for node in statements(name, everywhere):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif not node.level:
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        else:
            base = (
                ".".join([*parents[: -node.level], *filter(None, [node.module])]) if node.level else node.module or ""
            )
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def own_imports(name: str, everywhere: bool = True) -> set[str]:
    """Modules of this package that module `name` imports."""
    prefix = "marlin_convert."
    return {x.removeprefix(prefix) for x in imported(name, everywhere) if x.startswith(prefix)} & MODULES.keys()


def test_every_module_stands_in_a_room() -> None:
    assert {room(name) for name in MODULES} == LEVEL.keys()


@pytest.mark.parametrize("name", sorted(set(MODULES) - DOORS))
def test_a_room_imports_from_lower_rooms_only(name: str) -> None:
    wrong = {
        other for other in own_imports(name) if room(other) != room(name) and LEVEL[room(other)] >= LEVEL[room(name)]
    }
    assert not wrong, f"{name} imports {sorted(wrong)}"


def test_no_module_imports_itself_in_a_circle() -> None:
    """Inside a room as well: following imports never comes back."""
    arrows = {name: own_imports(name) for name in MODULES}
    left = dict(arrows)
    while free := {name for name, used in left.items() if not used & left.keys()}:
        left = {name: used for name, used in left.items() if name not in free}
    assert not left


def test_own_imports_sees_all_of_them() -> None:
    """The checks above can fail only if imports are found: these are known."""
    assert {"native.reference", "formats.layout"} <= own_imports("native.cpu")  # reference: inside functions
    assert {"conversion.convert", "cli.output", "errors"} <= own_imports("cli.commands")  # for types and in functions
    assert own_imports("formats.bf16") == set()


#: Modules of torch tensors through and through, themselves imported late.
TORCH_MODULES = {
    "bench.products", "bench.tokens", "engines.column_marks", "engines.expert_modules", "engines.grouped_experts",
    "engines.linear", "engines.tensor_parallel", "engines.transformers_modules", "engines.transformers_quantizer",
    "engines.transformers_trial",
    "engines.vllm_calls", "engines.vllm_choice", "engines.vllm_config", "engines.vllm_linear",
    "engines.vllm_loading", "engines.vllm_moe", "engines.vllm_plugin", "engines.serving_config",
    "engines.serving_experts", "engines.serving_linear", "engines.serving_loading", "engines.sglang_config",
    "engines.sglang_linear", "engines.sglang_loading", "engines.sglang_moe", "engines.sglang_plugin", "hf",
    "native._cuda_checks", "native.cuda",
    "native.cuda_library", "native.moe", "native.moe_library", "sglang", "vllm",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(MODULES) - TORCH_MODULES))
def test_torch_and_the_like_are_imported_late(name: str) -> None:
    packages = {other.split(".")[0] for other in imported(name, everywhere=False)}
    assert not packages & {"torch", "transformers", "huggingface_hub", "safetensors", "tqdm"}
    assert not own_imports(name, everywhere=False) & TORCH_MODULES


def loaded_after(code: str, *arguments: object, **environment: str) -> set[str]:
    """Top-level packages that a new Python has loaded after running `code`."""
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    process = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, timeout=PATIENCE, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return set(json.loads(process.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [None, ["--help"], ["--version"], ["convert", "--help"], ["verify", "--help"], ["demo", "--help"], ["verify"],
     ["push", "--help"],
     [], ["source"], ["source", "out", "--device", "gpu"],
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
from marlin_convert.conversion.convert import convert
from marlin_convert.options import Options
assert convert(sys.argv[1], sys.argv[2], Options(verify=True, device="cpu")).verification.ok
"""


@pytest.mark.slow
def test_converting_and_verifying_load_no_torch(source: Source, tmp_path: Path) -> None:
    if not cpu.native_available():
        pytest.skip("without the native library, torch does the work")
    loaded = loaded_after(CONVERT, source.folder, tmp_path / "out")
    assert "numpy" in loaded
    assert not loaded & {"torch", "transformers"}
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_without_the_native_library_torch_does_the_work(source: Source, tmp_path: Path) -> None:
    """And so the test above would see it."""
    loaded = loaded_after(CONVERT, source.folder, tmp_path / "out", **{cpu.NO_NATIVE: "1"})
    assert "torch" in loaded
    assert "transformers" not in loaded
