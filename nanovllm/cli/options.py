"""Command-line options that several subcommands share: a model, the engine's settings, the sampler's. Flags are the settings' names."""

import argparse
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from nanovllm.config import (
    BACKENDS,
    DTYPES,
    KV_CACHE_DTYPES,
    QUANTIZATIONS,
    SCHEDULING_POLICIES,
    EngineConfig,
)
from nanovllm.engine.chat_template import ChatTemplate
from nanovllm.hub import BUNDLED_MODEL
from nanovllm.sampling_params import SamplingParams

_ENGINE_FLAGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_model_len": (int, "most tokens of prompt and answer together (the model's context)"),
    "block_size": (int, "tokens in one block of the KV cache"),
    "max_num_seqs": (int, "most sequences in one step"),
    "max_num_batched_tokens": (int, "most tokens computed in one step"),
    "kv_cache_memory": (str, "memory for keys and values, such as 512MiB"),
    "num_threads": (int, "threads for the arithmetic (the library's choice)"),
    "max_logprobs": (int, "most log-probabilities a request may ask for at a position"),
}


def add_model(parser: argparse.ArgumentParser) -> None:
    """The positional MODEL."""
    text = f"a folder, or a name such as gpt2 or any/repo (default: the bundled {BUNDLED_MODEL})"
    parser.add_argument("model", nargs="?", default=BUNDLED_MODEL, help=text)


def served_names(parsed: argparse.Namespace) -> tuple[str, ...]:
    """Names of the model in the API: those of --served-model-name, or else that of the folder."""
    return tuple(parsed.served_model_name or (Path(parsed.model).name or str(parsed.model),))


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Flags for EngineConfig."""
    defaults = {field.name: field.default for field in fields(EngineConfig)}
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        default=defaults["backend"],
        help="forward pass: compiled, or to read (%(default)s)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default=defaults["dtype"],
        help="type of the weights while computing (%(default)s)",
    )
    group.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        default=None,
        help="weights of one byte, quantised while loading (none)",
    )
    cache_help = "type of keys and values (%(default)s: float32 beside float32 weights, bfloat16 beside bfloat16 and int8)"
    group.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default=defaults["kv_cache_dtype"],
        help=cache_help,
    )
    for name, (kind, text) in _ENGINE_FLAGS.items():
        default = defaults[name]
        shown = text if default is None else f"{text} ({default})"
        group.add_argument(
            _flag(name),
            type=kind,
            default=default,
            metavar=name.rsplit("_", 1)[-1].upper(),
            help=shown,
        )
    group.add_argument(
        "--scheduling-policy",
        choices=SCHEDULING_POLICIES,
        default=defaults["scheduling_policy"],
        help="order of requests: by arrival (fcfs), or by their priority field, then by arrival (%(default)s)",
    )
    yes_or_no = argparse.BooleanOptionalAction
    group.add_argument(
        "--enable-prefix-caching",
        action=yes_or_no,
        default=True,
        help="reuse what prompts that begin alike have in common",
    )
    invariant_help = "bits that do not depend on what else is in the batch; those of numba never do, numpy becomes slower"
    group.add_argument("--batch-invariant", action="store_true", help=invariant_help)
    group.add_argument(
        "--seed", type=int, default=None, help="make draws of requests without a seed repeatable"
    )


def engine_config(parsed: argparse.Namespace) -> EngineConfig:
    """The settings that the flags of `add_engine_options` say."""
    names = {field.name for field in fields(EngineConfig)}
    return EngineConfig(**{name: value for name, value in vars(parsed).items() if name in names})


_SAMPLING_FLAGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_tokens": (int, "most tokens to generate"),
    "min_tokens": (int, "no end before this many tokens"),
    "temperature": (float, "0 for the most likely token"),
    "top_p": (float, "draw among the most likely tokens that add up to this"),
    "top_k": (int, "draw among the k most likely tokens; 0 for all"),
    "min_p": (float, "drop tokens less likely than this share of the most likely one"),
    "repetition_penalty": (float, "above 1: less repetition"),
    "presence_penalty": (float, "above 0: less of what was said"),
    "frequency_penalty": (float, "above 0: less of what was said often"),
}


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Flags for SamplingParams; those left out keep the model's own defaults."""
    group = parser.add_argument_group("sampling")
    for name, (kind, text) in _SAMPLING_FLAGS.items():
        group.add_argument(
            _flag(name), type=kind, default=None, metavar=re.sub(".*_", "", name).upper(), help=text
        )
    group.add_argument(
        "--stop",
        action="append",
        default=None,
        help="text that ends the answer; may be given several times",
    )
    group.add_argument(
        "--ignore-eos", action="store_true", default=None, help="go on after the end of the text"
    )


def sampling_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """The settings of SamplingParams that were given as flags."""
    names = {field.name for field in fields(SamplingParams)}
    return {
        name: value for name, value in vars(parsed).items() if name in names and value is not None
    }


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_chat_template(group: "argparse._ActionsContainer") -> None:
    """Add the flag that gives a chat template."""
    group.add_argument(
        "--chat-template",
        type=Path,
        default=None,
        metavar="FILE",
        help="Jinja file for chat, in place of the model's own",
    )


def load_chat_template(folder: Path, parsed: argparse.Namespace) -> ChatTemplate | None:
    """The flag's template, or else that of the model folder, if any; raises CheckpointError where the flag's cannot be used."""
    template = ChatTemplate.load(folder, parsed.chat_template)
    if template is not None and parsed.chat_template is not None:
        template.check()
    return template
