"""TrainerController: when things happen. What a step means is the method's; how it is spread over ranks, the backend's."""

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from specforge import files
from specforge.config.schema import TrainConfig
from specforge.distributed import World
from specforge.errors import ConfigError, NonFiniteError, SpecForgeError
from specforge.features.loader import Window
from specforge.log.progress import progress
from specforge.log.run_log import RunLog
from specforge.methods.base import Moment, Trainable
from specforge.training.backend import FSDPTrainingBackend
from specforge.training.checkpoint import CheckpointManager
from specforge.training.profile import StepProfile
from specforge.training.schedule import learning_rate
from specforge.training.state import TrainState
from specforge.training.stop import SIGNALS, StoppedError, StopRequest

NON_FINITE_MARKER = "non_finite.json"


@runtime_checkable
class Seekable(Protocol):
    """Data that goes to a position of the global sample order, reached after so many steps, without reading."""

    def seek(self, samples: int, step: int) -> None: ...


class StepNumbers(NamedTuple):
    """One optimiser step, added up over all ranks."""

    norm: float
    """Of the gradient, before clipping."""
    weight: float
    loss_sum: float
    tokens: float
    correct_K: torch.Tensor
    count_K: torch.Tensor
    save_failed: bool
    orphaned: bool
    signals: list[signal.Signals]


@dataclass
class Interval:
    """Sums since the last log line."""

    norm: float = 0.0
    loss_sum: float = 0.0
    weight: float = 0.0
    tokens: float = 0.0
    correct_K: torch.Tensor | int = 0
    count_K: torch.Tensor | int = 0
    data_wait_s: float = 0.0
    steps: int = 0
    started_s: float = 0.0

    def add(self, step: StepNumbers) -> None:
        self.norm = step.norm
        self.loss_sum += step.loss_sum
        self.weight += step.weight
        self.tokens += step.tokens
        self.correct_K = self.correct_K + step.correct_K
        self.count_K = self.count_K + step.count_K
        self.steps += 1


class TrainerController:
    """Trains `method` on the windows of `data` until they end.

    `evaluate` is any callable that returns `eval/*` numbers; it is called on all ranks inside `backend.whole()`.
    """

    def __init__(
        self,
        *,
        config: TrainConfig,
        total_steps: int,
        method: Trainable,
        backend: FSDPTrainingBackend,
        data: Iterable[Window],
        checkpoints: CheckpointManager,
        log: RunLog,
        world: World,
        state: TrainState,
        settings: dict[str, Any],
        evaluate: Callable[[], Mapping[str, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.seed = seed
        self.total_steps = total_steps
        self.method = method
        self.backend = backend
        self.data = data
        self.checkpoints = checkpoints
        self.log = log
        self.world = world
        self.state = state
        self.evaluate = evaluate
        self._settings = settings
        self._saved_step = state.step if state.step else -1
        self._stop = StopRequest()
        self._interval = Interval()
        self.profile = StepProfile(world.device, config.profile)

    def fit(self) -> TrainState:
        """Run to the last step; returns where the run stands.

        Raises:
            NonFiniteError: a loss or gradient is not finite; raised on all ranks before any parameter changed.
            ConfigError: the first evaluation lacks `checkpoint.best_metric`.
            CheckpointError: a checkpoint could not be written.
            StoppedError: SIGTERM or SIGINT came, on any rank; the step was finished and saved.
        """
        try:
            with self._stop.listening():
                self.checkpoints.begin(self.state, self.config.resume_from)
                if self.state.step == 0:
                    self._evaluate()
                self._train()
                self.checkpoints.wait()
        except BaseException:
            self.log.close(exit_code=1)
            raise
        finally:
            self.checkpoints.release()
        self.log.close()
        return self.state

    def _train(self) -> None:
        first_step = self.state.step
        with progress(self.total_steps, first_step, "train", self.world) as bar:
            self._begin_interval()
            for window in self._windows():
                numbers = self._step(window)
                bar.update(1)
                last = self.state.step == self.total_steps
                if self._due(self.config.log_every) or last:
                    bar.set_postfix(self._log())
                if self._due(self.config.eval_every) or last:
                    self._evaluate()
                if self._due(self.config.save_every) or last:
                    self._save()
                if not last:
                    self._stop_if_asked(numbers)
        if self.profile.enabled and self.world.is_main and self.state.step > first_step:
            print(self.profile.table(self.state.step - first_step))

    def _windows(self) -> Iterator[Window]:
        """The windows after those that were trained on; data that cannot seek is advanced. The time spent waiting is noted."""
        skipped = self.state.samples_seen
        if isinstance(self.data, Seekable):
            self.data.seek(self.state.samples_seen, self.state.step)
            skipped = 0
        windows = iter(self.data)
        while True:
            asked_s = time.perf_counter()
            with self.profile.phase("data"):
                window = next(windows, None)
            self._interval.data_wait_s += time.perf_counter() - asked_s
            if window is None:
                return
            if skipped > 0:
                skipped -= window.samples
            else:
                yield window

    def _due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0

    def _step(self, window: Window) -> StepNumbers:
        """One optimiser step: gradient of (global loss sum / global weight), reduced over ranks once."""
        phase, losses, tallies = self.profile.phase, [], []
        with phase("plan"):
            moment = Moment(self.seed, self.state.step, self.total_steps)
            plans = window.plans or [self.method.plan(batch, moment) for batch in window.batches]
            weight = torch.tensor(sum(plan.weight for plan in plans), dtype=torch.float64).to(self.world.device, non_blocking=True)
            self.world.sum_(weight)
            divisor = torch.where(weight > 0, weight, 1.0)  # nothing is supervised in this window: a step of zero gradients
        for index, (batch, plan) in enumerate(zip(window.batches, plans, strict=True)):
            with phase("forward"):
                output = self.backend(batch.to(self.world.device), plan)
            with phase("backward"):
                self.backend.backward(output.loss_sum, divisor, boundary=index == len(plans) - 1)
            losses.append(output.loss_sum.detach())
            tallies.append(output.tally)
        with phase("clip"):
            norm = self.backend.clip()
        tokens = sum(batch.documents.num_tokens for batch in window.batches if batch.samples)
        with phase("read"):
            numbers = self._reduce(losses, tallies, norm, weight, tokens)
        if not (math.isfinite(numbers.norm) and math.isfinite(numbers.loss_sum)):
            self._stop_for_non_finite(window, losses)
        with phase("optimiser"):
            self.backend.step(learning_rate(self.config, self.state.step, self.total_steps))
        self.state = self.state.advanced(window.samples)
        self._interval.add(numbers)
        return numbers

    def _reduce(
        self, losses: list[torch.Tensor], tallies: list[dict[str, torch.Tensor]], norm: torch.Tensor, weight: torch.Tensor, tokens: int
    ) -> StepNumbers:
        """Add up over all ranks; reading the sums is the one time in a step that the host waits for the device."""
        known = torch.cat([torch.tensor([tokens, self.checkpoints.failed], dtype=torch.float64), self._stop.reasons()])
        local = torch.cat([
            torch.stack(losses).sum().reshape(1).double(),
            known.to(norm.device, non_blocking=True),
            torch.stack([tally["correct"] for tally in tallies]).sum(0).double(),
            torch.stack([tally["count"] for tally in tallies]).sum(0).double(),
        ])  # fmt: skip
        numbers = torch.cat([norm.detach().reshape(1).double(), weight.reshape(1), self.world.sum_(local)]).cpu()
        norm_, weight_, loss_sum, tokens_, failed, orphaned, *heard = numbers[: 6 + len(SIGNALS)].tolist()
        correct_K, count_K = numbers[6 + len(SIGNALS) :].chunk(2)
        signals = [number for number, count in zip(SIGNALS, heard, strict=True) if count]
        return StepNumbers(norm_, weight_, loss_sum, tokens_, correct_K, count_K, failed > 0, orphaned > 0, signals)

    def _stop_if_asked(self, numbers: StepNumbers) -> None:
        """End the run on all ranks if one of them must: after a save, unless saving is what failed or nobody waits for it."""
        if numbers.save_failed:
            self.checkpoints.wait()
        if numbers.orphaned:
            raise SpecForgeError(f"the launcher of this run is gone; stopped after step {self.state.step}.")
        for number in numbers.signals:
            self._save()
            self.checkpoints.wait()
            self.log.note("interrupted", signal=number.name, step=self.state.step)
            raise StoppedError(
                number,
                f"{number.name} ended the run after step {self.state.step}, which is saved; "
                f"continue with train.resume_from={self.checkpoints.folder}/latest.",
            )

    def _stop_for_non_finite(self, window: Window, losses: list[torch.Tensor]) -> None:
        suspects = [batch for batch, loss in zip(window.batches, losses, strict=True) if not loss.isfinite()]
        named = self.world.gather_objects([sample_id for batch in suspects for sample_id in batch.ids])
        if not any(named):
            named = self.world.gather_objects([sample_id for batch in window.batches for sample_id in batch.ids])
        everyone = [sample_id for ids in named for sample_id in ids]
        step = self.state.step + 1
        if self.world.is_main:
            files.write_json(self.log.folder / NON_FINITE_MARKER, {"step": step, "sample_ids": everyone})
        if self.state.step:
            self._save()
            self.checkpoints.wait()
        raise NonFiniteError(
            f"loss or gradient is not finite at step {step}, in one of the samples {', '.join(everyone)}; no parameter was changed. "
            "Lower train.learning_rate, or leave the samples out with data.exclude_ids, or set train.allow_non_finite=true and resume."
        )

    def _begin_interval(self) -> None:
        self._interval = Interval(started_s=time.perf_counter())

    def _log(self) -> dict[str, str]:
        interval = self._interval
        assert isinstance(interval.correct_K, torch.Tensor) and isinstance(interval.count_K, torch.Tensor)
        elapsed_s = time.perf_counter() - interval.started_s
        accuracy = (interval.correct_K / interval.count_K.clamp(min=1)).tolist()
        numbers: dict[str, Any] = {
            "train/loss": interval.loss_sum / (interval.weight or 1.0),
            "train/accuracy": accuracy,
            "train/learning_rate": learning_rate(self.config, self.state.step - 1, self.total_steps),
            "train/grad_norm": interval.norm,
            "train/samples_seen": self.state.samples_seen,
            "perf/tokens_per_s": interval.tokens / elapsed_s,
            "perf/step_time_s": elapsed_s / interval.steps,
            "perf/data_wait_s": interval.data_wait_s / interval.steps,
            "perf/peak_memory_mib": peak_memory_mib(self.world.device),
        }
        self.log.write(self.state.step, numbers)
        self._begin_interval()
        return {"loss": f"{numbers['train/loss']:.3f}", "acc_1": f"{accuracy[0]:.3f}", "tok/s": f"{numbers['perf/tokens_per_s']:.0f}"}

    def _evaluate(self) -> None:
        """Evaluate, and keep this step's draft if it is the best so far."""
        if self.evaluate is None:
            return
        started_s = time.perf_counter()
        with self.profile.phase("evaluate"), self.backend.whole():
            metrics = self.evaluate()
        self.checkpoints.metric(metrics)
        self.log.write(self.state.step, {**metrics, "perf/eval_time_s": time.perf_counter() - started_s})
        if self.checkpoints.is_best(metrics):
            self.checkpoints.mark_best(self.state, metrics)
            self._save()
        self._interval.started_s += time.perf_counter() - started_s

    def _save(self) -> None:
        if self._saved_step == self.state.step:
            return
        with self.profile.phase("save"):
            self.checkpoints.save(self.state, self.backend, self.method.config_dict(), self._settings)
        self._saved_step = self.state.step


def refuse_after_non_finite(folder: Path, config: TrainConfig, exclude_ids: tuple[str, ...]) -> None:
    """A run that stopped for a non-finite value goes on only when told how.

    Raises:
        ConfigError: the marker is there, its samples are not excluded and `train.allow_non_finite` is not set.
    """
    marker = folder / NON_FINITE_MARKER
    if not marker.is_file() or config.allow_non_finite:
        return
    stored = files.read_json(marker, error=ConfigError)
    if set(stored["sample_ids"]) <= set(exclude_ids):
        return
    raise ConfigError(
        f"{folder}: this run stopped at step {stored['step']} for a non-finite value in {', '.join(stored['sample_ids'])}; "
        "put them into data.exclude_ids or set train.allow_non_finite=true."
    )


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process: allocated on the device, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
