# SPDX-License-Identifier: Apache-2.0
"""The documentation does what it says: every block of Python and every command of
README.md and docs/ runs, in order, in a folder with a checkpoint and some photos.

A block after ``<!-- not run: reason -->`` is left out. Training is cut to two steps.
"""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from compiled import init
from PIL import Image

from vit_jax import models, weights
from vit_jax.config import ModelConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# As a new user would have them, but small.
SHORT = ["--config.steps=2", "--config.batch=8", "--config.eval.batch=8"]


def blocks(page: Path) -> list[re.Match]:
    return [b for b in BLOCK.finditer(page.read_text()) if b["language"] != "text"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A ViT of 32 pixels in the released names, called as a user's would be."""
    cfg = models.resolve(
        ModelConfig(
            name="", num_classes=7, image_size=(32, 32), width=32, depth=2, mlp_dim=64, heads=2, patch=8,
        )
    )  # fmt: skip
    params = init(models.create(cfg))
    path = tmp_path_factory.mktemp("docs") / "B_16.npz"
    weights.save(path, cfg, params)
    return path


@pytest.fixture
def home(checkpoint, tmp_path, monkeypatch) -> Path:
    """A folder with what the pages name."""
    (tmp_path / "B_16.npz").write_bytes(checkpoint.read_bytes())
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            pixels = random.integers(0, 256, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.jpg")
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str, command) -> None:
    """One line of a shell block: a command of this project."""
    program, *words = shlex.split(line, comments=True)
    if program == "python" and words[0] == "-m":
        module, *words = words[1:]
    else:
        assert program == "vit-jax", f"{line!r} is no command of this project"
        name, *words = words
        module = "vit_jax" if name.startswith("-") else f"vit_jax.{name}"
        words = [name, *words] if name.startswith("-") else words
    short = SHORT if module == "vit_jax.main" and "--help" not in words else []
    if short and "--config=digits" in words:
        short = [*short, "--config.model.depth=1"]
    ended = command(*words, *short, module=module)
    assert ended.returncode == 0, f"{line}\n{ended.stderr}"


@pytest.mark.heavy
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_block_runs(page, home, command):
    names: dict = {}
    for block in blocks(page):
        if block["reason"]:
            continue
        if block["language"] == "python":
            exec(compile(block["text"], f"{page.name}", "exec"), names)
            continue
        assert block["language"] == "sh", f"{page.name}: mark the block as text"
        for line in block["text"].replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                run(line, command)


def test_few_blocks_are_left_out():
    """And each says why."""
    found = [b for page in PAGES for b in blocks(page)]
    left_out = [b for b in found if b["reason"]]
    print(f"{len(found) - len(left_out)} blocks run, {len(left_out)} are left out")
    assert len(left_out) < len(found) / 2


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in text, page.name


def test_images_and_links_of_the_pages_exist():
    for page in PAGES:
        for target in re.findall(
            r"\]\(([^)#]+?)(?:#[^)]*)?\)|src=\"(.+?)\"", page.read_text()
        ):
            name = target[0] or target[1]
            if "://" not in name:
                assert (page.parent / name).exists(), f"{page.name}: {name}"


@pytest.mark.heavy
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="needs the extra docs")
    from mkdocs.commands import build
    from mkdocs.config import load_config

    cfg = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    build.build(cfg)
    assert (tmp_path / "index.html").exists()
