# SPDX-License-Identifier: Apache-2.0
"""Trains: feeds the program of :mod:`vit_jax.program` and writes down what comes out."""

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from vit_jax import config, data, evaluators, sharding, weights
from vit_jax.checkpoint import Checkpointer
from vit_jax.config import Config
from vit_jax.distributed import Preemption
from vit_jax.errors import UserError
from vit_jax.feed import Feed
from vit_jax.inference import Predictor
from vit_jax.program import Batch, Metrics, Program, State, build
from vit_jax.progress import Bar, phase, say
from vit_jax.workdir import MetricsWriter, claim


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int
    metrics: dict[str, float]  # of the last evaluation
    preempted: bool


def every(n: int, step: int, last: int) -> bool:
    """Whether to act after ``step`` of ``last`` steps when acting every ``n`` steps and
    at the end."""
    return step == last or (n > 0 and step % n == 0)


def train(
    cfg: Config, workdir: str, devices: Sequence[jax.Device] | None = None
) -> Result:
    """Trains, or continues what ``workdir`` holds, and evaluates.

    Raises:
      UserError: bad config, data or workdir, or a loss that stayed non-finite.
    """
    workdir = os.path.expanduser(workdir)  # the shell leaves --workdir=~/run as it is
    with phase("devices"):
        devices = list(devices or jax.devices())
    say(
        f"{'':<12} {len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es), jax {jax.__version__}"
    )
    with phase("data"):
        info = data.describe(cfg.data)
    program = build(cfg, devices, info)
    cfg = program.cfg
    for hint in program.hints:
        say(f"hint         {hint}")
    _say_sizes(program, info)
    with contextlib.ExitStack() as stack:
        preemption = stack.enter_context(contextlib.closing(Preemption()))
        stack.enter_context(claim(workdir, cfg, info))
        stack.enter_context(jax.set_mesh(program.mesh))
        checkpoints = stack.enter_context(
            contextlib.closing(Checkpointer(workdir, cfg.checkpoint))
        )
        with phase("restore" if checkpoints.latest else "initialize"):
            state = checkpoints.restore(program.state_shape) or _initial_state(program)
            start = int(state.step)
        if start:
            say(f"{'':<12} continuing after step {start}: {checkpoints.path(start)}")
        loop = Loop(program, info, workdir, checkpoints, preemption)
        with _explain_out_of_memory(cfg):
            result = loop.run(state)
        checkpoints.wait()
    _say_end(result, cfg, workdir, checkpoints)
    return result


class Loop:
    """Feeds the program: metrics are read one step late, so that the device never waits
    for the host."""

    def __init__(
        self,
        program: Program,
        info: data.DataInfo,
        workdir: str,
        checkpoints: Checkpointer | None,
        preemption: Preemption | None,
        train_step: Callable[[State, Batch], tuple[State, Metrics]] | None = None,
    ):
        self.program, self.cfg, self.info = program, program.cfg, info
        self.workdir, self.checkpoints = workdir, checkpoints
        self.preemption = preemption
        # Compiled already; None: compiled when the loop starts.
        self.train_step = train_step
        self.results: dict[str, float] = {}  # of the last evaluation
        self.bad_in_row = 0

    def run(self, state: State) -> Result:
        """Trains from ``state`` to the last step of the config, or until the process is
        asked to stop."""
        cfg, last = self.cfg, self.cfg.steps
        self.start = step = int(state.step)
        self.writer = MetricsWriter(self.workdir, step)
        if step >= last:
            done = self._evaluate(state, step)
            return Result(step, self.results, preempted=not done)
        bar, feed = Bar(last, step), self._feed()
        self.interval = _Interval(cfg, feed)
        profiler = _Profiler(cfg.profile, self.workdir)
        pending: tuple[int, Metrics] | None = None
        done = True
        try:
            with phase("first batch"):
                batch = next(feed)
            train_step = self.train_step or self._compile(batch)
            self.interval.restart()
            while step < last and not self._asked_to_stop():
                state, metrics = train_step(state, batch)
                batch = next(feed) if step + 1 < last else batch
                step += 1
                bar.step()
                if pending:
                    self._record(*pending, bar)
                pending = (step, metrics)
                profiler.step(step, metrics)
                evaluate = every(cfg.eval.every, step, last)
                save = every(cfg.checkpoint.every, step, last)
                save |= evaluate and bool(cfg.checkpoint.keep_best)
                if evaluate or save:
                    # The step in flight must be known to be good before it is evaluated
                    # or saved.
                    self._record(*pending, bar)
                    pending = None
                    with self.interval.paused():
                        if evaluate:
                            done = self._evaluate(state, step)
                        if save:
                            self._save(state, step, evaluate and done)
            if pending:
                self._record(*pending, bar)
            if step < last:
                say(f"asked to stop: saving step {step}")
                self._save(state, step, False)
            return Result(step, self.results, preempted=step < last or not done)
        finally:
            profiler.close()
            feed.close()
            bar.close()

    def _asked_to_stop(self) -> bool:
        return self.preemption is not None and self.preemption.requested()

    def _feed(self) -> Feed:
        cfg = self.cfg
        source = data.train_batches(
            cfg.data,
            batch=cfg.batch,
            seed=cfg.seed,
            start=self.start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        waiting = lambda seconds: say(f"waiting for data since {seconds:.0f} s")
        return Feed(source, self.program.batch_sharding, on_wait=waiting)

    def _compile(self, batch: Batch) -> Callable[[State, Batch], tuple[State, Metrics]]:
        """Compiles for a batch as the data has it: masks and float images are possible."""
        shapes = {
            k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for k, x in batch.items()
        }
        with phase("compile"):
            return self.program.train_step.lower(
                self.program.state_shape, shapes
            ).compile()

    def _record(self, step: int, metrics: Metrics, bar: Bar) -> None:
        """Looks at the metrics of a finished step. Called one step late, so that the
        device never waits."""
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        self.bad_in_row = self.bad_in_row + 1 if values["skipped"] else 0
        if self.bad_in_row >= self.cfg.max_bad_steps:
            self._give_up(step)
        self.interval.add(values)
        if every(self.cfg.log_every, step, self.cfg.steps):
            line = self.interval.summary(step)
            self.writer.write(step, line)
            bar.log(step, line)

    def _save(self, state: State, step: int, evaluated: bool) -> None:
        if not self.checkpoints or step == self.start:
            return
        # Parameters that are no numbers must not replace those that were good before.
        if self.bad_in_row and not jnp.isfinite(optax.tree.norm(state.params)):
            return
        self.checkpoints.save(state, step, self.results if evaluated else {})
        best = self.cfg.checkpoint.keep_best
        if evaluated and best and best not in self.results:
            raise UserError(
                f"config.checkpoint.keep_best={best!r} is not among what is measured: "
                f"{config.nearest(best, self.results)}choose one of "
                f"{sorted(self.results)}"
            )

    def _give_up(self, step: int) -> None:
        where = "there is no checkpoint yet"
        if self.checkpoints and self.checkpoints.latest:
            self.checkpoints.wait()
            where = f"the last good checkpoint is {self.checkpoints.path(self.checkpoints.latest)}"
        raise UserError(
            f"the loss or its gradient was not finite in {self.bad_in_row} steps in a row, up to step {step} "
            f"(config.max_bad_steps={self.cfg.max_bad_steps}); {where}. Lower config.optim.learning_rate, set "
            "config.optim.clip=1.0 or look at the data"
        )

    def _evaluate(self, state: State, step: int) -> bool:
        """Whether it came to its end; not if the process was asked to stop."""
        results = evaluate(self.program, self.info, state, self.preemption)
        if results:
            self.results = results
            self.writer.write(step, results)
            numbers = "  ".join(f"{k} {v:.4f}" for k, v in results.items())
            say(f"step {step}/{self.cfg.steps}  {numbers}")
        return results is not None


def evaluate(
    program: Program,
    info: data.DataInfo,
    state: State,
    preemption: Preemption | None = None,
) -> dict[str, float] | None:
    """Runs the evaluators of the config on the averaged parameters if there are any,
    else on the parameters.

    Returns ``{"test/accuracy": ...}``; None if the process was asked to stop meanwhile.
    """
    cfg = program.cfg
    params = state.ema if cfg.optim.polyak else state.params

    def interrupt() -> None:
        if preemption and preemption.requested():
            raise _Stopped

    predictor = Predictor(params, program.forward, program.mesh, interrupt)
    context = evaluators.Context(cfg, predictor, info)
    try:
        return {k: float(v) for k, v in evaluators.run(context).items()}
    except _Stopped:
        return None


class _Stopped(Exception):
    """An evaluation was interrupted by preemption."""


class _Interval:
    """Means of the metrics over the steps that were not skipped, and speed, since the
    last logged step. Time spent on evaluating and saving is left out."""

    def __init__(self, cfg: Config, feed: Feed):
        self._cfg, self._feed = cfg, feed
        self.restart()

    def restart(self) -> None:
        self._start, self._waited = time.perf_counter(), self._feed.waited
        self._sums = {"loss": 0.0}
        self._good = self._skipped = 0

    def add(self, values: dict[str, float]) -> None:
        if values["skipped"]:
            self._skipped += 1
            return
        self._good += 1
        for k, v in values.items():
            self._sums[k] = self._sums.get(k, 0.0) + v

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def summary(self, step: int) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._start, 1e-9)
        per_step = seconds / (self._good + self._skipped)
        line = {
            f"train/{k}": v / self._good if self._good else math.nan
            for k, v in self._sums.items()
            if k != "skipped"
        }
        line |= {
            "train/skipped_steps": float(self._skipped),
            "train/bad_examples": float(len(data.bad_examples())),
            "train/images_per_second": self._cfg.batch / per_step,
            "train/step_ms": 1e3 * per_step,
            "train/data_wait": min((self._feed.waited - self._waited) / seconds, 1.0),
            "train/eta_seconds": (self._cfg.steps - step) * per_step,
        }
        self.restart()
        return line


class _Profiler:
    """Traces the steps "first:last" of the config into the workdir, for TensorBoard's
    profile tab."""

    def __init__(self, steps: str, workdir: str):
        self._workdir, self._running = workdir, False
        match = re.fullmatch(r"(\d+):(\d+)", steps or "0:1")
        if not match or int(match[1]) >= int(match[2]):
            raise UserError(
                f"config.profile={steps!r}: write FIRST:LAST, for example 100:110"
            )
        self._first, self._last = int(match[1]), int(match[2])

    def step(self, step: int, metrics: Metrics) -> None:
        if step == self._first:
            jax.profiler.start_trace(self._workdir)
            self._running = True
        if step == self._last and self._running:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def _initial_state(program: Program) -> State:
    cfg = program.cfg
    if not cfg.pretrained:
        return program.init()
    params = weights.load_for_training(cfg.pretrained, cfg.model)
    return program.start_from(params)


def _say_sizes(program: Program, info: data.DataInfo) -> None:
    cfg = program.cfg
    params = sum(
        np.prod(p.shape, dtype=np.int64)
        for p in jax.tree.leaves(program.state_shape.params)
    )
    say(
        f"{'':<12} {info.num_train:,} training and {info.num_test:,} test images, {info.num_classes} classes"
    )
    per_device = cfg.batch // sharding.batch_parts(program.mesh)
    batch = sharding.batch_text(cfg.batch, per_device, cfg.accumulate)
    say(f"{'':<12} {batch}; {cfg.model.name or 'ViT'} with {params:,} parameters")


def _say_end(
    result: Result, cfg: Config, workdir: str, checkpoints: Checkpointer
) -> None:
    path = checkpoints.path(checkpoints.latest) if checkpoints.latest else "none"
    if result.preempted:
        say(
            f"stopped after step {result.step} of {cfg.steps}; checkpoint: {path}; start the same command to continue"
        )
        return
    for name, value in result.metrics.items():
        say(f"{name:<16} {value:.4f}")
    say(f"checkpoint       {path}")
    say(
        f"curves           tensorboard --logdir {workdir}   (numbers: {epath.Path(workdir) / 'metrics.jsonl'})"
    )
    say(f"predict          python -m vit_jax.predict {workdir} IMAGE...")
    say(f"export           python -m vit_jax.convert {workdir} model.npz")


@contextlib.contextmanager
def _explain_out_of_memory(cfg: Config) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        raise UserError(
            f"the device ran out of memory with config.batch={cfg.batch}: raise config.accumulate (now "
            f"{cfg.accumulate}), set config.model.remat=full (now {cfg.model.remat}), config.sharding=fsdp (now "
            f"{cfg.sharding}), or lower config.batch. {str(e).splitlines()[0]}"
        ) from e
