"""Trainer: the training loop, its evaluations and checkpoints.

    for step in range(steps):
        for batch in the step's batches:            grad_accumulation of them
            loss = model(batch); tape.backward()    gradients add up
        optimizer.update(learning rate of step)     clip, AdamW, zero the gradients
        every eval_every steps: validation loss, best checkpoint, sample, report, state

Batches, dropout masks and learning rates are functions of the seed and the step. So the state of a
run is its parameters, the optimizer's moments and a few counters, and a run that was interrupted
and resumed ends with the same bits as one that was not.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nanovllm.errors import TrainingError
from nanovllm.progress import progress_bar
from nanovllm.training.autograd import Tape
from nanovllm.training.checkpoint import load_counters, load_state, save_state
from nanovllm.training.config import TrainingConfig
from nanovllm.training.dataset import Dataset
from nanovllm.training.model import Dropout, loss_sum
from nanovllm.training.optimizer import AdamW, Schedule
from nanovllm.training.run_files import Evaluation, RunFiles
from nanovllm.training.setup import Setup, prepare
from nanovllm.training.stopping import StopSignal

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
    evaluations: tuple[Evaluation, ...] = field(default=())


class Trainer:
    """Trains one network.

        result = Trainer(TrainingConfig(data="shakespeare.txt", output="run")).train()

    Raises:
        TrainingError: a setting or the data cannot be used, or `output` holds a run already.
        CheckpointError: `init_from` is no GPT-2 checkpoint.
    """

    def __init__(self, config: TrainingConfig, *, resume: bool = False) -> None:
        """Prepare data, tokenizer and network; nothing is written before `train`."""
        config = config.resolved()
        if not config.output:
            raise TrainingError("output is empty; give the folder of the run")
        self.folder = Path(config.output)
        if not resume:
            RunFiles.check_is_new(self.folder)
        self.config = config
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
        self._files = RunFiles(self.folder, {**self._setup.facts, "config": config.to_dict()})
        if resume:
            self._load()

    @classmethod
    def resume(cls, folder: str | Path, **changes: Any) -> "Trainer":
        """Return a trainer that continues the run in `folder`.

        Args:
            folder: output folder of a run that was stopped or killed.
            changes: settings to change; only those that change no update may be.
        """
        saved = load_counters(Path(folder))
        fixed = [name for name in changes if name not in _CHANGEABLE]
        if fixed:
            raise TrainingError(
                f"{', '.join(fixed)} cannot change when a run is resumed; leave it out, or begin a "
                "new run"
            )
        settings = {"stop_after": None, **changes, "output": str(folder)}
        config = TrainingConfig.from_dict({**saved.get("config", {}), **settings}, f"{folder}")
        return cls(config, resume=True)

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
                checkpoints stay.
        """
        evaluations: list[Evaluation] = []

        def report(evaluation: Evaluation, sample: str | None) -> None:
            evaluations.append(evaluation)
            if on_evaluation is not None:
                on_evaluation(evaluation, sample)

        self._setup.save_static_files(self.folder)
        self._write_summary("running")
        try:
            with StopSignal() as stop:
                state, message = self._loop(stop, report)
        except TrainingError as error:
            self._write_summary("failed", message=str(error))
            raise
        self._write_summary(state, message=message)
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

    def _loop(
        self, stop: StopSignal, report: Callable[[Evaluation, str | None], None]
    ) -> tuple[str, str]:
        """Run updates; return the state in which the run ends, and why."""
        counters, config = self._counters, self.config
        last = self._steps if config.stop_after is None else min(self._steps, config.stop_after)
        with progress_bar(total=self._steps, initial=counters.step, unit="step") as line:
            if counters.best_step is None:
                self._evaluate(report)
                self._save_state()
            while counters.step < last and not stop.is_requested:
                loss, norm = self._update()
                line.set_postfix(self._progress(loss, norm), refresh=False)
                line.update()
                if counters.step % self._eval_every == 0 or counters.step == self._steps:
                    self._evaluate(report)
                    self._save_state()
                    if config.patience and counters.evaluations_since_best >= config.patience:
                        best = (
                            f"the lowest was {counters.best_val_loss:.4f} at {counters.best_step}"
                        )
                        return "finished", f"no lower validation loss for {config.patience}: {best}"
        if counters.step >= self._steps:
            return "finished", f"all {self._steps} steps"
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
            tape = Tape(setup.operations)
            dropout = Dropout(config.dropout, config.seed, number)
            total += loss_sum(
                tape,
                setup.model,
                setup.parameters,
                batch.inputs,
                batch.targets,
                scale=scale,
                dropout=dropout,
            )
            tape.backward()
        loss = total / tokens
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
        return loss, norm

    def _evaluate(self, report: Callable[[Evaluation, str | None], None]) -> None:
        """Compute the validation loss; keep the weights if it is the lowest."""
        counters = self._counters
        started_s = time.perf_counter()
        val_loss = self.validation_loss()
        sample = self._setup.sample(self.config.sample_tokens, self.config.seed)
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
        self._write_summary("running")
        report(evaluation, sample)

    def validation_loss(self) -> float:
        """Return the mean loss of the validation split, in nats per token."""
        setup, config = self._setup, self.config
        total, tokens = 0.0, 0
        for batch in setup.validation.validation_batches(
            config.batch_size, config.max_eval_batches
        ):
            tape = Tape(setup.operations, records=False)
            total += loss_sum(tape, setup.model, setup.parameters, batch.inputs, batch.targets)
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
        counters = {name: getattr(self._counters, name) for name in _Counters.__slots__}
        state = {
            "counters": counters,
            "config": self.config.to_dict(),
            "data_digest": self._setup.data_digest,
        }
        save_state(self.folder, self._arrays(), state)
        self._setup.save_weights(self.folder / "last")

    def _load(self) -> None:
        saved = load_counters(self.folder)
        if saved.get("data_digest") != self._setup.data_digest:
            raise TrainingError(
                f"the data is not that of the run in {self.folder}: files, pattern or their "
                "contents have changed; restore them, or begin a new run"
            )
        load_state(self.folder, self._arrays())
        self._counters = _Counters(**saved["counters"])
        self._optimizer.updates = self._counters.step
        self._files.forget_after(self._counters.step)

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
