"""Resolve a model's name: a path, the bundled model, a download, the cache, or the hub."""

import os
from dataclasses import replace
from pathlib import Path

from nanovllm.config import BUNDLED_MODEL, BUNDLED_MODELS, EngineConfig
from nanovllm.errors import CheckpointError, ModelNotFoundError, about_draft_model
from nanovllm.hub.downloads import MODEL_INFO, SHORT_NAMES, full_name, read_model_info
from nanovllm.suggestions import suggest

_BUNDLED = Path(__file__).parent.parent / "bundled"
_MIN_SIMILARITY = 0.8  # a name on the hub may be similar to a short name


def bundled_folder(name: str = BUNDLED_MODEL) -> Path:
    """Return the folder of a bundled model."""
    return _BUNDLED / name


def resolve_model(
    name: str | os.PathLike[str], *, models_dir: Path = Path("models"), may_fetch: bool = True
) -> Path:
    """Return the folder of the model `name`.

    The first match counts: a bundled model, such as "tiny-books" ("./tiny-books" is a folder); a
    folder with a config.json; `models_dir/<last part of the name>`, if `download` made it from that
    repository; the Hugging Face cache; the hub, if `may_fetch`.

    Raises:
        CheckpointError: a folder, file or repository without a checkpoint that can be loaded.
        ModelNotFoundError: no such path, a name unknown to the hub, or no connection to it.
    """
    text = os.fspath(name)
    if not text.strip():
        raise ModelNotFoundError(
            "the model's name is empty; give a folder, a name on the hub such as gpt2, "
            f"or {BUNDLED_MODEL}"
        )
    if isinstance(name, str) and name in BUNDLED_MODELS:
        return bundled_folder(name)
    path = Path(text).expanduser()
    if path.exists():
        return _checked_folder(path)
    if not isinstance(name, str) or _looks_like_path(text):
        raise ModelNotFoundError(
            f"{text} does not exist; give a folder with a checkpoint, a name on the hub such as "
            f"gpt2, or {BUNDLED_MODEL}"
        )
    local = models_dir / text.rsplit("/", maxsplit=1)[-1]
    if _is_download_of(local, text):
        return local
    return _from_hub(text, local, may_fetch=may_fetch)


def resolve_models(name: str | os.PathLike[str], config: EngineConfig) -> tuple[Path, EngineConfig]:
    """Return the folder of the model `name`, and the settings with that of their draft model.

    Raises as `resolve_model`; the message says which of the two models it is about.
    """
    folder, speculation = resolve_model(name), config.speculation
    if speculation is None or speculation.model is None:
        return folder, config
    with about_draft_model():
        draft = os.fspath(resolve_model(speculation.model))
    return folder, replace(config, speculative_config=replace(speculation, model=draft))


def _checked_folder(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is a file; give the folder that holds config.json and model.safetensors"
        )
    if not (path / "config.json").is_file():
        on_hub = full_name(path.name) if full_name(path.name) != path.name else "owner/name"
        raise CheckpointError(
            f"{path} is a folder without config.json, so it is not a complete checkpoint; "
            f"finish its download, or give the full name ({on_hub}) if you meant a model on the hub"
        )
    return path


def _looks_like_path(text: str) -> bool:
    return (
        text.startswith((".", "/", "~"))
        or text.endswith("/")
        or text.count("/") > 1
        or "\\" in text
    )


def _is_download_of(folder: Path, name: str) -> bool:
    if not (folder / "config.json").is_file():  # `download` writes it last
        return False
    info = read_model_info(folder)
    return full_name(name) in (info.get("repo"), info.get("asked_for"))


def _from_hub(name: str, local: Path, *, may_fetch: bool) -> Path:
    from nanovllm.hub.repo import (  # noqa: PLC0415 - slow to import
        cached_snapshot,
        fetch_snapshot,
    )

    try:
        cached = cached_snapshot(full_name(name))
        if cached is None and not may_fetch:
            raise ModelNotFoundError(f"nanovllm download {name} fetches it")
        return cached or fetch_snapshot(full_name(name))
    except ModelNotFoundError as error:
        hint = (
            f" ({local} exists, but no {MODEL_INFO} says that it is {full_name(name)}; "
            "to use it, give that path)"
            if local.exists()
            else ""
        )
        near = suggest(name, (*BUNDLED_MODELS, *SHORT_NAMES), min_similarity=_MIN_SIMILARITY)
        if near not in (None, name):
            bundled = ", which is bundled and needs no network" if near in BUNDLED_MODELS else ""
            fetched = ", and it could not be fetched" if may_fetch else ""
            raise ModelNotFoundError(
                f"{name} is not on this machine{hint}{fetched}; did you mean {near}{bundled}?"
            ) from error
        if not may_fetch:
            raise ModelNotFoundError(f"{name} is not on this machine{hint}; {error}") from error
        raise ModelNotFoundError(
            f"there is no folder {name} here{hint}, and it could not be fetched: {error}; "
            f"{BUNDLED_MODEL} needs no network"
        ) from None
