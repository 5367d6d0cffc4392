# SPDX-License-Identifier: Apache-2.0
"""``python -m vit_jax.analysis``: all figures, from every kind of checkpoint, and mistakes."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image
from trained import trained_workdir

from vit_jax import models, weights
from vit_jax.analysis import attention, drawing, embeddings, figures, maps, report, runs
from vit_jax.analysis.__main__ import analyse
from vit_jax.analysis.subject import Subject
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
RNG = np.random.default_rng(0)
SMALL = ModelConfig(
    name="", num_classes=3, image_size=(16, 16), width=16, depth=1, mlp_dim=16, heads=2, patch=8
)  # fmt: skip


@pytest.fixture(autouse=True)
def _same_numbers_for_each_test():
    global RNG
    RNG = np.random.default_rng(1)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        pixels = RNG.integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return str(folder)


def save(path, cfg):
    model = models.create(cfg)
    shape = (1, *cfg.image_size, cfg.channels)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros(shape))["params"]
    params = jax.tree.map(lambda s: RNG.normal(0, 0.3, s.shape), shapes)
    weights.save(str(path), model.cfg, params)
    return str(path)


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return save(tmp_path_factory.mktemp("npz") / "small.npz", SMALL)


def is_print_quality(path):
    with Image.open(path) as image:
        assert image.info["dpi"][0] == pytest.approx(300, abs=1)
        assert image.width == drawing.WIDTH * 300, "figures differ in width"
        assert np.asarray(image.convert("L")).std() > 1, f"{path} is blank"


def test_a_workdir_gives_every_figure_and_one_page(tmp_path, capsys):
    omitted = analyse(trained_workdir(), str(tmp_path), count=20, html=True)
    assert omitted == {}
    for name in figures.FIGURES:
        is_print_quality(tmp_path / f"{name}.png")
        arrays = dict(np.load(tmp_path / f"{name}.npz"))
        assert figures.draw(name, arrays), "the arrays do not make the figure again"
    page = (tmp_path / "report.html").read_text()
    for name in (*figures.FIGURES, "config"):
        assert f'href="#{name}"' in page
        assert f'id="{name}"' in page
    assert re.search(r"test/accuracy</td><td>[\d.]+% at step 4<", page)
    assert page.index("test/accuracy") < page.index("drawn") < page.index("<img")
    assert "&quot;learning_rate&quot;: 0.001" in page
    assert page.count("data:image/png;base64,") == len(figures.FIGURES)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page)
    assert capsys.readouterr().out.count("wrote ") == len(figures.FIGURES) + 1
    matrix = np.load(tmp_path / "confusion.npz")["confusion"]
    assert matrix.sum() == 128
    bins = np.load(tmp_path / "calibration.npz")
    assert bins["count"].sum() == 128
    right = (bins["count"] * bins["accuracy"]).sum()
    assert right == pytest.approx(np.trace(matrix))
    assert [*np.load(tmp_path / "rollout.npz")["predicted"][0]][-1] == "%"


def test_a_file_and_photos_give_all_that_needs_no_run(npz, photos, tmp_path, capsys):
    omitted = analyse(npz, str(tmp_path / "out"), places=(photos,))
    assert set(omitted) == {"curves", "confusion", "calibration", "errors"}
    assert "left out curves: the source is not a workdir" in capsys.readouterr().out
    assert "needs images with labels" in omitted["confusion"]
    shown = np.load(tmp_path / "out" / "rollout.npz")
    assert shown["images"].shape == (3, 16, 16, 3)
    taken = shown["maps"].sum((1, 2))  # the class token keeps the rest
    assert ((taken > 0) & (taken < 1)).all()


def test_without_images_only_the_embeddings_are_drawn(npz, tmp_path):
    omitted = analyse(npz, str(tmp_path), html=True)
    assert {p.stem for p in tmp_path.glob("*.png")} == {"filters", "positions"}
    assert "--images" in omitted["rollout"]
    assert "Left out: rollout" in (tmp_path / "report.html").read_text()


def test_a_model_without_positions_says_so(tmp_path, photos, capsys):
    cfg = dataclasses.replace(SMALL, positions="none")
    path = save(tmp_path / "none.npz", cfg)
    omitted = analyse(
        path, str(tmp_path), places=(photos,), only=("positions", "filters")
    )
    assert "the model has none" in omitted["positions"]
    assert "left out positions: no position embeddings" in capsys.readouterr().out
    assert (tmp_path / "filters.png").exists()


@pytest.mark.parametrize(
    "source",
    [
        "vt_token_rep.weights.npz",
        "bv_gap_rep.weights.npz",
        "hf_vit",
        "vt_hybrid.weights.npz",
    ],
)
def test_attention_of_files_that_others_wrote(source, photos, shared):
    """Released layout, big_vision, Hugging Face, hybrid."""
    subject = Subject(str(shared / "golden" / source), (photos,), count=2)
    layers, heads = subject.model.cfg.depth, subject.model.cfg.heads
    assert subject.summary.distance.shape == (layers, heads)
    assert len(subject.images) == 2
    np.testing.assert_allclose(subject.summary.rollout.sum(-1), 1, rtol=1e-4)
    assert figures.FIGURES["filters"].arrays(subject)["components"].shape[-1] == 3


def test_timm_layout_gives_the_same_attention(npz, photos, tmp_path):
    found = weights.read(npz)
    path = str(tmp_path / "timm.safetensors")
    weights.save(path, found.cfg, found.params, found.metadata, layout="timm")
    a, b = (Subject(s, (photos,), count=2).summary for s in (npz, path))
    np.testing.assert_allclose(a.distance, b.distance, rtol=1e-4)
    np.testing.assert_allclose(a.maps, b.maps, rtol=1e-4)


# Runs ------------------------------------------------------------------------------


def test_curves_take_the_later_of_two_lines(tmp_path):
    rows = [
        {"step": 1, "train/loss": 3.0},
        {"step": 2, "train/loss": 2.5, "test/accuracy": 0.1},
        {"step": 2, "train/loss": 2.0},  # again after a restart
    ]
    text = "\n".join(map(json.dumps, rows)) + '\n{"step": 3, "train/lo'  # cut off
    (tmp_path / "metrics.jsonl").write_text(text)
    got = runs.read_curves(tmp_path)
    assert got["names"].tolist() == ["test/accuracy", "train/loss", "train/loss"]
    assert got["steps"].tolist() == [2, 1, 2]
    assert got["values"].tolist() == [0.1, 3.0, 2.0]
    with pytest.raises(UserError, match=r"no metrics.jsonl with numbers"):
        runs.read_curves(tmp_path / "none")


@pytest.mark.parametrize("count", [2, 40])
def test_errors_are_the_most_and_the_least_confident(count):
    p = RNG.dirichlet(np.ones(4), 30)
    label = RNG.integers(0, 4, 30)
    mask = np.arange(30) < 27
    pictures = np.arange(30, dtype=np.uint8)[:, None, None, None]
    batches = [
        {
            "image": pictures[i : i + 10],
            "label": label[i : i + 10],
            "mask": mask[i : i + 10],
        }
        for i in (0, 10, 20)
    ]
    tested = runs.measure(
        lambda x: jnp.log(p[np.asarray(x)[:, 0, 0, 0]]),
        lambda logits: np.exp(logits),
        batches,
        ("a", "b", "c", "d"),
        count=count,
    )
    wrong = tested.errors
    expected = np.zeros((4, 4), int)
    np.add.at(expected, (label[:27], p.argmax(1)[:27]), 1)
    np.testing.assert_array_equal(tested.confusion["confusion"], expected)
    assert tested.calibration["count"].sum() == 27
    is_wrong = (p.argmax(1) != label) & mask
    order = [i for i in np.argsort(-p.max(1)) if is_wrong[i]]
    shown = wrong["images"].ravel().tolist()
    if count == 2:
        assert shown == [*order[:2], order[-1], order[-2]]
    else:  # each once, the more confident half first
        half = -(-len(order) // 2)
        assert shown == order[:half] + order[half:][::-1]
    np.testing.assert_allclose(wrong["confidence"], p.max(1)[shown], rtol=1e-6)
    assert wrong["true"].tolist() == [*np.array(list("abcd"))[label[shown]]]


def test_captions_hold_for_models_without_class_token():
    assert "without one of the mean patch" in figures.caption("heads")
    assert not any("output token" in figures.caption(name) for name in figures.FIGURES)


def test_enlarging_is_bilinear():
    small = np.array([[0.0, 1.0], [2.0, 3.0]])
    got = drawing.enlarge(small, (4, 4))
    np.testing.assert_allclose(got[0], [0, 0.25, 0.75, 1])
    np.testing.assert_allclose(got[:, 0], [0, 0.5, 1.5, 2])


def test_one_artefact_token_does_not_darken_the_map():
    """As in a real ViT-S/14: one patch of 1,369 takes a thousand times the others."""
    truth = RNG.uniform(0.5, 1, (1, 37, 37))
    maps = truth.copy()
    maps[0, 3, 4] = 1000
    shown = attention.bounded(maps)
    assert shown.max() == 1
    np.testing.assert_allclose(shown, np.minimum(maps / np.percentile(maps, 98), 1))
    assert np.median(shown) > 0.7
    assert "the largest at 1.01e+03" in drawing.clipping(maps)
    dark = np.zeros((1, 74, 74, 3), np.uint8)
    both = drawing.heated(dark, shown)
    assert both.mean() > 0.2, "nothing is seen on a dark picture"


@pytest.mark.parametrize("value", [0, 255])
def test_heat_shows_on_black_and_white_pictures(value):
    image = np.full((1, 16, 16, 1), value, np.uint8)
    shown = drawing.heated(image, np.eye(4)[None])
    assert shown.mean(-1).std() > 0.1


def overflow(figure):
    """Pixels by which any text reaches out of the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    outside = []
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text():
            box = text.get_window_extent(canvas.get_renderer())
            outside += [
                -box.x0,
                -box.y0,
                box.x1 - figure.bbox.x1,
                box.y1 - figure.bbox.y1,
            ]
    return max(outside)


LONG = "German short-haired pointer, a very long name that never seems to end at all"


@pytest.mark.parametrize("count", [1, 2, 3, 32])
def test_no_title_of_the_errors_is_cut_off(count):
    names = np.array([LONG] * count)
    images = RNG.integers(0, 256, (count, 8, 8, 3), np.uint8)
    figure = figures.draw(
        "errors",
        {"images": images, "confidence": np.full(count, 0.5), "true": names, "predicted": names},
    )  # fmt: skip
    assert overflow(figure) <= 1
    words = (
        " ".join(t.get_text() for t in figure.axes[0].texts)
        + figure.axes[0].get_title()
    )
    for word in LONG.split():
        assert word in words


@pytest.mark.parametrize("count", [1, 6])
def test_no_name_of_the_rollout_and_the_confusion_is_cut_off(count):
    names = np.array([f"{LONG} {i}" for i in range(count)])
    images = RNG.integers(0, 256, (count, 8, 8, 3), np.uint8)
    arrays = {"images": images, "maps": RNG.random((count, 2, 2)), "predicted": names}
    assert overflow(figures.draw("rollout", arrays)) <= 1
    assert overflow(figures.draw("rollout_grid", arrays)) <= 1
    arrays = {"confusion": np.eye(count, dtype=int), "class_names": names}
    assert overflow(figures.draw("confusion", arrays)) <= 1


IMAGE = np.zeros((1, 8, 8, 3), np.uint8)
SAID = {
    "positions": (
        {"similarity": np.zeros((2, 3, 2, 3))},
        ["of 2 x 3 patches", "cosine similarity"],
    ),
    "distance": (
        {"distance": np.ones((2, 3)), "uniform": 4.0, "images": 1, "model": "B/16"},
        ["B/16, average over 1 image\n", "one of 3 heads"],
    ),
    "rollout": (
        {"images": IMAGE, "maps": np.ones((1, 2, 2)), "predicted": np.array(["cat"])},
        ["input", "attention", "both", "cat", "98th"],
    ),
    "rollout_grid": (
        {"images": IMAGE, "maps": np.ones((1, 2, 2)), "predicted": np.array(["cat"])},
        ["Pairs of image and attention", "cat"],
    ),
    "heads": (
        {"image": IMAGE[0], "maps": np.ones((2, 3, 2, 2))},
        ["layer", "attention by head", "\n3\n", "98th"],
    ),
    "curves": (
        {
            "names": np.array(["train/loss", "train/images_per_second"]),
            "steps": np.array([1, 1]),
            "values": np.array([1.0, 2.0]),
        },
        ["images per second"],
    ),
    "confusion": (
        {"confusion": np.array([[3, 1], [0, 0]]), "class_names": np.array(["a", "b"])},
        ["a (4)", "b (0)", "75"],
    ),
    "calibration": (
        dict.fromkeys(("count", "confidence", "accuracy"), np.ones(15)),
        ["15 images", "perfect calibration"],
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_figures_say_what_they_show(name):
    arrays, words = SAID[name]
    figure = figures.draw(name, arrays)
    figure.draw_without_rendering()
    drawn, whole = figure.get_tightbbox(), figure.bbox_inches
    assert min(drawn.min) >= 0
    assert np.all(drawn.max <= whole.max)
    found = [t.get_text() for t in figure.findobj(Text) if t.get_visible()]
    text = "\n".join(["", *found, ""])
    assert [word for word in words if word not in text] == []


def test_filters_of_grey_pictures_are_grey(tmp_path, photos):
    for path in Path(photos).iterdir():
        Image.open(path).convert("L").convert("RGB").save(path)
    subject = Subject(save(tmp_path / "x.npz", SMALL), (photos,))
    kernel = np.asarray(subject.params["embedding"]["kernel"])
    got = figures.FIGURES["filters"].arrays(subject)["components"]
    assert got.shape[-1] == 1
    want, _ = embeddings.filter_components(kernel.sum(2, keepdims=True))
    np.testing.assert_allclose(got, want)


def test_colors_of_patch_tokens_tell_an_object_from_its_background():
    tokens = RNG.normal(0, 0.1, (2, 8, 8, 16))
    tokens[:, 2:6, 2:6] += RNG.normal(0, 1, 16)
    colors, share = maps.principal_colors(tokens)
    assert colors.min() == 0
    assert colors.max() == 1
    inside = colors[:, 2:6, 2:6, 0]
    outside = np.delete(
        colors[..., 0].reshape(2, -1),
        [i * 8 + j for i in range(2, 6) for j in range(2, 6)],
        1,
    )
    assert inside.min() > outside.max()
    assert 0.5 < share <= 1


# Mistakes ---------------------------------------------------------------------------


def test_bad_images_are_errors(npz, photos, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"bad.png cannot be read: not an image"):
        analyse(npz, str(tmp_path), places=(photos, str(bad)))
    with pytest.raises(UserError, match="image /nowhere does not exist"):
        analyse(npz, str(tmp_path), places=("/nowhere",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        analyse(npz, str(tmp_path), places=(str(tmp_path / "empty"),))
    assert len(Subject(npz, (photos,), count=2).photos()) == 2


def test_other_mistakes(npz, tmp_path):
    with pytest.raises(UserError, match="did you mean 'rollout'"):
        analyse(npz, str(tmp_path), only=("rolout",))
    with pytest.raises(UserError, match="--count=0"):
        analyse(npz, str(tmp_path), count=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out=.* cannot be written"):
        analyse(npz, str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"--out=.* cannot be written"):
        report.write_html(tmp_path / "none" / "x.html", "", {}, {}, {}, {})


def test_the_command(npz, tmp_path, command):
    args = [npz, f"--out={tmp_path}", "--only=filters,positions", "--html"]
    result = command(*args, module="vit_jax.analysis")
    assert result.returncode == 0, result.stderr
    assert {p.name for p in tmp_path.glob("*.png")} == {"filters.png", "positions.png"}


@pytest.mark.parametrize("out", [True, False])
def test_mistakes_in_the_command_are_one_line(npz, tmp_path, command, out):
    args, word = ([], "expected one SOURCE") if out else ([npz], "--out is missing")
    args += [f"--out={tmp_path}"] * out
    assert word in command(*args, module="vit_jax.analysis").error
