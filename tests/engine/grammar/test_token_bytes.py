"""Masks of the families' tokenizers are those of the bytes of their tokens."""

import pytest

from nanovllm.engine.grammar.grammar import Grammars
from nanovllm.structured_outputs import StructuredOutputs
from tests.support.family_tokenizers import FAMILIES

TEXTS = (" the world", "é🙂\n\nthe", "世 2026", "é")
SPARE = 9
"""Rows of the model's embedding without a token."""


@pytest.mark.parametrize("name", ["llama2", "mistral", "qwen", "llama3"])
def test_a_token_is_allowed_where_its_bytes_may_follow(name: str) -> None:
    """The slow twin tries the bytes of every token, on the shortest and the longest path."""
    tokenizer = FAMILIES[name]().tokenizer
    special = tokenizer.special_token_ids
    end = max(special)
    texts = [text.encode() for text in TEXTS]
    data = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab) if i not in special}
    grammars = Grammars(tokenizer, tokenizer.vocab + SPARE, [end])
    try:
        for wanted in texts:
            for pick in (min, max):
                sequence = grammars.for_request(StructuredOutputs(choice=list(TEXTS))).start()
                written = b""
                while True:
                    allowed = set(sequence.allowed_ids().tolist())
                    expected = {
                        i
                        for i, more in data.items()
                        if more and any(text.startswith(written + more) for text in texts)
                    }
                    expected |= {end} if written in texts else set()
                    if written:  # forced bytes have one spelling, the tokenizer's own
                        assert allowed, written
                        assert allowed <= expected, written
                    else:
                        assert allowed == expected
                    right = [i for i in allowed - {end} if wanted.startswith(written + data[i])]
                    if not right:
                        break
                    token_id = pick(right, key=lambda i: len(data[i]))
                    sequence.accept(token_id)
                    grammars.flush()
                    written += data[token_id]
                assert written == wanted
                sequence.close()
    finally:
        grammars.close()
