# SPDX-License-Identifier: Apache-2.0
"""Imports point one way: a module imports only modules of lower levels, and its own
folder."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Lowest first; a module imports from the lines above its own.
TIERS = """
errors config cli distributed progress feed
models data optim sharding checkpoint hlo recipes
objectives workdir weights
inference
evaluators
analysis
program
train
main predict evaluate convert plan benchmark sweep
"""
LEVELS = {
    name: level
    for level, names in enumerate(TIERS.strip().splitlines())
    for name in names.split()
}
ENTRY = LEVELS["main"]
# Within level 0, in this order; everything of level 1 and above may use them.
GROUND = ["errors", "progress", "feed", "distributed", "config", "cli"]
FILES = sorted((ROOT / "vit_jax").rglob("*.py"))


def part(module: str) -> str:
    """``vit_jax.data.sources`` -> ``data``."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {
                f"{node.module}.{a.name}" for a in node.names
            }
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path):
    own = part(module_of(path))
    if own in ("", "__init__"):  # the public API may import anything, lazily
        return
    # A package's command is an entry point, whatever its package is.
    entry = path.name == "__main__.py" or "def main(" in path.read_text()
    level = ENTRY if entry else LEVELS[own]
    for module in imports(path):
        if not module.startswith("vit_jax.") or part(module) in (own, "__version__"):
            continue
        other = part(module)
        assert other in LEVELS, (
            f"{path} imports {module}, which has no level: add it to LEVELS"
        )
        if own in GROUND and other in GROUND and not entry:
            assert GROUND.index(other) < GROUND.index(own), f"{path} imports {module}"
        else:
            assert LEVELS[other] < level, (
                f"{path} (level {level}) imports {module} (level {LEVELS[other]})"
            )


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_heavy_imports_stay_in_their_place(path):
    for module in imports(path):
        top = module.split(".")[0]
        if module.startswith("flax.linen"):
            assert part(module_of(path)) == "models", f"{path} imports {module}"
        if top in ("tensorflow", "tensorflow_datasets"):
            assert part(module_of(path)) == "data", f"{path} imports {module}"
        assert not module.startswith("flax.training"), f"{path} imports {module}"


def test_only_configs_import_recipes():
    for path in FILES:
        if path.name != "recipes.py":
            assert "vit_jax.recipes" not in imports(path), f"{path} imports recipes"
    own = {
        part(m)
        for m in imports(ROOT / "vit_jax" / "recipes.py")
        if m.startswith("vit_jax.")
    }
    assert own <= {"config", "errors"}


def test_every_module_has_a_level():
    parts = {part(module_of(p)) for p in FILES} - {"", "__init__"}
    assert parts == set(LEVELS)


def test_import_takes_no_tensorflow_and_no_device():
    code = (
        "import sys, vit_jax, vit_jax.train, vit_jax.predict, vit_jax.convert, vit_jax.plan, vit_jax.analysis\n"
        "assert 'tensorflow' not in sys.modules, 'tensorflow was imported'\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a device was taken'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
