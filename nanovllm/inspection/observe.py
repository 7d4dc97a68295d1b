"""Run the forward pass of one prompt with an observer.

The weights are read from the folder as float32, whatever type it stores, and one layer at a time:
memory holds the embeddings and one layer (`checkpoint.open_weights`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float32

from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import (
    ContextLengthError,
    EngineFaultError,
    InvalidRequestError,
    describe_value,
)
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import open_weights
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.forward import forward
from nanovllm.model.families.registry import load_config
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.observer import Observer
from nanovllm.model.weights import ModelWeights

MAX_PROMPT_TOKENS = 512
MAX_PROMPT_CHARACTERS = 1 << 16
JSON: TypeAlias = dict[str, Any]


def rounded(value: float) -> float:
    """Return a number with seven significant digits, as many as a float32 has."""
    return float(f"{value:.7g}")


@dataclass(frozen=True, slots=True)
class InspectedModel:
    """A model folder, ready to be observed.

    Attributes:
        name: name of the folder.
        config: sizes of the network.
        weights: float32; each layer is read from the folder when it is accessed.
        tokenizer: the folder's tokenizer.
    """

    name: str
    config: ModelConfig
    weights: ModelWeights
    tokenizer: Tokenizer

    @classmethod
    def load(cls, folder: Path) -> "InspectedModel":
        """Open a model folder; raises CheckpointError if it is not valid."""
        config = load_config(folder)
        return cls(folder.name, config, open_weights(folder, config), Tokenizer.load(folder))

    def encode(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = MAX_PROMPT_TOKENS,
        *,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Return the token ids of a prompt, as /v1/completions encodes it.

        `add_special_tokens`: add the tokens that the tokenizer puts around every text.

        Raises InvalidRequestError for an empty or too long prompt, and for an unknown token id.
        """
        if isinstance(prompt, str):
            if len(prompt) > MAX_PROMPT_CHARACTERS:
                raise InvalidRequestError(
                    f"the prompt has {len(prompt)} characters, the limit is "
                    f"{MAX_PROMPT_CHARACTERS}; shorten it",
                    param="prompt",
                )
            token_ids = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        else:
            token_ids = list(prompt)
        if not token_ids:
            raise InvalidRequestError(
                "the prompt is empty; give at least one token", param="prompt"
            )
        limit = min(max_tokens, self.config.max_positions)
        if len(token_ids) > limit:
            raise ContextLengthError(
                f"the prompt has {len(token_ids)} tokens, the limit is {limit}; shorten it",
                param="prompt",
            )
        for token_id in token_ids:
            self.check_token(token_id, "prompt")
        return token_ids

    def check_token(self, token_id: int, param: str) -> None:
        """Raise InvalidRequestError unless the vocabulary has this token."""
        if not 0 <= token_id < self.config.vocab:
            raise InvalidRequestError(
                f"the token id {describe_value(token_id)} is not in the vocabulary; give 0 to "
                f"{self.config.vocab - 1}",
                param=param,
            )

    def token(self, token_id: int) -> JSON:
        """Return the id and text of a token, and its bytes if they are not valid UTF-8."""
        entry = {"id": token_id, "text": self.tokenizer.token_text(token_id)}
        encoded = self.undecodable_bytes(token_id)
        return entry if encoded is None else {**entry, "bytes": encoded.hex()}

    def undecodable_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes of a token that is not valid UTF-8; None for any other token."""
        encoded = self.tokenizer.token_bytes(token_id)
        return None if encoded == self.tokenizer.token_text(token_id).encode() else encoded

    def forward(
        self, token_ids: Sequence[int], observe: Observer
    ) -> Float32[np.ndarray, "tokens d_model"]:
        """Run the forward pass and return the final hidden state of every token.

        Raises EngineFaultError if it is not finite.
        """
        cache = KVCache.allocate(self.config, blocks=1, block_size=len(token_ids))
        batch = ForwardBatch.single(token_ids, all_rows=True)
        hidden = forward(self.config, self.weights, batch, cache, observe)
        check_finite(hidden)
        return hidden


def check_finite(hidden: np.ndarray) -> None:
    """Raise EngineFaultError if the network's output is not finite."""
    if not np.isfinite(hidden).all():
        raise EngineFaultError("the network's output is not a number; is the checkpoint sound?")
