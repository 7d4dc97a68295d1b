"""The block hashes of the prompt in a request's body: the keys of the engine's prefix cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.scheduling.block_manager import hash_block, hash_salt
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import InvalidRequestError, NanovllmError
from nanovllm.server.openai.chat_prompt import encode_messages
from nanovllm.server.openai.chat_schemas import ChatMessage, ChatRequest, PromptFields
from nanovllm.server.openai.response_schemas import ItemReference, ResponsesRequest
from nanovllm.server.openai.responses import conversation

MAX_BLOCKS = 64
"""Blocks of a prompt that are hashed; a longer prefix seldom decides between replicas."""
MAX_BODY_BYTES = 1 << 17
"""Size of a body from which its prefix is not read: other requests would wait for that."""
_MAX_CHARACTERS = 1 << 14
"""Characters of a prompt that are tokenized. MAX_BLOCKS of 32 tokens of English have 9,000."""
CHAT_PATH, RESPONSES_PATH = "/v1/chat/completions", "/v1/responses"
_TEXT_FIELDS = {
    "/v1/completions": "prompt",
    RESPONSES_PATH: "input",
    "/v1/embeddings": "input",
}


class PrefixReader:
    """Finds the prefix of a request for one model. Threads may share it."""

    def __init__(self, folder: Path, block_size: int, template: ChatTemplate | None) -> None:
        """Load the tokenizer of a model folder; raises CheckpointError."""
        self._tokenizer = Tokenizer.load(folder)
        self._block_size = block_size
        self._template = template

    def hashes(self, path: str, body: dict[str, Any]) -> tuple[bytes, ...]:
        """Return the hash of each full block of the first prompt; empty where there is none.

        A body that is not valid has none either: the replica reports what is wrong with it.
        """
        salt = body.get("cache_salt")
        try:
            token_ids = self._token_ids(path, body)
            return block_hashes(token_ids, self._block_size, salt if isinstance(salt, str) else "")
        except (NanovllmError, ValueError, TypeError, ArithmeticError, RecursionError):
            return ()

    def _token_ids(self, path: str, body: dict[str, Any]) -> Sequence[int]:
        if path == CHAT_PATH:
            chat = ChatRequest.model_validate(body)
            return self._chat_ids(chat.messages, chat, chat.add_special_tokens)
        if path == RESPONSES_PATH and self._template is not None:
            return self._response_ids(ResponsesRequest.model_validate(body))
        prompt = body.get(_TEXT_FIELDS.get(path, ""))
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, str):
            has_special = body.get("add_special_tokens") is not False
            return self._tokenizer.encode(prompt[:_MAX_CHARACTERS], add_special_tokens=has_special)
        is_ids = isinstance(prompt, list) and all(type(item) is int for item in prompt)
        return prompt if is_ids and isinstance(prompt, list) else ()

    def _response_ids(self, response: ResponsesRequest) -> Sequence[int]:
        has_references = any(isinstance(item, ItemReference) for item in response.input)
        if has_references or response.previous_response_id is not None:
            return ()  # the ingress stores no responses
        return self._chat_ids(conversation(response), PromptFields.model_validate({}))

    def _chat_ids(
        self, messages: Sequence[ChatMessage], end: PromptFields, add_special_tokens: bool = False
    ) -> Sequence[int]:
        return encode_messages(
            messages,
            end,
            self._template,
            self._tokenizer,
            _check_length,
            add_special_tokens=add_special_tokens,
        )


def _check_length(text: str) -> None:
    if len(text) > _MAX_CHARACTERS:
        raise InvalidRequestError("the chat is too long to be tokenized by the ingress")


def block_hashes(token_ids: Sequence[int], block_size: int, salt: str = "") -> tuple[bytes, ...]:
    """Return the hash of each full block of a prompt, as the engine's prefix cache computes it."""
    hashes: list[bytes] = []
    parent = hash_salt(salt)
    last = min(len(token_ids) // block_size, MAX_BLOCKS) * block_size
    for start in range(0, last, block_size):
        parent = hash_block(parent, token_ids[start : start + block_size])
        hashes.append(parent)
    return tuple(hashes)
