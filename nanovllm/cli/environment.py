"""The environment variables that nanovllm reads, for `--help` and `nanovllm env`."""

import textwrap
from typing import NamedTuple

API_KEY_VARIABLE = "NANOVLLM_API_KEY"
HISTORY_VARIABLE = "NANOVLLM_HISTORY"
_HELP_COLUMNS = 78


class Variable(NamedTuple):
    """A variable's effect and default; the value of a secret one is never shown."""

    effect: str
    default: str
    is_secret: bool = False


VARIABLES = {
    API_KEY_VARIABLE: Variable(
        "API keys of the server, separated by commas; API key of bench serve",
        "none",
        is_secret=True,
    ),
    "NANOVLLM_CACHE_DIR": Variable(
        "folder of the compiled kernels", "nanovllm in the user's cache folder"
    ),
    HISTORY_VARIABLE: Variable(
        "history of the prompts of generate; empty for none",
        "history in the folder of NANOVLLM_CACHE_DIR",
    ),
    "HF_HOME": Variable("folder of Hugging Face's files", "~/.cache/huggingface"),
    "HF_HUB_CACHE": Variable("folder of downloaded models", "hub in the folder of HF_HOME"),
    "HF_HUB_OFFLINE": Variable("1: use models on this machine only", "0"),
    "HF_ENDPOINT": Variable("address of the hub, or of a mirror", "https://huggingface.co"),
    "HF_TOKEN": Variable("access token for gated and private models", "none", is_secret=True),
    "XDG_CACHE_HOME": Variable("the user's cache folder on Linux", "~/.cache"),
    "LOCALAPPDATA": Variable("the user's cache folder on Windows", "set by Windows"),
    "NOTIFY_SOCKET": Variable("where a server reports that it is ready", "set by systemd"),
    "NANOVLLM_CHECK": Variable("1: check every address in the kernels, for developers", "0"),
    "NANOVLLM_BFLOAT16": Variable(
        "dot or float32: how the kernels multiply bfloat16 weights",
        "the faster one, by measurement",
    ),
    "NANOVLLM_KERNELS": Variable(
        "compile: compile kernels even where the installation has some for this CPU", "none"
    ),
    "NANOVLLM_AMX": Variable(
        "0: never use the tile unit of Intel CPUs (AMX); "
        "1: use it for bfloat16 and int8 even where it is not faster",
        "where its bits are right and it is faster, by measurement",
    ),
    "NUMBA_CPU_NAME": Variable("compile the kernels for this CPU", "host"),
    "NUMBA_CPU_FEATURES": Variable("and with these features, such as +avx2,-fma", "the CPU's"),
}
MODEL_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN")
ENGINE_VARIABLES = ("NANOVLLM_CACHE_DIR", *MODEL_VARIABLES)


def variables_help(*names: str) -> str:
    """Return the part of a help text that lists environment variables."""
    width = max(map(len, names)) + 4
    lines = (
        textwrap.fill(
            f"  {name:{width - 2}}{VARIABLES[name].effect} (default: {VARIABLES[name].default})",
            _HELP_COLUMNS,
            subsequent_indent=" " * width,
        )
        for name in names
    )
    return "environment variables:\n" + "\n".join(lines)
