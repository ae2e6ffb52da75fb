"""Imports go down only, files stay small, and the library does not print."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "qlora_tools"
FLOORS = {
    "errors": 0, "specs": 0, "progress": 0, "names": 0, "manifest": 0, "finite": 0, "process_memory": 0, "cores": 0, "plot_style": 0, "resampling": 0,
    "quant": 1, "lowrank": 1, "models": 1,
    "checkpoint": 2, "engine": 2,
    "adapters": 3, "live": 3,
    "stages": 4, "training": 4, "calibrate": 4, "export": 4, "bench": 4, "quality": 4,
    "verbs": 5, "demo": 5, "api": 5,
    "cli": 6,
}  # fmt: skip
#: Pairs of one floor that may see each other, each with its reason.
SIDEWAYS = {
    ("checkpoint", "engine"): "the logical view is a Source; engine knows it only as a Protocol",
    ("api", "verbs"): "api is the list of verbs",
    ("api", "demo"): "demo is a verb too large for one file",
    ("demo", "verbs"): "the demo runs the verbs",
}
#: Files over 400 lines, each with its reason.
LARGE: dict[str, str] = {}
#: The one call that unpickles: tensors alone, in a file that the user asked to trust.
UNPICKLING = {("adapters/pickled.py", "torch.load")}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def imported_names(path):
    """Dotted names of this package that ``path`` imports, inside functions too; ``TYPE_CHECKING`` blocks count."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.startswith("qlora_tools."))


def imports(path):
    """Names of this package's rooms that ``path`` imports."""
    return (parts[1] for parts in (name.split(".") for name in imported_names(path)) if parts[1] in FLOORS)


def imported_files(path):
    """Files of this package that ``path`` imports; a name taken from a package's ``__init__`` stands for that."""
    for name in imported_names(path):
        found = PACKAGE.joinpath(*name.split(".")[1:])
        candidates = (found.with_suffix(".py"), found / "__init__.py", found.parent.with_suffix(".py"), found.parent / "__init__.py")
        yield next(one for one in candidates if one.is_file())


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def violations(room_of_file, imported):
    if room_of_file == imported:
        return False
    if (room_of_file, imported) in SIDEWAYS:
        return False
    down = FLOORS[imported] < FLOORS[room_of_file]
    return not (down or FLOORS[imported] == FLOORS[room_of_file] == 0)


def test_the_rule_itself_refuses_upward_and_sideways():
    assert violations("quant", "engine") and violations("export", "bench") and violations("stages", "cli")
    assert not violations("stages", "adapters") and not violations("cli", "api")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    name = room(path)
    if name == "__init__":
        return
    assert name in FLOORS, f"{name} has no floor"
    wrong = sorted({target for target in imports(path) if violations(name, target)})
    assert not wrong, f"{path.relative_to(PACKAGE)} on floor {FLOORS[name]} imports {wrong}"


def test_no_files_import_each_other_in_a_circle():
    graph = {path: {found for found in imported_files(path) if found.name != "__init__.py"} - {path} for path in modules()}
    assert sum(map(len, graph.values())) > len(graph)
    TopologicalSorter(graph).prepare()  # raises CycleError with the files


def test_files_stay_under_four_hundred_lines():
    long = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in modules()}
    assert {name: lines for name, lines in long.items() if lines > 400 and name not in LARGE} == {}


def test_every_module_says_what_it_owns():
    assert [str(path) for path in modules() if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_nothing_prints_and_nothing_unpickles():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if (str(path.relative_to(PACKAGE)), called) not in UNPICKLING:
                    assert called not in ("print", "torch.load", "pickle.load", "pickle.loads", "eval", "exec", "os.system"), f"{path}: {called}"


def test_the_command_line_is_light_at_the_top():
    heavy = ("torch", "numpy", "rich", "transformers", "onnxruntime", "onnx", "scipy", "numba", "matplotlib")
    for path in (PACKAGE / "cli").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [
                name for name in names if name.split(".")[0] in heavy or name.startswith(("qlora_tools.api", "qlora_tools.verbs", "qlora_tools.specs"))
            ], path
