"""Trainer: the training loop, its evaluations and checkpoints; models are named as for `LLM`.

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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from threadpoolctl import ThreadpoolController
from typing_extensions import Self

from nanovllm.engine.chat.examples import ChatExamples
from nanovllm.errors import ModelNotFoundError, TrainingError
from nanovllm.hub import resolve_model
from nanovllm.progress import step_progress
from nanovllm.stop_signal import StopSignal
from nanovllm.trainable_model import TrainableModel
from nanovllm.training.commands import resume_command
from nanovllm.training.config import TrainingConfig
from nanovllm.training.counters import Counters
from nanovllm.training.metrics import Evaluation, TrainingResult, Update
from nanovllm.training.network.model import Dropout, batch_loss
from nanovllm.training.network.optimizer import AdamW
from nanovllm.training.resume import is_current, restore_run, resumed_config, save_run
from nanovllm.training.run.checkpoint import LAST
from nanovllm.training.run.clock import RunClock
from nanovllm.training.run.files import RunFiles
from nanovllm.training.run.lock import check_is_idle, lock_folder
from nanovllm.training.setup import prepare

_MAX_UPDATES = 1000
_GPT2 = "gpt2"  # as a tokenizer; any other is a kind or a path


class Trainer:
    """Trains one network, from scratch or from a model by folder, name ("gpt2") or repository.

    >>> config = TrainingConfig(data="shakespeare.txt", output="run")
    >>> Trainer(config).train()

    As a context manager it ends its threads. Several trainers may exist, in any thread; Ctrl-C
    is handled in the main thread only.

    Raises:
        TrainingError: a setting or the data cannot be used, or `output` holds a run already.
        CheckpointError: `init_from` is not a GPT-2 checkpoint.
        ModelNotFoundError: there is no model of that name.

    Attributes:
        folder: of the run, its `output`.
        setup: the run's data, tokenizer and network.
        steps: updates of the whole run.
        resumes: whether the run has begun.
    """

    def __init__(self, config: TrainingConfig, *, resume: bool = False) -> None:
        """Prepare data, tokenizer and network; nothing is written before `train`.

        Args:
            resume: continue the run in `output`, whose settings these are; see `Trainer.resume`.
        """
        config = config.resolved()
        if ".." in Path(config.output).parts:  # "new/../run" must not create "new"
            config = replace(config, output=Path(config.output).resolve())
        self.folder = Path(config.output)
        if not resume:  # a run's own settings have the folders of models
            names = {"init_from": config.init_from, "tokenizer": config.tokenizer}
            config = replace(config, **_with_folders(names))
            check_is_idle(self.folder)
            RunFiles.check_is_new(self.folder)
        self.config = config
        self.resumes = resume
        self._is_changing = False  # an update or the records of an evaluation are incomplete
        self.setup = prepare(config, resumes=resume, load_chat=ChatExamples.load)
        self.steps = self.setup.steps
        self._clock = RunClock()
        self._counters = Counters()
        self._optimizer = AdamW(
            self.setup.parameters,
            self.setup.operations,
            weight_decay=config.weight_decay,
            grad_clip=config.grad_clip,
            beta1=config.beta1,
            beta2=config.beta2,
        )
        self._schedule = self.setup.schedule
        self._eval_every = config.in_effect(self.steps)["eval_every"]
        self._record_every = math.ceil(self.steps / _MAX_UPDATES)
        if resume:
            self._counters = restore_run(self.folder, self.setup, self._optimizer)
        self._files = RunFiles(self.folder, self.setup.facts)

    @classmethod
    def resume(cls, folder: str | Path, **changes: Any) -> Self:
        """Return a trainer that continues the run in `folder`.

        Args:
            folder: output folder of a run that was stopped or killed.
            changes: settings to change; only those that change no update so far may be.
        """
        return cls(resumed_config(Path(folder), _with_folders(changes)), resume=True)

    def __repr__(self) -> str:
        """Show the run and its size."""
        return (
            f"Trainer({str(self.folder)!r}, {self.num_parameters:,} parameters, "
            f"step {self._counters.step:,} of {self.steps:,})"
        )

    def __enter__(self) -> Self:
        """Return the trainer."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads."""
        self.close()

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the network."""
        return self.setup.model.num_parameters

    @property
    def model(self) -> TrainableModel:
        """The network, for a loop of one's own; it ends with the trainer."""
        setup = self.setup
        return TrainableModel(
            setup.model, setup.parameters, setup.operations, setup.save_static_files
        )

    @property
    def step(self) -> int:
        """Updates so far."""
        return self._counters.step

    @property
    def is_finished(self) -> bool:
        """Whether there is no update left: all steps are done, or `patience` has ended the run."""
        counters, patience = self._counters, self.config.patience
        is_patient = not patience or counters.evaluations_since_best < patience
        return counters.step >= self.steps or not is_patient

    def train(
        self,
        on_evaluation: Callable[[Evaluation, str | None], object] | None = None,
        on_step: Callable[[Update], object] | None = None,
    ) -> TrainingResult:
        """Train until the last step, `stop_after`, `patience`, or Ctrl-C; save on the way.

        Args:
            on_evaluation: is called with each evaluation and its sample.
            on_step: is called after each update with its record.

        Raises:
            TrainingError: another process writes to the folder, the loss became infinite or NaN, or
                a file cannot be written. The last checkpoints stay. After any other error the state
                is saved.
        """
        threads = self.setup.num_threads
        evaluations: list[Evaluation] = []

        def report(evaluation: Evaluation, sample: str | None) -> None:
            evaluations.append(evaluation)
            if on_evaluation is not None:
                on_evaluation(evaluation, sample)

        # NumPy generates the samples, and computes everything with the backend "numpy". The limit
        # holds from the call of `limit`, which must therefore follow the lock.
        with (
            lock_folder(self.folder),
            ThreadpoolController().limit(limits=threads, user_api="blas"),
            StopSignal() as stop,
            self._clock,
        ):
            try:
                self._begin()
                state, message = self._loop(stop, report, on_step)
                self._write_summary(state, message=message)
            except BaseException as error:
                with suppress(Exception):  # the error counts more
                    self._save_after(error)
                if isinstance(error, MemoryError):
                    raise TrainingError(
                        f"memory ran out at step {self._counters.step}: lower --context, --width "
                        "or --layers"
                    ) from None
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
        self.setup.close()

    def _begin(self) -> None:
        """Write what a resumed run needs before anything else, then the other files."""
        if self._is_changing:
            raise TrainingError(
                f"the run failed during an update; continue it with Trainer.resume({self.folder})"
            )
        self.setup.parameters.gradients.fill(0.0)  # an interrupted pass may have left some
        if not self.resumes:
            RunFiles.check_is_new(self.folder)
        elif not is_current(self.folder, self._counters):  # another process has continued the run
            self._counters = restore_run(self.folder, self.setup, self._optimizer)
        self.setup.save_static_files(self.folder / LAST)
        if not self.resumes:
            self._save_state()
        self.resumes = True
        self.setup.save_static_files(self.folder)
        counters = self._counters
        self._files.drop_after(evaluated_step=counters.evaluated_step, step=counters.step)
        self._write_summary("running")

    def _save_state(self) -> None:
        save_run(self.folder, self.setup, self._optimizer, self._counters)

    def _save_after(self, error: BaseException) -> None:
        """Save the state, where it is complete, and how the run ended."""
        if not self.resumes:
            return
        if not isinstance(error, TrainingError) and not self._is_changing:
            self._save_state()
        state = "failed" if isinstance(error, Exception) else "stopped"
        self._write_summary(state, message=f"{type(error).__name__}: {error}".rstrip(": "))

    def _loop(
        self,
        stop: StopSignal,
        report: Callable[[Evaluation, str | None], None],
        on_step: Callable[[Update], object] | None,
    ) -> tuple[str, str]:
        """Run updates; return the state in which the run ends, and why."""
        counters, config = self._counters, self.config
        last = self.steps if config.stop_after is None else min(self.steps, config.stop_after)
        values: dict[str, str] = {}
        with step_progress(total=self.steps, initial=counters.step, unit="step") as line:
            while not stop.is_requested:
                is_due = counters.step % self._eval_every == 0 or counters.step == self.steps
                if is_due and counters.step != counters.evaluated_step:
                    self._evaluate(report)
                    values["best"] = counters.best_text
                    line.show(values)
                    self._save_state()
                if config.patience and counters.evaluations_since_best >= config.patience:
                    best = f"the lowest was {counters.best_val_loss:.4f} at {counters.best_step}"
                    return "finished", f"no lower validation loss for {config.patience}: {best}"
                if counters.step >= self.steps:
                    all_steps = "1 step" if self.steps == 1 else f"all {self.steps:,} steps"
                    return "finished", all_steps
                if counters.step >= last or stop.is_requested:
                    break
                update = self._update()
                if on_step is not None:
                    on_step(update)
                values = counters.progress(update, self.setup.tokens_per_step)
                line.show(values)
                line.update()
        self._save_state()
        command = resume_command(self.folder)
        return "stopped", f"after step {counters.step:,}; continue with: {command}"

    def _update(self) -> Update:
        """Compute the gradients of a step and apply them."""
        counters, config, setup = self._counters, self.config, self.setup
        started_s = self._clock.read_s()
        first = counters.step * config.grad_accumulation
        numbers = range(first, first + config.grad_accumulation)
        batches = [setup.train.batch(one, config.batch_size, config.seed) for one in numbers]
        targets = max(1, sum(batch.num_targets for batch in batches))
        total = 0.0
        for number, batch in zip(numbers, batches, strict=True):
            total += batch_loss(
                setup.operations,
                setup.model,
                setup.parameters,
                batch.inputs,
                batch.targets,
                scale=1.0 / targets,
                dropout=Dropout(config.dropout, config.seed, number),
            )
        loss = total / targets
        self._is_changing = True
        lr = self._schedule.learning_rate(counters.step)
        norm = self._optimizer.update(lr)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"the loss is {loss:.3g} and the gradient norm {norm:.3g} at step "
                f"{counters.step}: {self._divergence_advice()}"
            )
        seconds = self._clock.read_s() - started_s
        speed = setup.tokens_per_step / max(seconds, 1e-9)
        update = Update(counters.step, loss, lr, norm, speed)
        if counters.step % self._record_every == 0:
            self._files.add(update)
        counters.add_update(loss, norm, seconds)
        self._is_changing = False
        return update

    def _evaluate(self, report: Callable[[Evaluation, str | None], None]) -> None:
        """Compute the validation loss; keep the weights if it is the lowest."""
        counters = self._counters
        started_s = self._clock.read_s()
        val_loss = self.validation_loss()
        sample = self.setup.sample(counters.step, self.config.sample_tokens, self.config.seed)
        self._is_changing = True
        if counters.is_best(val_loss):
            self.setup.save_weights(self.folder)
        evaluation = counters.add_evaluation(
            val_loss,
            self._clock.read_s() - started_s,
            lr=self._schedule.learning_rate(counters.step),
            tokens_per_step=self.setup.tokens_per_step,
        )
        self._files.add(evaluation)
        if sample is not None:
            self._files.add(sample)
        self._is_changing = False
        self._write_summary("running")
        report(evaluation, None if sample is None else sample.text)

    def validation_loss(self) -> float:
        """Return the mean loss of the validation split, in nats per token."""
        setup, config = self.setup, self.config
        total, tokens = 0.0, 0
        for batch in setup.validation.validation_batches(
            config.batch_size, config.max_eval_batches
        ):
            total += batch_loss(
                setup.operations, setup.model, setup.parameters, batch.inputs, batch.targets
            )
            tokens += batch.num_targets
        loss = total / tokens
        if not math.isfinite(loss):
            raise TrainingError(
                f"the validation loss is {loss:.3g} at step {self._counters.step}: "
                f"{self._divergence_advice()}"
            )
        return loss

    def _divergence_advice(self) -> str:
        remedies = ["lower the learning rate (--lr)", "lengthen the warmup (--warmup-steps)"]
        if self.config.grad_clip == 0:
            remedies.append("clip gradients (--grad-clip 1)")
        return (
            f"{', '.join(remedies[:-1])} or {remedies[-1]} in a new run with another --output, "
            "because the settings of a run cannot change; the checkpoints in "
            f"{self.folder} are those before it"
        )

    def _write_summary(self, state: str, message: str = "") -> None:
        counters = self._counters
        self._files.write_summary(
            state,
            message=message,
            step=counters.step,
            steps=self.steps,
            best_step=counters.best_step,
            best_val_loss=counters.best_val_loss,
            elapsed_s=counters.elapsed_s,
            written=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )


def _with_folders(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace names of models by their folders, which are downloaded where necessary."""
    folders = {}
    if isinstance(settings.get("init_from"), str):
        folders["init_from"] = str(resolve_model(settings["init_from"]))
    if settings.get("tokenizer") == _GPT2:
        try:
            folders["tokenizer"] = str(resolve_model(_GPT2))
        except ModelNotFoundError as error:
            raise ModelNotFoundError(
                f"the tokenizer gpt2 is missing: {error}; or train one (--tokenizer bpe)"
            ) from None
    return {**settings, **folders}
