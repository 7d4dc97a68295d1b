"""Check a configuration of Ray Serve before it is deployed. Neither Ray nor weights are loaded.

    python -m nanovllm.deploy.check examples/ray/two-replicas.yaml

The file is a config file of `serve run`, or a RayService manifest of Kubernetes. The command prints
what will run and returns 0, or what is wrong and returns 2. `ray_serve.build` makes the same checks
of its application, but Ray surrounds their errors with tracebacks.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nanovllm.cli.argument_types import positive_number, print_message
from nanovllm.cli.options import load_chat_template
from nanovllm.cli.serving import server_settings
from nanovllm.config import format_bytes
from nanovllm.deploy.settings import AppSettings, ModelSettings, read_settings
from nanovllm.engine.engine import Engine
from nanovllm.engine.loading import check_draft_model
from nanovllm.engine.memory import RESERVE_BYTES, weights_bytes
from nanovllm.errors import NanovllmError
from nanovllm.hub import resolve_models
from nanovllm.model.families.registry import load_config
from nanovllm.model.machine import MemoryLimit, memory_limit, usable_cpus

BUILDER = "nanovllm.deploy.ray_serve:build"
"""`import_path` of the applications that are checked."""
_NAME = "python -m nanovllm.deploy.check"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the file of the command line; return 2 if anything in it is wrong."""
    parser = argparse.ArgumentParser(
        prog=_NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="config file of Ray Serve, or RayService manifest")
    parser.add_argument(
        "--cpus",
        type=positive_number,
        help="CPUs of the cluster; without it the replicas must fit this machine, its memory too",
    )
    parsed = parser.parse_args(arguments)
    try:
        for line in check_file(parsed.file, parsed.cpus):
            print(line)
    except (ValueError, NanovllmError) as error:
        print_message(f"{parsed.file}: {error}", _NAME)
        return 2
    return 0


def check_file(path: Path, cpus: float | None = None) -> Iterator[str]:
    """Yield a line for each application and model of a file; raises ValueError or NanovllmError.

    Args:
        path: the file.
        cpus: CPUs of the cluster; None if it is this machine.
    """
    needed, needed_bytes = 0.0, 0
    for name, args in _applications(path):
        try:
            settings = read_settings(args)
        except ValidationError as error:
            problems = "".join(
                f"\n  {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
                for problem in error.errors()
            )
            raise ValueError(f"args of the application {name!r} are not valid:{problems}") from None
        available = usable_cpus() if cpus is None else cpus
        settings.check_cpus(available - needed)
        needed += settings.cpus
        limit = memory_limit() if cpus is None and not settings.can_grow else None
        lines, app_bytes = check_models(settings, limit, needed_bytes)
        needed_bytes += app_bytes
        of_all = ", added on demand" if settings.can_grow else f" of {available:g}"
        yield f"application {name!r}: {settings.cpus:g} CPUs{of_all}"
        for model, line in zip(settings.models, lines, strict=True):
            yield f"  {model.model}: {line}"


def check_models(
    settings: AppSettings, limit: MemoryLimit | None, other_bytes: int = 0
) -> tuple[list[str], int]:
    """Raise the errors that a replica would end with, where they need no weights.

    Args:
        settings: the application.
        limit: of the memory that all replicas share; None if they are on several machines.
        other_bytes: memory of other applications below the limit.

    Returns:
        What each model runs, and the memory of all replicas in bytes.
    """
    names: set[str] = set()
    lines = []
    total_bytes = shrinkable_bytes = 0
    is_alone = not other_bytes and sum(model.most_replicas for model in settings.models) == 1
    for model in settings.models:
        options = model.serve_options()
        names_of_model = server_settings(options).model_names
        folder, config = resolve_models(model.model, options.engine)
        Engine.check(folder, config, is_local=limit is not None)
        network = load_config(folder)
        draft = check_draft_model(config, network, folder)
        load_chat_template(folder, options.chat_template)
        for name in names_of_model:
            if name in names:
                raise ValueError(
                    f"two models have the name {name!r}; give one of them another `name`"
                )
            names.add(name)
        weights = weights_bytes(config, network) + (weights_bytes(*draft) if draft else 0)
        cache = 0 if config.num_blocks is not None else config.kv_cache_bytes
        total_bytes += model.most_replicas * (weights + cache + RESERVE_BYTES)
        if is_alone and config.has_default_cache:
            shrinkable_bytes = cache  # several replicas would each take what they find free
        lines.append(
            f"{_replicas(model)} of {model.cpus:g} CPUs, {format_bytes(weights)} of weights, "
            f"KV cache of up to {format_bytes(cache)}, routing {model.routing}"
        )
    needed_bytes = other_bytes + total_bytes - shrinkable_bytes
    if limit is not None and needed_bytes > limit.num_bytes:
        raise ValueError(
            f"the replicas need {format_bytes(needed_bytes)} of memory together, but {limit.name} "
            f"is {format_bytes(limit.num_bytes)}; lower replicas or their kv-cache-memory, or "
            "give the CPUs of a cluster of several machines by --cpus"
        )
    return lines, total_bytes


def _replicas(model: ModelSettings) -> str:
    most = f" to {model.most_replicas}" if model.is_autoscaled else ""
    return f"{model.replicas}{most} replica{'s' if model.most_replicas > 1 else ''}"


def _applications(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield name and args of each application of `BUILDER` in a file; raises ValueError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("kind") == "RayService":
            content = yaml.safe_load(content["spec"]["serveConfigV2"])
    except OSError as error:
        raise ValueError(f"the file cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the file is not YAML: {error}") from None
    except (KeyError, TypeError):
        raise ValueError("the manifest has no spec.serveConfigV2") from None
    applications = content.get("applications") if isinstance(content, dict) else None
    if not isinstance(applications, list) or not all(isinstance(one, dict) for one in applications):
        raise ValueError("the file has no list of `applications`")
    ours = [one for one in applications if one.get("import_path") == BUILDER]
    if not ours:
        raise ValueError(f"no application has the import_path {BUILDER}")
    for application in ours:
        args = application.get("args")
        name = str(application.get("name", "default"))
        if not isinstance(args, dict):
            raise ValueError(f"the application {name!r} has no `args`, which list its models")
        yield name, args


if __name__ == "__main__":
    sys.exit(main())
