# SPDX-License-Identifier: Apache-2.0
"""How long a forward pass takes on one device: one image alone, and batches.

The model as JAX runs it op by op, as ``predict`` and ``embed`` do (jitted), and as an
exported program; beside it, where they are installed, the same weights in timm
(``torch.compile``) and in transformers. All take turns, because machines are noisy.
"""

import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax import export, inference, models, weights
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError

# (images float32 (B, H, W, C) in [-1, 1]) -> logits; returns when they are there
Call = Callable[[np.ndarray], Any]
# Images per round at each batch size, where --round_steps does not say.
IMAGES = 20


def measure(
    cfg: ModelConfig,
    params: Any,
    batches: Sequence[int],
    rounds: int,
    steps: int,
    folder: Path,
) -> dict[str, Any]:
    """``latency_ms`` of one image, median and p99, and ``speed``, images/s by batch, of
    each program; ``left_out``: why one is not among them; ``exported_over_timm``: the
    ratio of their medians.

    Args:
      cfg: of the model.
      params: its parameters.
      batches: sizes to time, beside 1.
      rounds: of which the medians are taken.
      steps: calls per round; 0: for about ``IMAGES`` images.
      folder: where to write exported programs and other layouts.
    """
    calls, left_out = {}, {}
    for name, program in PROGRAMS.items():
        try:
            calls[name] = program(cfg, params, folder / name)
        except (ImportError, RuntimeError, UserError) as e:
            # RuntimeError: packages that do not fit each other, such as torchvision.
            left_out[name] = " ".join(str(e).split())
    random = np.random.default_rng(0)
    size = (*cfg.image_size, cfg.channels)
    latency, speed = {}, {name: {} for name in calls}
    for batch in sorted({1, *batches}):
        x = random.uniform(-1, 1, (batch, *size)).astype(np.float32)
        found = _seconds(calls, x, rounds, steps or math.ceil(IMAGES / batch))
        for name, seconds in found.items():
            speed[name][batch] = batch / float(np.median(seconds))
            if batch == 1:
                median, p99 = 1e3 * np.percentile(seconds, [50, 99])
                latency[name] = {"median": float(median), "p99": float(p99)}
    answer = {"latency_ms": latency, "speed": speed, "left_out": left_out}
    if "timm" in latency:
        ours, theirs = (latency[name]["median"] for name in ("exported", "timm"))
        answer["exported_over_timm"] = ours / theirs
    return answer


def _seconds(
    calls: dict[str, Call], x: np.ndarray, rounds: int, steps: int
) -> dict[str, list[float]]:
    """Of each call, by turns."""
    for call in calls.values():
        call(x)  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(steps):
                start = time.perf_counter()
                call(x)
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _eager(cfg: ModelConfig, params: Any, folder: Path) -> Call:
    model = models.create(cfg)
    params = jax.device_put(params, jax.devices()[0])
    return lambda x: jax.block_until_ready(model.apply({"params": params}, x))


def _jitted(cfg: ModelConfig, params: Any, folder: Path) -> Call:
    predictor = inference.create(cfg, params, jax.devices()[:1])
    return lambda x: jax.block_until_ready(predictor(x))


def _exported(cfg: ModelConfig, params: Any, folder: Path) -> Call:
    source, dest = str(folder.with_suffix(".npz")), folder.with_suffix(".stablehlo")
    weights.save(source, cfg, params)
    export.export(source, str(dest), dtype=cfg.dtype)
    call = jax.jit(jax.export.deserialize(bytearray(dest.read_bytes())).call)
    return lambda x: jax.block_until_ready(call(x))


def _timm(cfg: ModelConfig, params: Any, folder: Path) -> Call:
    torch, timm = _installed("torch", "timm")
    folder.mkdir()
    weights.save(folder, cfg, params, layout="timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return _torch_call(cfg, torch, model, lambda y: y)


def _transformers(cfg: ModelConfig, params: Any, folder: Path) -> Call:
    torch, transformers = _installed("torch", "transformers")
    weights.save(folder, cfg, params, layout="hf")
    auto = transformers.AutoModelForImageClassification
    model = auto.from_pretrained(str(folder), local_files_only=True)
    return _torch_call(cfg, torch, model, lambda y: y.logits)


PROGRAMS: dict[str, Callable[[ModelConfig, Any, Path], Call]] = {
    "eager": _eager,
    "jitted": _jitted,
    "exported": _exported,
    "timm": _timm,
    "transformers": _transformers,
}


def _installed(*names: str) -> list[Any]:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"{name} is not installed")
    return [importlib.import_module(name) for name in names]


def _torch_call(
    cfg: ModelConfig, torch: Any, model: Any, logits: Callable[[Any], Any]
) -> Call:
    """A compiled model of torch, on its GPU if there is one, in the same arithmetic."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, cfg.dtype)
    compiled = torch.compile(model.eval().to(device, dtype), dynamic=False)

    def call(x: np.ndarray) -> Any:
        with torch.inference_mode():
            given = torch.from_numpy(x).permute(0, 3, 1, 2).to(device, dtype)
            return logits(compiled(given)).float().cpu().numpy()

    return call
