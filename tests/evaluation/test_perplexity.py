"""evaluate: loss, perplexity and bits per byte, by hand and against transformers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from nanovllm import EvaluationResult, TrainingError, evaluate
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.evaluation import perplexity
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.numpy_backend import NumpyBackend
from tests.support.checkpoints import write_checkpoint, write_tiny_model
from tests.support.family_tokenizers import llama2

HELD_OUT = Path(__file__).parents[1] / "data" / "held_out" / "peter-rabbit.txt"
TEXT = "the cat in the hall, a café for 2 € 🙂 ... " * 4
CONTEXT = 128


def losses_by_hand(folder: Path, token_ids: list[int]) -> np.ndarray:
    """Return the losses of one window, with NumPy's forward pass and a softmax in float64."""
    backend = NumpyBackend.load(folder)
    backend.allocate_cache(1, CONTEXT)
    batch = ForwardBatch.single(token_ids[:-1], all_rows=True)
    logits = backend.logits(backend.forward(batch)).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    losses: np.ndarray = -logprobs[np.arange(len(token_ids) - 1), token_ids[1:]]
    return losses


def run(model: Path | str, data: Any, **settings: Any) -> EvaluationResult:
    return evaluate(model, data, use_tqdm=False, **settings)


def test_the_figures_are_those_computed_by_hand(tiny_model: Path, backend: Any) -> None:
    token_ids = Tokenizer.load(tiny_model).encode(TEXT)
    assert len(token_ids) > CONTEXT + 2
    losses = np.concatenate(
        [
            losses_by_hand(tiny_model, token_ids[: CONTEXT + 1]),
            losses_by_hand(tiny_model, token_ids[CONTEXT:]),
        ]
    )
    result = run(tiny_model, TEXT, backend=backend)
    np.testing.assert_allclose(result.losses, losses, rtol=0, atol=1e-4)
    assert result.loss == pytest.approx(losses.mean(), abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    num_bytes = len(TEXT.encode()) - len("the")
    assert (result.tokens, result.bytes, result.texts) == (len(token_ids) - 1, num_bytes, 1)
    assert result.bits_per_byte == pytest.approx(losses.sum() / math.log(2) / num_bytes, rel=1e-5)
    assert (result.precision, result.backend, result.context) == ("float32", backend, CONTEXT)
    assert result.tokens_per_s > 0


def test_threads_do_not_change_a_bit(tiny_model: Path) -> None:
    one, two = (run(tiny_model, TEXT, num_threads=threads) for threads in (1, 2))
    assert (one.num_threads, two.num_threads) == (1, 2)
    np.testing.assert_array_equal(one.losses, two.losses)


@pytest.mark.parametrize("max_tokens", [1, 5, 20, 21, 22, 23, 24, 40])
def test_bytes_are_those_of_the_predicted_tokens(tiny_model: Path, max_tokens: int) -> None:
    tokenizer = Tokenizer.load(tiny_model)
    token_ids = tokenizer.encode(TEXT)[1 : max_tokens + 1]
    result = run(tiny_model, TEXT, backend="numpy", max_tokens=max_tokens)
    assert result.tokens == max_tokens
    assert result.bytes == sum(len(tokenizer.token_bytes(token_id)) for token_id in token_ids)


def test_a_long_text_is_encoded_in_pieces(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny_model, TEXT, backend="numpy")
    monkeypatch.setattr(perplexity, "_PIECE_CHARACTERS", 30)
    pieces = run(tiny_model, TEXT, backend="numpy")
    np.testing.assert_array_equal(pieces.losses, whole.losses)
    assert pieces.bytes == whole.bytes
    limited = run(tiny_model, TEXT, backend="numpy", max_tokens=10)
    np.testing.assert_allclose(limited.losses, whole.losses[:10], atol=1e-5)


def test_a_character_level_tokenizer_counts_bytes_too(tmp_path: Path) -> None:
    characters = sorted(set(TEXT + "Hello, world 1"))  # loading encodes these
    write_tiny_model(tmp_path, config={"vocab_size": len(characters), "eos_token_id": None})
    library = LibraryTokenizer(models.WordLevel({name: i for i, name in enumerate(characters)}))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    library.decoder = decoders.Fuse()
    library.save(str(tmp_path / "tokenizer.json"))
    for max_tokens in (3, 30, 35, 37, 100):
        result = run(tmp_path, TEXT, backend="numpy", max_tokens=max_tokens)
        assert result.bytes == len(TEXT[1 : max_tokens + 1].encode())
    with pytest.raises(ValueError, match="cannot encode this text"):
        run(tmp_path, "Ω", backend="numpy")
    with pytest.raises(ValueError, match="no end-of-text token"):
        run(tmp_path, TEXT, backend="numpy", add_bos_token=True)


def test_each_text_is_scored_on_its_own(tiny_model: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "folder" / "b.py"
    second.parent.mkdir()
    first.write_bytes(b"\xef\xbb\xbfthe end\r\n")  # a byte order mark and a Windows line end
    second.write_text("in the hall", encoding="utf-8")
    texts = ["the end\n", "", "x", "in the hall"]
    together = run(tiny_model, texts, backend="numpy")
    parts = [run(tiny_model, text, backend="numpy") for text in (texts[0], texts[-1])]
    assert together.texts == 2
    np.testing.assert_allclose(
        together.losses, np.concatenate([part.losses for part in parts]), atol=1e-5
    )
    assert together.bytes == sum(part.bytes for part in parts)
    (tmp_path / "folder" / "c.py").write_bytes(b"a\0b")
    with pytest.warns(UserWarning, match="skipped 1 of 2 files"):
        files = run(tiny_model, [first, tmp_path / "folder"], backend="numpy", pattern="*.py")
    np.testing.assert_allclose(files.losses, together.losses, atol=1e-5)
    limit = parts[0].tokens + 3
    assert run(tiny_model, texts, backend="numpy", max_tokens=limit).tokens == limit


def test_with_a_bos_token_every_byte_is_predicted(tiny_model: Path) -> None:
    tokenizer = Tokenizer.load(tiny_model)
    (end,) = tokenizer.special_tokens.values()
    token_ids = [end, *tokenizer.encode("the end")]
    result = run(tiny_model, "the end", backend="numpy", add_bos_token=True)
    np.testing.assert_allclose(result.losses, losses_by_hand(tiny_model, token_ids), atol=1e-5)
    assert result.bytes == len("the end")
    written = run(tiny_model, "<|endoftext|>the end", backend="numpy")
    np.testing.assert_array_equal(written.losses, result.losses)


def test_the_bos_token_is_the_one_that_the_tokenizer_puts_before_texts(tmp_path: Path) -> None:
    tokenizer = llama2().tokenizer
    llama2().write(tmp_path)
    write_checkpoint(tmp_path, config={"vocab_size": tokenizer.vocab, "eos_token_id": 2})
    token_ids = tokenizer.encode("the end\n🙂")
    assert tokenizer.token_name(token_ids[0]) == "<s>"
    result = run(tmp_path, "the end\n🙂", backend="numpy", add_bos_token=True)
    np.testing.assert_allclose(result.losses, losses_by_hand(tmp_path, token_ids), atol=1e-5)
    assert result.bytes == len("the end\n🙂".encode())


def test_rounded_weights_cost_little(tiny_model: Path) -> None:
    exact = run(tiny_model, TEXT)
    for settings in ({"dtype": "bfloat16"}, {"quantization": "int8"}):
        rounded = run(tiny_model, TEXT, **settings)
        assert rounded.precision == next(iter(settings.values()))
        assert rounded.kv_cache_dtype == "bfloat16"
        assert 0 < abs(rounded.loss - exact.loss) < 0.05
        assert 0.9 < rounded.top1_agreement(exact) <= 1
    assert exact.top1_agreement(exact) == 1
    assert 0 <= exact.accuracy < 1
    with pytest.raises(ValueError, match="compare results of the same text"):
        exact.top1_agreement(run(tiny_model, "the end"))


def test_a_loss_beyond_float64_is_an_infinite_perplexity(tiny_model: Path) -> None:
    result = run(tiny_model, TEXT, backend="numpy")
    result.losses[0] = 1e9
    assert math.isinf(result.perplexity)
    assert math.isfinite(result.bits_per_byte)


@pytest.mark.parametrize(
    ("context", "stride", "loss"),
    [
        (512, None, 3.249375932552366),
        (64, None, 3.5082427866196912),
        (299, 100, 3.220299302292938),  # the guide's loop with max_length=300, stride=100
    ],
)
def test_the_bundled_model_has_the_loss_of_transformers(
    context: int, stride: int | None, loss: float
) -> None:
    """Recorded with transformers 5 and torch, in float32 with eager attention."""
    result = run("tiny-books", HELD_OUT, context=context, stride=stride)
    assert (result.tokens, result.bytes) == (972, 2858)
    assert result.loss == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "there is no text"),
        (b"a", "at least 2 are needed"),
        (b"the \x00 end", "byte 4 is zero"),
        (b"the \xff end", "byte 4 is 0xff"),
    ],
)
def test_unusable_files_are_named(
    tiny_model: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "data.txt"
    file.write_bytes(content)
    with pytest.raises(TrainingError, match=message):
        run(tiny_model, file, backend="numpy")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 129}, "context is 129, but the model has 128 positions"),
        ({"context": 0}, "context is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"context": 16, "stride": 17}, "stride is 17, but the context is 16"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"backend": "numpy", "quantization": "int8"}, "computes in float32 only"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
    ],
)
def test_unusable_settings_are_refused_before_loading(
    tiny_model: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny_model, TEXT, **settings)


def test_missing_data_is_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="does not exist"):
        run(tiny_model, tmp_path / "none.txt")
    with pytest.raises(TrainingError, match=r"no file that matches '\*\.txt'"):
        run(tiny_model, tmp_path)
