"""Training computes what torch and transformers compute, where they are installed.

The loss of the bundled model on a passage is also recorded (tests/reference).
"""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.hub.names import bundled_folder
from nanovllm.llm import LLM
from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.checkpoint import expected_shapes, load_arrays
from nanovllm.model.config import GPT2Config
from nanovllm.sampling_params import SamplingParams
from nanovllm.trainer import Trainer
from nanovllm.training.config import TrainingConfig
from nanovllm.training.network.autograd import Tape
from nanovllm.training.network.model import loss_sum
from nanovllm.training.network.operations import NumpyOperations
from nanovllm.training.network.optimizer import AdamW
from nanovllm.training.network.parameters import Parameters, is_decayed
from tests.support.checkpoints import write_checkpoint

REFERENCE = Path(__file__).parents[1] / "reference" / "recorded_loss.json"
TEXT = "she sells sea shells on the sea shore. " * 60
TOKENS = np.random.default_rng(7).integers(0, 97, (2, 13))


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason="compares with torch live; the loss is recorded")


@pytest.fixture(scope="module")
def transformers(torch: Any) -> Any:
    return pytest.importorskip("transformers", reason="compares with transformers live")


def load(folder: Path) -> tuple[GPT2Config, Parameters]:
    config = GPT2Config.load(folder)
    parameters = Parameters(expected_shapes(config))
    for name, array in load_arrays(folder, config).items():
        parameters.tensors[name].data[...] = array
    return config, parameters


def mean_loss(
    config: GPT2Config, parameters: Parameters, tokens: np.ndarray, *, differentiate: bool = True
) -> float:
    """Return the mean loss of the next token, and leave its gradients in the parameters."""
    tape = Tape(NumpyOperations(), records=differentiate)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    total = loss_sum(tape, config, parameters, inputs, targets, scale=1.0 / targets.size)
    if differentiate:
        tape.backward()
    return total / targets.size


def reference_loss(transformers: Any, torch: Any, folder: Path, tokens: np.ndarray) -> Any:
    """Return transformers' model after its backward pass, and its loss."""
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")
    ids = torch.from_numpy(tokens)
    loss = model.eval()(input_ids=ids, labels=ids).loss
    loss.backward()
    return model, float(loss.detach())


def gradients_of(model: Any) -> dict[str, np.ndarray]:
    return {
        name.removeprefix("transformer."): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
    }


def test_the_bundled_model_has_the_recorded_loss() -> None:
    recorded = json.loads(REFERENCE.read_text(encoding="utf-8"))
    config, parameters = load(bundled_folder())
    tokens = np.array([recorded["token_ids"]])
    ours = mean_loss(config, parameters, tokens, differentiate=False)
    assert ours == pytest.approx(recorded["loss"], abs=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_loss_and_gradients_equal_those_of_torch(
    torch: Any, transformers: Any, tmp_path: Path, activation: str, tied: bool
) -> None:
    changes = {"activation_function": activation, "tie_word_embeddings": tied}
    folder = write_checkpoint(tmp_path, config=changes, tied=tied, seed=5)
    model, expected = reference_loss(transformers, torch, folder, TOKENS)
    config, parameters = load(folder)
    assert mean_loss(config, parameters, TOKENS) == pytest.approx(expected, abs=1e-5)
    gradients = gradients_of(model)
    assert gradients.keys() == parameters.tensors.keys()
    for name, ours in parameters.views(parameters.gradients).items():
        largest = np.abs(gradients[name]).max()
        np.testing.assert_allclose(
            ours, gradients[name], rtol=1e-4, atol=1e-4 * largest, err_msg=name
        )


@pytest.mark.parametrize("grad_clip", [0.01, 0.0])
def test_an_update_equals_that_of_torch(
    torch: Any, transformers: Any, tmp_path: Path, grad_clip: float
) -> None:
    folder = write_checkpoint(tmp_path, seed=5)
    _, parameters = load(folder)
    model, _ = reference_loss(transformers, torch, folder, TOKENS)
    named = {name.removeprefix("transformer."): one for name, one in model.named_parameters()}
    decayed = [one for name, one in named.items() if is_decayed(name)]
    others = [one for name, one in named.items() if not is_decayed(name)]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    ours = AdamW(
        parameters,
        NumpyOperations(),
        weight_decay=0.3,
        grad_clip=grad_clip,
        beta1=0.9,
        beta2=0.95,
    )
    for _ in range(2):  # the second has moments of the first
        for name, gradient in parameters.views(parameters.gradients).items():
            gradient[...] = named[name].grad.numpy()
        limit = grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        reference.step()
        assert ours.update(1e-2) == pytest.approx(float(norm), rel=1e-5)
        for name, tensor in parameters:
            expected = named[name].detach().numpy()
            np.testing.assert_allclose(tensor.data, expected, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "changes",
    [{"tokenizer": "char"}, {"tokenizer": "bpe"}, {"tokenizer": "char", "positions": "sinusoidal"}],
    ids=["char", "bpe", "sinusoidal"],
)
def test_transformers_loads_a_run_and_generates_the_same_text(
    transformers: Any,
    torch: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    folder = tmp_path / "run"
    config = TrainingConfig(
        data=text,
        output=folder,
        layers=2,
        heads=2,
        width=16,
        context=32,
        batch_size=4,
        steps=20,
        lr=1e-2,
        sample_tokens=0,
        backend="numpy",
        **changes,
    )
    with Trainer(config) as trainer:
        trainer.train()
    transformers.utils.logging.enable_propagation()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer("she sells", return_tensors="pt")
        drawn = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=0,
        )
    assert not any(info.values()), info
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    with LLM(folder, backend="numpy") as llm:
        output = llm.generate("she sells", SamplingParams(max_tokens=12, temperature=0))[0]
    assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
    expected = drawn[0, len(output.prompt_token_ids) :].tolist()
    assert output.outputs[0].token_ids == expected
    assert output.outputs[0].text == tokenizer.decode(expected)
