"""A recipe file and the command line's overrides → a typed recipe, or every problem at once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.errors import UsageError
from rlhf_cli.recipe.build import SHOWN, Builder, lines_of, spell_out
from rlhf_cli.recipe.checks import findings
from rlhf_cli.recipe.dump import flatten
from rlhf_cli.recipe.keys import required_keys, unlisted
from rlhf_cli.recipe.recipes import Recipe, TrainingRecipe
from rlhf_cli.recipe.stages import STAGES
from rlhf_cli.recipe.yaml_reader import BAD, MAX_BYTES, Node, Problem, Unreadable, decode, plain, read
from rlhf_cli.suggest import closest, did_you_mean

OF_BASE = 10_000_000
"""Lines of a recipe's base are counted from here, those of the base's own base from twice as many: a line says its file."""
OF_FILES = {
    "base": "another recipe, by its path from this one: what it says holds where this one says nothing",
    "stage": "the command that the recipe is for, which is then checked",
}
"""Keys of a file that are no part of its recipe."""

RIVALS = {"train.steps": "train.epochs", "train.epochs": "train.steps", "data.eval": "data.holdout", "data.holdout": "data.eval"}
"""A key from the command line puts its rival in the file out of force: `--set train.steps=4` on a recipe with epochs."""


@dataclass(frozen=True)
class Devices:
    """Machines that one does not have, to plan for."""

    count: int
    memory: float  # bytes of each

    @property
    def words(self) -> str:
        return f"{self.count} × {self.memory / 2**30:.1f} GiB" + (", sharded" if self.count > 1 else "")

    @classmethod
    def read(cls, text: str) -> Devices:
        """Of `8x80GB`. UsageError: it says something else."""
        found = re.fullmatch(r"([1-9]\d*)x(\d+(?:\.\d+)?)(GB|GiB)", text)
        if not found or not float(found[2]):
            raise UsageError(f"--devices {text}: write COUNTxMEMORY, as in 8x80GB or 1x24GiB")
        return cls(int(found[1]), float(found[2]) * (10**9 if found[3] == "GB" else 2**30))


@dataclass(frozen=True)
class Loaded:
    """A recipe and where each of its keys stands: line in its file, from 1, plus OF_BASE a base; or 0 for the command line."""

    recipe: Recipe
    stage: str
    files: tuple[Path, ...]  # the recipe, its base, the base's own …
    lines: dict[str, int]
    devices: Devices | None = None

    @property
    def path(self) -> Path:
        return self.files[0]

    def named(self, key: str) -> str:
        """`where`, and the key itself if that does not say it."""
        place = self.where(key)
        return place if place.endswith(key) else f"{place}: {key}"

    def where(self, key: str) -> str:
        """`recipes/x.yaml:14` of the key or its nearest parent in the file, or `--set key`."""
        found = _nearest(self.lines, key)
        return _place(self.files, self.lines[found], found) if found else str(self.path)


def load_recipe(stage: str, path: Path, overrides: Sequence[str] = (), output: str | None = None) -> Loaded:
    """Reads and checks a recipe. Raises UsageError with one line for each problem."""
    problems: list[Problem] = []
    section, files = STAGES[stage].recipe, [path]
    try:
        root = _with_bases(files, _read_file(path, problems, section), problems, section)
    except Unreadable as error:
        raise UsageError(_render(files, [*problems, error.problem])) from None
    root = _of_stage(root, stage, problems)
    root = spell_out(root, section)
    for override in overrides:
        root = spell_out(_override(root, override, problems), section)
    if output is not None:
        root = _put(root, ["output"], Node(output, 0, output))
    lines = lines_of(root)
    builder = Builder(section, stage)
    recipe = builder.section(section, root, "")
    problems += builder.problems
    values = flatten(recipe)
    bad = builder.bad | {problem.key for problem in problems}
    found = list[Problem]()
    for key, what in findings(STAGES[stage].checks, recipe, bad):
        near = _nearest(lines, key)
        found.append(Problem(lines.get(near, 1), near if unlisted(near) == unlisted(key) else key, what))
    for key in ("model.trust_remote_code", "trust_remote_code"):
        if lines.get(key, 0) > 0 and values.get(key):
            what = f"only the command line may allow this. remove it and add --set {key}=true"
            found.append(Problem(lines[key], key, what))
    if problems or found:
        raise UsageError(_render(files, problems + found))
    return Loaded(recipe, stage, tuple(files), lines)


def _with_bases(files: list[Path], root: Node, problems: list[Problem], section: type) -> Node:
    """The recipe merged over the one that its key `base` names, and over that one's; their files are added to `files`."""
    base = root.value.get("base")
    if base is None:
        return root
    own = dataclasses.replace(root, value={name: child for name, child in root.value.items() if name != "base"})
    if not isinstance(base.value, str) or not base.value.strip():
        raise Unreadable(base.line, "base", "expected the file of another recipe. name one")
    path = files[-1].parent / base.value
    if path.resolve() in [file.resolve() for file in files]:
        circle = " → ".join(map(str, [*files, path]))
        raise Unreadable(base.line, "base", f"recipes that are each other's base: {circle}. remove one of these keys")
    try:
        found: list[Problem] = []
        under = _read_file(path, found, section)
    except UsageError as error:
        raise Unreadable(base.line, "base", str(error)) from None
    finally:
        by = OF_BASE * len(files)
        problems += [problem._replace(line=problem.line + by) for problem in found]
    files.append(path)
    return _merged(_with_bases(files, _shifted(under, by), problems, section), own)


def _shifted(node: Node, by: int) -> Node:
    """The tree with its lines counted from another one."""
    value = node.value
    if isinstance(value, dict):
        value = {name: _shifted(child, by) for name, child in value.items()}
    if isinstance(value, list):
        value = [_shifted(child, by) for child in value]
    return dataclasses.replace(node, value=value, line=node.line + by)


def _merged(under: Node, over: Node) -> Node:
    """Sections key by key, anything else replaced; so is a section of another `kind`, whose keys mean something else."""
    if not isinstance(under.value, dict) or not isinstance(over.value, dict):
        return over
    kinds = [section.value.get("kind") for section in (under, over)]
    if None not in kinds and kinds[0].value != kinds[1].value:
        return over
    both = {name: _merged(under.value[name], child) if name in under.value else child for name, child in over.value.items()}
    return dataclasses.replace(over, value={**under.value, **both})


def _of_stage(root: Node, stage: str, problems: list[Problem]) -> Node:
    """The recipe without the key `stage`, which may say which command it is for."""
    named = root.value.get("stage")
    if named is None:
        return root
    if named.value != stage:
        advice = f"run rlhf {named.value}" if named.value in STAGES else did_you_mean(str(named.value), STAGES, "remove it")
        problems.append(
            Problem(named.line, "stage", f"this recipe is for {named.text[:40] or 'nothing'}, not for {stage}. {advice}")
        )
    return dataclasses.replace(root, value={name: child for name, child in root.value.items() if name != "stage"})


def read_keys(path: Path) -> Node:
    """The tree of a file that another program's keys are in. Raises UsageError with one line for each problem."""
    problems: list[Problem] = []
    try:
        root = _read_file(path, problems, TrainingRecipe)
    except Unreadable as error:
        problems.append(error.problem)
    if problems:
        raise UsageError(_render([path], problems))
    return root


def _read_file(path: Path, problems: list[Problem], section: type) -> Node:
    """The tree of a file, which is to be a recipe of this type."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        inside = path / "recipe.yaml"
        hint = f"did you mean {inside}?" if inside.is_file() else "name the recipe in it"
        raise UsageError(f"{path}: is a folder. {hint}") from None
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file. {_near_file(path)}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path}: cannot be read: {reason}. check the path") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path}: larger than 1 MB, which no recipe is. is it a data file? a recipe names those")
    root, needed = read(decode(data), problems), tuple(required_keys(section))
    if root.value is None:
        *most, last = needed
        raise Unreadable(1, "", f"the file is empty. a recipe needs {', '.join(most)} and {last}")
    if not isinstance(root.value, dict):
        kind = "a list" if isinstance(root.value, list) else "text"
        first, second, *_ = dict.fromkeys(key.partition(".")[0] for key in needed)
        what = f"expected keys such as {first}: and {second}:, found {kind}. write `{first}:` at the start of a line"
        raise Unreadable(root.line, "", what)
    return root


def _near_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    names = sorted(other.name for other in path.parent.iterdir() if other.suffix in (".yaml", ".yml"))
    same_stem = [name for name in names if Path(name).stem == path.name.removesuffix(path.suffix)]
    near = same_stem[0] if same_stem else closest(path.name, names)
    if near is not None:
        return f"did you mean {path.parent / near}?"
    return f"recipes there: {', '.join(names[:5])}" if names else "there are no recipes in that folder"


def _override(root: Node, text: str, problems: list[Problem]) -> Node:
    """The tree with one KEY=VALUE of the command line put in; a problem leaves it as it is."""
    key, equals, value = text.partition("=")
    key = key.strip()
    parts = key.split(".")
    if not equals or not all(parts):
        problems.append(Problem(0, text[:40], "expected KEY=VALUE. write e.g. --set seed=4"))
        return root
    try:
        node = read(value, problems, line=0, key=key)
        root = _put(root, parts, node)
    except Unreadable as error:
        problems.append(error.problem)
        return root
    rival = RIVALS.get(key)
    return _without(root, rival.split(".")) if rival is not None and node.value is not BAD and plain(node) else root


def _put(node: Node, parts: Sequence[str], value: Node, key: str = "") -> Node:
    """The tree with `value` at the path; sections on the way are made where the file has none."""
    if not parts:
        return value
    head, *rest = parts
    dotted = f"{key}.{head}" if key else head
    if isinstance(node.value, list):
        if node.bare and not head.isdecimal():
            return dataclasses.replace(node, value=[_put(node.value[0], parts, value, key)])
        if not head.isdecimal() or int(head) >= len(node.value):
            count = len(node.value)
            what = f"no such position: {key} has {count}, counted from 0. use 0 to {count - 1}" if count else f"{key} is empty"
            raise Unreadable(0, dotted, what)
        items = list(node.value)
        items[int(head)] = _put(items[int(head)], rest, value, dotted)
        return dataclasses.replace(node, value=items)
    if head == "0" and not isinstance(node.value, dict):
        return Node([_put(Node(None, -1), rest, value, dotted)], -1)
    children = dict(node.value) if isinstance(node.value, dict) else {}
    children[head] = _put(children.get(head, Node(None, -1)), rest, value, dotted)
    return Node(children, node.line if isinstance(node.value, dict) else min(node.line, 0))


def _without(root: Node, parts: Sequence[str]) -> Node:
    """The tree without a key of the file; one from the command line stays, and is then found to be in conflict."""
    child = root.value.get(parts[0])
    if child is None or (not isinstance(child.value, dict) and len(parts) > 1):
        return root
    children = dict(root.value)
    if len(parts) > 1:
        children[parts[0]] = _without(child, parts[1:])
    elif child.line > 0:
        del children[parts[0]]
    return dataclasses.replace(root, value=children)


def _nearest(lines: dict[str, int], key: str) -> str:
    """The key, the key without list positions, or the nearest parent that has a line; empty when there is none."""
    while key and key not in lines:
        if unlisted(key) in lines:
            return unlisted(key)
        key = key.rpartition(".")[0]
    return key


def _place(files: Sequence[Path], line: int, key: str) -> str:
    if line > 0:
        file, line = divmod(line, OF_BASE)
        return f"{files[file]}:{line}"
    return "--output" if key == "output" else f"--set {key}"


def _render(files: Sequence[Path], problems: Sequence[Problem]) -> str:
    """One line for each problem, in the order of the file, the command line's last."""
    ordered = sorted(dict.fromkeys(problems), key=lambda problem: problem.line if problem.line > 0 else float("inf"))
    lines = []
    for line, key, what in ordered[:SHOWN]:
        text = f"{_place(files, line, key)}: {f'{key[:100]}: ' if key and line > 0 else ''}{what}"
        # without control characters: what a recipe says must not steer the terminal
        lines.append("".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text))
    if len(ordered) > SHOWN:
        lines.append(f"{files[0]}: and {len(ordered) - SHOWN} more like these")
    return "\n".join(lines)
