"""Options shared by several commands: the model, engine settings and sampling settings.

Options have the names of the settings. This module imports nothing slow, see parsers/__init__.py.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.config import (
    BACKENDS,
    BUNDLED_MODEL,
    DTYPES,
    KV_CACHE_DTYPES,
    QUANTIZATIONS,
    SCHEDULING_POLICIES,
    EngineConfig,
)
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


_ENGINE_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_model_len": (
        int, "maximum tokens of prompt and output together (default: the model's context)",
    ),
    "block_size": (int, "tokens in a block of the KV cache"),
    "max_num_seqs": (int, "maximum sequences in one step"),
    "max_num_batched_tokens": (int, "maximum tokens computed in one step"),
    "kv_cache_memory": (
        str, "memory of the KV cache, such as 512MiB; auto is 1GiB, less where memory is limited",
    ),
    "num_threads": (int, "compute threads (default: the cores this process may use)"),
    "max_logprobs": (int, "maximum log-probabilities per position that a request may ask for"),
}  # fmt: skip


_POLICY_HELP = (
    "order of requests: by arrival, priority or equal shares of clients (default: fcfs; fair with "
    "several API keys or a key file)"
)
_ENGINE_CHOICES: dict[str, tuple[tuple[str, ...], str]] = {
    "backend": (BACKENDS, "implementation of the forward pass; numpy is the readable one"),
    "dtype": (DTYPES, "type of the weights in memory"),
    "quantization": (QUANTIZATIONS, "quantize weights on load (default: none)"),
    "kv_cache_dtype": (
        KV_CACHE_DTYPES,
        "type of the KV cache; auto is float32 for float32 weights, else bfloat16",
    ),
    "scheduling_policy": (SCHEDULING_POLICIES, _POLICY_HELP),
}


def add_precision_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of EngineConfig that choose the arithmetic of a forward pass."""
    group = parser.add_argument_group("engine")
    for name in ("backend", "dtype", "quantization", "kv_cache_dtype", "num_threads"):
        _add_engine_option(group, name)


def _add_engine_option(group: "argparse._ArgumentGroup", name: str) -> None:
    (default,) = (field.default for field in fields(EngineConfig) if field.name == name)
    if name in _ENGINE_CHOICES:
        choices, text = _ENGINE_CHOICES[name]
        default = None if name == "scheduling_policy" else default
        group.add_argument(_option(name), choices=choices, default=default, help=text)
    else:
        kind, text = _ENGINE_OPTIONS[name]
        metavar = name.rsplit("_", 1)[-1].upper()
        group.add_argument(_option(name), type=kind, default=default, metavar=metavar, help=text)


def add_engine_options(
    parser: argparse.ArgumentParser, *, seed: int | None = None, prefix_caching: bool = True
) -> None:
    """Add an option for each field of EngineConfig."""
    group = parser.add_argument_group("engine")
    for name in (*_ENGINE_CHOICES, *_ENGINE_OPTIONS):
        _add_engine_option(group, name)
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=prefix_caching,
        help="reuse the KV cache of shared prompt prefixes",
    )
    group.add_argument(
        "--batch-invariant",
        action="store_true",
        help="make results bit-identical in any batch; slower with numpy, always so with numba "
        "(default: no)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=seed,
        help="seed for requests that have none" + (" (default: random)" if seed is None else ""),
    )


def engine_config(parsed: argparse.Namespace) -> EngineConfig:
    """Return the settings of `add_engine_options`; those that are None have their defaults."""
    names = {field.name for field in fields(EngineConfig)}
    given = {name: value for name, value in vars(parsed).items() if value is not None}
    return EngineConfig(**{name: value for name, value in given.items() if name in names})


_SAMPLING_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_tokens": (int, f"maximum tokens to generate (default: {DEFAULT_MAX_TOKENS})"),
    "min_tokens": (int, "minimum tokens before the end-of-text token or a stop string"),
    "temperature": (float, "sampling temperature; 0 for greedy decoding"),
    "top_p": (float, "sample from the most probable tokens with this total probability"),
    "top_k": (int, "sample from the k most probable tokens; 0 for all"),
    "min_p": (float, "exclude tokens below this fraction of the highest probability"),
    "repetition_penalty": (float, "above 1, penalize tokens of the prompt and the output"),
    "presence_penalty": (float, "above 0, penalize tokens of the output"),
    "frequency_penalty": (float, "above 0, penalize tokens of the output by their count"),
}


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add options for SamplingParams, without which the model's own defaults apply."""
    group = parser.add_argument_group(
        "sampling",
        "Defaults in the model's generation_config.json override those below.",
    )
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    for name, (kind, text) in _SAMPLING_OPTIONS.items():
        shown = text if "default" in text else f"{text} (default: {defaults[name]})"
        metavar = re.sub(".*_", "", name).upper()
        group.add_argument(_option(name), type=kind, metavar=metavar, help=shown)
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


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_chat_template(group: "argparse._ActionsContainer", more: str = "") -> None:
    """Add --chat-template; `more` is added to its help."""
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help=f"Jinja chat template, or plain for the bundled one{more} (default: the model's own)",
    )


def load_chat_template(folder: Path, parsed: argparse.Namespace) -> "ChatTemplate | None":
    """Return the template of --chat-template, or else the model's; raises CheckpointError."""
    from nanovllm.engine.chat.template import ChatTemplate  # noqa: PLC0415 - slow to import

    template = ChatTemplate.load(folder, parsed.chat_template)
    if template is not None and parsed.chat_template is not None:
        template.check()
    return template
