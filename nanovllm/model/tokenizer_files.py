"""The tokenizer of a model folder: tokenizer.json, or GPT-2's vocab.json and merges.txt.

The second form is byte-level BPE (Radford et al. 2019, section 2.2).
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nanovllm.errors import CheckpointError
from nanovllm.model.tokenizer_growth import check_growth

END_OF_TEXT = "<|endoftext|>"


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
            tokenizer = byte_level(models.BPE.from_file(str(vocab), str(merges)))
            if tokenizer.token_to_id(END_OF_TEXT) is not None:
                tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
        else:
            return None
        check_growth(tokenizer)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - the library panics with a BaseException
        raise CheckpointError(f"the tokenizer in {path} cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def byte_level(model: models.Model) -> Tokenizer:
    """Return a byte-level tokenizer with GPT-2's division of text into words."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
