"""Examples in JSON Lines: which tokens have a loss, and lines that are none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.engine.chat.examples import ChatExamples
from nanovllm.errors import TrainingError
from nanovllm.training.config import TrainingConfig
from nanovllm.training.data.dataset import Dataset
from nanovllm.training.data.examples import encode_examples, read_examples
from nanovllm.training.data.prepare import PreparedData, prepare_data
from nanovllm.training.data.tokenizer import make_tokenizer, save_tokenizer
from nanovllm.training.network.operations import IGNORED
from tests.support.family_tokenizers import llama2

PAIRS = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(4)]
TEMPLATE = (
    "{% for message in messages %}<|endoftext|>{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|endoftext|>assistant:{% endif %}"
)


def write(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def prepare(*data: Path, tokenizer: str = "bpe", **settings: Any) -> PreparedData:
    config = TrainingConfig(data=data, output="run", **settings)
    return prepare_data(config, tokenizer=tokenizer, context=4, load_chat=ChatExamples.load)


def spelled(data: PreparedData, split: Dataset) -> list[tuple[str, bool]]:
    """Return the text of each run of tokens with or without a loss."""
    assert split.has_loss is not None
    cuts = np.flatnonzero(np.diff(split.has_loss)) + 1
    return [
        (data.tokenizer.decode(ids.tolist(), skip_special_tokens=False), bool(has_loss[0]))
        for ids, has_loss in zip(
            np.split(split.tokens, cuts), np.split(split.has_loss, cuts), strict=True
        )
    ]


def test_a_completion_and_the_end_after_it_have_a_loss(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *PAIRS[:2], "", {"text": "2 + 2 = 4"}, PAIRS[3])
    data = prepare(path, validation_fraction=0.2)
    assert spelled(data, data.train) == [
        ("0 + 1 =", False),
        (" 1<|endoftext|>", True),
        ("1 + 1 =", False),
        (" 2<|endoftext|>2 + 2 = 4<|endoftext|>", True),
    ]
    assert spelled(data, data.validation) == [("3 + 1 =", False), (" 4<|endoftext|>", True)]
    assert data.validation_bytes == len(" 4")
    prompt = data.validation.prompt(8)
    assert "3 + 1 =".endswith(data.tokenizer.decode(prompt.tolist()))


def test_a_completion_has_the_tokens_of_a_continuation(tmp_path: Path) -> None:
    """SentencePiece's tokenizers put a space before a text, but the model continues its prompt."""
    lines = [{"prompt": "Hello", "completion": " world"}, {"text": "the"}]
    path = write(tmp_path / "a.jsonl", *lines)
    examples, library = read_examples(path, None), llama2().library
    ids, has_loss = encode_examples(library, examples, 2, "Encoding")
    names = [library.id_to_token(int(one)) for one in ids]
    assert names == ["▁", "Hello", "▁world", "</s>", "▁the", "</s>"]
    assert has_loss.tolist() == [False, False, True, True, True, True]


def test_validation_data_may_be_files_of_its_own(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.jsonl", PAIRS[i]) for i in range(3)]
    data = prepare(*files[:2], validation_data=files[2], tokenizer="char")
    assert spelled(data, data.train)[-1] == (" 2", True)
    assert data.end_of_text_id is None
    assert spelled(data, data.validation) == [("2 + 1 =", False), (" 3", True)]
    with pytest.raises(TrainingError, match="a file is given twice"):
        prepare(*files, validation_data=files[2])
    with pytest.raises(TrainingError, match="training and validation need an example each"):
        prepare(files[0])
    with pytest.raises(TrainingError, match=r"b\.txt: give \.jsonl files, or text files"):
        prepare(files[0], write(tmp_path / "b.txt", "text"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"a\.jsonl, line 2: it is not JSON"),
        ("[" * 100_000, "line 2: it is not JSON"),
        ("[1]", "line 2: it holds a list, but must hold an object"),
        ({"prompt": "a"}, "line 2: it has 'prompt', but needs prompt and completion, messages, or"),
        ({}, "line 2: it has nothing"),
        ({"prompt": 1, "completion": "b"}, "line 2: prompt is a int, but must be text"),
        ({"prompt": "a", "completion": ""}, "line 2: completion is empty"),
        ({"prompt": "a", "completion": "\ud800"}, "line 2: completion has half of a surrogate"),
        ({"messages": []}, "line 2: it has messages, but the tokenizer has no chat template"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        read_examples(write(tmp_path / "a.jsonl", PAIRS[0], line), None)


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """Return a folder with a tokenizer and a chat template."""
    folder = tmp_path / "model"
    save_tokenizer(make_tokenizer("bpe", ["user assistant: hello"]), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def test_of_a_conversation_the_answers_have_a_loss(tmp_path: Path, chat_model: Path) -> None:
    roles = ("user", "assistant", "user", "assistant", "user")
    messages = [{"role": role, "content": f"hello {i}"} for i, role in enumerate(roles)]
    path = write(tmp_path / "a.jsonl", {"messages": messages}, {"messages": messages[:2]})
    data = prepare(path, tokenizer=str(chat_model))
    assert spelled(data, data.train) == [
        ("<|endoftext|>user: hello 0\n<|endoftext|>assistant:", False),
        (" hello 1\n", True),
        ("<|endoftext|>user: hello 2\n<|endoftext|>assistant:", False),
        (" hello 3\n", True),
        ("<|endoftext|>user: hello 4\n<|endoftext|>", False),
    ]
    assert spelled(data, data.validation)[1:] == [(" hello 1\n<|endoftext|>", True)]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list of objects"),
        ([{"role": "user", "content": "hello"}], "it has no message of the assistant"),
        ("hello", "messages must be a list of objects"),
    ],
)
def test_a_conversation_that_teaches_nothing_is_refused(
    tmp_path: Path, chat_model: Path, messages: Any, message: str
) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": messages})
    with pytest.raises(TrainingError, match=f"line 1: {message}"):
        prepare(path, tokenizer=str(chat_model))


def test_a_template_that_renders_an_answer_otherwise_is_refused(
    tmp_path: Path, chat_model: Path
) -> None:
    template = TEMPLATE.replace("assistant:{%", "model:{%")
    (chat_model / "chat_template.jinja").write_text(template, encoding="utf-8")
    messages = [{"role": role, "content": "hello"} for role in ("user", "assistant")]
    path = write(tmp_path / "a.jsonl", {"messages": messages})
    with pytest.raises(TrainingError, match=r"line 1: the chat template renders messages\[1\]"):
        prepare(path, tokenizer=str(chat_model))


def test_windows_without_a_loss_are_not_drawn() -> None:
    """Of 10 windows, those with token 13 or 27 as a target have one, for every offset."""
    tokens, has_loss = np.arange(41, dtype=np.uint16), np.zeros(41, dtype=np.bool_)
    has_loss[[13, 27]] = True
    data = Dataset(tokens, 4, has_loss)
    assert data.num_targets == 2
    for number in range(20):
        batch = data.batch(number, 3, seed=1)
        kept = batch.targets != IGNORED
        assert batch.num_targets == kept.sum() == 3
        assert set(batch.targets[kept]) <= {13, 27}
        np.testing.assert_array_equal(batch.targets[kept], batch.inputs[kept] + 1)
    batches = list(data.validation_batches(2, limit=2))
    assert [batch.num_targets for batch in batches] == [1, 1]
