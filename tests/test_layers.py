# SPDX-License-Identifier: Apache-2.0
"""Imports point one way: between parts by the tiers below, between files without a
cycle, and the heavy ones stay in their place."""

import ast
import functools
import graphlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Lowest first. A part (a file or folder of vit_jax/) imports from its own line and the
# lines above.
TIERS = """
errors hub fields vtab_tasks config matrices runtime preemption peers distributed progress feed config_file cli
models data optim sharding checkpoint hlo hardware tpu search recipes demos scales studies
kernels kernel_schedule
objectives workdir trackers measure weights inference photos pixels
evaluators
analysis program
train
main app predict embed evaluate sharing space convert export latency plan benchmark sweep costs study
"""
LEVELS = {
    name: level
    for level, names in enumerate(TIERS.strip().splitlines())
    for name in names.split()
}
ENTRY = LEVELS["main"]
FILES = sorted((ROOT / "vit_jax").rglob("*.py"))


def part(module: str) -> str:
    """``vit_jax.data.sources`` -> ``data``."""
    return module.split(".")[1] if "." in module else ""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Full names of what a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {
                f"{node.module}.{a.name}" for a in node.names
            }
    return frozenset(found)


def is_command(path: Path) -> bool:
    """A package's command is an entry point, whatever its package is."""
    return path.name == "__main__.py" or "def main(" in path.read_text()


@pytest.mark.heavy
def test_parts_import_from_their_tier_and_above():
    for path in FILES:
        own = part(module_of(path))
        if own in ("", "__init__", "__main__"):  # may import anything, lazily
            continue
        level = ENTRY if is_command(path) else LEVELS[own]
        for module in imports(path):
            other = part(module)
            if module.startswith("vit_jax.") and other not in (own, "__version__"):
                assert other in LEVELS, f"{path}: {module} has no tier: add it to TIERS"
                assert LEVELS[other] <= level, f"{path} imports {module}, a later tier"


def test_no_file_is_in_an_import_cycle():
    """Folders included; the ``__init__`` of a folder stands for what it imports."""
    modules = {module_of(path).removesuffix(".__init__"): path for path in FILES}
    graph = {
        name: {m for m in imports(path) if m in modules and m != name}
        for name, path in modules.items()
    }
    # ``from vit_jax.data import records`` in a file of data/ needs records alone, not
    # the names that data/__init__.py has gathered.
    for name, wanted in graph.items():
        wanted -= {p for p in wanted if name.startswith(f"{p}.")}
    graphlib.TopologicalSorter(graph).prepare()


def test_no_private_name_of_another_module_is_used():
    private = lambda name: name.startswith("_") and not name.endswith("__")
    for path in FILES:
        names = set()  # of the project's modules, as the file calls them
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module)[:7] == "vit_jax":
                assert not [a.name for a in node.names if private(a.name)], path
                names |= {a.asname or a.name for a in node.names}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used = node.value.id in names and private(node.attr)
                assert not used, f"{path}: {node.value.id}.{node.attr}"


def test_heavy_imports_stay_in_their_place():
    for path, module in ((p, m) for p in FILES for m in imports(p)):
        top = module.split(".")[0]
        if module.startswith("flax.linen"):
            assert part(module_of(path)) == "models", f"{path} imports {module}"
        if top in ("tensorflow", "tensorflow_datasets"):
            assert part(module_of(path)) in ("data", "export"), path
        assert not module.startswith("flax.training"), f"{path} imports {module}"


def test_only_configs_and_studies_import_recipes():
    for path in FILES:
        if path.name not in ("recipes.py", "scales.py", "studies.py"):
            assert "vit_jax.recipes" not in imports(path), f"{path} imports recipes"
    own = {
        part(m)
        for m in imports(ROOT / "vit_jax" / "recipes.py")
        if m.startswith("vit_jax.")
    }
    assert own <= {"config", "errors", "vtab_tasks"}


@pytest.mark.process
def test_import_takes_no_tensorflow_and_no_device():
    code = (
        "import sys, vit_jax, vit_jax.train, vit_jax.predict, vit_jax.convert, vit_jax.plan, vit_jax.analysis\n"
        "assert 'tensorflow' not in sys.modules, 'tensorflow was imported'\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a device was taken'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_wheel_holds_every_folder():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {module_of(path.parent) for path in FILES}
    listed = set(project["tool"]["setuptools"]["packages"])
    assert listed == folders | {"vit_jax.configs"}
