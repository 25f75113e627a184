"""What may import what, and what pyproject.toml says of it, read from the sources; layers are import-linter's."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LIBRARY = sorted((ROOT / "avar_lightning").rglob("*.py"))
CALLBACKS = sorted((ROOT / "callbacks").rglob("*.py"))
SHIPPED = [*LIBRARY, *CALLBACKS, ROOT / "train.py"]
DEVELOPMENT = sorted(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
FIRST_PARTY = {"avar_lightning", "benchmarks", "tests"} | {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
# Heavy packages that stand behind one file each: every other file asks that one.
BEHIND_ONE_FILE = {
    "matplotlib": "avar_lightning/report/figure.py",
    "math_verify": "avar_lightning/mathematics.py",
    "openai": "avar_lightning/synthesis/client.py",
    "pyarrow": "avar_lightning/conversion/tables.py",
}
NOT_IMPORTED_BY_US = {
    "tensorboard",  # what TensorBoardLogger, which is in every recipe, writes with
    *("pytest-timeout", "pytest-xdist", "ruff", "mypy", "import-linter"),  # a plugin and programs
    "setuptools",  # builds the wheel that tests/test_wheel.py tries
    *("fastapi", "uvicorn"),  # under `transformers serve`, which is run as a program
}


class _RuntimeImports(ast.NodeVisitor):
    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_Import(self, node: ast.Import) -> None:
        self.names |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert not node.level, f"line {node.lineno}: expected an absolute import"
        self.names |= {f"{node.module}.{alias.name}" for alias in node.names}

    def visit_If(self, node: ast.If) -> None:
        # What only a type checker imports binds nobody at run time.
        for child in node.orelse if ast.unparse(node.test).endswith("TYPE_CHECKING") else ast.iter_child_nodes(node):
            self.visit(child)


class _ImportsOnReading(_RuntimeImports):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Imported when it is called."""


@cache
def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, also inside functions; `from a import b` gives `a.b`."""
    visitor = _RuntimeImports()
    visitor.visit(ast.parse(path.read_text()))
    return visitor.names


def third_party(paths: Iterable[Path]) -> set[str]:
    """Top-level modules that files import, those of Python and of this project aside."""
    modules = {name.partition(".")[0] for path in paths for name in imports(path)}
    return modules - FIRST_PARTY - sys.stdlib_module_names


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    """Distribution names of requirements."""
    return {normalized(re.match(r"[\w.-]+", requirement).group()) for requirement in requirements}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


DEPENDENCIES = declared(PYPROJECT["project"]["dependencies"])
EXTRAS = {name: declared(wanted) for name, wanted in PYPROJECT["project"]["optional-dependencies"].items()}
DEV = EXTRAS.pop("dev") - {"avar-lightning"}  # which stands for the other extras
OPTIONAL = set().union(*EXTRAS.values())


def test_library_does_not_import_callbacks():
    pairs = [(relative(path), name) for path in LIBRARY for name in imports(path)]
    assert not [pair for pair in pairs if pair[1].startswith("avar_lightning.callbacks")]


@pytest.mark.parametrize("module", BEHIND_ONE_FILE)
def test_heavy_packages_stand_behind_one_file(module):
    assert [relative(path) for path in SHIPPED if module in third_party([path])] == [BEHIND_ONE_FILE[module]]


def test_an_optional_dependency_is_imported_where_it_is_needed():
    """And not when a file is read: whoever does not need it may not have it."""
    modules = {name for name, homes in packages_distributions().items() if {*map(normalized, homes)} & OPTIONAL}
    assert {"openai", "pyarrow"} <= modules
    for path in SHIPPED:
        visitor = _ImportsOnReading()
        visitor.visit(ast.parse(path.read_text()))
        assert not {name.partition(".")[0] for name in visitor.names} & modules, relative(path)


@pytest.mark.parametrize(
    ("paths", "allowed"),
    [(SHIPPED, DEPENDENCIES | OPTIONAL), (DEVELOPMENT, DEPENDENCIES | OPTIONAL | DEV)],
    ids=["shipped", "development"],
)
def test_every_import_is_a_declared_dependency(paths, allowed):
    distributions = packages_distributions()
    undeclared = {
        module: relative(path)
        for path in paths
        for module in third_party([path])
        if not {normalized(name) for name in distributions.get(module, [module])} & allowed
    }
    assert not undeclared


@pytest.mark.parametrize(
    ("dependencies", "paths"), [(DEPENDENCIES | OPTIONAL, SHIPPED), (DEV, DEVELOPMENT)], ids=["dependencies", "dev"]
)
def test_every_declared_dependency_is_imported(dependencies, paths):
    distributions = packages_distributions()
    used = {normalized(name) for module in third_party(paths) for name in distributions.get(module, [module])}
    assert dependencies - used - NOT_IMPORTED_BY_US == set()


def test_every_declared_dependency_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins.keys() >= DEPENDENCIES | OPTIONAL | DEV
    # A local version such as 2.13.0+cpu is one index's; the pin must hold on every index.
    assert not [name for name, version in pins.items() if not re.fullmatch(r"[\d.]+(post\d+)?", version)]


def test_every_package_ships():
    folders = {path.parent.relative_to(ROOT).as_posix() for path in LIBRARY if path.name == "__init__.py"}
    packages = {folder.replace("/", ".") for folder in folders} | {"avar_lightning.callbacks"}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages
