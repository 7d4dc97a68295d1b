"""Everything that a run needs before its first step: data, tokenizer, network and operations."""

import hashlib
import os
import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from nanovllm.errors import TrainingError
from nanovllm.model.checkpoint import expected_shapes, load_arrays
from nanovllm.model.config import GPT2Config
from nanovllm.training import samples
from nanovllm.training.checkpoint import hugging_face_config, save_weights, write_json
from nanovllm.training.config import TrainingConfig
from nanovllm.training.dataset import Dataset
from nanovllm.training.operations import NumpyOperations
from nanovllm.training.parameters import Parameters, initialize
from nanovllm.training.prepare import PreparedData, prepare_data
from nanovllm.training.tokenizer import END_OF_TEXT, save_tokenizer


@dataclass(slots=True)
class Setup:
    """Data, tokenizer and network of a run.

    Attributes:
        model: sizes of the network.
        context: tokens of a training sequence, at most the model's.
        data_digest: of both splits' tokens; a resumed run must have the same.
        facts: what run.json says of the run.
    """

    config: TrainingConfig
    model: GPT2Config
    context: int
    parameters: Parameters
    operations: NumpyOperations
    data: PreparedData
    data_digest: str
    facts: dict[str, Any]

    @property
    def train(self) -> Dataset:
        """The training split."""
        return self.data.train

    @property
    def validation(self) -> Dataset:
        """The validation split."""
        return self.data.validation

    def save_static_files(self, folder: Path) -> None:
        """Write the files of a checkpoint that do not change during the run."""
        eos_token_id = self.data.tokenizer.token_to_id(END_OF_TEXT)
        settings = hugging_face_config(
            self.model, dropout=self.config.dropout, eos_token_id=eos_token_id
        )
        for target in (folder, folder / "last"):
            write_json(target / "config.json", settings)
            write_json(
                target / "generation_config.json",
                {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id},
            )
            save_tokenizer(self.data.tokenizer, target)

    def save_weights(self, folder: Path) -> None:
        """Write the parameters as model.safetensors."""
        save_weights(folder, self.model, self.parameters.arrays())

    def sample(self, tokens: int, seed: int) -> str | None:
        """Return text that the network generates after the first words of the validation text."""
        if tokens == 0:
            return None
        prompt = self.validation.tokens[: min(8, self.context)].astype(np.int64).tolist()
        drawn = samples.generate(self.model, self.parameters.arrays(), prompt, tokens, seed=seed)
        return str(self.data.tokenizer.decode(prompt + drawn, skip_special_tokens=False))

    def close(self) -> None:
        """End the threads of the operations."""
        self.operations.close()


def prepare(config: TrainingConfig, *, resumes: bool) -> Setup:
    """Read the data, make the tokenizer, and build the network with its initial weights.

    Args:
        config: resolved settings.
        resumes: the tokenizer is that of the output folder, and the weights will be loaded.
    """
    if not config.data_paths:
        raise TrainingError("data is empty; give text files, folders or a token file (--data)")
    source = None if config.init_from is None else Path(config.init_from)
    pretrained = None if source is None else GPT2Config.load(source)
    context = config.context or (64 if pretrained is None else pretrained.max_positions)
    if pretrained is not None and context > pretrained.max_positions:
        raise TrainingError(
            f"context is {context}, but the positions of {source} end at "
            f"{pretrained.max_positions}; lower --context"
        )
    tokenizer = str(config.output if resumes else source or config.tokenizer)
    data = prepare_data(
        config.data_paths,
        pattern=config.pattern,
        tokenizer=tokenizer,
        vocab_size=None if resumes else config.vocab_size,
        context=context,
        validation_fraction=config.validation_fraction,
    )
    model = pretrained or _new_model(config, context, data.tokenizer)
    if data.tokenizer.get_vocab_size() > model.vocab:
        raise TrainingError(
            f"the tokenizer of {source} has {data.tokenizer.get_vocab_size()} tokens, the model "
            f"embeddings for {model.vocab}; the folder does not belong together"
        )
    is_sinusoidal = config.positions == "sinusoidal"
    parameters = Parameters(
        expected_shapes(model),
        constant=frozenset({"wpe.weight"} if is_sinusoidal else ()),
    )
    if source is None or resumes:
        initialize(parameters, model, config.positions or "learned", config.seed)
    else:
        for name, array in load_arrays(source, model).items():
            parameters.tensors[name].data[...] = array
    operations = _operations(config)
    return Setup(
        config,
        model,
        context,
        parameters,
        operations,
        data,
        _digest(data),
        _facts(config, model, data),
    )


def _new_model(config: TrainingConfig, context: int, tokenizer: Tokenizer) -> GPT2Config:
    width = config.width or 0
    eos_token_id = tokenizer.token_to_id(END_OF_TEXT)
    return GPT2Config(
        vocab=tokenizer.get_vocab_size(),
        max_positions=context,
        d_model=width,
        layers=config.layers or 0,
        heads=config.heads or 0,
        d_ff=4 * width,
        activation=config.activation or "gelu_new",
        eos_token_ids=() if eos_token_id is None else (eos_token_id,),
    )


def _operations(config: TrainingConfig) -> NumpyOperations:
    if config.backend == "numpy":
        return NumpyOperations()
    from nanovllm.training.kernels.operations import CompiledOperations  # noqa: PLC0415

    return CompiledOperations(config.num_threads)


def _digest(data: PreparedData) -> str:
    digest = hashlib.sha256()
    for split in (data.train, data.validation):
        digest.update(f"{split.tokens.dtype} {len(split.tokens)}\n".encode())
        digest.update(np.ascontiguousarray(split.tokens).data)
    return digest.hexdigest()


def _facts(config: TrainingConfig, model: GPT2Config, data: PreparedData) -> dict[str, Any]:
    return {
        "model": {
            "layers": model.layers,
            "heads": model.heads,
            "width": model.d_model,
            "context": model.max_positions,
            "vocab": model.vocab,
            "parameters": model.num_parameters,
        },
        "data": {
            "files": len(data.files),
            "train_tokens": len(data.train.tokens),
            "validation_tokens": len(data.validation.tokens),
            "validation_bytes": data.validation_bytes,
        },
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "backend": config.backend,
        "threads": config.num_threads or os.cpu_count(),
        "cpu": platform.processor() or platform.machine(),
    }
