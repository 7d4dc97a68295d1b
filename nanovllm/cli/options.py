"""Options as the fields of settings, and the options that several commands share.

An option has the name, the type, the bounds, the choices and the default of its field, and the
first sentence about it in the docstring of its class as help. This module imports nothing slow.
"""

import argparse
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args, get_origin

from nanovllm.checked_fields import CheckedField, checked_fields, short_repr
from nanovllm.cli.argument_types import print_message
from nanovllm.cli.parser import flag_of
from nanovllm.config import BACKENDS, BUNDLED_MODEL, EngineConfig
from nanovllm.errors import EngineFaultError
from nanovllm.sampling_params import SamplingParams
from nanovllm.speculative_config import SpeculativeConfig

if TYPE_CHECKING:
    from nanovllm.engine.chat.template import ChatTemplate
    from nanovllm.engine.engine_parts import EngineParts
    from nanovllm.learn.guard import OnStuck

T = TypeVar("T")

DEFAULT_MAX_TOKENS = 128  # of `nanovllm generate`
SAMPLING_OPTIONS = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty",
)  # fmt: skip
PRECISION_OPTIONS = ("backend", "dtype", "quantization", "kv_cache_dtype", "num_threads")
_MODEL_HELP = (
    f"folder, or name such as gpt2 or owner/name (default: {BUNDLED_MODEL}, the bundled model)"
)
_LEARN = "learn:"
_UNSET = {"scheduling_policy": "fcfs; fair with several API keys or a key file"}
"""What an option without a value stands for, where the docstring does not say it."""


class _NameModel(argparse.Action):
    """Store the model, by position or by --model; two different ones are an error.

    The last of several --model options counts.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        is_flag = option_string is not None
        was_flag, earlier = getattr(namespace, "named_model", (is_flag, values))
        if was_flag is not is_flag and earlier != values:
            parser.error(f"two models are named, {earlier} and {values}; name one")
        namespace.model, namespace.named_model = values, (is_flag, values)


def add_model(
    parser: argparse.ArgumentParser, text: str = _MODEL_HELP, default: str | None = BUNDLED_MODEL
) -> None:
    """Add MODEL, by position, and --model."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", action=_NameModel, default=argparse.SUPPRESS, help=text
    )
    add_model_flag(parser, "the same, as an option", default)


def add_model_flag(
    parser: argparse.ArgumentParser, text: str = _MODEL_HELP, default: str | None = BUNDLED_MODEL
) -> None:
    """Add --model."""
    parser.add_argument("--model", metavar="MODEL", action=_NameModel, default=default, help=text)


def add_options(
    group: "argparse._ActionsContainer",
    settings: type,
    names: Iterable[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    *,
    sets_defaults: bool = True,
) -> None:
    """Add an option for fields of a dataclass. "None for X" in a text becomes the default, X.

    Args:
        group: what the options are added to.
        settings: the dataclass.
        names: its fields; None for all.
        defaults: other defaults than those of the fields.
        sets_defaults: without it, the value of an option that is left out is None.
    """
    checked = checked_fields(settings)
    for name in checked if names is None else names:
        field = checked[name]
        text, _, unset = field.summary.partition("; None for ")
        default = {name: field.default, **(defaults or {})}[name]
        if default is None:
            text += f" (default: {_UNSET.get(name, unset)})"
        elif not sets_defaults:
            text += f" (default: {default})"
        options: dict[str, Any] = {"default": default if sets_defaults else None, "help": text}
        if field.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.choices:
            options["choices"] = field.choices
        elif SpeculativeConfig in get_args(field.value_type):
            options |= {"type": _speculative_config, "metavar": "JSON"}
        else:
            options |= {"type": _reader(field), "metavar": _metavar(field)}
            if get_origin(field.value_type) is list:
                options["action"] = "append"
        group.add_argument(flag_of(name), **options)


def _reader(field: CheckedField) -> Callable[[str], Any]:
    """Return a function that reads the value of a field from its text and checks it."""
    kind = field.kind or (Path if field.value_type is Path else str)

    def read(text: str) -> Any:
        try:
            return field.check(kind(text))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} must be {field.expected}") from None

    return read


def _speculative_config(text: str) -> SpeculativeConfig | None:
    """Return the settings in a JSON object."""
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{short_repr(text)} is not JSON ({error}); write an object in quotes, such as "
            """'{"method": "ngram"}'"""
        ) from None
    try:
        return SpeculativeConfig.of(settings)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _metavar(field: CheckedField) -> str:
    if field.value_type is Path:
        return "FILE"
    unit = field.name.rsplit("_", 1)[-1].upper()
    return "SECONDS" if unit == "S" else unit


def options_of(parsed: argparse.Namespace, settings: type[T], **others: Any) -> T:
    """Return the options that `add_options` has added as a `settings`; `others` are other fields.

    Options that are None have the defaults of their fields.
    """
    names = {field.name for field in fields(settings)}  # type: ignore[arg-type]  # a dataclass
    given = {name: value for name, value in vars(parsed).items() if value is not None}
    return settings(**{name: given[name] for name in names & given.keys()}, **others)


class _BackendNames(tuple[str, ...]):
    """The backends of EngineConfig, and learn:DIR with any folder in place of DIR."""

    __slots__ = ()

    def __contains__(self, name: object) -> bool:
        return str(name).startswith(_LEARN) or super().__contains__(name)


def _folder(text: str) -> str:
    if text == _LEARN:
        raise argparse.ArgumentTypeError("learn: names no folder; learn:. is the current one")
    return text


def add_texts(parser: argparse.ArgumentParser, settings: type, names: Iterable[str]) -> None:
    """Add --data, the files to score, and options for fields of `settings`."""
    group = parser.add_argument_group("text")
    group.add_argument(
        "--data",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="text files in UTF-8, and folders of them",
    )
    add_options(group, settings, names)


def read_data(paths: Sequence[Path], pattern: str) -> list[str]:
    """Return the texts of --data; warnings go to standard error. Raises TrainingError."""
    from nanovllm.training.data.text import read_documents

    corpus = read_documents(paths, pattern)
    for warning in corpus.warnings:
        print_message(warning)
    return corpus.texts


def add_learn_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of EngineConfig, and learn:DIR to the values of --backend."""
    add_engine_options(parser, ("backend",))
    group = parser.add_argument_group("backend")
    add_options(group, EngineConfig, ("backend",))
    backend = group._group_actions[-1]  # noqa: SLF001 - has no other name
    backend.choices = _BackendNames([*BACKENDS, f"{_LEARN}DIR"])
    backend.type = _folder
    backend.help = (
        "implementation of the forward pass: compiled, the readable specification, or a reader's "
        "of the course in DIR"
    )


def learn_folder(parsed: argparse.Namespace) -> Path | None:
    """Return DIR of --backend learn:DIR; None for other backends."""
    name = str(parsed.backend)
    return Path(name.removeprefix(_LEARN)) if name.startswith(_LEARN) else None


def engine_parts(folder: Path | None, config: EngineConfig, on_stuck: "OnStuck") -> "EngineParts":
    """Return the parts of an engine: the project's own, or the code in a reader's folder.

    `on_stuck` hears of a call of the reader's code that does not end. Raises ValueError if the
    reader's engine cannot have these settings.
    """
    if folder is None:
        from nanovllm.engine.engine_parts import OWN_PARTS

        return OWN_PARTS
    from nanovllm.learn.engine import check_config, learn_parts

    check_config(config)
    return learn_parts(folder, on_stuck)


def end_stuck_process(error: EngineFaultError, thread: int) -> NoReturn:
    """Print the error of a call that does not end, and end the process; any thread may call it."""
    print_message(str(error))
    os._exit(1)


def add_precision_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of EngineConfig that choose the arithmetic of a forward pass."""
    add_options(parser.add_argument_group("engine"), EngineConfig, PRECISION_OPTIONS)


def add_engine_options(
    parser: argparse.ArgumentParser, omitted: Collection[str] = (), **defaults: Any
) -> None:
    """Add an option for each field of EngineConfig; `defaults` are other ones than its own."""
    names = [field.name for field in fields(EngineConfig) if field.name not in omitted]
    defaults = {"scheduling_policy": None, **defaults}
    add_options(parser.add_argument_group("engine"), EngineConfig, names, defaults)


def engine_config(parsed: argparse.Namespace) -> EngineConfig:
    """Return the settings of `add_engine_options`; those that are None have their defaults.

    The reader's backend, learn:DIR, has the settings of backend="numpy". Raises ValueError if they
    exclude each other.
    """
    if learn_folder(parsed) is not None:
        if parsed.speculative_config is not None:
            raise ValueError(
                "speculative_config is set, but the course's scheduler plans no drafted tokens; "
                "leave it out, or choose another backend"
            )
        parsed = argparse.Namespace(**{**vars(parsed), "backend": "numpy"})
    return options_of(parsed, EngineConfig)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add options for SamplingParams, without which the model's own defaults apply."""
    group = parser.add_argument_group(
        "sampling",
        "Defaults in the model's generation_config.json override those below.",
    )
    defaults = {"max_tokens": DEFAULT_MAX_TOKENS}
    add_options(group, SamplingParams, SAMPLING_OPTIONS, defaults, sets_defaults=False)
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="stop string; repeat for several (default: none)",
    )
    group.add_argument(
        "--ignore-eos",
        action="store_true",
        default=None,
        help="generate past the end-of-text token (default: no)",
    )


def sampling_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of SamplingParams on the command line."""
    names = {field.name for field in fields(SamplingParams)}
    return {
        name: value for name, value in vars(parsed).items() if name in names and value is not None
    }


def served_names(model: str, names: Iterable[str] | None) -> tuple[str, ...]:
    """Return the model's names in the API: --served-model-name, or else the folder's name."""
    return tuple(names or (Path(model).name or model,))


def load_chat_template(folder: Path, named: str | None) -> "ChatTemplate | None":
    """Return the template of --chat-template, or else the model's; raises CheckpointError."""
    from nanovllm.engine.chat.template import ChatTemplate

    template = ChatTemplate.load(folder, named)
    if template is not None and named is not None:
        template.check()
    return template
