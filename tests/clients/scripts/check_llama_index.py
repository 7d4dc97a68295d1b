"""LlamaIndex: OpenAILike and its embeddings."""

from checks import DIMENSIONS, KEY, MODEL, PROMPT, V1, works
from llama_index.core.base.llms.types import ChatMessage
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from person import Person

ACCESS = {"api_base": V1, "api_key": KEY, "max_retries": 0}
SETTINGS = {"model": MODEL, "context_window": 512, **ACCESS}
completion = OpenAILike(max_tokens=8, is_chat_model=False, **SETTINGS)
chat = OpenAILike(max_tokens=8, is_chat_model=True, **SETTINGS)
MESSAGES = [ChatMessage(role="user", content="Who went into the garden?")]


@works
def completions() -> None:
    assert completion.complete(PROMPT).text
    assert [piece.delta for piece in completion.stream_complete(PROMPT)]


@works
async def async_calls() -> None:
    assert (await completion.acomplete(PROMPT)).text
    assert (await chat.achat(MESSAGES)).message.content


@works
def chats() -> None:
    assert chat.chat(MESSAGES).message.content
    assert "".join(piece.delta or "" for piece in chat.stream_chat(MESSAGES))


@works
def conversations() -> None:
    answer = chat.chat(MESSAGES).message
    assert chat.chat([*MESSAGES, answer, ChatMessage(role="user", content="Why?")]).message.content


@works
def json_schemas() -> None:
    form = {
        "type": "json_schema",
        "json_schema": {"name": "p", "schema": Person.model_json_schema()},
    }
    longer = OpenAILike(max_tokens=200, is_chat_model=True, **SETTINGS)
    answer = longer.chat(MESSAGES, response_format=form)
    Person.model_validate_json(answer.message.content)


@works
def structured_prediction() -> None:
    structured = OpenAILike(
        max_tokens=200, is_chat_model=True, should_use_structured_outputs=True, **SETTINGS
    )
    assert isinstance(structured.as_structured_llm(Person).complete(PROMPT).raw, Person)


@works
def log_probabilities() -> None:
    answer = OpenAILike(max_tokens=4, is_chat_model=True, logprobs=True, top_logprobs=2, **SETTINGS)
    assert len(answer.chat(MESSAGES).logprobs) == 4


@works
def embeddings() -> None:
    embed = OpenAILikeEmbedding(model_name=MODEL, **ACCESS)
    assert len(embed.get_text_embedding("one")) == DIMENSIONS
    assert len(embed.get_text_embedding_batch(["one", "two"])) == 2
