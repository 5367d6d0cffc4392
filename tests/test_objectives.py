# SPDX-License-Identifier: Apache-2.0
"""Losses in closed form, mixup, and the properties of masked patch prediction."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import objectives
from vit_jax.config import Config, ModelConfig, replace
from vit_jax.errors import UserError
from vit_jax.objectives import masked_patch
from vit_jax.objectives.mixup import mixup

KEY = jax.random.key(0)
B, P, N = 8, 4, 16  # images of 16 x 16


class Given:
    """A model whose parameters are its predictions."""

    def __init__(self, num_classes):
        self.cfg = SimpleNamespace(
            name="given", num_classes=num_classes, patch=P, resnet_width=0
        )
        self.seen = []

    def apply(self, variables, images, *, train, rngs, corruption=None):
        assert train
        self.seen.append((images, rngs["dropout"], corruption))
        return variables["params"]


def batch(labels):
    images = jax.random.uniform(KEY, (B, 16, 16, 3), minval=-1, maxval=1)
    return {"image": images, "label": jnp.asarray(labels)}


def loss_of(cfg, logits, labels, key=KEY):
    model = Given(logits.shape[-1])
    loss_fn = objectives.of(cfg).create(model, cfg)
    data = batch(labels)
    if cfg.mixup:
        cfg = replace(cfg, model__num_classes=logits.shape[-1])
        data = objectives.mixup_batch(cfg, jax.random.fold_in(key, 1), data)
    loss, metrics = jax.jit(loss_fn)(logits, data, key)
    assert loss.shape == ()
    assert loss.dtype == jnp.float32
    return float(loss), {k: float(v) for k, v in metrics.items()}


def ten_classes(cfg):
    return replace(cfg, model__num_classes=10)


def width_of(cfg, patch=P):
    return masked_patch.outputs(replace(cfg, model__patch=patch))


# Classification


@pytest.mark.parametrize("change", [{}, {"label_smoothing": 0.1}, {"mixup": 0.5}])
def test_softmax_of_a_zero_head_is_ln_k(change):
    cfg = Config(**change)
    loss, _ = loss_of(cfg, jnp.zeros((B, 10)), np.arange(B) % 10)
    assert loss == pytest.approx(math.log(10), rel=1e-6)


@pytest.mark.parametrize(
    ("k", "bias", "printed"), [(21_843, -10.0, 10.99), (1000, -6.9, 7.91)]
)
def test_sigmoid_of_a_constant_head_has_the_closed_form(k, bias, printed):
    loss, _ = loss_of(Config(loss="sigmoid"), jnp.full((B, k), bias), np.arange(B))
    assert loss == pytest.approx(
        (k - 1) * math.log1p(math.exp(bias)) + math.log1p(math.exp(-bias)), rel=1e-5
    )
    assert loss == pytest.approx(printed, abs=5e-3)


def test_sigmoid_sums_over_the_classes_of_a_multi_hot_label():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, 5)).astype(np.float32)
    y = (rng.random((B, 5)) < 0.5).astype(np.float32)
    p = 1 / (1 + np.exp(-x.astype(np.float64)))
    expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(1)
    given = objectives.example_losses("sigmoid", jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(given, expected, rtol=1e-5)
    loss, _ = loss_of(Config(loss="sigmoid"), jnp.asarray(x), 3 * y)  # listed 3 times
    assert loss == pytest.approx(expected.mean(), rel=1e-5)


def test_label_smoothing_by_hand():
    # Two classes, logits (a, 0): -log p = softplus(-a) and softplus(a).
    a, s = 1.5, 0.2
    logits = jnp.zeros((B, 2)).at[:, 0].set(a)
    loss, _ = loss_of(Config(label_smoothing=s), logits, np.zeros(B, np.int32))
    expected = (1 - s / 2) * math.log1p(math.exp(-a)) + s / 2 * math.log1p(math.exp(a))
    assert loss == pytest.approx(expected, rel=1e-6)


def test_example_losses_are_one_float32_per_example():
    logits = jnp.array([[2.0, 0.0], [0.0, 0.0]], jnp.bfloat16)
    given = objectives.example_losses("softmax", logits, jnp.array([0, 1]))
    assert given.dtype == jnp.float32
    np.testing.assert_allclose(
        given, [math.log1p(math.exp(-2)), math.log(2)], rtol=1e-6
    )
    soft = jnp.array([[0.5, 0.5], [0.0, 1.0]])
    np.testing.assert_allclose(
        objectives.example_losses("softmax", logits, soft),
        [math.log1p(math.exp(-2)) + 1, math.log(2)],
        rtol=1e-6,
    )


def test_accuracy_counts_the_top_class_as_right_if_it_is_any_label():
    logits = jnp.tile(jnp.array([[0.0, 2.0, 1.0]]), (B, 1))
    labels = np.zeros((B, 3), np.float32)
    labels[:, 0] = 1
    labels[:3, 1] = 1
    _, metrics = loss_of(Config(loss="sigmoid"), logits, labels)
    assert metrics == {"accuracy": 3 / B}
    _, metrics = loss_of(Config(mixup=1.0), logits, np.array([1, 1] + [2] * (B - 2)))
    assert metrics == {"accuracy": 2 / B}  # of the example with the larger share


def test_ignored_examples_take_no_part():
    logits = jax.random.normal(KEY, (B, 10))
    labels = np.arange(B)
    labels[[1, 4]] = -1
    kept = np.delete(np.arange(B), [1, 4])
    loss, metrics = loss_of(Config(), logits, labels)
    each = objectives.example_losses("softmax", logits[kept], jnp.asarray(kept))
    assert loss == pytest.approx(float(each.mean()), rel=1e-6)
    hits = (logits[kept].argmax(-1) == kept).mean()
    assert metrics["accuracy"] == pytest.approx(float(hits))
    # Multi-hot rows are taken out by the mask of the pipeline, or are -1 throughout.
    masked = batch(np.eye(B, 10, dtype=np.float32) * (labels >= 0)[:, None])
    masked["mask"] = jnp.asarray(labels >= 0, jnp.float32)
    ignored = np.eye(B, 10, dtype=np.float32)
    ignored[labels < 0] = -1
    loss_fn = objectives.OBJECTIVES["softmax"].create(Given(10), Config())
    for data in (masked, batch(ignored)):
        assert float(loss_fn(logits, data, KEY)[0]) == pytest.approx(loss, rel=1e-6)
        assert float(objectives.of(Config()).num_counted(data)) == B - 2
    cfg = Config(mixup=0.5, model=ModelConfig(num_classes=10))
    mixed = objectives.mixup_batch(cfg, KEY, batch(labels))
    np.testing.assert_array_equal(np.flatnonzero(mixed["mask"] == 0), [1, 2, 4, 5])


def test_a_batch_of_ignored_examples_has_loss_zero():
    loss, _ = loss_of(Config(), jnp.zeros((B, 10)), np.full(B, -1))
    assert loss == 0


# Mixup


def test_mixup_blends_images_and_labels_with_one_weight():
    data = batch(np.arange(B))
    labels = jax.nn.one_hot(data["label"], B)
    x, y = mixup(KEY, data["image"], labels, 0.5)
    share = float(y[0, 0])
    assert 0.5 <= share < 1
    np.testing.assert_allclose(
        y,
        share * np.eye(B)
        + (1 - share) * np.eye(B, k=-1)
        + (1 - share) * np.eye(B, k=B - 1),
        rtol=1e-6,
    )
    np.testing.assert_allclose(y.sum(1), 1, rtol=1e-6)
    image = np.asarray(data["image"])
    np.testing.assert_allclose(
        x, share * image + (1 - share) * np.roll(image, 1, 0), rtol=1e-5, atol=1e-6
    )
    again, _ = mixup(KEY, data["image"], labels, 0.5)
    np.testing.assert_array_equal(again, x)


def test_mixup_weight_is_the_larger_side_of_a_beta_draw():
    keys = jax.random.split(KEY, 4000)
    one, zero = jnp.ones((1, 1)), jnp.array([[1.0], [0.0]])
    share = jax.jit(
        jax.vmap(lambda k: mixup(k, one, zero, 1.0)[1][0, 0]),
    )(keys)
    # Beta(1, 1) is uniform, its larger side uniform in [1/2, 1].
    assert float(share.min()) >= 0.5
    assert float(share.mean()) == pytest.approx(0.75, abs=4 * 0.1443 / 4000**0.5)
    assert float(share.std()) == pytest.approx(0.1443, rel=0.05)


def test_mixup_batch_mixes_before_the_model_sees_it():
    cfg = Config(mixup=0.5, model=ModelConfig(num_classes=10))
    mixed = objectives.mixup_batch(cfg, KEY, batch(np.arange(B)))
    images, labels = mixup(KEY, batch(np.arange(B))["image"], jnp.eye(B, 10), 0.5)
    np.testing.assert_array_equal(mixed["image"], images)
    np.testing.assert_array_equal(mixed["label"], labels)
    other = objectives.mixup_batch(cfg, jax.random.key(9), batch(np.arange(B)))
    assert not np.allclose(other["label"], labels)


def test_loss_hands_the_key_to_dropout():
    model = Given(10)
    loss_fn = objectives.OBJECTIVES["softmax"].create(model, Config())
    loss_fn(jnp.zeros((B, 10)), batch(np.arange(B)), KEY)
    np.testing.assert_array_equal(
        jax.random.key_data(model.seen[0][1]), jax.random.key_data(KEY)
    )


# Masked patch prediction


@pytest.fixture(scope="module")
def many():
    return jax.jit(masked_patch.draw_corruption, static_argnums=(1, 2))(KEY, 500, 49)


def near(count, total, share):
    """Within 4 standard deviations of a binomial."""
    return abs(count - total * share) < 4 * (total * share * (1 - share)) ** 0.5


def test_half_of_the_patches_are_chosen_in_every_image(many):
    chosen, _ = many
    np.testing.assert_array_equal(chosen.sum(1), round(49 / 2))
    # Every position equally often, and not the same ones in every image.
    assert all(near(c, 500, 24 / 49) for c in np.asarray(chosen.sum(0)))


def test_chosen_patches_are_corrupted_80_10_10(many):
    chosen, corruption = many
    kind = np.asarray(corruption["kind"])[np.asarray(chosen)]
    for value, share in [(1, 0.8), (2, 0.1), (0, 0.1)]:
        assert near((kind == value).sum(), kind.size, share)
    assert not np.asarray(corruption["kind"])[~np.asarray(chosen)].any()


def test_source_is_another_patch_of_the_image_each_equally_often(many):
    source = np.asarray(many[1]["source"])
    assert source.min() == 0
    assert source.max() == 48
    assert (source != np.arange(49)).all()
    offsets = np.bincount(((source - np.arange(49)) % 49).ravel(), minlength=49)
    assert offsets[0] == 0
    assert all(near(c, source.size, 1 / 48) for c in offsets[1:])


def test_corruption_follows_the_key_and_the_share():
    a, b, c = (
        masked_patch.draw_corruption(jax.random.key(k), 2, 20, 0.15)[0]
        for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    np.testing.assert_array_equal(a.sum(1), 3)


@pytest.mark.parametrize("target", list(masked_patch.TARGETS))
def test_loss_covers_exactly_the_chosen_patches(target):
    cfg = Config(
        loss="masked_patch",
        masked_target=target,
        model=ModelConfig(head="masked_patch"),
    )
    width = width_of(cfg)
    model = Given(width)
    loss_fn = masked_patch.create(model, cfg)
    predictions = 0.1 * jax.random.normal(KEY, (B, N, width))

    @jax.jit
    def grads_and_kind(p):
        grads = jax.grad(lambda p: loss_fn(p, batch(np.arange(B)), KEY)[0])(p)
        return grads, model.seen[-1][2]["kind"]

    grads, kind = map(np.asarray, grads_and_kind(predictions))
    touched = np.abs(grads).sum(-1) > 0
    np.testing.assert_array_equal(touched.sum(1), N // 2)
    assert touched[kind > 0].all()
    # Chosen but left unchanged: in the loss as well.
    assert (touched & (kind == 0)).any()


@pytest.mark.parametrize("target", ["mean", "downsampled"])
def test_uniform_prediction_costs_ln_512(target):
    cfg = Config(loss="masked_patch", masked_target=target)
    width = width_of(cfg)
    loss_fn = masked_patch.create(Given(width), cfg)
    loss, metrics = jax.jit(loss_fn)(jnp.zeros((B, N, width)), batch(np.arange(B)), KEY)
    assert float(loss) == pytest.approx(math.log(512), rel=1e-6)
    assert float(metrics["accuracy"]) < 0.1


@pytest.mark.parametrize("target", ["mean", "downsampled"])
def test_right_prediction_is_accurate(target):
    """Constant images: every patch and every cell has the same colour."""
    color = jnp.array([1.0, -1.0, 0.0]).reshape(1, 1, 1, 3)  # bins 7, 0, 4
    cfg = Config(loss="masked_patch", masked_target=target)
    width = width_of(cfg)
    logits = jnp.zeros((B, N, width // 512, 512)).at[..., 7 * 64 + 0 + 4].set(50.0)
    data = {"image": jnp.broadcast_to(color, (B, 16, 16, 3))}
    loss_fn = masked_patch.create(Given(width), cfg)
    loss, metrics = jax.jit(loss_fn)(logits.reshape(B, N, width), data, KEY)
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx(1)


def test_pixel_regression_by_hand():
    cfg = Config(loss="masked_patch", masked_target="pixels")
    width = width_of(cfg)
    data = {"image": jnp.full((B, 16, 16, 3), 0.5)}
    loss_fn = masked_patch.create(Given(width), cfg)
    loss, metrics = jax.jit(loss_fn)(jnp.full((B, N, width), 0.25), data, KEY)
    assert float(loss) == pytest.approx(0.25**2, rel=1e-6)
    assert not metrics


def test_color_classes_are_three_bits_per_channel():
    def of(r, g, b):  # in 0..255
        pixel = jnp.array([r, g, b], jnp.float32) / 127.5 - 1
        return int(masked_patch.color_classes(pixel))

    assert of(0, 0, 0) == 0
    assert of(255, 255, 255) == 511
    assert (of(255, 0, 0), of(0, 255, 0), of(0, 0, 255)) == (448, 56, 7)
    # Bins are 255 / 8 = 31.875 wide.
    assert [of(0, 0, v) for v in (31, 32, 63, 64, 223, 224)] == [0, 1, 1, 2, 6, 7]
    every = {of(32 * r + 9, 32 * g + 9, 32 * b + 9) for r, g, b in np.ndindex(8, 8, 8)}
    assert every == set(range(512))


def test_patches_are_in_raster_order_and_whole():
    images = jnp.arange(9 * 13 * 3.0).reshape(1, 9, 13, 3)
    patches = masked_patch.to_patches(images, 4)
    assert patches.shape == (1, 2 * 3, 4, 4, 3)
    np.testing.assert_array_equal(patches[0, 4], images[0, 4:8, 4:8])


def test_downsampled_cells_are_in_raster_order():
    cfg = Config(loss="masked_patch", masked_target="downsampled")
    p = 8  # cells of 2 x 2 pixels
    cell = np.arange(16).reshape(4, 4) // 2  # bins of the blue channel
    image = np.zeros((B, p, p, 3), np.float32) - 1
    image[..., 2] = np.kron((2 * cell + 1) / 8 - 1, np.ones((2, 2)))
    image[:, ::2, :, 2] += 0.1  # averages out within a cell
    image[:, 1::2, :, 2] -= 0.1
    width = width_of(cfg, p)
    model = Given(width)
    model.cfg.patch = p
    logits = 50.0 * jax.nn.one_hot(cell.ravel(), 512)
    loss, _ = jax.jit(masked_patch.create(model, cfg))(
        jnp.broadcast_to(logits.reshape(1, 1, width), (B, 1, width)),
        {"image": jnp.asarray(image)},
        KEY,
    )
    assert float(loss) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("target", "width"), [("mean", 512), ("downsampled", 8192), ("pixels", 768)]
)
def test_head_width_of_the_masked_targets(target, width):
    cfg = Config(loss="masked_patch", masked_target=target)
    assert width_of(cfg, 16) == width


# Bad input

MASKED = Config(loss="masked_patch", model=ModelConfig(head="masked_patch"))


@pytest.mark.parametrize(
    ("cfg", "multilabel", "words"),
    [
        (Config(), True, ["'softmax'", "multi-hot", "--config.loss=sigmoid"]),
        (replace(Config(), loss="masked_patch"), False, ["config.model.head='token'"]),
        (replace(MASKED, loss="softmax"), False, ["config.model.head='masked_patch'"]),
        (replace(MASKED, mixup=0.2), False, ["config.mixup=0.2", "masked_patch"]),
        (replace(MASKED, model__channels=1), False, ["config.model.channels=1"]),
        (Config(label_smoothing=1.0), False, ["config.label_smoothing=1.0"]),
        (
            Config(loss="sigmoid", label_smoothing=0.1),
            False,
            ["config.label_smoothing=0.1", "softmax"],
        ),
        (Config(model=ModelConfig(head="none")), False, ["config.model.head='none'"]),
        (
            replace(Config(), loss="hinge"),
            False,
            ["unknown config.loss 'hinge'", "softmax"],
        ),
    ],
)
def test_check_refuses_by_name(cfg, multilabel, words):
    with pytest.raises(UserError) as e:
        objectives.check(ten_classes(cfg), multilabel)
    for word in words:
        assert word in str(e.value)


def test_check_refuses_softmax_over_one_class():
    with pytest.raises(UserError, match="1 class"):
        objectives.check(replace(Config(), model__num_classes=1), False)


def test_check_passes_what_fits_and_hints_at_the_sigmoid_bias():
    assert objectives.check(ten_classes(Config()), False) == []
    assert objectives.check(MASKED, True) == []
    (hint,) = objectives.check(ten_classes(Config(loss="sigmoid")), True)
    assert "head_bias=-6.9" in hint
    biased = replace(Config(), loss="sigmoid", model__head_bias=-6.9)
    assert objectives.check(ten_classes(biased), True) == []


def test_label_smoothing_is_said_to_be_in_the_training_loss_alone():
    """A training loss of 0.52 beside a test loss of 0.14 looks like a mistake."""
    (hint,) = objectives.check(ten_classes(Config(label_smoothing=0.1)), False)
    assert "label_smoothing=0.1" in hint


def test_masked_patch_refuses_what_has_no_pixel_patches():
    hybrid = replace(MASKED, model__name="R50+ViT-B/16", model__resnet_width=1)
    with pytest.raises(UserError, match="R50"):
        width_of(hybrid)
    with pytest.raises(UserError, match="divisible by 4"):
        width_of(replace(MASKED, masked_target="downsampled"), 14)
