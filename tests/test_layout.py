"""What people forget: packages missing from the wheel, imports that point upwards, methods without a source."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from vlmfast.adapters import ADAPTERS, DEFAULTS
from vlmfast.families import FAMILIES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDERS = {"vlmfast": ROOT / "vlmfast", "vlmfast.adapters": ROOT / "adapters", "vlmfast.eval": ROOT / "eval"}
LAYERS = ["vlmfast", "vlmfast.adapters", "vlmfast.eval"]
BASES = ("base.py", "layered.py")  # what a method file may import of its family
MAY_LOOK_UP = {"vlmfast/__init__.py", "vlmfast/__main__.py"}  # the front door, inside functions, and the command line


def sources() -> list[tuple[str, Path]]:
    """(layer, file) of every module of the package."""
    return [(name, path) for name, folder in FOLDERS.items() for path in sorted(folder.rglob("*.py"))]


def imported(tree: ast.AST) -> list[tuple[str, bool]]:
    """(module, at top level) of every absolute import of our own packages."""
    top = set(ast.walk(ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], [])))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "inner imports are absolute"
            found += [(f"{node.module}.{alias.name}", node in top) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
    return [(name, at_top) for name, at_top in found if name.split(".")[0] == "vlmfast"]


def layer(module: str) -> int:
    return max((i for i, name in enumerate(LAYERS) if module == name or module.startswith(name + ".")), default=0)


def test_every_package_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join([name, *path.parent.relative_to(FOLDERS[name]).parts])
        for name, path in sources()
        if path.name == "__init__.py"
    }
    assert set(listed) == found
    folders = {path.parent for _, path in sources()}
    assert all((folder / "__init__.py").exists() for folder in folders)


@pytest.mark.parametrize(("name", "path"), sources(), ids=lambda value: getattr(value, "name", value))
def test_imports_point_one_way(name, path):
    where = str(path.relative_to(ROOT))
    for module, at_top in imported(ast.parse(path.read_text())):
        if where in MAY_LOOK_UP:
            assert not (at_top and layer(module) > 0), f"{where} imports {module} at the top: only inside functions"
        else:
            assert layer(module) <= LAYERS.index(name), f"{where} imports {module}, which lies above it"


def test_no_method_imports_another():
    for path in (ROOT / "adapters").rglob("*.py"):
        if path.name in ("__init__.py", *BASES):
            continue
        others = [m for m, _ in imported(ast.parse(path.read_text())) if m.startswith("vlmfast.adapters.")]
        family = ".".join(["vlmfast.adapters", *path.parent.relative_to(ROOT / "adapters").parts])
        bases = tuple(f"{family}.{base.removesuffix('py')}" for base in BASES)
        assert all(module.startswith(bases) for module in others), f"{path.name} imports {others}"


def test_no_model_type_outside_families():
    """`model_type` is asked for in the families alone."""
    for _, path in sources():
        known = {"families", "testbed"} & set(path.parts)
        if path.name not in ("processors.py", "models.py") and not known:
            assert "model_type ==" not in path.read_text(), path


def test_every_method_names_its_source():
    assert list(ADAPTERS) == sorted(ADAPTERS)
    for name, cls in ADAPTERS.items():
        text = sys.modules[cls.__module__].__doc__
        assert cls.name == name and cls.kind and cls.summary
        assert cls.paper.startswith("arXiv:") and cls.paper.removeprefix("arXiv:")[:10] in text
        assert "Paper:" in text and "Code:" in text, f"{name}: paper and code belong in the docstring"


def test_every_family_has_a_default():
    assert set(DEFAULTS) == set(FAMILIES)


def test_every_module_has_a_docstring():
    for _, path in sources():
        assert ast.get_docstring(ast.parse(path.read_text())), path
