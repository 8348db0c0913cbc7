"""The arrangement of the package: layers, no circles, no private imports, small files."""

import ast
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "entropic_fast"
LAYERS = (
    "_utils", "_torch", "ops", "distributed", "objective", "curvature", "paths", "dynamics",
    "training", "experiments", "profile", "selfcheck", "cli",
)  # fmt: skip
SAME_LAYER = ({"curvature", "paths"},)  # neither may import the other
OPEN = {"_utils", "_torch", "_version"}  # whose modules every package may import
MODULES = {p: ast.parse(p.read_text()) for p in sorted(PACKAGE.rglob("*.py"))}
# What is left to do, with the number of such imports; only ever less.
PRIVATE = {
    "cli/_main.py": 5,
    "profile/_figures.py": 3,
    "profile/_plan.py": 1,
    "profile/_profile.py": 3,
    "profile/_report.py": 3,
    "profile/_tasks.py": 3,
    "selfcheck/_facts.py": 1,
    "selfcheck/_networks.py": 1,
    "selfcheck/_ops.py": 1,
    "selfcheck/_speeds.py": 1,
}
LONG: set[str] = set()
CIRCLES: dict[str, str] = {}  # importing module -> imported


def name_of(path: Path) -> tuple[str, ...]:
    return tuple(p for p in path.relative_to(PACKAGE).with_suffix("").parts if p != "__init__")


NAMES = {name_of(path) for path in MODULES}


def imports(path: Path) -> set[tuple[str, ...]]:
    """Modules of the package that a module imports, each as the longest name there is."""
    found = set()
    package = name_of(path) if path.stem == "__init__" else name_of(path)[:-1]
    for node in ast.walk(MODULES[path]):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = tuple(node.module.split(".")) if node.module else ()
        if node.level:
            base = (*package[: len(package) - node.level + 1], *base)
        elif base[:1] == ("entropic_fast",):
            base = base[1:]
        else:
            continue
        for alias in node.names:
            full = (*base, alias.name)
            found.add(full if full in NAMES else base)
    return found - {()}


def test_packages_import_only_from_layers_below():
    for path in MODULES:
        here = name_of(path)[:1]
        if not here or here[0] not in LAYERS:
            continue
        for other in imports(path):
            if other[0] not in LAYERS or other[0] == here[0]:
                continue
            assert LAYERS.index(other[0]) < LAYERS.index(here[0]), (str(path), other)
            assert {here[0], other[0]} not in SAME_LAYER, (str(path), other)


def test_no_module_imports_itself_by_way_of_others():
    graph = {name_of(path): imports(path) for path in MODULES if path.stem != "__init__"}
    done: set[tuple[str, ...]] = set()

    def visit(name: tuple[str, ...], above: tuple[tuple[str, ...], ...]) -> None:
        assert name not in above, " -> ".join(".".join(n) for n in (*above, name))
        if name not in done:
            for other in graph.get(name, ()):
                if CIRCLES.get(".".join(name)) == ".".join(other):
                    continue
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_other_packages_private_modules_are_not_imported():
    found: Counter[str] = Counter()
    for path in MODULES:
        here = name_of(path)
        for other in imports(path):
            if other[0] in OPEN or (here and other[0] == here[0]):
                continue
            found[str(path.relative_to(PACKAGE))] += any(p.startswith("_") for p in other)
    found = +found
    assert all(found[name] <= PRIVATE.get(name, 0) for name in found), found - Counter(PRIVATE)


def test_files_and_folders_are_small():
    lines = {str(p.relative_to(PACKAGE)): len(p.read_text().splitlines()) for p in MODULES}
    long = {name for name, count in lines.items() if count > 400}
    assert long <= LONG
    folders = Counter(path.parent for path in MODULES)
    assert {str(f): n for f, n in folders.items() if n > 16 + 1} == {}, "at most 16 and __init__"
