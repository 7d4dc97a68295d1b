"""Options shared by several commands: the model, engine settings and sampling settings.

Options have the names of the settings. This module imports nothing slow.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.checked_fields import checked_fields
from nanovllm.cli.parser import flag_of
from nanovllm.config import BUNDLED_MODEL, EngineConfig
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.chat.template import ChatTemplate

DEFAULT_MAX_TOKENS = 128  # of `nanovllm generate`
_MODEL_HELP = (
    f"folder, or name such as gpt2 or owner/name (default: {BUNDLED_MODEL}, the bundled model)"
)


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


def add_served_model_name(group: "argparse._ActionsContainer") -> None:
    """Add --served-model-name."""
    group.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="name of the model in requests; repeat for several (default: the folder's name)",
    )


def served_names(parsed: argparse.Namespace) -> tuple[str, ...]:
    """Return the model's names in the API: --served-model-name, or else the folder's name."""
    return tuple(parsed.served_model_name or (Path(parsed.model).name or str(parsed.model),))


_UNSET = {"scheduling_policy": "fcfs; fair with several API keys or a key file"}
"""What an option without a value stands for, where the docstring does not say it."""


def add_precision_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of EngineConfig that choose the arithmetic of a forward pass."""
    group = parser.add_argument_group("engine")
    names = ("backend", "dtype", "quantization", "kv_cache_dtype", "num_threads")
    _add_fields(group, EngineConfig, names, {})


def add_engine_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add an option for each field of EngineConfig; `defaults` are other ones than its own."""
    group = parser.add_argument_group("engine")
    names = [field.name for field in fields(EngineConfig) if field.name != "num_blocks"]
    _add_fields(group, EngineConfig, names, {"scheduling_policy": None, **defaults})


def _add_fields(
    group: "argparse._ArgumentGroup",
    settings: type,
    names: Sequence[str],
    defaults: Mapping[str, Any],
    *,
    sets_defaults: bool = True,
) -> None:
    """Add an option for fields of a class, whose docstring says what each is for.

    The help of an option is the first sentence about the field. "None for X" in it becomes the
    default, X.

    Args:
        defaults: other defaults than those of the fields.
        sets_defaults: without it, the value of an option that is left out is None.
    """
    checked = checked_fields(settings)
    for name in names:
        field = checked[name]
        text, _, unset = field.summary.partition("; None for ")
        default = {name: field.default, **defaults}[name]
        if default is None:
            text += f" (default: {_UNSET.get(name, unset)})"
        elif not sets_defaults:
            text += f" (default: {default})"
        options: dict[str, Any] = {"default": default if sets_defaults else None, "help": text}
        if field.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.choices:
            options["choices"] = field.choices
        else:
            metavar = name.rsplit("_", 1)[-1].upper()
            options |= {"type": field.kind or str, "metavar": metavar}
        group.add_argument(flag_of(name), **options)


def engine_config(parsed: argparse.Namespace) -> EngineConfig:
    """Return the settings of `add_engine_options`; those that are None have their defaults."""
    names = {field.name for field in fields(EngineConfig)}
    given = {name: value for name, value in vars(parsed).items() if value is not None}
    return EngineConfig(**{name: value for name, value in given.items() if name in names})


_SAMPLING_NAMES = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty",
)  # fmt: skip


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add options for SamplingParams, without which the model's own defaults apply."""
    group = parser.add_argument_group(
        "sampling",
        "Defaults in the model's generation_config.json override those below.",
    )
    defaults = {"max_tokens": DEFAULT_MAX_TOKENS}
    _add_fields(group, SamplingParams, _SAMPLING_NAMES, defaults, sets_defaults=False)
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


def add_chat_template(group: "argparse._ActionsContainer", more: str = "") -> None:
    """Add --chat-template; `more` is added to its help."""
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help=f"Jinja chat template, or plain for the bundled one{more} (default: the model's own)",
    )


def load_chat_template(folder: Path, parsed: argparse.Namespace) -> "ChatTemplate | None":
    """Return the template of --chat-template, or else the model's; raises CheckpointError."""
    from nanovllm.engine.chat.template import ChatTemplate

    template = ChatTemplate.load(folder, parsed.chat_template)
    if template is not None and parsed.chat_template is not None:
        template.check()
    return template
