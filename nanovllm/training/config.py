"""TrainingConfig: the settings of a run, from Python, the command line or a TOML file.

A setting is declared here once: its type and bounds, its default and its text. The checks and the
options of the command line follow from it.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias, cast

from annotated_types import Interval

from nanovllm.checked_fields import checked_fields
from nanovllm.config import BACKENDS
from nanovllm.errors import InvalidRequestError, TrainingError, counted
from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.config import ABLATIONS, EMBEDDED_POSITIONS
from nanovllm.suggestions import suggest
from nanovllm.training.network.schedule import SCHEDULES, Schedule

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LISTS = {"data": "paths of text", "validation_data": "paths of text", "ablate": "names"}
_TEXTS = ("output", "pattern", "init_from", "tokenizer")
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


_NETWORK = tuple(field.name for field in fields(NetworkSettings))
PRESETS: Mapping[str, NetworkSettings] = {
    name: NetworkSettings(layers, heads, width, context=1024, tokenizer="gpt2")
    for name, layers, heads, width in (
        ("gpt2", 12, 12, 768),
        ("gpt2-medium", 24, 16, 1024),
        ("gpt2-large", 36, 20, 1280),
        ("gpt2-xl", 48, 25, 1600),
    )
}
"""Settings of the published models (Radford et al. 2019, table 2)."""
_CHOICES: Mapping[str, Sequence[str]] = {
    "preset": tuple(PRESETS),
    "positions": EMBEDDED_POSITIONS,
    "backend": BACKENDS,
    "activation": tuple(ACTIVATIONS),
    "schedule": SCHEDULES,
}


class TrainingConfigError(TrainingError):
    """Settings of a run are missing, wrong, or contradict each other: the message lists all."""


Text: TypeAlias = str | Path
Size: TypeAlias = Annotated[int, Interval(ge=1, le=2**24)]
Steps: TypeAlias = Annotated[int, Interval(ge=1, le=2**40)]
Factor: TypeAlias = Annotated[float, Interval(ge=0, lt=math.inf)]
Rate: TypeAlias = Annotated[float, Interval(ge=0, lt=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """Settings of a run; TrainingError names every value that cannot be used.

    `data` and `output` are necessary. A setting of None takes the value of the preset, of the
    checkpoint in `init_from`, or the default that is given here.

    Attributes:
        data: text files, folders of them, examples (.jsonl), or one token file (.npy, or .bin of
            uint16).
        validation_data: text, examples or a token file to validate on (default: the end of `data`).
            Text files that are also in `data` are left out of the training text.
        output: new or empty folder for checkpoint, metrics, report and the state for resuming.
        pattern: files to read from folders, but not from hidden ones, node_modules or virtual
            environments.
        layers: transformer blocks (default: 4).
        heads: attention heads (default: 4).
        width: d_model, the width of the residual stream (default: 128).
        context: context length in tokens (default: 64, with `init_from` the model's).
        activation: gelu_new, gelu, quick_gelu, relu, relu2, silu, sigmoid, tanh, mish or another
            that transformers names (default: gelu_new).
        positions: position embedding, learned or sinusoidal (default: learned).
        ablate: parts to train without, to see what they are for: positions, layer-norm, residual,
            ffn, causal-mask, scaling.
        preset: sizes of gpt2, gpt2-medium, gpt2-large or gpt2-xl.
        init_from: fine-tune this model: a folder, or a name such as gpt2.
        tokenizer: char, bpe (trained on the data), gpt2, or a folder or tokenizer.json (default:
            bpe).
        vocab_size: vocabulary of a bpe tokenizer (default: 1024, or what a small text gives).
        batch_size: sequences of a batch, which is one forward pass.
        grad_accumulation: batches per update.
        steps: updates (default: 2000, or those of `epochs`).
        epochs: passes over the data, instead of `steps`.
        lr: peak learning rate (default: 1e-3, fine-tuning 1e-4).
        schedule: learning rate after the warmup: cosine, constant, or wsd (warmup, stable, decay).
        min_lr: learning rate at the end of cosine or wsd (default: a tenth of `lr`).
        warmup_steps: updates to reach `lr` (default: a twentieth of the steps, at most 100).
        decay_steps: updates of the linear decay that ends wsd (default: a fifth of the steps).
        weight_decay: AdamW's decay of matrices; biases, gains and positions have none.
        grad_clip: maximum gradient norm, 0 for none.
        beta1: AdamW's first decay rate.
        beta2: AdamW's second decay rate.
        dropout: dropout rate.
        seed: seed of initial weights, data order and dropout.
        eval_every: updates between evaluations (default: a tenth of the steps).
        max_eval_batches: batches of an evaluation (default: the whole validation split).
        patience: end after this many evaluations without a lower validation loss.
        stop_after: save and end after this step, to resume later.
        validation_fraction: part of the text, at its end, that is held out.
        sample_tokens: tokens to generate at each evaluation.
        backend: numba for compiled kernels, numpy for the readable operations.
        num_threads: threads of the kernels and of NumPy (default: all usable physical cores).
    """

    data: Text | Sequence[Text] = ()
    validation_data: Text | Sequence[Text] = ()
    output: Text = ""
    pattern: str = "*.txt"
    layers: Annotated[int, Interval(ge=1, le=2**10)] | None = None
    heads: Annotated[int, Interval(ge=1, le=2**14)] | None = None
    width: Annotated[int, Interval(ge=1, le=2**17)] | None = None
    context: Size | None = None
    activation: str | None = None
    positions: str | None = None
    ablate: Text | Sequence[Text] = ()
    preset: str | None = None
    init_from: Text | None = None
    tokenizer: Text | None = None
    vocab_size: Size | None = None
    batch_size: Size = 12
    grad_accumulation: Size = 1
    steps: Steps | None = None
    epochs: Steps | None = None
    lr: Factor | None = None
    schedule: str = "cosine"
    min_lr: Factor | None = None
    warmup_steps: Annotated[int, Interval(ge=0, le=2**40)] | None = None
    decay_steps: Steps | None = None
    weight_decay: Factor = 0.1
    grad_clip: Factor = 1.0
    beta1: Rate = 0.9
    beta2: Rate = 0.99
    dropout: Rate = 0.0
    seed: Annotated[int, Interval(ge=0, le=2**63 - 1)] = 0
    eval_every: Steps | None = None
    max_eval_batches: Steps | None = None
    patience: Steps | None = None
    stop_after: Steps | None = None
    validation_fraction: Annotated[float, Interval(gt=0, lt=1)] = _VALIDATION_FRACTION
    sample_tokens: Annotated[int, Interval(ge=0, le=10_000)] = 100
    backend: str = "numba"
    num_threads: Annotated[int, Interval(ge=1, le=2**10)] | None = None

    def __post_init__(self) -> None:
        missing = {}
        if self.data in ((), [], "", [""]):
            missing["data"] = "data is missing: text files, folders or a token file (--data)"
        if self.output == "":
            missing["output"] = "output is missing: a new folder for the run (--output)"
        values = {name: getattr(self, name) for name in checked_fields(TrainingConfig)}
        problems = {**missing, **wrong_values(values), **self._wrong_texts(), **missing}
        found = [*problems.values(), *self._contradictions(wrong=set(problems))]
        if found:
            raise TrainingConfigError("these settings cannot be used:\n  " + "\n  ".join(found))

    def _wrong_texts(self) -> dict[str, str]:
        """Make paths text; return the problems of texts by setting."""
        problems = {}
        for name in (*_TEXTS, *_LISTS):
            value = getattr(self, name)
            texts = value if name in _LISTS and not isinstance(value, str | Path) else [value]
            if isinstance(texts, Sequence) and all(map(_is_text, texts)):
                text = tuple(map(str, texts)) if name in _LISTS else str(value)
                object.__setattr__(self, name, text)
            elif value is not None or name not in ("init_from", "tokenizer"):
                problems[name] = f"{name} is {value!r} but must be {_LISTS.get(name, 'text')}"
        return problems

    def _contradictions(self, wrong: set[str]) -> list[str]:
        """Return the problems of settings together; those that are `wrong` have their defaults."""
        config = copy(self)
        for name in wrong:
            object.__setattr__(config, name, checked_fields(TrainingConfig)[name].default)
        problems = []
        if config.steps is not None and config.epochs is not None:
            problems.append("steps and epochs are both given; leave one out")
        if config.validation_data and config.validation_fraction != _VALIDATION_FRACTION:
            problems.append("validation_data and validation_fraction are both given; leave one out")
        if config.init_from is not None:
            problems += [
                f"{name} is given, but init_from has one; leave it out"
                for name in (*_NETWORK, "preset", "vocab_size")
                if name != "context" and getattr(config, name) is not None
            ]
        problems += config.ablation_problems()
        width, heads = config.network.width, config.network.heads
        if width % heads and not wrong & {"width", "heads"}:
            problems.append(
                f"width is {width}, which {heads} heads do not divide; choose a multiple"
            )
        if config.min_lr is not None and config.min_lr > config.peak_lr:
            problems.append(f"min_lr is {config.min_lr} but must be at most lr, {config.peak_lr}")
        if config.min_lr is not None and config.schedule == "constant":
            problems.append("min_lr is given, but the constant schedule never falls; leave it out")
        if config.decay_steps is not None and config.schedule != "wsd":
            problems.append(
                f"decay_steps is given, but the schedule is {config.schedule}; choose wsd"
            )
        if config.epochs is None and "steps" not in wrong:
            problems += config.schedule_problems(config.number_of_steps(windows=0))
        return problems

    def ablation_problems(self) -> list[str]:
        """Return the problems of `ablate`."""
        problems = [
            f"ablate has {one!r} but must be some of {', '.join(ABLATIONS)}"
            for one in self.ablated
            if one not in ABLATIONS
        ]
        if self.ablate and self.init_from is not None:
            problems.append("ablate is given, but the network of init_from has its parts")
        if "positions" in self.ablated and self.positions == "sinusoidal":
            problems.append("positions is sinusoidal, but ablate leaves positions out; drop one")
        if "causal-mask" in self.ablated and self.backend != "numpy":
            problems.append("ablate causal-mask needs --backend numpy: the other is always causal")
        return problems

    def schedule_problems(self, steps: int) -> list[str]:
        """Return the problems of the settings that count steps, in a run of so many steps."""
        problems = []
        if self.warmup_steps is not None and self.warmup_steps >= steps:
            problems.append(_step_problem("warmup_steps", self.warmup_steps, "below", steps))
        elif (stable := self.learning_rates(steps)).decay_steps + stable.warmup_steps > steps:
            problems.append(
                f"decay_steps is {stable.decay_steps}, which with {stable.warmup_steps} "
                f"warmup_steps are more than the {counted(steps, 'step')}"
            )
        if self.stop_after is not None and self.stop_after > steps:
            problems.append(_step_problem("stop_after", self.stop_after, "at most", steps))
        return problems

    @property
    def network(self) -> NetworkSettings:
        """Settings of a new network: those that are given, of the preset, or the defaults."""
        preset = NetworkSettings() if self.preset is None else PRESETS[self.preset]
        given = {name: value for name in _NETWORK if (value := getattr(self, name)) is not None}
        return replace(preset, **given)

    @property
    def peak_lr(self) -> float:
        """`lr`, or its default."""
        default = 1e-3 if self.init_from is None else 1e-4
        return default if self.lr is None else self.lr

    def learning_rates(self, steps: int) -> Schedule:
        """Return the schedule of a run of so many steps."""
        warmup = min(100, steps // 20) if self.warmup_steps is None else self.warmup_steps
        decay = min(steps // 5, steps - warmup) if self.decay_steps is None else self.decay_steps
        return Schedule(
            peak=self.peak_lr,
            floor=self.peak_lr / 10 if self.min_lr is None else self.min_lr,
            warmup_steps=warmup,
            steps=steps,
            kind=self.schedule,
            decay_steps=decay if self.schedule == "wsd" else 0,
        )

    def in_effect(self, steps: int) -> dict[str, Any]:
        """Return the settings in effect that depend on the number of steps."""
        schedule = self.learning_rates(steps)
        return {
            "steps": steps,
            "warmup_steps": schedule.warmup_steps,
            "min_lr": None if self.schedule == "constant" else schedule.floor,
            "decay_steps": schedule.decay_steps or None,
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
        return {**asdict(self), **{name: list(getattr(self, name)) for name in _LISTS}}

    @property
    def ablated(self) -> tuple[str, ...]:
        """`ablate` as names."""
        return cast("tuple[str, ...]", self.ablate)

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
        """Return a config; raise TrainingError for names of no setting."""
        names = sorted(field.name for field in fields(cls))
        problems = []
        for name in settings.keys() - set(names):
            near = suggest(name, names)
            advice = f"did you mean {near}?" if near else f"the settings are {', '.join(names)}"
            if isinstance(settings[name], Mapping):
                advice = "write the settings without tables"
            problems.append(f"there is no setting {name!r}; {advice}")
        if problems:
            raise TrainingError(f"{source}: " + "\n  ".join(sorted(problems)))
        return cls(**settings)


def wrong_values(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the problems of numbers and choices by setting, each of them one of TrainingConfig."""
    problems = {}
    for name, value in values.items():
        choices = _CHOICES.get(name)
        try:
            checked_fields(TrainingConfig)[name].check(value)
        except InvalidRequestError as error:
            problems[name] = str(error)
        if choices and value is not None and value not in choices:
            problems[name] = f"{name} is {value!r} but must be one of {', '.join(choices)}"
    return problems


def read_toml(path: Path) -> dict[str, Any]:
    """Return the settings in a TOML file; dashes in names may be underscores.

    Raises:
        TrainingError: the file cannot be read, or is not TOML.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe or a device may have no end
            raise OSError("it is not a regular file")
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(f"{path} cannot be read: {reason}") from None
    return {name.replace("-", "_"): value for name, value in raw.items()}


def _step_problem(name: str, value: int, limit: str, steps: int) -> str:
    return f"{name} is {value:,} but must be {limit} the {counted(steps, 'step')} of the run"


def _is_text(value: object) -> bool:
    return isinstance(value, str | Path) and str(value) != "" and "\0" not in str(value)
