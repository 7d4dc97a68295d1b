"""The ingress finds the same block hashes as the engine's prefix cache."""

from pathlib import Path
from typing import Any

import pytest

from nanovllm.config import EngineConfig
from nanovllm.deploy.prefix import MAX_BLOCKS, PrefixReader, block_hashes
from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.hub import resolve_model
from nanovllm.sampling_params import SamplingParams
from tests.support.processing import process

TEXT = "Once upon a time there was an old man, and " * 8
SIZE = 16


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model("tiny-books")


@pytest.fixture(scope="module")
def reader(folder: Path) -> PrefixReader:
    return PrefixReader(folder, SIZE, None)


def test_hashes_are_those_that_the_engine_caches(folder: Path, reader: PrefixReader) -> None:
    engine = Engine.load(folder, EngineConfig(block_size=SIZE, backend="numpy", num_blocks=64))
    try:
        params = SamplingParams(max_tokens=1, temperature=0.0)
        prepared = process(engine.input_processor, "one", TEXT, params, cache_salt="salt")
        (request,) = prepared.requests
        for _ in engine.run([prepared]):
            pass
    finally:
        engine.close()
    hashes = reader.hashes("/v1/completions", {"prompt": TEXT, "cache_salt": "salt"})
    assert len(hashes) >= 4
    assert tuple(request.block_hashes[: len(hashes)]) == hashes


def test_text_and_its_token_ids_have_the_same_hashes(reader: PrefixReader) -> None:
    path = "/v1/completions"
    ids = reader._tokenizer.encode(TEXT)  # noqa: SLF001
    expected = block_hashes(ids, SIZE)
    assert reader.hashes(path, {"prompt": ids}) == expected
    assert reader.hashes(path, {"prompt": [TEXT, "other"]}) == expected
    assert reader.hashes(path, {"prompt": [ids]}) == expected
    assert reader.hashes("/v1/responses", {"input": TEXT}) == expected
    assert reader.hashes("/v1/embeddings", {"input": TEXT}) == expected


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {}),
        ("/v1/completions", {"prompt": 5}),
        ("/v1/completions", {"prompt": []}),
        ("/v1/completions", {"prompt": [True] * 64}),
        ("/v1/completions", {"prompt": [{}]}),
        ("/v1/completions", {"prompt": [10**30] * 64}),
        ("/v1/completions", {"prompt": TEXT, "cache_salt": "\ud800"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": TEXT}]}),
        ("/tokenize", {"prompt": TEXT}),
        ("/health", {}),
    ],
)
def test_a_body_without_a_prompt_has_no_hashes(
    reader: PrefixReader, path: str, body: dict[str, Any]
) -> None:
    assert reader.hashes(path, body) == ()


def test_long_prompts_are_tokenized_in_part(reader: PrefixReader) -> None:
    assert len(reader.hashes("/v1/completions", {"prompt": TEXT * 10_000})) == MAX_BLOCKS


@pytest.mark.parametrize(("repeats", "has_hashes"), [(1, True), (10_000, False)])
def test_a_chat_has_the_hashes_of_its_text(folder: Path, repeats: int, has_hashes: bool) -> None:
    reader = PrefixReader(folder, SIZE, ChatTemplate("{{ messages[0].content }}", "test"))
    body = {"messages": [{"role": "user", "content": TEXT * repeats}]}
    expected = reader.hashes("/v1/completions", {"prompt": TEXT}) if has_hashes else ()
    assert reader.hashes("/v1/chat/completions", body) == expected


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"input": TEXT}, f"user:{TEXT}"),
        ({"input": [{"role": "user", "content": TEXT}]}, f"user:{TEXT}"),
        ({"input": TEXT, "instructions": "Be brief"}, f"system:Be brief user:{TEXT}"),
        ({"input": TEXT, "previous_response_id": "resp_1"}, None),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, None),
    ],
)
def test_a_response_has_the_hashes_of_its_conversation(
    folder: Path, fields: dict[str, Any], text: str | None
) -> None:
    source = (
        "{% for m in messages %}{{ ' ' if loop.index0 }}{{ m.role }}:{{ m.content }}{% endfor %}"
    )
    reader = PrefixReader(folder, SIZE, ChatTemplate(source, "test"))
    expected = () if text is None else reader.hashes("/v1/completions", {"prompt": text})
    assert reader.hashes("/v1/responses", fields) == expected


def test_only_the_first_blocks_are_hashed() -> None:
    assert len(block_hashes(list(range(10_000)), SIZE)) == MAX_BLOCKS
    assert block_hashes(list(range(SIZE - 1)), SIZE) == ()
    assert block_hashes([1] * SIZE, SIZE, "a") != block_hashes([1] * SIZE, SIZE, "b")
