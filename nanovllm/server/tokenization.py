"""/tokenize, /detokenize and /tokenizer_info: text to token ids and back, as the served model reads it. Names and fields are vLLM's.

The ids are those that /v1/completions would compute: a literal `<|endoftext|>` in the text is ordinary text. A text may be longer than
the model's context, since finding that out is what people ask for; what one request may cost is bounded by its size instead.
"""

from typing import Annotated

from pydantic import Field

from nanovllm.engine.engine import Engine
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import check_unicode
from nanovllm.server.answers import Detokenized, Tokenized, TokenizerInfo
from nanovllm.server.bounds import INTEGERS
from nanovllm.server.schemas import Body, TokenId

MAX_TEXT_BYTES = 1 << 18  # of UTF-8: at most as many tokens, 256 times the context of GPT-2
MAX_TOKENS = 1 << 18

BoundedTokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_TOKENS), INTEGERS]


class TokenizeRequest(Body):
    """The body of POST /tokenize."""

    prompt: str = Field(
        description=f"text of up to {MAX_TEXT_BYTES} bytes in UTF-8",
        json_schema_extra={"maxLength": MAX_TEXT_BYTES},
    )
    add_special_tokens: bool = Field(
        True,
        description="what the tokenizer puts around every text, if anything; GPT-2's puts nothing",
    )
    return_token_strs: bool = Field(
        False, description="also each token as the vocabulary spells it"
    )


class DetokenizeRequest(Body):
    """The body of POST /detokenize."""

    tokens: BoundedTokenIds = Field(description="token ids of the model's vocabulary")


def tokenize(body: TokenizeRequest, engine: Engine) -> Tokenized:
    """The answer to /tokenize; takes its time with a long text, so call it beside the event loop. Raises InvalidRequestError."""
    check_unicode("prompt", body.prompt)
    size = len(body.prompt.encode())
    if size > MAX_TEXT_BYTES:
        raise InvalidRequestError(
            f"the prompt has {size} bytes in UTF-8, the limit is {MAX_TEXT_BYTES}; send it in parts",
            param="prompt",
        )
    tokenizer = engine.tokenizer
    tokens = tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    names = (
        [tokenizer.token_name(token_id) for token_id in tokens] if body.return_token_strs else None
    )
    return {
        "count": len(tokens),
        "max_model_len": engine.max_model_len,
        "tokens": tokens,
        "token_strs": names,
    }


def detokenize(body: DetokenizeRequest, engine: Engine) -> Detokenized:
    """The answer to /detokenize, special tokens included; to be called as `tokenize`. Raises InvalidRequestError."""
    last = engine.model.vocab - 1
    outside = next((token_id for token_id in body.tokens if not 0 <= token_id <= last), None)
    if outside is not None:
        raise InvalidRequestError(
            f"tokens has the id {str(outside)[:24]} but the vocabulary goes from 0 to {last}",
            param="tokens",
        )
    return {"prompt": engine.tokenizer.decode(body.tokens, skip_special_tokens=False)}


def tokenizer_info(engine: Engine) -> TokenizerInfo:
    """The answer to /tokenizer_info: what a program has to know that lets the server tokenise for it.

    `bos_token` and `eos_token` are null: such programs tokenise these texts to learn their ids, and /tokenize reads every text as text.
    """
    special = engine.tokenizer.special_tokens
    return {
        "bos_token": None, "eos_token": None, "eos_token_ids": list(engine.model.eos_token_ids), "special_tokens": special,
        "vocab_size": engine.model.vocab, "model_max_length": engine.max_model_len,
    }  # fmt: skip
