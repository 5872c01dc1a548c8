"""The modules, parameters and files that each stage's code uses, read from its syntax tree, to keep `dvc.yaml` honest.

`python -m flows.deps` prints where `dvc.yaml` and the code differ; with `--write` it sets the module and parameter lists of
`dvc.yaml` to what the code uses. The code does not show which files a stage reads and which it makes, so those lists are
written by hand, and a test compares their union with the files found here.

How it works, starting from the stage's function in `stages.py`:

- functions: every function and class of the package that is named there, and those that these name, and so on (`_reached`);
- modules: those that `stages.py` imports for the stage, and everything that they import (`_closure`);
- settings and files: the attributes used on any parameter annotated `Config` or `Workspace` in those functions (`_chains`).
"""

import ast
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from flows.settings import read_yaml, write_yaml
from tda.artifacts import Workspace
from tda.config import SECTIONS_OF_NO_RESULT, Config

UNTRACKED_MODULES = {"__init__", "config"}  # the values of the configuration are tracked instead, as parameters
UNVERSIONED = {"root", "store", "work", "audits"}  # places of the workspace that DVC does not track
DATA_OF_MODULES = {"report": "templates"}  # files of the package that a module reads


@dataclass(frozen=True)
class Reach:
    """What one stage uses, sorted."""

    modules: list[str]  # paths as in `dvc.yaml`
    params: list[str]  # section, or section.key
    files: list[str]  # below data/, `${item}` for the number of a part


def reach(stage: str, package: Path) -> Reach:
    """What the function `stage` of `stages.py` in the folder `package` uses, itself and through what it calls.

    Raises:
        ValueError: there is no such function.
    """
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in package.glob("*.py")}
    if stage not in _definitions(trees["stages"]):
        raise ValueError(f"{package / 'stages.py'}: no function {stage}; expected one per stage of dvc.yaml")
    seeds, settings, files = {"stages"}, set(), set()
    for module, node in _reached(stage, trees, package.name):
        here = module == "stages"
        if here:
            named = _names(node)
            seeds |= {origin for origin, _ in _bound(node, trees, package.name).values()}
            seeds |= {
                origin for key, (origin, _) in _bound(trees[module], trees, package.name, deep=False).items() if key in named
            }
        settings |= {chain for chain, _ in _chains(node, "Config")}
        files |= {(chain[0], here and argument == "index") for chain, argument in _chains(node, "Workspace")}
    modules = sorted(_closure(seeds, trees, package.name) - UNTRACKED_MODULES)
    paths = [f"{package.name}/{name}.py" for name in modules]
    paths += [f"{package.name}/{DATA_OF_MODULES[name]}" for name in modules if name in DATA_OF_MODULES]
    return Reach(sorted(paths), _params(settings), _files(files))


def _definitions(tree: ast.Module) -> dict[str, ast.AST]:
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def _reached(stage: str, trees: dict[str, ast.Module], package: str) -> list[tuple[str, ast.AST]]:
    """(module, node) of the stage's function, and of every function and class of the package that it names, and so on."""
    reached, todo = {}, [("stages", stage)]
    while todo:
        module, name = todo.pop()
        node = _definitions(trees[module]).get(name)
        if node is None or (module, name) in reached:
            continue
        reached[module, name] = node
        todo += [(module, other) for other in _names(node)]
        todo += [origin for origin in _bound(node, trees, package).values() if origin[1]]
        todo += [origin for key, origin in _bound(trees[module], trees, package, deep=False).items() if key in _names(node)]
    return [(module, node) for (module, _), node in reached.items()]


def _names(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _bound(tree: ast.AST, trees: dict[str, ast.Module], package: str, *, deep: bool = True) -> dict[str, tuple[str, str]]:
    """The local names that imports in `tree` bind, each with its (module, name there); the name is empty for a whole module."""
    bound = {}
    for node in ast.walk(tree) if deep else tree.body:
        if isinstance(node, ast.Import):
            pairs = [(name.asname or name.name, name.name.removeprefix(f"{package}."), "") for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = (f"{package}.{node.module or ''}".rstrip(".") if node.level else node.module).removeprefix(f"{package}.")
            whole = module == package
            pairs = [
                (name.asname or name.name, name.name if whole else module, "" if whole else name.name) for name in node.names
            ]
        else:
            continue
        bound |= {key: (module, name) for key, module, name in pairs if module in trees}
    return bound


def imports(path: Path) -> set[str]:
    """The modules of its own package that the file at `path` imports, at its top or inside a function."""
    names = {other.stem: None for other in path.parent.glob("*.py")}
    return {module for module, _ in _bound(ast.parse(path.read_text(encoding="utf-8")), names, path.parent.name).values()}


def _closure(seeds: set[str], trees: dict[str, ast.Module], package: str) -> set[str]:
    """`seeds` and every module that they import, directly or not; of `stages` itself only the seeds count."""
    seen, todo = {"stages"}, sorted(seeds)
    while todo:
        if (name := todo.pop()) not in seen | UNTRACKED_MODULES:
            seen.add(name)
            todo += [module for module, _ in _bound(trees[name], trees, package).values()]
    return seen


def _chains(function: ast.AST, annotation: str) -> set[tuple]:
    """Attribute chains on parameters with that annotation: (attributes, the argument if the first of them is called)."""
    arguments = [node for node in ast.walk(function) if isinstance(node, ast.arg) and node.annotation is not None]
    names = {node.arg for node in arguments if ast.unparse(node.annotation).strip("'\"") == annotation}
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id in names and isinstance(parents[node], ast.Attribute):
            attributes, at = [], parents[node]
            call = parents[at]
            while isinstance(at, ast.Attribute):
                attributes.append(at.attr)
                at = parents[at]
            called = isinstance(call, ast.Call) and call.func is parents[node] and call.args
            found.add((tuple(attributes), ast.unparse(call.args[0]) if called else ""))
    return found


def _params(chains: set[tuple]) -> list[str]:
    """Sections and keys, as `dvc.yaml` names them; if all keys of a section are used, only the section."""
    found = set()
    for attributes in chains:
        if attributes[0] == "model_dump":  # of the whole configuration
            found |= {(section,) for section in Config.model_fields if section not in SECTIONS_OF_NO_RESULT}
        model, key = Config, []
        for attribute in attributes:
            if not (isinstance(model, type) and issubclass(model, BaseModel) and attribute in model.model_fields):
                break
            key.append(attribute)
            model = model.model_fields[attribute].annotation
        if key and key[0] not in SECTIONS_OF_NO_RESULT:
            found.add(tuple(key))
    for section, model in Config.model_fields.items():
        if {key[1] for key in found if key[0] == section and len(key) == 2} == set(model.annotation.model_fields):
            found.add((section,))
    return sorted(".".join(key) for key in found if not any(key[:n] in found for n in range(1, len(key))))


def _files(uses: set[tuple[str, bool]]) -> list[str]:
    """Paths below data/. If there is a file per part, it is the file of the stage's own part, or else the folder of all."""
    workspace, found = Workspace(), set()
    for name, own_part in uses:
        value = getattr(workspace, name)
        if name in UNVERSIONED:
            continue
        if isinstance(value, Path):
            found.add(value.as_posix())
        else:
            found.add(part_file(value) if own_part else value(0).parent.as_posix())
    return sorted(found)


def part_file(path_of: Callable[[int], Path]) -> str:
    """A part's file as `dvc.yaml` names it."""
    return path_of(0).with_stem("${item}").as_posix()


def update(dvc_file: Path, package: Path, *, write: bool) -> list[str]:
    """Where the module and parameter lists of `dvc_file` differ from the code, a line each; with `write` they are corrected."""
    changes, pipeline = [], read_yaml(dvc_file)
    for name, entry in pipeline["stages"].items():
        stage, used = entry.get("do", entry), reach(name, package)
        deps = [*(dep for dep in stage["deps"] if not dep.startswith("tda/")), *used.modules]
        for key, wanted in (("deps", deps), ("params", used.params)):
            had = set(stage.get(key, []))
            if had != set(wanted):
                changes.append(f"{name}: {key}: missing {sorted(set(wanted) - had)}, not used {sorted(had - set(wanted))}")
                stage[key] = wanted
    if write:
        write_yaml(dvc_file, pipeline)
    return changes


def main() -> int:
    """Compare, or correct with `--write`. Returns 1 if something differs and was not corrected."""
    write = "--write" in sys.argv[1:]
    changes = update(Path("dvc.yaml"), Path("tda"), write=write)
    print("\n".join(changes) or "dvc.yaml names what the code uses")
    return 1 if changes and not write else 0


if __name__ == "__main__":
    sys.exit(main())
