"""The tokenizer of a model folder: tokenizer.json, or GPT-2's vocab.json and merges.txt.

The second form is byte-level BPE (Radford et al. 2019, section 2.2). The tokens around a text are
those of tokenizer.json, unless tokenizer_config.json has add_bos_token or add_eos_token: then these
two decide, as in transformers.
"""

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from nanovllm.errors import CheckpointError
from nanovllm.model.tokenizer_growth import check_growth

END_OF_TEXT = "<|endoftext|>"
_OTHER_FORMS = {
    "tokenizer.model": "SentencePiece's or tiktoken's",
    "tekken.json": "Mistral's",
    "spiece.model": "SentencePiece's",
}


def load_tokenizer_files(path: Path) -> Tokenizer | None:
    """Return the tokenizer of a model folder, or of a tokenizer.json; None if there is none.

    Raises CheckpointError if a file is invalid, or multiplies texts.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    vocab, merges = path / "vocab.json", path / "merges.txt"
    try:
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        elif vocab.is_file() and merges.is_file():
            _check_words(path)
            tokenizer = byte_level(models.BPE.from_file(str(vocab), str(merges)))
            if tokenizer.token_to_id(END_OF_TEXT) is not None:
                tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
        else:
            return None
        if path.is_dir():
            _set_tokens_around_text(tokenizer, read_tokenizer_config(path))
        check_growth(tokenizer)
    except (KeyboardInterrupt, SystemExit, CheckpointError):
        raise
    except BaseException as error:  # noqa: BLE001 - the library panics with a BaseException
        raise CheckpointError(f"the tokenizer in {path} cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def has_tokenizer(files: Container[str]) -> bool:
    """Return whether a folder or repository with these files has a tokenizer that can be read."""
    return "tokenizer.json" in files or ("vocab.json" in files and "merges.txt" in files)


def missing_tokenizer(model: str, files: Container[str]) -> str:
    """Return what a folder or repository without a tokenizer's files lacks, and the remedy."""
    needed = "tokenizer.json, or vocab.json and merges.txt"
    for name, owner in _OTHER_FORMS.items():
        if name in files:
            return (
                f"{model} has no tokenizer.json, only {name}, which is in {owner} own format; take "
                "tokenizer.json from a copy of the model that has one, or write it where "
                'transformers and sentencepiece are installed: python -c "from transformers import '
                f"AutoTokenizer as T; T.from_pretrained('{model}').save_pretrained('converted')\""
            )
    return f"{model} has no tokenizer: it needs {needed}"


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return the settings in tokenizer_config.json, above those of special_tokens_map.json.

    It is empty if the folder has neither. Raises CheckpointError if a file cannot be read.
    """
    names = ("special_tokens_map.json", "tokenizer_config.json")
    return {**_read_settings(folder / names[0]), **_read_settings(folder / names[1])}


def special_token_text(setting: object) -> str | None:
    """Return the text of a special token, which is a string or an object with `content`."""
    content = setting.get("content") if isinstance(setting, dict) else setting
    return content if isinstance(content, str) else None


def without_prefix(
    tokenizer: Tokenizer, schemes: Container[str] = ("first", "always")
) -> Tokenizer:
    """Return the tokenizer of a text in the middle of another, which has no space put before it.

    The same tokenizer is returned if it puts none. `schemes` are those of SentencePiece that are
    changed: a space before the first of the texts between special tokens, or before all of them.
    """
    parts = {"normalizer": tokenizer.normalizer, "pre_tokenizer": tokenizer.pre_tokenizer}
    states = {name: json.loads(part.__getstate__()) for name, part in parts.items() if part}
    changed = {name: _without_prefix(state, schemes) for name, state in states.items()}
    if changed == states:
        return tokenizer
    return Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), **changed}))


def _without_prefix(step: dict[str, Any], schemes: Container[str]) -> dict[str, Any] | None:
    """Return a step of a normalizer or pre-tokenizer without its prefix; None if it is no more."""
    for name in ("normalizers", "pretokenizers"):
        if name in step:
            steps = (_without_prefix(one, schemes) for one in step[name])
            return {**step, name: [one for one in steps if one is not None]}
    if step["type"] == "Prepend" and "always" in schemes:
        return None
    if step.get("prepend_scheme") in schemes:
        return {**step, "prepend_scheme": "never"}
    if step.get("add_prefix_space") and "always" in schemes:
        return {**step, "add_prefix_space": False}
    return step


def _check_words(folder: Path) -> None:
    """Raise CheckpointError if vocab.json and merges.txt are not for GPT-2's words."""
    tokenizer_class = read_tokenizer_config(folder).get("tokenizer_class")
    if isinstance(tokenizer_class, str) and tokenizer_class.startswith("Qwen2"):
        raise CheckpointError(
            f"{folder} has vocab.json and merges.txt for Qwen's division of texts into words, "
            "which needs tokenizer.json; take it from the model's repository"
        )


def _read_settings(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; fix or delete the file") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} is not a JSON object; fix or delete the file")
    return settings


def _set_tokens_around_text(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Put the tokens around a text that the settings ask for, if they say anything about them."""
    if settings.keys().isdisjoint(("add_bos_token", "add_eos_token")):
        return
    around = {
        name: special_token_text(settings.get(f"{name}_token"))
        for name in ("bos", "eos")
        if settings.get(f"add_{name}_token")
    }
    ids = {text: tokenizer.token_to_id(text) for text in around.values() if text is not None}
    missing = [text for text, token_id in ids.items() if token_id is None]
    if missing:
        raise CheckpointError(
            f"tokenizer_config.json puts {missing[0]!r} around every text, which the vocabulary "
            "lacks; correct bos_token and eos_token there, or delete add_bos_token and "
            "add_eos_token"
        )
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    bos, eos = (
        [{"SpecialToken": {"id": around[name], "type_id": 0}}] if around.get(name) else []
        for name in ("bos", "eos")
    )
    template = processors.TemplateProcessing(single="$A", special_tokens=[])
    described = {
        "type": "TemplateProcessing", "single": [*bos, *text, *eos],
        "pair": [*text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            text: {"id": text, "ids": [token_id], "tokens": [text]}
            for text, token_id in ids.items()
        },
    }  # fmt: skip
    template.__setstate__(json.dumps(described).encode())
    tokenizer.post_processor = template


def byte_level(model: models.Model) -> Tokenizer:
    """Return a byte-level tokenizer with GPT-2's division of text into words."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
