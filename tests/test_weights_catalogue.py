# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

import vit_jax
from vit_jax.errors import UserError
from vit_jax.weights import __main__ as command
from vit_jax.weights import augreg, catalogue, fetch
from vit_jax.weights.catalogue import CATALOGUE


def test_ids_and_cache_names_are_unique(monkeypatch, tmp_path):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    rows = [
        *(*catalogue._original(), *catalogue._augreg()),
        *(*catalogue._big_vision(), *catalogue._families()),
    ]
    assert len({p.id for p in rows}) == len(rows) == len(CATALOGUE)
    files = [p.file for p in rows if p.file]
    assert len(set(files)) == len(files)
    assert len({fetch.cached(f) for f in files}) == len(files)
    elsewhere = [s for p in rows for s in p.alternatives]
    assert len(set(elsewhere)) == len(elsewhere)
    same_name = [p for p in rows if p.file.endswith("/ViT-B_16.npz")]
    assert len(same_name) == 4  # in four folders


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_row_is_a_model(name):
    p = CATALOGUE[name]
    cfg = vit_jax.create_model(p.model, image_size=p.image_size).cfg
    assert cfg.depth in (12, 24, 26, 27, 32, 40, 50)
    assert all(s.startswith(("hf://", "gs://", "https://")) for s in p.sources)
    assert (p.head == "zeroed") == ("imagenet21k/" in p.file)
    assert bool(p.accuracy) == bool(p.measured_by)
    assert p.accuracy < 90.1
    assert p.classes in {"none": (0,), "zeroed": (21843,)}.get(
        p.head, (512, 768, 1000, 1024, 1280, 21843)
    )
    if "augreg" in p.file:
        about = augreg.parse_name(p.file)
        assert about.model == p.model
        assert about.image_size == p.image_size
        assert bool(about.adapt_data) == ("->" in p.data)


def test_parser():
    name = "gs://a/R26_S_32-i21k-30ep-lr_0.001-aug_light0-wd_0.03-do_0.1-sd_0.1.npz"
    assert augreg.parse_name(name) == (
        ("R26+ViT-S/32", "i21k", 30, 0.001, "light0", 0.03, 0.1, 0.1, "", 0, 0.0, 224)
    )
    tuned = name.removesuffix(".npz") + "--cifar100-steps_0k-lr_0.003-res_384.npz"
    about = augreg.parse_name(tuned)
    assert about[8:] == ("cifar100", 0, 0.003, 384)
    short = "Ti_16-i1k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0"
    assert augreg.parse_name(short).model == "ViT-Ti/16"
    with pytest.raises(UserError, match="no AugReg file name"):
        augreg.parse_name("ViT-B_16.npz")


def test_command(capsys, tmp_path, monkeypatch):
    assert command.main(["list", "b/16", "384"]) == 0
    out = capsys.readouterr().out
    assert command.main(["list", "B/16 384"]) == 0
    assert capsys.readouterr().out == out
    assert "vit_b16_augreg_i21k_ft_i1k_384" in out
    assert "ViT-L" not in out
    assert "refused anonymous" in out
    command.main(["show", "vit_b16_i21k"])
    out = capsys.readouterr().out
    assert "accuracy" not in out  # it has no head
    command.main(["show", "vit_b16_i21k_ft_i1k_224"])
    out += capsys.readouterr().out
    for field in dataclasses.fields(catalogue.Published):
        assert field.name in out
    command.main(["parse", "S_16-i1k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0"])
    assert "weight_decay         0.1" in capsys.readouterr().out
    with pytest.raises(UserError, match="did you mean 'vit_b16_i21k'"):
        command.main(["show", "vit_b16_i21"])
    (tmp_path / "RUN").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="RUN holds no checkpoint"):
        command.main(["show", "RUN"])
    with pytest.raises(UserError, match="unknown command"):
        command.main(["lst"])


def test_list_fits_a_terminal_and_takes_patterns(capsys):
    command.main(["list"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert all(name in out for name in CATALOGUE)
    command.main(["list", "ViT-S/*"])
    lines = capsys.readouterr().out.splitlines()
    ids = [line.split()[0] for line in lines[1 : lines.index("")]]
    assert ids == [p.id for p in CATALOGUE.values() if p.model.startswith("ViT-S/")]
    assert ids == vit_jax.list_models("ViT-S/*", pretrained=True)
    assert vit_jax.list_models("*dinov2-base", pretrained=True) == ["dinov2-base"]
    with pytest.raises(UserError, match="no published checkpoint matches 'vit-z'"):
        command.main(["list", "vit-z"])
