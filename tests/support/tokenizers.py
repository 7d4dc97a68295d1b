"""Tokenizers that are not byte-level, as of GPT-2 models for other languages."""

from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers

from nanovllm.engine.tokenizer import Tokenizer


def word_piece() -> Tokenizer:
    """BERT's: `##` marks the pieces inside a word, spaces are put between the others."""
    words = [
        "[UNK]",
        "play",
        "##ing",
        "##s",
        "game",
        "do",
        "n't",
        "not",
        "!",
        ".",
        ",",
        "é",
        "##é",
        "世",
        "界",
        "'",
        "s",
    ]
    library = LibraryTokenizer(
        models.WordPiece(vocab={word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    return Tokenizer(library)


def metaspace() -> Tokenizer:
    """SentencePiece's: `▁` stands for a space, and the one before the first word is left out."""
    words = ["<unk>", "▁", "▁Hello", "▁world", "wor", "ld", "!", "▁▁", "é", "世界", "▁世", "lo"]
    library = LibraryTokenizer(
        models.Unigram(
            [(word, -float(i)) for i, word in enumerate(words)], unk_id=0, byte_fallback=False
        )
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    return Tokenizer(library)


def byte_fallback() -> Tokenizer:
    """SentencePiece's with byte tokens, which encode characters without a token of their own."""
    words = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁Hello",
        "a",
        "b",
        "▁b",
        "é",
    ]
    library = LibraryTokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return Tokenizer(library)
