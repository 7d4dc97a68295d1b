"""Counters: what a run counts between its evaluations, and its best validation loss."""

import math
from dataclasses import dataclass

from nanovllm.training.metrics import Evaluation, Update


@dataclass(slots=True)
class Counters:
    """The counters of a run; saved with its state.

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

    def __post_init__(self) -> None:
        """Raise ValueError for counters that no run has saved."""
        counts = (self.step, self.best_step or 0, self.evaluations_since_best, self.updates)
        sums = (self.best_val_loss or 0.0, self.elapsed_s, self.loss, self.grad_norm, self.seconds)
        if not all(type(one) is int and one >= 0 for one in counts):
            raise ValueError("a count is not a natural number")
        if not all(math.isfinite(one) for one in sums):
            raise ValueError("a sum is not finite")

    @property
    def evaluated_step(self) -> int:
        """Step of the last evaluation; -1 before the first."""
        return -1 if self.best_step is None else self.step - self.updates

    def is_best(self, val_loss: float) -> bool:
        """Return whether a validation loss is the lowest so far."""
        return self.best_val_loss is None or val_loss < self.best_val_loss

    def add_update(self, loss: float, grad_norm: float, seconds: float) -> None:
        """Count an update."""
        self.step += 1
        self.updates += 1
        self.loss += loss
        self.grad_norm += grad_norm
        self.seconds += seconds
        self.elapsed_s += seconds

    def add_evaluation(
        self, val_loss: float, seconds: float, *, lr: float, tokens_per_step: int
    ) -> Evaluation:
        """Count an evaluation, and return it with the means of the updates since the last one.

        Args:
            val_loss: mean loss of the validation split.
            seconds: time that the evaluation took.
            lr: learning rate of the next update.
            tokens_per_step: training tokens of an update.
        """
        if self.is_best(val_loss):
            self.best_step, self.best_val_loss = self.step, val_loss
            self.evaluations_since_best = 0
        else:
            self.evaluations_since_best += 1
        self.elapsed_s += seconds
        updates = self.updates
        evaluation = Evaluation(
            step=self.step,
            train_loss=self.loss / updates if updates else None,
            val_loss=val_loss,
            lr=lr,
            grad_norm=self.grad_norm / updates if updates else None,
            tokens_per_s=updates * tokens_per_step / self.seconds if updates else None,
            elapsed_s=self.elapsed_s,
            tokens=self.step * tokens_per_step,
        )
        self.loss = self.grad_norm = self.seconds = 0.0
        self.updates = 0
        return evaluation

    def progress(self, update: Update, tokens_per_step: int) -> dict[str, str]:
        """Return the figures of the progress line after an update."""
        speed = self.updates * tokens_per_step / max(self.seconds, 1e-9)
        return {
            "loss": f"{update.train_loss:.3f}",
            "best": self.best_text,
            "lr": f"{update.lr:.1e}".replace("e-0", "e-"),
            "norm": f"{update.grad_norm:.2f}",
            "tok/s": f"{speed:.0f}" if speed < 10_000 else f"{speed / 1000:.1f}k",
        }

    @property
    def best_text(self) -> str:
        """The lowest validation loss as the progress line shows it."""
        return "-" if self.best_val_loss is None else f"{self.best_val_loss:.3f}"
