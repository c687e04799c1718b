"""The house: who imports whom, and how large a room, a function and a signature may be."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

FLOORS = (
    ("errors", "__version__"),
    ("figures", "files", "metrics", "sections", "signals", "suggest"),
    ("console", "ranks"),
    ("hub",),
    ("data",),
    ("models",),
    ("objectives",),
    ("recipe",),
    ("runs", "importing"),
    ("judges",),
    ("training", "rollout"),
    ("evaluation",),
    ("labels",),
    ("reports",),
    ("stages",),
    ("cli",),
    ("__main__",),
)
"""The parts of the package, the lowest floor first. A part imports from lower floors and from itself, be it for types alone."""
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}


MODULES = sorted((ROOT / "rlhf_cli").rglob("*.py"))
OWN = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES}
"""The names of our modules."""


def imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted module, runs when the module is imported) of every import in a file; a name of our package is a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = str(node.module)
            inner = [f"{module}.{alias.name}" for alias in node.names]
            names = [name if name in OWN or module == "rlhf_cli" else module for name in inner]
            yield from ((node.lineno, name, node not in lazy) for name in names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, node not in lazy) for alias in node.names)


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "rlhf_cli").parts[0].removesuffix(".py")


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module of ours) of every import in a file, those in functions and for types alone included."""
    for line, module, _ in imports(path):
        if module.split(".")[0] == "rlhf_cli":
            yield line, module


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


class TestImports:
    def test_go_down(self) -> None:
        """Type-only imports and those inside functions count: who names a type knows what it is."""
        wrong = [
            f"{path.relative_to(ROOT)}:{line}: {part_of(path)} imports {module}"
            for path in MODULES
            if part_of(path) != "__init__"
            for line, module in own_imports(path)
            if (part := module.split(".")[1]) != part_of(path) and FLOOR[part] >= FLOOR[part_of(path)]
        ]
        assert wrong == []

    def test_files_form_no_circle(self) -> None:
        edges = {(module_of(path), module) for path in MODULES for _, module in own_imports(path)}
        assert len(edges) > 300
        while leaves := {b for _, b in edges} - {a for a, _ in edges}:
            edges = {(a, b) for a, b in edges if b not in leaves}
        assert edges == set()

    def test_reading_a_recipe_needs_nothing_heavy(self) -> None:
        """Nor does anything that is imported by what reads it, however many imports away."""
        rooms = {"recipe", "importing", "cli", "__main__", *(part for floor in FLOORS[:3] for part in floor)} - {"ranks"}
        imported = {module_of(path): {m for _, m, at_import in imports(path) if at_import} for path in MODULES}
        light: set[str] = set()
        reached = {module_of(path) for path in MODULES if part_of(path) in rooms}
        while reached:
            light |= reached
            reached = {module for name in reached for module in imported[name] if module in imported} - light
        assert light >= {"rlhf_cli.objectives.dpo", "rlhf_cli.objectives.ppo", "rlhf_cli.data.formats"}
        heavy = {"torch", "transformers", "datasets", "numpy", "accelerate", "peft", "pyarrow"}
        assert [(name, m) for name in light for m in imported[name] if m.split(".")[0] in heavy] == []

    def test_third_parties_are_declared(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        declared = {re.split(r"[>=]", line)[0].replace("-", "_") for line in project["dependencies"]}
        extras = {"bitsandbytes": None, "math_verify": None, "vllm": None}  # imported when they are asked for
        distribution = {"yaml": "pyyaml", **extras}
        used = {module.split(".")[0] for path in MODULES for _, module, _ in imports(path)}
        third = used - set(sys.stdlib_module_names) - {"rlhf_cli"}
        assert {distribution.get(name, name) for name in third} - {None} == declared


LINES, FILE, FUNCTION, ARGUMENTS, REASONED = 33_100, 400, 60, 8, ("transformers", "typer")
"""At most: lines of the package, of a file and of a function; arguments, but where a docstring says who asks for more."""


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


class TestSizes:
    def test_files_are_rooms(self) -> None:
        sizes = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").count("\n") for path in MODULES}
        assert {name: size for name, size in sizes.items() if size > FILE} == {}
        assert sum(sizes.values()) <= LINES

    def test_functions_are_read_at_once(self) -> None:
        sizes = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions()}
        assert {name: size for name, size in sizes.items() if size > FUNCTION} == {}

    def test_more_than_eight_arguments_have_a_reason(self) -> None:
        wide = {
            name: node
            for name, node in functions()
            if len([a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")])
            > ARGUMENTS
        }
        assert [name for name, node in wide.items() if not any(who in (ast.get_docstring(node) or "") for who in REASONED)] == []
