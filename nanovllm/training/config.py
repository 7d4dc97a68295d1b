"""TrainingConfig: the settings of a run, from Python, the command line or a TOML file."""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nanovllm.config import BACKENDS
from nanovllm.errors import TrainingError
from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.config import POSITIONS
from nanovllm.suggestions import suggest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PATHS = ("data", "validation_data")
_VALIDATION_FRACTION = 0.1
_DEFAULT_STEPS = 2000


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """Settings of a new network and its tokenizer, and their defaults; see TrainingConfig."""

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    activation: str = "gelu_new"
    positions: str = "learned"
    tokenizer: str = "bpe"


PRESETS: Mapping[str, NetworkSettings] = MappingProxyType(
    {
        name: NetworkSettings(layers, heads, width, context=1024, tokenizer="gpt2")
        for name, layers, heads, width in (
            ("gpt2", 12, 12, 768),
            ("gpt2-medium", 24, 16, 1024),
            ("gpt2-large", 36, 20, 1280),
            ("gpt2-xl", 48, 25, 1600),
        )
    }
)
"""Settings of the published models (Radford et al. 2019, table 2)."""

_INTEGERS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "layers": (1, 2**10),
        "heads": (1, 2**14),
        "width": (1, 2**17),
        "context": (1, 2**24),
        "vocab_size": (1, 2**24),
        "batch_size": (1, 2**24),
        "grad_accumulation": (1, 2**24),
        "steps": (1, 2**40),
        "epochs": (1, 2**40),
        "warmup_steps": (0, 2**40),
        "seed": (0, 2**63 - 1),
        "eval_every": (1, 2**40),
        "max_eval_batches": (1, 2**40),
        "patience": (1, 2**40),
        "stop_after": (1, 2**40),
        "sample_tokens": (0, 10_000),
        "num_threads": (1, 2**10),
    }
)
"""Smallest and largest values; a size of the network has the limit of GPT2Config."""
_NUMBERS: Mapping[str, float] = MappingProxyType(
    {
        "lr": math.inf,
        "min_lr": math.inf,
        "weight_decay": math.inf,
        "grad_clip": math.inf,
        "beta1": 1.0,
        "beta2": 1.0,
        "dropout": 1.0,
        "validation_fraction": 1.0,
    }
)
"""Numbers from 0 to below this one."""
_CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "preset": tuple(PRESETS),
        "positions": POSITIONS,
        "backend": BACKENDS,
        "activation": tuple(ACTIVATIONS),
    }
)


class TrainingConfigError(TrainingError):
    """Settings of a run are missing, wrong, or contradict each other: the message lists all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """Settings of a run; TrainingError names every value that cannot be used.

    `data` and `output` are necessary.

    A setting of None takes the value of the preset, of the checkpoint in `init_from`, or the
    default that is given here.

    Attributes:
        data: text files, folders of them, or one prepared token file (.npy).
        validation_data: the same, to validate on instead of the end of `data`; files of it that are
            also in `data` are left out of the training text.
        output: folder of the run: the checkpoint, metrics, report and the state for resuming.
        pattern: file names to read from folders.
        layers: number of transformer blocks (4).
        heads: number of attention heads (4).
        width: d_model, the width of the residual stream (128).
        context: tokens of a sequence, the context length of the model (64).
        activation: activation function of the feed-forward block (gelu_new).
        positions: "learned", or "sinusoidal" for a constant position embedding (learned).
        preset: sizes of a published model: gpt2, gpt2-medium, gpt2-large, gpt2-xl.
        init_from: model folder whose weights and tokenizer to begin with (fine-tuning).
        tokenizer: "char", "bpe" (trained on the data), "gpt2", or a folder or tokenizer.json (bpe).
        vocab_size: number of tokens of a "bpe" tokenizer; None for 1,024, or as many as the text
            gives.
        batch_size: sequences per forward pass.
        grad_accumulation: forward passes per update.
        steps: updates; None for `epochs`, or 2,000.
        epochs: passes over the training tokens, instead of `steps`.
        lr: peak learning rate (1e-3, with `init_from` 1e-4).
        min_lr: learning rate at the end of the cosine; None for a tenth of `lr`.
        warmup_steps: updates over which the learning rate rises to `lr`; None for a twentieth of
            the steps, at most 100.
        weight_decay: decay of the matrices; biases, gains and positions have none.
        grad_clip: largest norm of the gradient; 0 for no limit.
        beta1, beta2: decay rates of AdamW's moments.
        dropout: rate of dropout.
        seed: of initial weights, the order of the data, and dropout.
        eval_every: updates between two evaluations; None for a tenth of the steps.
        max_eval_batches: batches of an evaluation; None for the whole validation split.
        patience: evaluations without a lower validation loss before the run ends; None for all.
        stop_after: end after this update with the state saved, to resume later.
        validation_fraction: part of the text, at its end, that is held out for validation.
        sample_tokens: tokens to generate at each evaluation; 0 for no samples.
        backend: "numba" for compiled kernels, "numpy" for the readable operations.
        num_threads: threads of the compiled kernels, and of NumPy in `train`; None for all usable
            cores.
    """

    data: str | Path | Sequence[str | Path] = ()
    validation_data: str | Path | Sequence[str | Path] = ()
    output: str | Path = ""
    pattern: str = "*.txt"
    layers: int | None = None
    heads: int | None = None
    width: int | None = None
    context: int | None = None
    activation: str | None = None
    positions: str | None = None
    preset: str | None = None
    init_from: str | Path | None = None
    tokenizer: str | Path | None = None
    vocab_size: int | None = None
    batch_size: int = 12
    grad_accumulation: int = 1
    steps: int | None = None
    epochs: int | None = None
    lr: float | None = None
    min_lr: float | None = None
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    dropout: float = 0.0
    seed: int = 0
    eval_every: int | None = None
    max_eval_batches: int | None = None
    patience: int | None = None
    stop_after: int | None = None
    validation_fraction: float = _VALIDATION_FRACTION
    sample_tokens: int = 100
    backend: str = "numba"
    num_threads: int | None = None

    def __post_init__(self) -> None:
        problems = []
        for name in _PATHS:
            given = getattr(self, name)
            paths = [given] if isinstance(given, str | Path) else given
            if name == "data" and paths in ((), [], [""]):
                problems.append("data is missing: text files, folders or a token file (--data)")
            elif isinstance(paths, Sequence) and all(map(_is_text, paths)):
                object.__setattr__(self, name, tuple(map(str, paths)))
            else:
                problems.append(f"{name} is {given!r} but must be paths of text")
        for name in ("output", "init_from", "tokenizer"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        if self.output == "":
            problems.append("output is missing: a new folder for the run (--output)")
        problems += [*self._wrong_numbers(), *self._wrong_choices(), *self._contradictions()]
        problems += self._wrong_pairs()
        if problems:
            raise TrainingConfigError("these settings cannot be used:\n  " + "\n  ".join(problems))

    def _given(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """Yield the settings of these names that must have a value, or have one."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in names and not (value is None and field.default is None):
                yield field.name, value

    def _wrong_numbers(self) -> list[str]:
        problems = [
            f"{name} is {value!r} but must be an integer from {low} to {high}"
            for name, value in self._given(_INTEGERS)
            for low, high in [_INTEGERS[name]]
            if not (_is_number(value, int) and low <= value <= high)
        ]
        for name, value in self._given(_NUMBERS):
            high = _NUMBERS[name]
            if not (_is_number(value, int | float) and 0.0 <= value < high):
                limit = "" if high == math.inf else f" and below {high:g}"
                problems.append(f"{name} is {value!r} but must be a number of at least 0{limit}")
        return problems

    def _wrong_choices(self) -> list[str]:
        texts = self._given(("output", "pattern", "init_from", "tokenizer"))
        return [
            *(
                f"{name} is {value!r} but must be text"
                for name, value in texts
                if not (_is_text(value) or (name, value) == ("output", ""))  # it is missing
            ),
            *(
                f"{name} is {value!r} but must be one of {', '.join(_CHOICES[name])}"
                for name, value in self._given(_CHOICES)
                if value not in _CHOICES[name]
            ),
        ]

    def _contradictions(self) -> list[str]:
        problems = []
        if self.steps is not None and self.epochs is not None:
            problems.append("steps and epochs are both given; leave one out")
        if self.validation_data and self.validation_fraction != _VALIDATION_FRACTION:
            problems.append("validation_data and validation_fraction are both given; leave one out")
        if self.init_from is not None:
            problems += [
                f"{name} is given, but init_from has one; leave it out"
                for name in (
                    "layers",
                    "heads",
                    "width",
                    "activation",
                    "positions",
                    "preset",
                    "tokenizer",
                    "vocab_size",
                )
                if getattr(self, name) is not None
            ]
        return problems

    def _wrong_pairs(self) -> list[str]:
        """Return the problems of pairs of settings that are right, each by itself."""
        problems = []
        is_known = self.preset is None or self.preset in _CHOICES["preset"]
        sizes = self.network if is_known else self
        values: tuple[Any, ...] = (sizes.width, sizes.heads, self.peak_lr, self.min_lr)
        width, heads, lr, min_lr = (
            value if _is_number(value, int | float) and value >= 0 else None for value in values
        )
        if width is not None and heads and width % heads:
            problems.append(
                f"width is {width}, which {heads} heads do not divide; choose a multiple"
            )
        if lr is not None and min_lr is not None and min_lr > lr:
            problems.append(f"min_lr is {min_lr!r} but must be at most lr, {lr!r}")
        if self.epochs is None:
            steps = _DEFAULT_STEPS if self.steps is None else self.steps
            problems += self.schedule_problems(steps) if _is_number(steps, int) else []
        return problems

    def schedule_problems(self, steps: int) -> list[str]:
        """Return the problems of the settings that count steps, in a run of so many steps."""
        return [
            f"{name} is {value:,} but must be {limit} the {steps:,} steps of the run"
            for name, value, limit, excess in (
                ("warmup_steps", self.warmup_steps, "below", 0),
                ("stop_after", self.stop_after, "at most", 1),
            )
            if value is not None and _is_number(value, int) and value >= steps + excess > 0
        ]

    @property
    def network(self) -> NetworkSettings:
        """Settings of a new network: those that are given, of the preset, or the defaults."""
        preset = NetworkSettings() if self.preset is None else PRESETS[self.preset]
        names = (field.name for field in fields(preset))
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(preset, **given)

    @property
    def peak_lr(self) -> float:
        """`lr`, or its default."""
        default = 1e-3 if self.init_from is None else 1e-4
        return default if self.lr is None else self.lr

    def schedule(self, steps: int) -> dict[str, Any]:
        """Return the settings in effect that depend on the number of steps."""
        warmup, min_lr = self.warmup_steps, self.min_lr
        return {
            "steps": steps,
            "warmup_steps": min(100, steps // 20) if warmup is None else warmup,
            "min_lr": self.peak_lr / 10 if min_lr is None else min_lr,
            "eval_every": self.eval_every or max(1, steps // 10),
        }

    def number_of_steps(self, windows: int) -> int:
        """Return `steps`, its default, or the steps of `epochs` with so many training windows."""
        if self.epochs is None:
            return _DEFAULT_STEPS if self.steps is None else self.steps
        batches = math.ceil(windows * self.epochs / (self.batch_size * self.grad_accumulation))
        return max(1, batches)

    def resolved(self) -> "TrainingConfig":
        """Return the settings with those of the network and `lr` in place of None."""
        network = asdict(self.network) if self.init_from is None else {}
        return replace(self, **network, lr=self.peak_lr)

    def unchanged(self) -> tuple[str, ...]:
        """Return the names of the settings that have their defaults."""
        defaults = TrainingConfig(
            data=self.data, output=self.output, preset=self.preset, init_from=self.init_from
        ).resolved()
        given = {"data", "output"} | ({"steps"} if self.epochs is not None else set())
        names = [field.name for field in fields(self) if field.name not in given]
        return tuple(name for name in names if getattr(self, name) == getattr(defaults, name))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {**asdict(self), **{name: list(getattr(self, name)) for name in _PATHS}}

    def absolute(self) -> "TrainingConfig":
        """Return the settings with absolute paths of the data."""
        return replace(
            self,
            data=[path.absolute() for path in self.data_paths],
            validation_data=[path.absolute() for path in self.validation_paths],
        )

    @property
    def data_paths(self) -> tuple[Path, ...]:
        """`data` as paths."""
        return _to_paths(self.data)

    @property
    def validation_paths(self) -> tuple[Path, ...]:
        """`validation_data` as paths."""
        return _to_paths(self.validation_data)

    @classmethod
    def from_dict(
        cls, settings: Mapping[str, Any], source: str = "the settings"
    ) -> "TrainingConfig":
        """Return a config; raise TrainingError for a name that is none of a setting."""
        names = sorted(field.name for field in fields(cls))
        unknown = [name for name in settings if name not in names]
        if any(isinstance(settings[name], Mapping) for name in unknown):
            raise TrainingError(
                f"{source}: {', '.join(map(repr, unknown[:5]))} is a table; write the settings "
                "without tables"
            )
        if unknown:
            near = [suggest(name, names) for name in unknown[:5]]
            parts = [
                repr(name) + (f" (did you mean {found}?)" if found else "")
                for name, found in zip(unknown, near, strict=False)
            ]
            verb = "is no setting" if len(parts) == 1 else "are no settings"
            listed = "" if all(near) else f"; the settings are {', '.join(names)}"
            raise TrainingError(f"{source}: {', '.join(parts)} {verb}{listed}")
        return cls(**settings)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the settings in a TOML file; dashes in names may be underscores.

    Raises:
        TrainingError: the file cannot be read, or is not TOML.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe or a device may have no end
            raise OSError("it is no regular file")
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(f"{path} cannot be read: {reason}") from None
    return {name.replace("-", "_"): value for name, value in raw.items()}


def _to_paths(value: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    return (Path(value),) if isinstance(value, str | Path) else tuple(map(Path, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str | Path) and str(value) != "" and "\0" not in str(value)


def _is_number(value: object, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
