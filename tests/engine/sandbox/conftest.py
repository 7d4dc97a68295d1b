"""The pool of grammar workers that the tests of this package share."""

from collections.abc import Iterator

import pytest

from nanovllm.engine.grammar.grammar import Grammars
from nanovllm.engine.tokenizer import Tokenizer


@pytest.fixture(scope="package")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    """Grammars for the tiny model's tokenizer, whose last token ends a text."""
    grammars = Grammars(tokenizer, tokenizer.vocab, [tokenizer.vocab - 1])
    yield grammars
    grammars.close()
