# SPDX-License-Identifier: Apache-2.0
"""The switches that other families need, against a model in plain numpy.

``reference`` below knows nothing of Flax: it is written from the papers, in float64,
one token, head and angle at a time where the model has arrays of them.
"""

import dataclasses
import functools
from math import erf

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import apply

from vit_jax import models
from vit_jax.config import ModelConfig

pytestmark = pytest.mark.heavy

SIZES = {"width": 24, "depth": 2, "mlp_dim": 20, "heads": 3, "patch": 8}
SIZE = (16, 24)  # 2 x 3 patches

# What each family switches on, as far as it has no parameters of its own name.
FAMILIES = {
    "deit distilled": {"distillation": "head", "gelu": "exact"},
    "deit without its second head": {"distillation": "token", "gelu": "exact"},
    "dinov2 with registers": {"registers": 4, "head": "token_gap", "mlp": "swiglu"},
    "dinov3": {
        **{"registers": 2, "class_token": True, "head": "gap", "positions": "none"},
        **{"rope": "dinov3", "layer_norm_eps": 1e-5},
    },
    "clip": {"norm_pre": True, "gelu": "quick", "layer_norm_eps": 1e-5},
    "siglip": {"head": "map", "gelu": "tanh"},
    "aimv2": {"norm": "rms", "patch_norm": True, "mlp": "swiglu", "head": "gap"},
    "beit": {
        **{"positions": "none", "relative_bias": True, "class_token": True},
        **{"head": "gap", "final_norm": "pooled", "gelu": "exact"},
    },
    "eva02": {
        **{"rope": "eva02", "rope_grid": (4, 5), "mlp": "swiglu", "mlp_norm": True},
        **{"attention_norm": True, "class_token": True, "head": "gap"},
        "final_norm": "pooled",
    },
    "pe": {
        **{"rope": "pe", "rope_grid": (4, 5), "rope_offset": 1.0, "norm_pre": True},
        **{"head": "map", "class_token": True, "map_heads": 4, "map_mlp_dim": 12},
    },
    "pe spatial": {"rope": "pe", "rope_theta": 50.0, "final_norm": "none"},
    "xp": {"norm": "rms", "norm_pre": True, "parallel": True, "qk_norm": True},
    "colours": {"image_mean": (0.4, 0.5, 0.6), "image_std": (0.2, 0.3, 0.25)},
    "all tokens": {"head": "none", "registers": 1, "distillation": "token"}
    | {"class_token": True, "norm": "rms", "qk_norm": True, "mlp_norm": True},
    "axial": {"axial": True, "head": "gap", "positions": "learned2d"},
    "patches": {"head": "masked_patch", "registers": 2, "positions": "learned2d"},
}


def create(**fields):
    sizes = SIZES | {"num_classes": 5, "image_size": SIZE}
    return models.create(ModelConfig(name="", **(sizes | fields)))


def images_of(size=SIZE, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (2, *size, 3)).astype(np.float32)


def filled(model, images, seed=1):
    """Parameters of which none is zero, so that each one matters."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(seed)
    value = lambda path, x: (
        np.float32(path[-1].key == "scale")
        + rng.normal(0, 0.3, x.shape).astype(np.float32)
    )
    return jax.tree_util.tree_map_with_path(value, shapes)


@functools.cache
def computed(family):
    """The model, its parameters, what forward returns and what is seen inside."""
    model, images = create(**FAMILIES[family]), images_of()
    params = filled(model, images)
    options = {"method": "forward", "mutable": ["intermediates"]}
    returned, seen = apply(model, params, images, **options)
    return model, params, returned, seen["intermediates"]["Transformer"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_what_numpy_computes(family):
    model, params, (logits, out), _ = computed(family)
    expected = Reference(model.cfg, params)
    tokens = expected.tokens(images_of())
    np.testing.assert_allclose(out["tokens"], tokens, atol=2e-5)
    want, features = expected.read(tokens)
    np.testing.assert_allclose(out["pre_logits"], features, atol=2e-5)
    np.testing.assert_allclose(logits, want, atol=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_an_effect(family):
    model, params, *_ = computed(family)
    loss = lambda p: (model.apply({"params": p}, images_of()) ** 2).sum()
    for path, g in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        name = "/".join(k.key for k in path)
        if not name.endswith(("key/bias", "mask_token")):  # softmax cancels the bias
            assert np.abs(g).max() > 1e-6, name


@pytest.mark.parametrize("family", FAMILIES)
def test_scan_and_remat_compute_the_same(family):
    model, params, (logits, _), seen = computed(family)
    encoder = dict(params["Transformer"])
    blocks = [encoder.pop(f"encoderblock_{i}") for i in range(2)]
    encoder["encoderblock"] = jax.tree.map(lambda *x: np.stack(x), *blocks)
    stacked = params | {"Transformer": encoder}
    scanned = create(**FAMILIES[family], layers="scan", remat="dots")
    other, inside = apply(scanned, stacked, images_of(), mutable=["intermediates"])
    np.testing.assert_allclose(logits, other, atol=2e-5)
    if model.cfg.axial:  # keeps the attention of lines, elsewhere
        return
    attention = lambda tree: tree["MultiHeadDotProductAttention_1"]["attention"][0]
    layers = attention(inside["intermediates"]["Transformer"]["encoderblock"])
    s = 2 * 3 + models.prefix_tokens(model.cfg)
    assert layers.shape == (2, 2, 3, s, s)
    for i, found in enumerate(layers):
        expected = attention(seen[f"encoderblock_{i}"])
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("family", ["dinov3", "aimv2", "beit", "eva02", "xp"])
def test_bfloat16_is_close_and_stays_in_the_blocks(family):
    _, params, (_, expected), _ = computed(family)
    options = {"method": "forward", "mutable": ["intermediates"]}
    model = create(**FAMILIES[family], dtype="bfloat16")
    (logits, out), seen = apply(model, params, images_of(), **options)
    assert logits.dtype == out["pre_logits"].dtype == "float32"
    block = seen["intermediates"]["Transformer"]["encoderblock_1"]
    assert block["tokens"][0].dtype == out["tokens"].dtype == "bfloat16"
    error = np.abs(np.float32(out["tokens"]) - expected["tokens"])
    assert error.max() < 0.05 * np.abs(expected["tokens"]).max()


def test_colours_are_those_of_the_pixels():
    """(pixels / 255 - mean) / std, and not an operation more where both are 0.5."""
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    plain, other = create(), create(image_mean=mean, image_std=std)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3))
    params = filled(plain, images_of())
    as_trained = np.float32((pixels / 255 - np.array(mean)) / np.array(std))
    found = apply(other, params, np.float32(pixels / 127.5 - 1))
    np.testing.assert_allclose(found, apply(plain, params, as_trained), atol=1e-5)
    half = create(image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    program = lambda m: (
        jax.jit(m.apply).lower({"params": params}, images_of()).as_text()
    )
    assert program(half) == program(plain)
    assert program(other) != program(plain)


@pytest.mark.parametrize("family", ["dinov3", "eva02", "pe spatial"])
def test_rotary_positions_fit_images_of_any_size(family):
    fields = FAMILIES[family] | {"positions": "none", "image_size": (0, 0)}
    model = create(**fields)
    params = filled(model, images_of())
    for size in ((16, 24), (32, 8), (40, 40)):
        images = images_of(size)
        expected = Reference(model.cfg, params).tokens(images)
        tokens = apply(model, params, images, method="forward")[1]["tokens"]
        np.testing.assert_allclose(tokens, expected, atol=2e-5)


def test_rotated_products_depend_on_the_offset_only():
    """RoPE's one property: q_i k_j of equal vectors is a function of i - j."""
    cfg = create(rope="eva02", positions="none", head="gap").cfg
    cos, sin = models.positions.rotation(cfg, (8 * 4, 8 * 5))
    ones = jnp.ones((1, 20, 3, 8))
    q = models.positions.rotate(cfg, ones, cos, sin)[0, :, 0].reshape(4, 5, 8)
    dot = lambda a, b: np.einsum("...d,...d->...", a, b)
    assert np.ptp(dot(q[1:, 2:], q[:-1, :-2])) < 1e-5
    assert np.ptp(dot(q, q[:1, :1])) > 1


def test_registers_start_different():
    """Without positions, equal ones would get equal gradients for ever."""
    model = create(registers=4)
    tokens = jax.jit(lambda: model.init(jax.random.key(0), images_of())["params"])()
    registers = np.asarray(tokens["registers"][0])
    assert np.linalg.matrix_rank(registers) == 4
    assert 0.01 < registers.std() < 0.03


def test_a_symbolic_batch_can_be_exported():
    resnet = create(depth=0, heads=0, mlp_dim=0, patch=0, resnet=(1,))
    models_and_params = [
        *(computed(family)[:2] for family in ("pe", "dinov2 with registers")),
        (resnet, filled(resnet, images_of())),
    ]
    for model, params in models_and_params:
        (b,) = jax.export.symbolic_shape("b")
        images = jax.ShapeDtypeStruct((b, *SIZE, 3), jnp.float32)
        apply = jax.jit(lambda x, model=model, p=params: model.apply({"params": p}, x))
        program = jax.export.export(apply)(images)
        for batch in (1, 3):
            images = np.resize(images_of(), (batch, *SIZE, 3))
            np.testing.assert_allclose(program.call(images), apply(images), atol=1e-5)


class Reference:
    """The model once more, written to be checked by eye rather than to be fast."""

    def __init__(self, cfg, params):
        self.cfg = cfg
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def tokens(self, images):
        return np.stack([self.encode(image) for image in np.float64(images)])

    def encode(self, image):
        """(H, W, 3) in [-1, 1] -> (S, D)."""
        c, p = self.cfg, self.params
        mean, std = (
            np.array(c.image_mean or (0.5,) * 3),
            np.array(c.image_std or (0.5,) * 3),
        )
        image = ((image + 1) / 2 - mean) / std
        rows, columns = image.shape[0] // 8, image.shape[1] // 8
        kernel = p["embedding"]["kernel"].reshape(-1, c.width)
        tokens, places = [], []
        for i in range(rows):
            for j in range(columns):
                patch = image[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].reshape(-1)
                x = patch @ kernel + p["embedding"]["bias"]
                if c.patch_norm:
                    x = self.norm(x, p["embedding_norm"])
                tokens.append(x)
                places.append((i, j))
        prefix = [p[name][0] for name in ("cls", "dist") if name in p]
        z = np.concatenate([*prefix, np.stack(tokens)])
        z = z + self.table(rows, columns, len(prefix))
        if "registers" in p:
            z = np.concatenate([z[: len(prefix)], p["registers"][0], z[len(prefix) :]])
        places = [None] * (len(z) - len(places)) + places
        encoder = p["Transformer"]
        if c.norm_pre:
            z = self.norm(z, encoder["norm_pre"])
        for i in range(c.depth):
            p, grid = encoder[f"encoderblock_{i}"], (rows, columns)
            z = self.axial(z, p, grid) if c.axial else self.block(z, p, places, grid)
        return self.norm(z, encoder["encoder_norm"]) if c.final_norm == "tokens" else z

    def table(self, rows, columns, prefix):
        if self.cfg.positions == "none":
            return 0.0
        p = self.params["Transformer"]["posembed_input"]
        if self.cfg.positions == "learned":
            return p["pos_embedding"][0]
        x, y = p["pos_embedding_x"][0], p["pos_embedding_y"][:, 0]
        patches = [[*x[j], *y[i]] for i in range(rows) for j in range(columns)]
        cls = p["pos_embedding_cls"][0] if prefix else np.empty((0, len(patches[0])))
        return np.concatenate([cls, patches])

    def norm(self, x, p):
        axes = tuple(range(x.ndim - p["scale"].ndim, x.ndim))
        if self.cfg.norm == "rms":
            rms = np.sqrt((x**2).mean(axes, keepdims=True) + self.cfg.layer_norm_eps)
            return x / rms * p["scale"]
        centred = x - x.mean(axes, keepdims=True)
        variance = (centred**2).mean(axes, keepdims=True) + self.cfg.layer_norm_eps
        return centred / np.sqrt(variance) * p["scale"] + p["bias"]

    def block(self, z, p, places, grid):
        c = self.cfg
        attend = lambda y: self.attention(
            c, y, y, p["MultiHeadDotProductAttention_1"], places, grid
        )
        y = self.norm(z, p["LayerNorm_0"])
        if c.parallel:
            return z + attend(y) + self.mlp(c, y, p["MlpBlock_3"])
        z = z + attend(y)
        return z + self.mlp(c, self.norm(z, p["LayerNorm_2"]), p["MlpBlock_3"])

    def axial(self, z, p, grid):
        """Every row by itself, then every column."""
        z = z.reshape(*grid, -1)
        z = np.stack([self.block(row, p["rows"], None, None) for row in z])
        columns = [self.block(c, p["columns"], None, None) for c in z.swapaxes(0, 1)]
        return np.stack(columns, axis=1).reshape(grid[0] * grid[1], -1)

    def attention(self, c, queries, tokens, p, places=None, grid=None):
        project = lambda x, n: (
            np.einsum("sd,dkh->skh", x, p[n]["kernel"]) + p[n]["bias"]
        )
        q, k = project(queries, "query"), project(tokens, "key")
        v = project(tokens, "value")
        if c.qk_norm:
            q, k = self.norm(q, p["query_norm"]), self.norm(k, p["key_norm"])
        if c.rope != "none" and places:
            q, k = self.turned(q, places, grid), self.turned(k, places, grid)
        heads = np.empty((len(q), c.heads, c.width // c.heads))
        for t in range(len(q)):
            for h in range(c.heads):
                logits = k[:, h] @ q[t, h] / (c.width // c.heads) ** 0.5
                if c.relative_bias:
                    table = p["posembed_bias"]["pos_embedding"]
                    for s, place in enumerate(places):
                        logits[s] += table[self.offset(places[t], place, grid), h]
                a = np.exp(logits - logits.max())
                heads[t, h] = a / a.sum() @ v[:, h]
        if c.attention_norm:
            heads = self.norm(heads, p["norm"])
        return np.einsum("tkh,khd->td", heads, p["out"]["kernel"]) + p["out"]["bias"]

    def offset(self, query, key, grid):
        """The row of BEiT's table."""
        h, w = grid
        last = (2 * h - 1) * (2 * w - 1) + 2
        if query is None or key is None:
            return {(1, 0): last - 2, (0, 1): last - 1, (1, 1): last}[
                (int(query is None), int(key is None))
            ]
        rows, columns = query[0] - key[0] + h - 1, query[1] - key[1] + w - 1
        return rows * (2 * w - 1) + columns

    def turned(self, x, places, grid):
        """Every pair of entries as a complex number, times e^(i angle)."""
        c, x = self.cfg, x.copy()
        size = x.shape[-1]
        theta = c.rope_theta or {"dinov3": 100}.get(c.rope, 10_000)
        for s, place in enumerate(places):
            if place is None:
                continue
            if c.rope == "dinov3":
                at = [
                    2 * np.pi * ((2 * i + 1) / n - 1)
                    for i, n in zip(place, grid, strict=True)
                ]
            else:
                reference = [r or n for r, n in zip(c.rope_grid, grid, strict=True)]
                at = [
                    (i + c.rope_offset) / n * r
                    for i, n, r in zip(place, grid, reference, strict=True)
                ]
            at = at[::-1] if c.rope == "pe" else at
            angles = [
                a / theta ** (j / (size // 4)) for a in at for j in range(size // 4)
            ]
            for j, angle in enumerate(angles):
                pair = (j, j + size // 2) if c.rope == "dinov3" else (2 * j, 2 * j + 1)
                number = (x[s, :, pair[0]] + 1j * x[s, :, pair[1]]) * np.exp(1j * angle)
                x[s, :, pair[0]], x[s, :, pair[1]] = number.real, number.imag
        return x

    def mlp(self, c, y, p):
        dense = lambda y, n: y @ p[n]["kernel"] + p[n]["bias"]
        u = dense(y, "Dense_0")
        if c.mlp == "swiglu":
            gate = dense(y, "gate")
            u = u * gate / (1 + np.exp(-gate))
        elif c.gelu == "quick":
            u = u / (1 + np.exp(-1.702 * u))
        elif c.gelu == "exact":
            u = u * np.vectorize(lambda t: (1 + erf(t / 2**0.5)) / 2)(u)
        else:
            u = u / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (u + 0.044715 * u**3)))
        return dense(self.norm(u, p["norm"]) if c.mlp_norm else u, "Dense_1")

    def read(self, tokens):
        """Logits and features of (B, S, D)."""
        c, p = self.cfg, self.params
        patches = tokens[:, models.prefix_tokens(c) :]
        features = {
            "token": lambda: tokens[:, 0],
            "gap": lambda: patches.mean(1),
            "token_gap": lambda: np.concatenate([tokens[:, 0], patches.mean(1)], -1),
            "map": lambda: np.stack([self.pooled(z) for z in tokens]),
            "none": lambda: tokens,
            "masked_patch": lambda: patches,
        }[c.head]()
        if c.final_norm == "pooled":
            features = self.norm(features, p["fc_norm"])
        logits = features @ p["head"]["kernel"] + p["head"]["bias"]
        if c.distillation == "head":
            second = tokens[:, 1] @ p["head_dist"]["kernel"] + p["head_dist"]["bias"]
            return (logits + second) / 2, (features + tokens[:, 1]) / 2
        return logits, features

    def pooled(self, z):
        p = self.params["MAPHead_0"]
        c = dataclasses.replace(
            self.cfg,
            heads=self.cfg.map_heads or self.cfg.heads,
            **{"qk_norm": False, "attention_norm": False, "relative_bias": False},
            **{"mlp": "gelu", "mlp_norm": False},
        )
        a = self.attention(c, p["probe"][0], z, p["MultiHeadDotProductAttention_0"])
        return (a + self.mlp(c, self.norm(a, p["LayerNorm_0"]), p["MlpBlock_0"]))[0]
