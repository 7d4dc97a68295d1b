"""Self-contained HTML files: their size, and text that looks like HTML."""

import base64
import gzip
from typing import Any

import numpy as np
import pytest

from nanovllm.errors import InvalidRequestError
from nanovllm.inspection import html_file
from nanovllm.inspection.attention import HeadStatistics, attention_weights, head_statistics
from nanovllm.inspection.embeddings import project
from nanovllm.inspection.logit_lens import logit_lens
from nanovllm.inspection.observe import InspectedModel
from nanovllm.inspection.responses import projection_entry
from tests.support.html_page import HtmlPage

HOSTILE = "<script>alert(1)</script><!--\u2028'\" </script>&lt;<img src=x onerror=alert(2)>\x00"


def pages(model: InspectedModel, prompt: str) -> dict[str, str]:
    token_ids = model.encode(prompt)
    weights = attention_weights(model, token_ids)
    flat = weights.reshape(-1, weights.shape[2])
    projection = projection_entry(model, "pca", project(model, "pca", 20, extra_ids=token_ids))
    return {
        "attention": html_file.attention_page(
            model, token_ids, flat, head_statistics(model, token_ids)
        ),
        "logit-lens": html_file.lens_page(model, token_ids, logit_lens(model, token_ids)),
        "embeddings": html_file.embeddings_page(model, {"pca": projection}, {}, token_ids),
    }


@pytest.fixture(scope="module")
def hostile_pages(model: InspectedModel) -> dict[str, HtmlPage]:
    return {kind: HtmlPage(page) for kind, page in pages(model, HOSTILE).items()}


@pytest.mark.parametrize("kind", ["attention", "logit-lens", "embeddings"])
def test_text_of_a_prompt_is_never_markup(hostile_pages: dict[str, HtmlPage], kind: str) -> None:
    page = hostile_pages[kind]
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 3
    assert not {"img", "iframe", "object"} & set(tags)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.texts["p"][1] == HOSTILE.replace("\x00", "\ufffd")
    data = page.data
    assert data["kind"] == kind
    if kind == "embeddings":
        assert len(data["marked"]) > 10
        return
    tokens = data["overview"]["tokens"] if kind == "attention" else data["tokens"]
    # The three bytes of U+2028 are three tokens, each a part of a character.
    text = "".join(token["text"] for token in tokens)
    assert text == HOSTILE.replace("\u2028", "\ufffd" * 3)


def decode(attention: dict[str, Any]) -> np.ndarray:
    content = gzip.decompress(base64.b64decode(attention["weights"]))
    integers = np.frombuffer(content, dtype=np.dtype(attention["dtype"]).newbyteorder("<"))
    return integers / np.iinfo(attention["dtype"]).max


def test_weights_are_stored_in_16_bits(model: InspectedModel) -> None:
    token_ids = list(range(20))
    weights = attention_weights(model, token_ids)
    flat = weights.reshape(-1, weights.shape[2])
    page = html_file.attention_page(model, token_ids, flat, head_statistics(model, token_ids))
    attention = HtmlPage(page).data["attention"]
    assert (attention["dtype"], attention["encoding"]) == ("uint16", "gzip")
    np.testing.assert_allclose(decode(attention), flat.ravel(), atol=0.5001 / 65535)


def dense_heads(num_heads: int, tokens: int) -> tuple[np.ndarray, list[HeadStatistics]]:
    """Return weights of heads that compress badly, and their statistics."""
    pairs = tokens * (tokens + 1) // 2
    weights = np.random.default_rng(0).random((num_heads, pairs), dtype=np.float32)
    heads = [HeadStatistics(index // 12, index % 12, *[0.5] * 6) for index in range(num_heads)]
    return weights, heads


def test_a_file_of_gpt2_s_heads_and_128_tokens_is_below_3_mb(model: InspectedModel) -> None:
    weights, heads = dense_heads(144, 128)
    page = html_file.attention_page(model, list(range(128)), weights, heads)
    assert len(page.encode()) <= 3_000_000
    attention = HtmlPage(page).data["attention"]
    assert attention["dtype"] == "uint8"  # noise does not compress; weights of models have 16 bits
    np.testing.assert_allclose(decode(attention), weights.ravel(), atol=0.5001 / 255)


def test_a_larger_file_names_the_options_that_make_it_smaller(model: InspectedModel) -> None:
    weights, heads = dense_heads(288, 128)
    with pytest.raises(InvalidRequestError, match=r"limit is 3000000; .* --layers and --heads"):
        html_file.attention_page(model, list(range(128)), weights, heads)
