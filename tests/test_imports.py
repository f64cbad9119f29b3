"""The direction of the dependencies: down only, no cycles, the maths free of everything else, and nothing heavy before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import srppo

ROOT = Path(srppo.__file__).parent
# From the ground up. A module may import its own layer and those below. The longest matching name decides.
LAYERS = {
    "errors": 0,
    "memory_limit": 2,
    "world": 0,
    "watch": 0,
    "meeting": 0,
    "yaml_text": 0,
    "section": 0,
    "sections": 0,
    "config": 0,
    "masking": 0,
    "records": 0,
    "seeding": 0,
    "logprobs": 1,
    "rewards": 1,
    "advantages": 1,
    "losses": 1,
    "intervals": 2,
    "text": 2,
    "titles": 2,
    "files": 2,
    "limits": 2,
    "links": 2,
    "json_shape": 2,
    "outcomes": 2,
    "terminal": 2,
    "environment": 2,
    "machine": 2,
    "allocator": 2,
    "threads": 2,
    "profiling": 2,
    "progress": 2,
    "run_config": 2,
    "run_folder": 2,
    "scoring": 2,
    "card": 2,
    "data": 2,
    "models": 2,
    "rollout": 2,
    "methods": 3,
    "train": 3,
    "evaluate": 3,
    "retention": 3,
    "diagnose": 3,
    "report": 3,
    "generate": 3,
    "planning": 3,
    "lab": 3,
    "workspace": 4,
    "stages": 4,
    "diagnosis": 4,
    "job": 4,
    "lab.demo": 5,
    "flags": 5,
    "cli": 5,
    "__main__": 6,
}
RUN = "from click.testing import CliRunner; from srppo.cli import cli; CliRunner().invoke(cli, "
MATHS = ("logprobs", "rewards", "advantages", "losses", "masking", "records")
MATHS_MAY = {"torch", "math", "dataclasses", "collections", "typing", "functools", "__future__", "enum"}


def modules() -> dict[str, Path]:
    """{"train.ppo": path}; a package is named like its __init__."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(path: Path, *, at_import_only: bool = False) -> set[str]:
    """Absolute names of everything a file imports; inside functions and for type checking too, unless at_import_only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[ast.AST] = list(ast.walk(tree)) if not at_import_only else [n for s in tree.body for n in _run_at_import(s)]
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # "from srppo.lab import demo" may mean the module lab.demo
            names |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}".removeprefix("srppo.") in MODULES else str(node.module)
                for a in node.names
            }
    return names


def _run_at_import(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return []
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return [n for s in node.orelse for n in _run_at_import(s)]
    return [node, *(n for child in ast.iter_child_nodes(node) for n in _run_at_import(child))]


def own(names: set[str]) -> set[str]:
    """Of imported names those of the package, without its prefix."""
    return {n.removeprefix("srppo.") for n in names if n.startswith("srppo.")} | ({""} if "srppo" in names else set())


def layer(module: str) -> int:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in LAYERS:
            return LAYERS[".".join(parts[:length])]
    pytest.fail(f"src/srppo/{module}: which layer is it in? Add it to LAYERS")


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 40 and "train.ppo" in MODULES
    assert own(imported(MODULES["train.ppo"])) >= {"masking", "records", "run_folder"}
    assert layer("lab.demo") > layer("lab.world") and layer("train.ppo") == layer("train")


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m))
def test_no_arrow_points_up(module: str) -> None:
    up = {name for name in own(imported(MODULES[module])) - {""} if layer(name) > layer(module)}
    assert not up, f"{module} (layer {layer(module)}) imports {', '.join(f'{n} (layer {layer(n)})' for n in sorted(up))}"


def test_no_cycles() -> None:
    """Among what runs at import time."""
    graph = {m: own(imported(p, at_import_only=True)) & set(MODULES) for m, p in MODULES.items()}
    state: dict[str, int] = {}

    def visit(module: str, path: list[str]) -> None:
        if state.get(module) == 2:
            return
        assert state.get(module) != 1, f"import cycle: {' -> '.join([*path[path.index(module) :], module])}"
        state[module] = 1
        for name in graph[module]:
            visit(name, [*path, module])
        state[module] = 2

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.split(".")[0] in MATHS))
def test_maths_imports_only_maths(module: str) -> None:
    names = imported(MODULES[module])
    ours = own(names)
    assert {n.split(".")[0] for n in ours} <= set(MATHS), f"{module} imports {ours}"
    others = {n.split(".")[0] for n in names if not n.startswith("srppo")}
    assert others <= MATHS_MAY, f"{module} imports {others - MATHS_MAY}"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.split(".")[0] == "report"))
def test_report_reads_run_folders_and_knows_no_trainer(module: str) -> None:
    allowed = {"report", "intervals", "files", "links", "json_shape", "yaml_text", "run_folder", "text", "titles", "errors", ""}
    assert {n.split(".")[0] for n in own(imported(MODULES[module]))} <= allowed


@pytest.mark.parametrize("module", ["config", "section", "sections", "errors", "cli", "flags", "run_config", "run_folder", "progress"])
def test_no_torch_by_name_in_light_modules(module: str) -> None:
    heavy = {"torch", "transformers", "peft", "datasets", "matplotlib"}
    assert not heavy & {n.split(".")[0] for n in imported(MODULES[module], at_import_only=True)}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import srppo", ["torch", "transformers", "pydantic", "yaml"]),
        ("import srppo.cli", ["torch", "transformers", "peft", "datasets", "pydantic", "matplotlib", "rich", "numpy", "yaml"]),
        (f"{RUN}['--help'])", ["torch", "transformers", "pydantic", "matplotlib", "numpy"]),
        (f"{RUN}['align', '--help'])", ["torch", "transformers"]),
        (f"{RUN}['align', 'none.yaml'])", ["torch", "transformers"]),
        ("import srppo.report", ["torch", "transformers", "pydantic"]),
        ("import srppo.progress, srppo.run_folder", ["torch", "transformers", "pydantic", "rich"]),
        ("from srppo.config import load_recipe", ["torch", "transformers", "click"]),
    ],
)
def test_what_is_not_needed_is_not_loaded(code: str, absent: list[str]) -> None:
    listing = f"{code}\nimport sys\nprint(*[n for n in {absent!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
