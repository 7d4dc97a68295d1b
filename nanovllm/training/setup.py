"""Everything that a run needs before its first step: data, tokenizer, network and operations."""

import hashlib
import os
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from nanovllm.errors import CheckpointError, TrainingError
from nanovllm.model.checkpoint import expected_shapes, load_arrays, read_tensors
from nanovllm.model.config import ModelConfig, load_generation_config, read_json
from nanovllm.model.families.registry import load_config
from nanovllm.model.machine import cpu_name, default_threads
from nanovllm.training.atomic_files import write_json
from nanovllm.training.config import TrainingConfig
from nanovllm.training.data.dataset import Dataset
from nanovllm.training.data.prepare import ChatLoader, PreparedData, prepare_data
from nanovllm.training.data.tokenizer import save_tokenizer
from nanovllm.training.metrics import Sample
from nanovllm.training.network.model import next_logits
from nanovllm.training.network.numpy_operations import NumpyOperations
from nanovllm.training.network.operations import Operations
from nanovllm.training.network.parameters import Parameters, initialize
from nanovllm.training.network.schedule import Schedule
from nanovllm.training.run import samples
from nanovllm.training.run.checkpoint import LAST, hugging_face_config, save_weights

_SAMPLING = {"do_sample": True, "temperature": samples.TEMPERATURE, "top_p": samples.TOP_P}


@dataclass(slots=True)
class Setup:
    """Data, tokenizer and network of a run.

    Attributes:
        model: sizes of the network.
        context: tokens of a training sequence, at most the model's.
        steps: updates of the whole run.
        checkpoint: model folder whose settings are kept: that of `init_from`, or of a resumed run.
        data_digest: of both splits' tokens; a resumed run must have the same.
        facts: what run.json says of the run.
        notices: for the user: files that were skipped, weights that are converted.
    """

    config: TrainingConfig
    model: ModelConfig
    context: int
    steps: int
    parameters: Parameters
    operations: Operations
    data: PreparedData
    checkpoint: Path | None
    data_digest: str
    facts: dict[str, Any]
    notices: tuple[str, ...]

    @property
    def train(self) -> Dataset:
        """The training split."""
        return self.data.train

    @property
    def validation(self) -> Dataset:
        """The validation split."""
        return self.data.validation

    @property
    def schedule(self) -> Schedule:
        """The learning rate of each update."""
        return self.config.learning_rates(self.steps)

    @property
    def tokens_per_step(self) -> int:
        """Training tokens of an update."""
        return self.config.batch_size * self.config.grad_accumulation * self.context

    @property
    def num_threads(self) -> int:
        """Threads of the compiled kernels, and of NumPy's BLAS while the run trains."""
        return self.config.num_threads or default_threads()

    def save_static_files(self, folder: Path) -> None:
        """Write the files of a checkpoint that do not change during the run."""
        save_model_files(
            folder,
            self.model,
            self.data.tokenizer,
            checkpoint=self.checkpoint,
            tokenizer_source=self.checkpoint or Path(self.config.network.tokenizer),
            dropout=self.config.dropout,
        )

    def save_weights(self, folder: Path) -> None:
        """Write the parameters as model.safetensors."""
        save_weights(folder, self.parameters.arrays())

    def sample(self, step: int, tokens: int, seed: int) -> Sample | None:
        """Return text that the network generates after the first validation text or prompt."""
        if tokens == 0:
            return None
        prompt = self.validation.prompt(min(8, self.context)).astype(np.int64).tolist()
        network = (self.operations, self.model, self.parameters)
        drawn = samples.generate(
            self.model,
            self.parameters.arrays(),
            prompt,
            tokens,
            seed=seed,
            scores_after=None if self.model.is_gpt2 else partial(next_logits, *network),
        )
        given, text = (
            str(self.data.tokenizer.decode(ids, skip_special_tokens=False))
            for ids in (prompt, prompt + drawn)
        )
        # The last token of the prompt may end inside a character.
        return Sample(step, text, os.path.commonprefix([given, text]))  # noqa: RUF071 - of texts

    def close(self) -> None:
        """End the threads of the operations."""
        self.operations.close()


def prepare(config: TrainingConfig, *, resumes: bool, load_chat: ChatLoader | None = None) -> Setup:
    """Read the data, make the tokenizer, and build the network with its initial weights.

    Args:
        config: resolved settings.
        resumes: the tokenizer is that of the output folder, and the weights will be loaded.
        load_chat: renders the conversations of examples; see `prepare_data`.
    """
    # The folder in `init_from` may have changed or gone since the run began.
    last = Path(config.output) / LAST if resumes else None
    source = last or (None if config.init_from is None else Path(config.init_from))
    if last is not None and not (last / "config.json").exists():
        raise TrainingError(f"{last} is missing or incomplete; the run cannot be resumed")
    pretrained = None if source is None else load_trainable(source, may_be_ablated=resumes)
    context = config.network.context
    if pretrained is not None and config.context is None:
        context = pretrained.max_positions
    elif pretrained is not None and context > pretrained.max_positions:
        raise TrainingError(
            f"context is {context}, but the positions of {source} end at "
            f"{pretrained.max_positions}; lower --context"
        )
    try:
        data = prepare_data(
            config,
            tokenizer=str(source or config.network.tokenizer),
            context=context,
            end_of_text_id=next(iter(pretrained.eos_token_ids), None) if pretrained else None,
            load_chat=load_chat,
        )
    except TrainingError as error:
        if not resumes:
            raise
        raise TrainingError(
            f"the run in {config.output} needs the data that it began with, or its new path "
            f"(--data): {error}"
        ) from None
    vocab = max(data.tokenizer.get_vocab().values()) + 1
    model = pretrained or _new_model(config, vocab, data.end_of_text_id)
    if vocab > model.vocab:
        raise TrainingError(
            f"the tokenizer of {source} has {vocab} tokens, but its model has embeddings for only "
            f"{model.vocab}; give a folder whose files belong together"
        )
    steps = config.number_of_steps(data.train.windows)
    problems = config.schedule_problems(steps)
    if problems:
        raise TrainingError("; ".join(problems))
    try:
        parameters = load_parameters(model, None if resumes else source, seed=config.seed)
    except MemoryError:
        raise TrainingError(
            f"{model.num_parameters:,} parameters do not fit into memory; lower --layers or --width"
        ) from None
    notices = data.warnings
    if source is not None and not resumes and _is_narrow(source):
        notices += (f"the 16-bit weights of {source} are trained, and saved, in float32",)
    return Setup(
        config=config,
        model=model,
        context=context,
        steps=steps,
        parameters=parameters,
        operations=make_operations(config.backend, config.num_threads),
        data=data,
        checkpoint=source,
        data_digest=_digest(data),
        facts=_facts(config, model, data, context, steps),
        notices=notices,
    )


def save_model_files(
    folder: Path,
    model: ModelConfig,
    tokenizer: Tokenizer,
    *,
    checkpoint: Path | None,
    tokenizer_source: Path,
    dropout: float = 0.0,
) -> None:
    """Write the files of a checkpoint apart from its weights.

    Args:
        checkpoint: model folder whose settings are kept.
        tokenizer_source: folder of the tokenizer, if it was loaded from one.
    """
    settings = hugging_face_config(model, dropout=dropout)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation: dict[str, Any] = {name: settings[name] for name in ids if name in settings}
    if checkpoint is not None:
        kept = read_json(checkpoint / "config.json")
        settings |= {name: kept[name] for name in ids if name in kept}
        generation = load_generation_config(checkpoint) or generation
    if _SAMPLING.keys().isdisjoint(generation):
        generation |= _SAMPLING
    write_json(folder / "config.json", settings)
    write_json(folder / "generation_config.json", generation)
    save_tokenizer(tokenizer, folder, tokenizer_source)


def load_trainable(folder: Path, *, may_be_ablated: bool = False) -> ModelConfig:
    """Read a model folder's config.json; raise CheckpointError for a network of another family."""
    config = load_config(folder, may_be_ablated=may_be_ablated)
    if config.family != "gpt2":
        raise CheckpointError(
            f"{folder} is a {config.family} model; only networks in GPT-2's shape can be trained"
        )
    return config


def load_parameters(model: ModelConfig, source: Path | None, *, seed: int = 0) -> Parameters:
    """Return the weights in `source`, or else initial weights."""
    parameters = Parameters(
        expected_shapes(model),
        constant_positions=model.positions == "sinusoidal" or "positions" in model.ablated,
    )
    if source is None:
        initialize(parameters, model, seed)
    else:
        for name, array in load_arrays(source, model).items():
            parameters.tensors[name].data[...] = array
    return parameters


def _is_narrow(folder: Path) -> bool:
    return any(tensor.dtype != "F32" for tensor in read_tensors(folder).values())


def _new_model(config: TrainingConfig, vocab: int, eos_token_id: int | None) -> ModelConfig:
    network = config.network
    return ModelConfig(
        vocab=vocab,
        max_positions=network.context,
        d_model=network.width,
        layers=network.layers,
        heads=network.heads,
        d_ff=4 * network.width,
        activation=network.activation,
        positions=network.positions,
        scale_attn_weights="scaling" not in config.ablated,
        eos_token_ids=() if eos_token_id is None else (eos_token_id,),
        ablated=config.ablated,
    )


def make_operations(backend: str, num_threads: int | None) -> Operations:
    """Return the operations of a backend, of as many threads as there are cores for None."""
    if backend == "numpy":
        return NumpyOperations()
    from nanovllm.training.kernels.operations import CompiledOperations  # noqa: PLC0415

    return CompiledOperations(num_threads)


def _digest(data: PreparedData) -> str:
    digest = hashlib.sha256()
    for split in (data.train, data.validation):
        digest.update(f"{split.tokens.dtype} {len(split.tokens)}\n".encode())
        digest.update(np.ascontiguousarray(split.tokens).data)
        if split.has_loss is not None:
            digest.update(split.has_loss.data)
    return digest.hexdigest()


def _facts(
    config: TrainingConfig, model: ModelConfig, data: PreparedData, context: int, steps: int
) -> dict[str, Any]:
    """Return what run.json says of the whole run: its settings in effect, sizes and machine."""
    threads = config.num_threads or default_threads()
    sizes = {"layers": model.layers, "heads": model.heads, "width": model.d_model}
    in_effect = {
        **sizes,
        **config.in_effect(steps),
        "context": context,
        "activation": model.activation,
        "positions": model.positions,
        "vocab_size": model.vocab,
        "num_threads": threads,
    }
    return {
        "config": config.to_dict() | in_effect,
        "defaults": config.unchanged(),
        "model": {
            **sizes,
            "context": model.max_positions,
            "vocab": model.vocab,
            "parameters": model.num_parameters,
        },
        "is_gpt2": model.is_gpt2,
        "data": {
            "files": len(data.files),
            "train_tokens": len(data.train.tokens),
            "validation_tokens": data.validation.num_targets,
            "validation_bytes": data.validation_bytes,
        },
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "backend": config.backend,
        "threads": threads,
        "cpu": cpu_name(),
    }
