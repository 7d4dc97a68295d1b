"""The reference of `nanovllm verify`: transformers' GPT-2 in float32 with eager attention."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Libraries(NamedTuple):
    """The two modules."""

    torch: Any
    transformers: Any


def import_libraries() -> Libraries:
    """Import torch and transformers without their messages; raises ImportError."""
    # Imported here: only this command needs them, and they are not dependencies.
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return Libraries(torch, transformers)


class Reference:
    """The model and, where transformers can load one, the tokenizer of a folder."""

    def __init__(self, folder: Path, libraries: Libraries) -> None:
        """Load both; raises RuntimeError if transformers refuses the model."""
        torch, transformers = libraries
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), attn_implementation="eager", **options
            )
        except Exception as error:  # it raises exceptions of many kinds
            raise RuntimeError(
                f"transformers {transformers.__version__} cannot load {folder}: {error}"
            ) from error
        self._tokenizer, self.tokenizer_problem = _load_tokenizer(transformers, folder, options)
        self._torch = torch
        self._model = model.float().eval()
        self._head = self._model.get_output_embeddings()

    @property
    def title(self) -> str:
        """Return the names and versions of the libraries."""
        return " and ".join(f"{name} {version}" for name, version in self.versions.items())

    def encode(self, text: str) -> list[int] | None:
        """Return the token ids of a text; None without a tokenizer."""
        return None if self._tokenizer is None else list(self._tokenizer(text)["input_ids"])

    def logprobs(self, token_ids: list[int], rows: int) -> Iterator[np.ndarray]:
        """Yield log-probabilities after every token, float64 [rows, vocab]."""
        with self._torch.inference_mode():
            hidden = self._model.base_model(
                input_ids=self._torch.tensor([token_ids]), use_cache=False
            ).last_hidden_state[0]
            for start in range(0, len(hidden), rows):
                logits = self._head(hidden[start : start + rows])
                yield self._torch.log_softmax(logits.double(), dim=-1).numpy()

    def greedy(self, token_ids: list[int], count: int) -> tuple[list[int], list[float]]:
        """Decode `count` tokens greedily; return them and their logit gaps to the second best."""
        chosen: list[int] = []
        gaps: list[float] = []
        cache, input_ids = None, token_ids
        with self._torch.inference_mode():
            for _ in range(count):
                output = self._model.base_model(
                    input_ids=self._torch.tensor([input_ids]), past_key_values=cache, use_cache=True
                )
                best = self._head(output.last_hidden_state[0, -1]).double().topk(2)
                cache, input_ids = output.past_key_values, [int(best.indices[0])]
                chosen += input_ids
                gaps.append(float(best.values[0] - best.values[1]))
        return chosen, gaps


def _load_tokenizer(
    transformers: Any, folder: Path, options: dict[str, bool]
) -> tuple[Any, str | None]:
    """Return the folder's tokenizer, or None and the reason.

    A folder with only vocab.json and merges.txt may not name the class.
    """
    problems = []
    for kind in (transformers.AutoTokenizer, transformers.GPT2TokenizerFast):
        try:
            return kind.from_pretrained(str(folder), **options), None
        except Exception as error:  # noqa: BLE001 - raises many kinds
            problems.append(str(error).strip().partition("\n")[0])
    return None, problems[0]
