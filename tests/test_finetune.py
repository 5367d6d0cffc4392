# SPDX-License-Identifier: Apache-2.0
"""From a weight file to a user's photos and back, by the commands that a user types."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from compiled import init
from PIL import Image
from tiny import TINY

from vit_jax import config, hardware, models, program, tpu, train, weights
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.workdir import read_metrics

ROOT = Path(__file__).parent.parent
CLASSES = {"sand": (1.0, 0.8, 0.5), "sea": (0.4, 0.7, 1.0), "wood": (0.7, 1.0, 0.5)}
SIZE = 16  # pixels of the photos and of the fine-tuned model


def finetune(command, photos, pretrained, workdir, *more):
    return command(
        f"--config={ROOT / 'configs' / 'finetune_folder.py'}",
        f"--workdir={workdir}",
        f"--config.data.path={photos}",
        f"--config.pretrained={pretrained}",
        f"--config.data.image_size={SIZE}",
        *("--config.model.name=", "--config.model.width=16", "--config.model.depth=1"),
        *("--config.model.mlp_dim=32", "--config.model.heads=2"),
        *("--config.model.patch=4", "--config.steps=40", "--config.batch=32"),
        *("--config.log_every=10", "--config.optim.learning_rate=0.1"),
        *more,
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes of noisy tints, so that a good model errs now and then."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 40)):
        for name, tint in CLASSES.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                colour = np.asarray(tint) + rng.normal(0, 0.25, 3)
                noise = rng.uniform(0, 200, (SIZE, SIZE, 1))
                pixels = np.clip(noise * colour, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file of 7 classes at half the resolution, whose head must go."""
    cfg = models.resolve(
        config.replace(TINY, model__num_classes=7, model__image_size=(8, 8)).model
    )
    params = init(models.create(cfg), seed=1)
    path = tmp_path_factory.mktemp("released") / "model.npz"
    weights.save(path, cfg, jax.tree.map(np.asarray, params))
    return path


@pytest.mark.heavy
def test_from_npz_to_npz(photos, released, tmp_path, command):
    """What predict says of the exported file is as right as the model was in memory."""
    run = tmp_path / "run"
    done = finetune(command, photos, released, run)
    assert done.returncode == 0, done.stderr
    accuracy = [m for m in read_metrics(str(run)) if "test/accuracy" in m][-1]
    assert accuracy["step"] == 40
    assert 0.6 < accuracy["test/accuracy"] < 1  # a third is chance

    done = command(run, tmp_path / "mine.npz", module="vit_jax.convert")
    assert done.returncode == 0, done.stderr
    files = sorted((photos / "test").glob("*/*.png"))
    done = command(
        tmp_path / "mine.npz", *files, "--top=1", "--json", module="vit_jax.predict"
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    right = [s["top"][0]["class"] == Path(s["image"]).parent.name for s in said]
    assert len(said) == accuracy["test/count"] == 120
    assert np.mean(right) == pytest.approx(accuracy["test/accuracy"])


@pytest.mark.parametrize("module", ["vit_jax.plan", "vit_jax.benchmark"])
def test_what_is_planned_and_timed_is_what_is_trained(
    module, released, command, monkeypatch
):
    """The architecture and the image size of the file."""

    def build(cfg, *_, **__):
        raise UserError(f"width {cfg.model.width}, {cfg.data.image_size} pixels")

    target = tpu.Topology("v5e:2x4", hardware.CHIPS["v5e"], jax.devices())
    monkeypatch.setattr(program, "build", build)
    monkeypatch.setattr(tpu, "topology", lambda *_: target)
    done = command(
        "--config=digits",
        f"--config.pretrained={released}",
        "--config.data.image_size=0",
        *(f"--config.model.{k}=0" for k in ("width", "depth", "mlp_dim", "heads")),
        *("--config.model.patch=0", "--config.data.source=synthetic"),
        *("--config.data.num_classes=5", "--config.model.name=ViT-B/16"),
        module=module,
    )
    assert done.stderr.endswith("error: width 16, 8 pixels\n")


@pytest.mark.heavy
def test_fine_tuning_starts_from_the_file(photos, released, tmp_path, command):
    """With every array frozen but the head, the rest stays what the file holds."""
    done = finetune(
        command,
        photos,
        released,
        tmp_path / "run",
        "--config.steps=2",
        "--config.optim.freeze=('Transformer/.*','embedding.*','cls')",
    )
    assert done.returncode == 0, done.stderr
    before, after = weights.read(released), weights.read(tmp_path / "run")
    kernel = ["Transformer", "encoderblock_0", "MlpBlock_3", "Dense_0", "kernel"]
    old, new = before.params, after.params
    for key in kernel:
        old, new = old[key], new[key]
    np.testing.assert_array_equal(old, new)
    assert np.shape(after.params["head"]["kernel"]) == (16, 3)
    assert np.any(after.params["head"]["kernel"])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("--config.model.width=32", "model.width: file 16, config 32"),
        ("--config.model.depth=2", "model.depth: file 1, config 2"),
        ("--config.model.patch=8", "model.patch: file"),
    ],
)
def test_another_architecture_names_the_field(
    photos, released, tmp_path, change, field, command
):
    done = finetune(command, photos, released, tmp_path / "run", change)
    assert field in done.error


@pytest.mark.heavy
def test_a_file_alone_brings_its_architecture(tmp_path):
    """Six flags used to be needed for a model that is not the config's."""
    colours = {"image_mean": (0.4, 0.5, 0.6), "image_std": (0.2, 0.3, 0.25)}
    small = dataclasses.replace(
        TINY.model, num_classes=7, image_size=(16, 16), **colours
    )
    model = models.create(small)
    params = init(model)
    file = str(tmp_path / "small.npz")
    weights.save(file, small, params)

    cfg = config.replace(
        TINY, model=ModelConfig(), pretrained=file, steps=3, data__image_size=0
    )
    train.train(cfg, str(tmp_path / "run"))
    stored = config.read(tmp_path / "run" / "config.json")
    found = stored.model
    assert stored.data.image_size == 16
    assert (found.width, found.depth, found.heads, found.patch) == (16, 1, 2, 4)
    assert {field: getattr(found, field) for field in colours} == colours
    # A run that is continued does not need the file.
    (tmp_path / "small.npz").rename(tmp_path / "moved.npz")
    train.train(config.replace(cfg, steps=4), str(tmp_path / "run"))

    with pytest.raises(UserError, match=r"config.data.image_size is 0"):
        program.build(config.replace(cfg, pretrained=""))
    other = config.replace(cfg, model__width=32, model__depth=1, model__mlp_dim=32,
        model__heads=2, model__patch=4, pretrained=str(tmp_path / "moved.npz"))  # fmt: skip
    with pytest.raises(UserError, match=r"--config.model.width=16"):
        train.train(other, str(tmp_path / "other"))
