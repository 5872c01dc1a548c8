"""Who may import what."""

import ast
from pathlib import Path

import pytest

from flows.deps import imports

PACKAGE = Path(__file__).parents[2] / "tda"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
# The one module that may know each of these.
ONLY_IN = {"lancedb": {"store"}, "lance": {"store"}, "yaml": {"config"}, "jinja2": {"page"}, "prefect": set(), "dvc": set()}


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_is_known_to_one_module(package):
    assert {module for module in MODULES if package in imported_packages(PACKAGE / f"{module}.py")} <= ONLY_IN[package]


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_the_flows(module):
    assert "flows" not in imported_packages(PACKAGE / f"{module}.py")


def test_imports_have_an_order():
    """A file imports only files above it in some list of all of them: there is no circle."""
    needs = {module: imports(PACKAGE / f"{module}.py") - {module} for module in MODULES}
    while needs:
        free = [module for module, others in needs.items() if not others & set(needs)]
        assert free, f"these import each other in a circle: {sorted(needs)}"
        for module in free:
            del needs[module]


def test_the_stages_are_reached_from_the_command_line_alone():
    users = {module for module in MODULES if "stages" in imports(PACKAGE / f"{module}.py")}
    assert users <= {"cli", "pipeline"}


@pytest.mark.parametrize("module", ["config", "artifacts", "segments", "spectral"])
def test_what_stands_at_the_bottom_imports_no_later_layer(module):
    assert imports(PACKAGE / f"{module}.py") <= {"config", "artifacts"}
