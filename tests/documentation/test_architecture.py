"""The drawing of the architecture shows the imports that there are."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from documentation.pages import ROOT

PAGE = ROOT / "docs/explanations/architecture.md"
PACKAGES = {"longseq": ROOT / "platform/longseq", "longseq_data": ROOT / "pipelines/longseq_data"}
FOUNDATION, DATA = "foundation", "longseq_data"
ANYBODY = (FOUNDATION, DATA, "config")  # whose arrows are left out


def room(module: str) -> str | None:
    """Where a module of ours belongs in the drawing; None for the package itself."""
    package, _, rest = module.partition(".")
    if package == "longseq_data":
        return DATA
    first = rest.partition(".")[0]
    if first in ("", "__init__"):  # the front door, which imports a function when it is asked for
        return None
    return first if (PACKAGES["longseq"] / first).is_dir() else FOUNDATION


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names} if node.module == "longseq" else {node.module}
    return {name for name in found if name.partition(".")[0] in PACKAGES}


def arrows() -> set[tuple[str, str]]:
    found = set()
    for name, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            own = room(".".join((name, *path.relative_to(folder).with_suffix("").parts)))
            found |= {(own, other) for module in imports(path) if (other := room(module)) and own and other != own}
    return found


def graph_of_files() -> dict[str, set[str]]:
    """The modules that each module imports, wherever in it: in functions and under TYPE_CHECKING, too."""
    files = {
        ".".join((name, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
        for name, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
    }
    del files["longseq"]  # the front door names what it imports when it is asked for
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                package = name if path.stem == "__init__" else name.rpartition(".")[0]
                above = package.split(".")[: 1 - node.level or None] if node.level else []
                module = ".".join([*above, *([node.module] if node.module else [])])
                inner = (f"{module}.{alias.name}" for alias in node.names)
                found |= {full if full in files else module for full in inner}
        graph[name] = found & set(files) - {name}
    return graph


def drawn() -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """All arrows of the drawing, and the dashed ones."""
    (graph,) = re.findall(r"```mermaid\n(flowchart.*?)```", PAGE.read_text(), re.DOTALL)
    found = re.findall(r"^    (\w+) (-->|-\.->) (\w+)$", graph, re.MULTILINE)
    return {(a, b) for a, _, b in found}, {(a, b) for a, kind, b in found if kind == "-.->"}


def test_the_drawing_has_the_arrows_of_the_imports():
    found = {
        (a, b) for a, b in arrows() if a != "commands" and (b not in ANYBODY or (a in ANYBODY and b != FOUNDATION))
    }
    shown, _ = drawn()
    assert found - shown == set(), f"imports that {PAGE.name} does not draw"
    assert shown - found == set(), f"arrows of {PAGE.name} without an import"


def test_solid_arrows_make_no_cycle():
    every, dashed = drawn()
    left = every - dashed
    while left:
        ends = {b for _, b in left} - {a for a, _ in left}
        assert ends, f"a cycle among {sorted(left)}"
        left = {(a, b) for a, b in left if b not in ends}


def test_attention_knows_tensors_only_and_data_stand_alone():
    assert [b for a, b in arrows() if a == "attention"] == []
    assert [b for a, b in arrows() if a == DATA] == []


def test_no_two_files_need_each_other():
    graph = graph_of_files()
    assert "longseq.errors" in graph["longseq.config.merging"]  # the graph has what is there
    assert "longseq_data.samples.infilling" in graph["longseq_data.samples.rows"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"files import each other: {' → '.join(reversed(error.args[1]))}") from None
