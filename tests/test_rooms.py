"""Who may know whom: the rules of docs/architecture.md, held against what the modules import."""

import ast
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

from tests.conftest import ROOT

HOUSES = ("data_prep", "pipeline", "jobs")
HEAVY = ("deepspeed", "mlflow", "nvidia", "submitit")


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): file for house in HOUSES for file in (ROOT / house).rglob("*.py")}


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """The modules that statements import; of the project, by their whole names."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"from {'.' * node.level}{node.module or ''} is relative"
            for whole in (f"{node.module}.{alias.name}" for alias in node.names):
                found.add(whole if whole in MODULES else str(node.module))
    return found


TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}
# Also within functions, and for types alone.
KNOWN = {name: imported(ast.walk(tree)) & MODULES.keys() for name, tree in TREES.items()}


def within(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def known(*rooms: str) -> set[str]:
    """What the modules of rooms know beyond these rooms."""
    return {
        other
        for name, others in KNOWN.items()
        for other in others
        if within(name, *rooms) and not within(other, *rooms)
    }


def test_who_may_know_whom() -> None:
    assert known("data_prep") == set()
    assert known("pipeline") == {"data_prep.files", "data_prep.manifest"}
    assert known("pipeline.models") == set()
    assert any(within(other, "pipeline.training") for other in known("jobs"))  # it sees imports


def test_there_are_no_circles() -> None:
    """Between rooms, which are a house or a part of `pipeline`, nor between modules."""

    def room(name: str) -> str:
        return ".".join(name.split(".")[: 1 + within(name, "pipeline")])

    rooms: dict[str, set[str]] = {}
    for name, others in KNOWN.items():
        rooms.setdefault(room(name), set()).update(map(room, others))
    for graph in (KNOWN, {own: others - {own} for own, others in rooms.items()}):
        assert list(TopologicalSorter(graph).static_order())  # raises CycleError, which names it


def test_what_takes_long_to_load_is_loaded_where_it_is_needed() -> None:
    for name, tree in TREES.items():
        loaded = {other for other in imported(tree.body) if within(other, *HEAVY)}
        assert not loaded, f"{name} loads {loaded} with itself"
