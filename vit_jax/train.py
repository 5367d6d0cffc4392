# SPDX-License-Identifier: Apache-2.0
"""Trains: feeds the program of :mod:`vit_jax.program` and writes down what comes out."""

import contextlib
import dataclasses
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from vit_jax import config, data, evaluators, models, sharding, tpu, weights
from vit_jax.checkpoint import Checkpointer
from vit_jax.config import Config
from vit_jax.errors import Diverged, UserError
from vit_jax.feed import Feed
from vit_jax.inference import Predictor
from vit_jax.measure import Interval, Profiler
from vit_jax.preemption import Preemption
from vit_jax.program import Batch, Metrics, Program, State, build
from vit_jax.progress import Bar, number, phase, say
from vit_jax.trackers import Trackers
from vit_jax.workdir import (
    METRICS,
    Claim,
    MetricsWriter,
    check_place,
    is_evaluation,
    read_metrics,
)


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
    check_place("--workdir", workdir)
    with phase("devices"):
        devices = list(devices or jax.devices())
    say(
        f"{'':<12} {len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es), jax {jax.__version__}"
    )
    with contextlib.ExitStack() as stack:
        preemption = stack.enter_context(contextlib.closing(Preemption()))
        with phase("data"):
            cfg = adopted(cfg, workdir)
            info = data.describe(cfg.data)
        program = build(cfg, devices, info)
        evaluators.check_run(cfg)
        cfg = program.cfg
        for hint in program.hints:
            say(f"hint         {hint}")
        if program.attention:
            say(f"attention    {program.attention}")
        _say_sizes(program, info)
        claim = stack.enter_context(Claim(workdir, cfg, info))
        stack.enter_context(jax.set_mesh(program.mesh))
        checkpoints = Checkpointer(
            workdir,
            cfg.checkpoint,
            read_metrics(workdir),
            evaluators.lower_is_better(cfg.checkpoint.keep_best),
        )
        stack.enter_context(contextlib.closing(checkpoints))
        stack.enter_context(_explain_out_of_memory(program))
        if preemption.requested():
            result = Result(0, {}, preempted=True)
        else:
            with phase("restore" if checkpoints.latest else "initialize"):
                state = checkpoints.restore(program.state_shape)
                state = state or _initial_state(program)
            claim.write()
            start = int(state.step)
            if start:
                say(
                    f"{'':<12} continuing after step {start}: {checkpoints.path(start)}"
                )
            trackers = Trackers(cfg, workdir, start)
            stack.callback(trackers.close)
            loop = Loop(
                program, info, workdir, checkpoints, preemption,
                start=start, before_writing=claim.check, trackers=trackers,
            )  # fmt: skip
            result = loop.run(state)
        checkpoints.wait()
        _say_end(result, cfg, workdir, checkpoints)
    return result


class Loop:
    """Feeds the program: metrics are read one step late, so that the device never waits
    for the host.

    Args:
      program: to run.
      info: of the data.
      workdir: for metrics and traces.
      checkpoints: where to save; None: nowhere.
      preemption: what may ask it to stop.
      train_step: compiled already; None: compiled when the loop starts.
      start: steps done.
      before_writing: called before anything is written; raises what ends the run.
      trackers: what gets the metrics besides the workdir.
    """

    def __init__(
        self,
        program: Program,
        info: data.DataInfo,
        workdir: str,
        checkpoints: Checkpointer | None,
        preemption: Preemption | None,
        train_step: Callable[[State, Batch], tuple[State, Metrics]] | None = None,
        start: int = 0,
        before_writing: Callable[[], None] = lambda: None,
        trackers: Trackers | None = None,
    ):
        self.program, self.cfg, self.info = program, program.cfg, info
        self.workdir, self.checkpoints, self.start = workdir, checkpoints, start
        self.preemption, self.before_writing = preemption, before_writing
        self.train_step = train_step
        rows = [m for m in read_metrics(workdir) if m["step"] == start]
        self.evaluated = any(map(is_evaluation, rows))
        self.writer = MetricsWriter(workdir, start)
        self.trackers = trackers
        self.profiler = Profiler(self.cfg.profile, workdir, self.cfg.steps)
        self.interval = Interval(self.cfg)
        self.results: dict[str, float] = {}  # of the last evaluation
        self.bad_in_row = 0

    def run(self, state: State) -> Result:
        """Trains from ``state`` to the last step of the config, or until the process is
        asked to stop."""
        start, last = self.start, self.cfg.steps
        if start > last:
            say(
                f"config.steps={last} is below step {start}, which is trained already: "
                "that step is evaluated and nothing trained"
            )
        # An evaluation that was cut short is made up for.
        owed = start and not self.evaluated and every(self.cfg.eval.every, start, last)
        if start >= last or owed:
            done = self._evaluate(state, start)
            if start >= last or not done:
                return Result(start, self.results, preempted=not done)
        if self._asked_to_stop():  # compiling may take longer than there is
            return Result(start, self.results, preempted=True)
        feed, bar = self._feed(), Bar(last, start)
        try:
            # The first batch is read while the program is traced and compiled.
            train_step = self.train_step or self._compile(self.program.batch_shape)
            with phase("first batch"):
                batch = next(feed)
            if not self.train_step and _shapes(batch) != _shapes(
                self.program.batch_shape
            ):
                train_step = self._compile(batch)  # masks and float images are possible
            self.interval.restart(feed)
            return self._train(state, train_step, batch, feed, bar)
        finally:
            self.profiler.close()
            feed.close()
            bar.close()

    def _train(
        self,
        state: State,
        train_step: Callable[[State, Batch], tuple[State, Metrics]],
        batch: Batch,
        feed: Feed,
        bar: Bar,
    ) -> Result:
        cfg, step, last = self.cfg, self.start, self.cfg.steps
        pending: tuple[int, Metrics] | None = None
        done = True
        while step < last and not self._asked_to_stop():
            state, metrics = train_step(state, batch)
            batch = next(feed) if step + 1 < last else batch
            step += 1
            bar.step()
            if pending:
                self._record(*pending, bar)
            pending = (step, metrics)
            self.profiler.step(step, metrics)
            due_eval = every(cfg.eval.every, step, last)
            due_save = every(cfg.checkpoint.every, step, last)
            due_save |= due_eval and bool(cfg.checkpoint.keep_best)
            if due_eval or due_save:
                # The step in flight must be known to be good before it is evaluated or
                # saved.
                self._record(*pending, bar)
                pending = None
                with self.interval.paused():
                    if due_eval:
                        done = self._evaluate(state, step)
                    if due_save:
                        self._save(state, step)
        if pending:
            self._record(*pending, bar)
        if step < last:
            say(f"asked to stop: saving step {step}")
            self._save(state, step)
        return Result(step, self.results, preempted=step < last or not done)

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

    def _compile(
        self, batch: Mapping[str, Any]
    ) -> Callable[[State, Batch], tuple[State, Metrics]]:
        """Compiles for a batch, or the shapes of one."""
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
            self._write(step, line)
            bar.log(step, line)

    def _write(self, step: int, line: Mapping[str, float]) -> None:
        self.before_writing()
        self.writer.write(step, line)
        if self.trackers:
            self.trackers.log(step, line)

    def _save(self, state: State, step: int) -> None:
        if not self.checkpoints or step == self.start:
            return
        self.before_writing()
        self.checkpoints.save(state, step)
        best = self.cfg.checkpoint.keep_best
        if self.results and best and best not in self.results:
            raise UserError(
                f"config.checkpoint.keep_best={best!r} is not among what is measured: "
                f"{config.nearest(best, self.results)}choose one of "
                f"{sorted(self.results)}"
            )

    def _give_up(self, step: int) -> None:
        where = "there is no checkpoint yet"
        if self.checkpoints:
            self.checkpoints.wait()
            if latest := self.checkpoints.latest:
                where = f"the newest checkpoint is finite: {self.checkpoints.path(latest)}, but its loss may have risen before"
        raise Diverged(
            f"the loss, its gradient or the update was not finite in {self.bad_in_row} steps in a row, up to step {step} "
            f"(config.max_bad_steps={self.cfg.max_bad_steps}); {where}. Lower config.optim.learning_rate, set "
            "config.optim.clip=1.0 or look at the data"
        )

    def _evaluate(self, state: State, step: int) -> bool:
        """Whether it came to its end; not if the process was asked to stop."""
        results = evaluate(self.program, self.info, state, self.preemption)
        if not results:  # no evaluator, or told to stop
            return results is not None
        self.results = results
        self._write(step, results)
        if self.checkpoints:
            self.checkpoints.evaluated(step, results)
        # Of how many images is said once, at the end: lines fit 80 columns.
        shown = {k: v for k, v in results.items() if not k.endswith("/count")}
        numbers = "  ".join(f"{k} {number(v)}" for k, v in shown.items())
        say(f"step {step}/{self.cfg.steps}  {numbers}")
        return True


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


# Fields of a model that are not the file's: what is trained, and how it is computed.
_OWN = (
    "num_classes", "image_size", "channels", "pre_logits", "head_bias", "dropout",
    "attention_dropout", "stochastic_depth", "dtype", "layers", "remat",
)  # fmt: skip


def adopted(cfg: Config, workdir: str = "") -> Config:
    """The config with the architecture of the file that it starts from, unless it sets
    a size itself.

    A run that ``workdir`` holds keeps the one it has, and does not need the file any
    more.
    """
    sizes = ("width", "depth", "mlp_dim", "heads", "patch")
    chosen = any(getattr(cfg.model, size) for size in sizes)
    if not cfg.pretrained or (chosen and cfg.data.image_size):
        return cfg
    before = epath.Path(workdir) / "config.json"
    old = config.read(before) if workdir and before.exists() else None
    if old and old.pretrained == cfg.pretrained:
        stored = old.model
    else:
        stored = weights.model_config(cfg.pretrained)
    if not cfg.data.image_size:
        cfg = config.replace(cfg, data__image_size=max(stored.image_size))
    if chosen:
        return cfg
    taken = {
        f.name: getattr(stored, f.name)
        for f in dataclasses.fields(cfg.model)
        if f.name not in _OWN
        and (f.name == "name" or getattr(cfg.model, f.name) == f.default)
    }
    if stored.head in ("none", "masked_patch"):
        del taken["head"]
    if stored.name != cfg.model.name:
        what = stored.name or f"of width {stored.width} and depth {stored.depth}"
        say(f"model        {what}, as in {cfg.pretrained}, not {cfg.model.name!r}")
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **taken))


def _initial_state(program: Program) -> State:
    cfg = program.cfg
    if not cfg.pretrained:
        return program.init()
    params = weights.load_for_training(cfg.pretrained, cfg.model)
    return program.start_from(params)


def _say_sizes(program: Program, info: data.DataInfo) -> None:
    cfg = program.cfg
    say(
        f"{'':<12} {info.num_train:,} training and {info.num_test:,} test images, {info.num_classes} classes"
    )
    per_device = cfg.batch // sharding.batch_parts(program.mesh)
    batch = sharding.batch_text(cfg.batch, per_device, cfg.accumulate)
    say(
        f"{'':<12} {batch}; {cfg.model.name or 'ViT'} with {program.num_parameters:,} parameters"
    )


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
        say(f"{name:<16} {number(value)}")
    say(f"checkpoint       {path}")
    say(f"numbers          {epath.Path(workdir) / METRICS}")
    # --logdir_spec gives the run a name where --logdir would show it as ".".
    name = epath.Path(workdir).name or os.path.basename(os.path.abspath(workdir))
    curves, quoted = shlex.quote(f"{name}:{workdir}"), shlex.quote(workdir)
    say(f"curves           tensorboard --logdir_spec {curves}")
    say(f"predict          python -m vit_jax.predict {quoted} IMAGE...")
    say(f"convert          python -m vit_jax.convert {quoted} model.npz")


def _shapes(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {k: (x.shape, x.dtype) for k, x in batch.items()}


@contextlib.contextmanager
def _explain_out_of_memory(program: Program) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        raise UserError(out_of_memory(program, str(e))) from e


def out_of_memory(program: Program, reason: str) -> str:
    """What to do about a lack of memory, in one line."""
    if advice := tpu.beyond_vector_memory(reason):
        return advice
    cfg = program.cfg
    found = re.search(r"(\d+) bytes", reason)
    wanted = f": {int(found[1]) / 2**30:.3g} GiB more were wanted" if found else ""
    more = (
        f"set config.sharding=fsdp (now {cfg.sharding}), "
        if program.mesh.size > 1 and cfg.sharding != "fsdp"
        else ""
    )
    model = models.resolve(cfg.model)
    grid = math.prod(models.token_grid(model, model.image_size))
    tokens = (
        ""
        if models.is_resnet(model)
        else f" of {grid + models.prefix_tokens(model)} tokens each"
    )
    return (
        f"the device ran out of memory{wanted}. A step has config.batch={cfg.batch} images{tokens}: "
        f"choose a larger patch in config.model.name or a smaller config.data.image_size, {more}"
        f"raise config.accumulate (now {cfg.accumulate}), set config.model.remat=full (now {cfg.model.remat}), "
        "or lower config.batch"
    )
