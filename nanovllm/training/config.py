"""TrainingConfig: the settings of a run, from Python, the command line or a TOML file.

Each field states its type, bounds and description once: the config checks its values by them, and
the command line makes its options of them (`training_settings`).
"""

import math
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from nanovllm.config import BACKENDS
from nanovllm.errors import TrainingError
from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.config import POSITIONS
from nanovllm.suggestions import suggest
from nanovllm.training.settings import Paths, Setting, Text, describe_settings, setting

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PATHS = ("data", "validation_data")
_VALIDATION_FRACTION = 0.1
_DEFAULT_STEPS = 2000
_OF_CHECKPOINT = (
    "layers",
    "heads",
    "width",
    "activation",
    "positions",
    "preset",
    "tokenizer",
    "vocab_size",
)


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


class TrainingConfigError(TrainingError):
    """Settings of a run are missing, wrong, or contradict each other: the message lists all."""


_run, _model = partial(setting, "run"), partial(setting, "model")
_optimization, _evaluation = partial(setting, "optimization"), partial(setting, "evaluation")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """Settings of a run; TrainingError names every value that cannot be used.

    `data` and `output` are necessary. A setting of None takes the value of the preset, of the
    checkpoint in `init_from`, or the default in its description.
    """

    data: Paths = _run(
        (), "text files, folders of them, or one token file (.npy, or .bin of uint16)", "path"
    )
    validation_data: Paths = _run(
        (),
        "text or a token file to validate on; its files that are also in --data are left out of "
        "the training text (default: the end of --data)",
        "path",
    )
    output: Text | Path = _run("", "new or empty folder for checkpoint, metrics and report", "dir")
    pattern: Text = _run(
        "*.txt",
        "files to read from folders, but not from hidden ones, node_modules or virtual "
        "environments",
        "glob",
    )
    stop_after: int | None = _run(
        None, "save and end after this step, to resume later", "step", ge=1, le=2**40
    )
    seed: int = _run(0, "seed of weights, data order and dropout", ge=0, le=2**63 - 1)
    backend: str = _run(
        "numba", "numba: compiled kernels; numpy: the readable operations", "name", BACKENDS
    )
    num_threads: int | None = _run(
        None,
        "threads of the kernels and of NumPy (default: all usable physical cores)",
        "threads",
        ge=1,
        le=2**10,
    )

    layers: int | None = _model(None, "transformer blocks (default: 4)", ge=1, le=2**10)
    heads: int | None = _model(None, "attention heads (default: 4)", ge=1, le=2**14)
    width: int | None = _model(None, "width of the residual stream (default: 128)", ge=1, le=2**17)
    context: int | None = _model(
        None, "context length (default: 64, with --init-from the model's)", "tokens", ge=1, le=2**24
    )
    activation: str | None = _model(
        None,
        "gelu_new, gelu, quick_gelu, relu, relu2, silu, sigmoid, tanh, mish or another of "
        "docs/training.md (default: gelu_new)",
        "name",
        ACTIVATIONS,
    )
    positions: str | None = _model(
        None, "position embedding, learned or sinusoidal (default: learned)", "kind", POSITIONS
    )
    preset: str | None = _model(
        None, "sizes of gpt2, gpt2-medium, gpt2-large or gpt2-xl", "name", PRESETS
    )
    init_from: Text | Path | None = _model(
        None, "fine-tune this model: a folder, or a name such as gpt2", "model"
    )
    tokenizer: Text | Path | None = _model(
        None,
        "char, bpe (trained on the data), gpt2, or a folder or tokenizer.json (default: bpe)",
        "kind",
    )
    vocab_size: int | None = _model(
        None,
        "vocabulary of a bpe tokenizer (default: 1024, or what a small text gives)",
        "tokens",
        ge=1,
        le=2**24,
    )

    batch_size: int = _optimization(12, "sequences per batch", "seqs", ge=1, le=2**24)
    grad_accumulation: int = _optimization(1, "batches per update", "batches", ge=1, le=2**24)
    steps: int | None = _optimization(None, "updates (default: 2000)", ge=1, le=2**40)
    epochs: int | None = _optimization(
        None, "passes over the data, instead of --steps", ge=1, le=2**40
    )
    lr: float | None = _optimization(
        None, "peak learning rate (default: 1e-3, fine-tuning 1e-4)", ge=0
    )
    min_lr: float | None = _optimization(
        None, "learning rate at the end of the cosine (default: a tenth of --lr)", ge=0
    )
    warmup_steps: int | None = _optimization(
        None,
        "updates to reach --lr (default: a twentieth of the steps, at most 100)",
        "steps",
        ge=0,
        le=2**40,
    )
    weight_decay: float = _optimization(
        0.1, "AdamW's decay of matrices; biases, gains and positions have none", ge=0
    )
    grad_clip: float = _optimization(1.0, "maximum gradient norm, 0 for none", ge=0)
    beta1: float = _optimization(0.9, "AdamW's first decay rate", ge=0, lt=1)
    beta2: float = _optimization(0.99, "AdamW's second decay rate", ge=0, lt=1)
    dropout: float = _optimization(0.0, "dropout rate", ge=0, lt=1)

    eval_every: int | None = _evaluation(
        None, "updates between evaluations (default: a tenth of the steps)", "steps", ge=1, le=2**40
    )
    max_eval_batches: int | None = _evaluation(
        None,
        "batches of an evaluation (default: the whole validation split)",
        "batches",
        ge=1,
        le=2**40,
    )
    patience: int | None = _evaluation(
        None,
        "end after this many evaluations without a lower validation loss",
        "evals",
        ge=1,
        le=2**40,
    )
    validation_fraction: float = _evaluation(
        _VALIDATION_FRACTION, "part of the text, at its end, that is held out", "f", ge=0, lt=1
    )
    sample_tokens: int = _evaluation(
        100, "tokens to generate at each evaluation", "tokens", ge=0, le=10_000
    )

    def __post_init__(self) -> None:
        given = {one.name: getattr(self, one.name) for one in training_settings()}
        for name in (*_PATHS, "output", "init_from", "tokenizer"):
            object.__setattr__(self, name, _as_text(getattr(self, name), several=name in _PATHS))
        problems = {}
        if self.data in ((), ("",)):
            problems["data"] = "data is missing: text files, folders or a token file (--data)"
        if self.output == "":
            problems["output"] = "output is missing: a new folder for the run (--output)"
        for one in training_settings():
            if one.name not in problems and not one.accepts(getattr(self, one.name)):
                problems[one.name] = f"{one.name} is {given[one.name]!r} but must be {one.limit}"
        found = [*problems.values(), *self._contradictions(wrong=set(problems))]
        if found:
            raise TrainingConfigError("these settings cannot be used:\n  " + "\n  ".join(found))

    def _contradictions(self, wrong: set[str]) -> list[str]:
        """Return the problems of settings together; those that are `wrong` have their defaults."""
        config = copy(self)
        for one in training_settings():
            if one.name in wrong:
                object.__setattr__(config, one.name, one.default)
        problems = []
        if config.steps is not None and config.epochs is not None:
            problems.append("steps and epochs are both given; leave one out")
        if config.validation_data and config.validation_fraction != _VALIDATION_FRACTION:
            problems.append("validation_data and validation_fraction are both given; leave one out")
        if config.init_from is not None:
            problems += [
                f"{name} is given, but init_from has one; leave it out"
                for name in _OF_CHECKPOINT
                if getattr(config, name) is not None
            ]
        width, heads = config.network.width, config.network.heads
        if width % heads and not wrong & {"width", "heads"}:
            problems.append(
                f"width is {width}, which {heads} heads do not divide; choose a multiple"
            )
        if config.min_lr is not None and config.min_lr > config.peak_lr:
            problems.append(f"min_lr is {config.min_lr} but must be at most lr, {config.peak_lr}")
        if config.epochs is None and "steps" not in wrong:
            problems += config.schedule_problems(config.number_of_steps(windows=0))
        return problems

    def schedule_problems(self, steps: int) -> list[str]:
        """Return the problems of the settings that count steps, in a run of so many steps."""
        problems = []
        if self.warmup_steps is not None and self.warmup_steps >= steps:
            problems.append(_step_problem("warmup_steps", self.warmup_steps, "below", steps))
        if self.stop_after is not None and self.stop_after > steps:
            problems.append(_step_problem("stop_after", self.stop_after, "at most", steps))
        return problems

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
        return tuple(map(Path, cast("tuple[str, ...]", self.data)))

    @property
    def validation_paths(self) -> tuple[Path, ...]:
        """`validation_data` as paths."""
        return tuple(map(Path, cast("tuple[str, ...]", self.validation_data)))

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


@cache
def training_settings() -> tuple[Setting, ...]:
    """Return the settings of a run, group by group."""
    return describe_settings(TrainingConfig)


def _step_problem(name: str, value: int, limit: str, steps: int) -> str:
    return f"{name} is {value:,} but must be {limit} the {steps:,} steps of the run"


def _as_text(value: Any, *, several: bool) -> Any:
    """Return paths as text, one of `several` as a tuple; other values as they are."""
    if isinstance(value, Path):
        value = str(value)
    if not several:
        return value
    if isinstance(value, str):
        return (value,)
    is_list = isinstance(value, Sequence) and not isinstance(value, bytes)
    return tuple(_as_text(one, several=False) for one in value) if is_list else value
