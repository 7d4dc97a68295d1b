"""Trainer: the training loop, its evaluations and checkpoints.

    for step in range(steps):
        for batch in the step's batches:            grad_accumulation of them
            loss += batch_loss(batch)               gradients add up
        optimizer.update(learning rate of step)     clip, AdamW, zero the gradients
        every eval_every steps: validation loss, best checkpoint, sample, report, state

Batches, dropout masks and learning rates are functions of the seed and the step. So the state of a
run is its parameters, the optimizer's moments and a few counters, and a run that was interrupted
and resumed ends with the same bits as one that was not.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nanovllm.errors import TrainingError
from nanovllm.progress import progress_bar
from nanovllm.stop_signal import StopSignal
from nanovllm.training.config import TrainingConfig
from nanovllm.training.data.dataset import Dataset
from nanovllm.training.network.model import Dropout, batch_loss
from nanovllm.training.network.optimizer import AdamW, Schedule
from nanovllm.training.run.checkpoint import (
    LAST,
    RESUME_FILE,
    load_counters,
    load_state,
    save_state,
)
from nanovllm.training.run.files import Evaluation, RunFiles
from nanovllm.training.setup import Setup, prepare

_DEFAULT_STEPS = 2000
_CHANGEABLE = ("data", "stop_after", "num_threads", "patience", "sample_tokens", "max_eval_batches")
"""Settings that a resumed run may change: none of them changes an update."""


@dataclass(slots=True)
class _Counters:
    """What a run counts; saved with its state.

    Attributes:
        step: updates so far.
        best_step, best_val_loss: of the lowest validation loss; None before an evaluation.
        evaluations_since_best: evaluations in a row that were not the lowest.
        elapsed_s: time in the training loop.
        loss, grad_norm, updates, seconds: sums since the last evaluation.
    """

    step: int = 0
    best_step: int | None = None
    best_val_loss: float | None = None
    evaluations_since_best: int = 0
    elapsed_s: float = 0.0
    loss: float = 0.0
    grad_norm: float = 0.0
    updates: int = 0
    seconds: float = 0.0

    @property
    def evaluated_step(self) -> int:
        """Step of the last evaluation; -1 before the first."""
        return -1 if self.best_step is None else self.step - self.updates


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        state: "finished", or "stopped" if the run can be resumed.
        evaluations: those of this part of the run.
    """

    folder: Path
    state: str
    step: int
    best_step: int | None
    best_val_loss: float | None
    message: str
    evaluations: tuple[Evaluation, ...] = ()


class Trainer:
    """Trains one network.

        result = Trainer(TrainingConfig(data="shakespeare.txt", output="run")).train()

    As a context manager it ends its threads. Several trainers may exist, in any thread; Ctrl-C
    is handled in the main thread only.

    Raises:
        TrainingError: a setting or the data cannot be used, or `output` holds a run already.
        CheckpointError: `init_from` is no GPT-2 checkpoint.
    """

    def __init__(self, config: TrainingConfig, *, resume: bool = False) -> None:
        """Prepare data, tokenizer and network; nothing is written before `train`.

        Args:
            resume: continue the run in `output`, whose settings these are; see `Trainer.resume`.
        """
        config = config.resolved()
        if not config.output:
            raise TrainingError("output is empty; give the folder of the run")
        self.folder = Path(config.output)
        if not resume:
            RunFiles.check_is_new(self.folder)
        self.config = config
        self._resumes = resume
        self._is_changing = False  # an update or the records of an evaluation are incomplete
        self._setup: Setup = prepare(config, resumes=resume)
        self._steps = self._number_of_steps()
        self._counters = _Counters()
        self._optimizer = AdamW(
            self._setup.parameters,
            self._setup.operations,
            weight_decay=config.weight_decay,
            grad_clip=config.grad_clip,
            beta1=config.beta1,
            beta2=config.beta2,
        )
        peak = config.lr or 0.0
        warmup = min(100, self._steps // 20) if config.warmup_steps is None else config.warmup_steps
        floor = peak / 10 if config.min_lr is None else config.min_lr
        self._schedule = Schedule(peak, floor, warmup, self._steps)
        self._eval_every = config.eval_every or max(1, self._steps // 10)
        self._facts = {**self._setup.facts, "config": config.to_dict()}
        if resume:
            self._load()
        self._files = RunFiles(self.folder, self._facts)

    @classmethod
    def resume(cls, folder: str | Path, **changes: Any) -> "Trainer":
        """Return a trainer that continues the run in `folder`.

        Args:
            folder: output folder of a run that was stopped or killed.
            changes: settings to change; only those that change no update may be.
        """
        path = Path(folder) / RESUME_FILE
        settings = load_counters(Path(folder)).get("config")
        if not isinstance(settings, dict):
            raise TrainingError(f"{path} is damaged: it has no settings")
        before = {**settings, "output": str(folder), "stop_after": None}
        saved = TrainingConfig.from_dict(before, str(path))
        config = TrainingConfig.from_dict({**before, **changes})
        fixed = [
            f"{name} is {value!r}"
            for name in changes
            if name not in _CHANGEABLE and (value := getattr(saved, name)) != getattr(config, name)
        ]
        if fixed:
            raise TrainingError(
                f"{', '.join(fixed)} in the run in {folder}, and cannot change when it is resumed; "
                "leave it out, or begin a new run"
            )
        return cls(config, resume=True)

    def __repr__(self) -> str:
        """Show the run and its size."""
        return (
            f"Trainer({str(self.folder)!r}, {self.num_parameters:,} parameters, "
            f"step {self._counters.step:,} of {self._steps:,})"
        )

    def __enter__(self) -> "Trainer":
        """Return the trainer."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads."""
        self.close()

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the network."""
        return self._setup.model.num_parameters

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        return self._steps

    @property
    def setup(self) -> Setup:
        """The run's data, tokenizer and network."""
        return self._setup

    def train(
        self, on_evaluation: Callable[[Evaluation, str | None], object] | None = None
    ) -> TrainingResult:
        """Train until the last step, `stop_after`, `patience`, or Ctrl-C; save on the way.

        Args:
            on_evaluation: is called with each evaluation and its sample.

        Raises:
            TrainingError: the loss became infinite or NaN, or a file cannot be written. The last
                checkpoints stay. After any other error the state is saved.
        """
        evaluations: list[Evaluation] = []

        def report(evaluation: Evaluation, sample: str | None) -> None:
            evaluations.append(evaluation)
            if on_evaluation is not None:
                on_evaluation(evaluation, sample)

        try:
            with StopSignal() as stop:
                self._begin()
                state, message = self._loop(stop, report)
                self._write_summary(state, message=message)
        except BaseException as error:
            self._save_after(error)
            raise
        counters = self._counters
        return TrainingResult(
            self.folder,
            state,
            counters.step,
            counters.best_step,
            counters.best_val_loss,
            message,
            tuple(evaluations),
        )

    def close(self) -> None:
        """End the threads of the compiled kernels."""
        self._setup.close()

    def _begin(self) -> None:
        """Write what a resumed run needs before anything else, then the other files."""
        if self._is_changing:
            raise TrainingError(
                f"the run failed during an update; continue it with Trainer.resume({self.folder})"
            )
        self._setup.parameters.gradients.fill(0.0)  # an interrupted pass may have left some
        if not self._resumes:
            RunFiles.check_is_new(self.folder)
        self._setup.save_static_files(self.folder / LAST)
        if not self._resumes:
            self._save_state()
        self._resumes = True
        self._setup.save_static_files(self.folder)
        self._files.drop_after(self._counters.evaluated_step)
        self._write_summary("running")

    def _save_after(self, error: BaseException) -> None:
        """Save the state, where it is complete, and how the run ended; the error counts more."""
        with suppress(Exception):
            if not self._resumes:
                return
            if not isinstance(error, TrainingError) and not self._is_changing:
                self._save_state()
            state = "failed" if isinstance(error, Exception) else "stopped"
            self._write_summary(state, message=f"{type(error).__name__}: {error}".rstrip(": "))

    def _loop(
        self, stop: StopSignal, report: Callable[[Evaluation, str | None], None]
    ) -> tuple[str, str]:
        """Run updates; return the state in which the run ends, and why."""
        counters, config = self._counters, self.config
        last = self._steps if config.stop_after is None else min(self._steps, config.stop_after)
        with progress_bar(total=self._steps, initial=counters.step, unit="step") as line:
            while not stop.is_requested:
                is_due = counters.step % self._eval_every == 0 or counters.step == self._steps
                if is_due and counters.step != counters.evaluated_step:
                    self._evaluate(report)
                    self._save_state()
                if config.patience and counters.evaluations_since_best >= config.patience:
                    best = f"the lowest was {counters.best_val_loss:.4f} at {counters.best_step}"
                    return "finished", f"no lower validation loss for {config.patience}: {best}"
                if counters.step >= self._steps:
                    return "finished", f"all {self._steps} steps"
                if counters.step >= last or stop.is_requested:
                    break
                loss, norm = self._update()
                line.set_postfix(self._progress(loss, norm), refresh=False)
                line.update()
        self._save_state()
        return "stopped", f"after step {counters.step}; continue with --resume {self.folder}"

    def _update(self) -> tuple[float, float]:
        """Compute the gradients of a step and apply them; return the loss and the gradient norm."""
        counters, config, setup = self._counters, self.config, self._setup
        started_s = time.perf_counter()
        total, tokens = 0.0, 0
        for part in range(config.grad_accumulation):
            number = counters.step * config.grad_accumulation + part
            batch = setup.train.batch(number, config.batch_size, config.seed)
            tokens += batch.targets.size
            scale = 1.0 / (batch.targets.size * config.grad_accumulation)
            total += batch_loss(
                setup.operations,
                setup.model,
                setup.parameters,
                batch.inputs,
                batch.targets,
                scale=scale,
                dropout=Dropout(config.dropout, config.seed, number),
            )
        loss = total / tokens
        self._is_changing = True
        norm = self._optimizer.update(self._schedule.learning_rate(counters.step))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"the loss is {loss} and the gradient norm {norm} at step {counters.step}: lower "
                "the learning rate (--lr), lengthen the warmup (--warmup-steps) or clip gradients "
                f"(--grad-clip 1); the checkpoints in {self.folder} are those before it"
            )
        counters.step += 1
        counters.updates += 1
        counters.loss += loss
        counters.grad_norm += norm
        seconds = time.perf_counter() - started_s
        counters.seconds += seconds
        counters.elapsed_s += seconds
        self._is_changing = False
        return loss, norm

    def _evaluate(self, report: Callable[[Evaluation, str | None], None]) -> None:
        """Compute the validation loss; keep the weights if it is the lowest."""
        counters = self._counters
        started_s = time.perf_counter()
        val_loss = self.validation_loss()
        sample = self._setup.sample(self.config.sample_tokens, self.config.seed)
        self._is_changing = True
        is_best = counters.best_val_loss is None or val_loss < counters.best_val_loss
        if is_best:
            self._setup.save_weights(self.folder)
            counters.best_step, counters.best_val_loss = counters.step, val_loss
            counters.evaluations_since_best = 0
        else:
            counters.evaluations_since_best += 1
        counters.elapsed_s += time.perf_counter() - started_s
        updates = counters.updates
        evaluation = Evaluation(
            step=counters.step,
            train_loss=counters.loss / updates if updates else None,
            val_loss=val_loss,
            lr=self._schedule.learning_rate(counters.step),
            grad_norm=counters.grad_norm / updates if updates else None,
            tokens_per_s=updates * self._tokens_per_step / counters.seconds if updates else None,
            elapsed_s=counters.elapsed_s,
            tokens=counters.step * self._tokens_per_step,
        )
        counters.loss = counters.grad_norm = counters.seconds = 0.0
        counters.updates = 0
        self._files.add_evaluation(evaluation, sample)
        self._is_changing = False
        self._write_summary("running")
        report(evaluation, sample)

    def validation_loss(self) -> float:
        """Return the mean loss of the validation split, in nats per token."""
        setup, config = self._setup, self.config
        total, tokens = 0.0, 0
        for batch in setup.validation.validation_batches(
            config.batch_size, config.max_eval_batches
        ):
            total += batch_loss(
                setup.operations, setup.model, setup.parameters, batch.inputs, batch.targets
            )
            tokens += batch.targets.size
        loss = total / tokens
        if not math.isfinite(loss):
            raise TrainingError(
                f"the validation loss is {loss} at step {self._counters.step}: lower the learning "
                f"rate (--lr); the checkpoints in {self.folder} are those before it"
            )
        return loss

    @property
    def _tokens_per_step(self) -> int:
        config = self.config
        return config.batch_size * config.grad_accumulation * self._setup.context

    def _number_of_steps(self) -> int:
        config = self.config
        if config.steps is not None:
            return config.steps
        if config.epochs is None:
            return _DEFAULT_STEPS
        train: Dataset = self._setup.train
        windows = train.windows * config.epochs
        return max(1, math.ceil(windows / (config.batch_size * config.grad_accumulation)))

    def _progress(self, loss: float, norm: float) -> dict[str, str]:
        counters = self._counters
        speed = counters.updates * self._tokens_per_step / max(counters.seconds, 1e-9)
        best = counters.best_val_loss
        return {
            "loss": f"{loss:.3f}",
            "best_val": "-" if best is None else f"{best:.3f}",
            "lr": f"{self._schedule.learning_rate(counters.step - 1):.1e}",
            "grad_norm": f"{norm:.2f}",
            "tok/s": f"{speed:,.0f}",
        }

    def _arrays(self) -> dict[str, Any]:
        return {
            "parameters": self._setup.parameters.values,
            "first_moment": self._optimizer.first_moment,
            "second_moment": self._optimizer.second_moment,
        }

    def _save_state(self) -> None:
        """Save what a resumed run needs, and the last weights as a checkpoint."""
        data = [str(path.absolute()) for path in self.config.data_paths]
        state = {
            "counters": asdict(self._counters),
            "config": {**self.config.to_dict(), "data": data},
            "data_digest": self._setup.data_digest,
            "started": self._facts["started"],
        }
        save_state(self.folder, self._arrays(), state)
        self._setup.save_weights(self.folder / LAST)

    def _load(self) -> None:
        saved = load_counters(self.folder)
        if saved.get("data_digest") != self._setup.data_digest:
            raise TrainingError(
                f"the data is not that of the run in {self.folder}: files, pattern or their "
                "contents have changed; restore them, or begin a new run"
            )
        load_state(self.folder, self._arrays())
        try:
            self._counters = _Counters(**saved["counters"])
        except (KeyError, TypeError):
            raise TrainingError(
                f"{self.folder / RESUME_FILE} is damaged: it has no counters"
            ) from None
        self._optimizer.updates = self._counters.step
        self._facts["started"] = saved.get("started", self._facts["started"])

    def _write_summary(self, state: str, message: str = "") -> None:
        counters = self._counters
        self._files.write_summary(
            state,
            message=message,
            step=counters.step,
            steps=self._steps,
            best_step=counters.best_step,
            best_val_loss=counters.best_val_loss,
            elapsed_s=counters.elapsed_s,
            written=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
