"""LangChain: OpenAI, ChatOpenAI and OpenAIEmbeddings."""

from checks import DIMENSIONS, KEY, MODEL, PROMPT, V1, refused, works
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from person import Person

ACCESS = {"base_url": V1, "api_key": KEY, "max_retries": 0, "timeout": 60}
completion = OpenAI(model=MODEL, max_tokens=8, **ACCESS)
chat = ChatOpenAI(model=MODEL, max_tokens=200, **ACCESS)
QUESTION = "Who went into the garden?"


@works
def completions() -> None:
    assert completion.invoke(PROMPT)
    assert len(completion.batch([PROMPT, "One day"])) == 2
    assert "".join(completion.stream(PROMPT))


@works
def chats() -> None:
    assert chat.invoke(QUESTION, max_tokens=8).usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream(QUESTION, max_tokens=8))


@works
async def async_calls() -> None:
    assert (await chat.ainvoke(QUESTION, max_tokens=8)).content
    assert [chunk async for chunk in chat.astream(QUESTION, max_tokens=8)]


@works
def conversations() -> None:
    first = HumanMessage(QUESTION)
    assert chat.invoke(
        [first, chat.invoke([first], max_tokens=8), HumanMessage("Why?")], max_tokens=8
    )


@works
def json_schemas() -> None:
    assert isinstance(
        chat.with_structured_output(Person, method="json_schema").invoke(QUESTION), Person
    )


@works
def log_probabilities() -> None:
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION, max_tokens=4)
    assert len(answer.response_metadata["logprobs"]["content"]) == 4


@works
def embeddings_of_text() -> None:
    embed = OpenAIEmbeddings(model=MODEL, check_embedding_ctx_length=False, **ACCESS)
    assert [len(vector) for vector in embed.embed_documents(["one", "two"])] == [DIMENSIONS] * 2


@refused("tools are not supported", naming="tool")
def tools_and_function_calling() -> None:
    chat.with_structured_output(Person, method="function_calling").invoke(QUESTION)


@refused("the size of a vector cannot be chosen", naming="dimensions")
def dimensions() -> None:
    embed = OpenAIEmbeddings(model=MODEL, check_embedding_ctx_length=False, dimensions=8, **ACCESS)
    embed.embed_query("one")


@works
def the_responses_api() -> None:
    answer = ChatOpenAI(model=MODEL, use_responses_api=True, **ACCESS).invoke(QUESTION)
    assert answer.text
