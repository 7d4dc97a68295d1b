"""Semantic Kernel's connectors for OpenAI."""

from checks import DIMENSIONS, KEY, MODEL, PROMPT, V1, works
from openai import AsyncOpenAI
from semantic_kernel.connectors.ai.open_ai import (
    OpenAIChatCompletion,
    OpenAIChatPromptExecutionSettings,
    OpenAITextCompletion,
    OpenAITextEmbedding,
    OpenAITextPromptExecutionSettings,
)
from semantic_kernel.contents import ChatHistory


def access() -> AsyncOpenAI:
    return AsyncOpenAI(base_url=V1, api_key=KEY, max_retries=0)


@works
async def chats_and_conversations() -> None:
    service = OpenAIChatCompletion(ai_model_id=MODEL, async_client=access())
    settings = OpenAIChatPromptExecutionSettings(max_tokens=8)
    history = ChatHistory(system_message="Tell a tale.")
    for question in ("Who went into the garden?", "And then?"):
        history.add_user_message(question)
        answer = await service.get_chat_message_content(history, settings)
        assert answer is not None
        history.add_message(answer)


@works
async def chat_streams() -> None:
    service = OpenAIChatCompletion(ai_model_id=MODEL, async_client=access())
    history = ChatHistory()
    history.add_user_message(PROMPT)
    settings = OpenAIChatPromptExecutionSettings(max_tokens=8)
    stream = service.get_streaming_chat_message_content(history, settings)
    assert "".join([str(piece) async for piece in stream])


@works
async def completions() -> None:
    service = OpenAITextCompletion(ai_model_id=MODEL, async_client=access())
    settings = OpenAITextPromptExecutionSettings(max_tokens=8)
    assert str(await service.get_text_content(PROMPT, settings))


@works
async def embeddings() -> None:
    service = OpenAITextEmbedding(ai_model_id=MODEL, async_client=access())
    assert (await service.generate_embeddings([PROMPT])).shape == (1, DIMENSIONS)
