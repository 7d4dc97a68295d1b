"""The glossary is sorted, its terms are short, and every one of them is a term of the project."""

import re
from pathlib import Path

GLOSSARY = Path(__file__).parents[2] / "docs" / "reference" / "glossary.md"
ENTRIES = dict(
    re.findall(r"^## (.+)\n\n((?:.+\n)+)", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)
)
MAX_SENTENCES = 4  # of a term with two meanings; three of the others


def test_the_terms_are_in_alphabetical_order() -> None:
    keys = ["".join(filter(str.isalnum, term.lower())) for term in ENTRIES]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys) > 60


def test_a_text_has_one_to_three_sentences() -> None:
    for term, text in ENTRIES.items():
        sentences = re.findall(r"[.!?](?=\s|$)", re.sub(r"\d\\\. ", "", text))
        assert 1 <= len(sentences) <= MAX_SENTENCES, (term, len(sentences))


def test_what_beginners_ask_is_answered() -> None:
    asked = {
        "Q, K, V", "logits", "residual stream", "sqrt(head_dim)", "perplexity", "bits per byte",
        "prefill", "decode", "preemption", "prefix cache", "slot", "block table", "acceptance rate",
        "acceptance", "draft model", "drafted token", "forced token", "n-gram", "verification",
    }  # fmt: skip
    assert asked <= ENTRIES.keys()
