"""The official Python client, sync, async and with aiohttp."""

import asyncio
import functools
import threading
import time
from collections.abc import Callable

import openai
from checks import KEY, MESSAGES, MODEL, PERSON, PROMPT, V1, load, raised_by, refused, works
from openai import AsyncOpenAI, DefaultAioHttpClient, OpenAI
from person import Person

client = OpenAI(base_url=V1, max_retries=0, timeout=60)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds, ten seconds at most."""
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.01)


@works
def completions() -> None:
    answer = client.completions.create(
        model=MODEL, prompt=[PROMPT, "One day"], n=2, max_tokens=8, best_of=2, logprobs=2, seed=1,
        stop=["zebra"], echo=True, logit_bias={"5": -1}, user="someone",
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text.startswith(PROMPT)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 32


@works
def completion_streams() -> None:
    chunks = list(
        client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=8, stream=True, temperature=0,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    whole = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0)
    assert (
        "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    )
    assert chunks[-1].usage == whole.usage


@works
def token_ids_as_prompts() -> None:
    answer = client.completions.create(
        model=MODEL, prompt=[1, 2, 3], max_tokens=4, extra_body={"return_token_ids": True}
    )
    assert answer.choices[0].prompt_token_ids == [1, 2, 3]  # type: ignore[attr-defined]


@works
def chats() -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=8, n=2, logprobs=True, top_logprobs=3
    )
    assert len(answer.choices) == 2
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 3


@works
def chat_streams() -> None:
    chunks = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=8, stream=True, temperature=0
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    whole = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0
    )
    assert text == whole.choices[0].message.content


@works
def the_stream_helper() -> None:
    """It raises where an answer ends with its length; one that follows a schema ends by itself."""
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, max_tokens=200, response_format=Person
    ) as stream:
        assert "content.done" in [event.type for event in stream]
    assert isinstance(stream.get_final_completion().choices[0].message.parsed, Person)


@works
def a_conversation_of_model_dumps() -> None:
    messages = list(MESSAGES)
    for question in ("And then?", "Why?"):
        answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8)
        messages.append(answer.choices[0].message.model_dump())
        messages.append({"role": "user", "content": question})


@works
def a_conversation_of_message_objects() -> None:
    first = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8)
    messages = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "And then?"}]
    client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8)


@works
def harmless_fields() -> None:
    client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=4, store=False, metadata={"a": "b"},
        service_tier="auto", safety_identifier="someone", prompt_cache_key="tale",
        parallel_tool_calls=True, modalities=["text"], tools=[], tool_choice="none",
    )  # fmt: skip
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=4, stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
    )  # fmt: skip
    assert list(stream)[-1].usage is not None


@works
def null_for_every_field() -> None:
    names = [
        "temperature", "top_p", "n", "stop", "presence_penalty", "frequency_penalty",
        "logit_bias", "seed", "stream", "stream_options", "user",
    ]  # fmt: skip
    nothing = dict.fromkeys(names)
    client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=2, **nothing)
    more = dict.fromkeys(
        ["tools", "tool_choice", "metadata", "functions", "reasoning_effort", "store"]
    )
    client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=2, **nothing, extra_body=more
    )


@works
def schemas_by_parse() -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, max_tokens=200, response_format=Person
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


@works
def schemas_that_are_not_closed() -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=200, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}},
    )  # fmt: skip
    Person.model_validate_json(answer.choices[0].message.content)


@works
def embeddings() -> None:
    plain = client.embeddings.create(model=MODEL, input=["one", "two"])
    floats = client.embeddings.create(model=MODEL, input=["one", "two"], encoding_format="float")
    assert plain.data[1].embedding == floats.data[1].embedding


@works
def models_and_raw_responses() -> None:
    assert client.models.retrieve(MODEL).id in [model.id for model in client.models.list()]
    raw = client.completions.with_raw_response.create(
        model=MODEL, prompt=PROMPT, extra_headers={"x-request-id": "abc"}
    )
    assert raw.headers["x-request-id"] == "abc"
    assert raw.parse().choices
    with client.completions.with_streaming_response.create(model=MODEL, prompt=PROMPT) as body:
        assert b"choices" in body.read()


@works
async def async_calls() -> None:
    async with AsyncOpenAI(base_url=V1, max_retries=0) as opened:
        answers = await asyncio.gather(
            *(opened.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4) for _ in range(8))
        )
        assert all(answer.choices[0].finish_reason for answer in answers)
        stream = await opened.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=4, stream=True
        )
        assert [chunk async for chunk in stream][-1].choices[0].finish_reason == "length"


@works
async def the_aiohttp_transport() -> None:
    async with AsyncOpenAI(base_url=V1, http_client=DefaultAioHttpClient()) as opened:
        answer = await opened.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4)
        assert answer.choices


@works
def errors_have_their_classes() -> None:
    late = {"extra_headers": {"x-request-timeout-s": "0.01"}, "extra_body": {"ignore_eos": True}}
    ask = functools.partial(client.completions.create, model=MODEL, prompt=PROMPT, max_tokens=400)
    denied = client.with_options(api_key="no")
    for call, kind in (
        (functools.partial(client.models.retrieve, "other"), openai.NotFoundError),
        (functools.partial(ask, n=0), openai.BadRequestError),
        (denied.models.list, openai.AuthenticationError),
        (functools.partial(ask, **late), openai.InternalServerError),
    ):
        error = raised_by(call)
        assert isinstance(error, kind), repr(error)
        assert error.response.json()["error"]["message"]


@works
def a_full_queue_is_retried() -> None:
    """The queue of this server has room for 256 answers."""
    many = {"model": MODEL, "prompt": "the", "n": 128, "max_tokens": 100}

    def fill() -> None:
        client.completions.create(**many, extra_body={"ignore_eos": True})

    threads = [threading.Thread(target=fill) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: load() == 256)
    error = raised_by(lambda: client.completions.create(model=MODEL, prompt=PROMPT))
    assert isinstance(error, openai.RateLimitError), repr(error)
    assert int(error.response.headers["retry-after"]) >= 1
    client.with_options(max_retries=8).completions.create(model=MODEL, prompt=PROMPT)
    for thread in threads:
        thread.join()


@works
def a_closed_stream_frees_its_place() -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        n=64,
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    assert load() > 0
    stream.close()
    wait_until(lambda: load() == 0)


@works
async def a_cancelled_task_frees_its_place() -> None:
    async with AsyncOpenAI(base_url=V1, api_key=KEY) as opened:
        call = opened.completions.create(
            model=MODEL, prompt=PROMPT, n=64, max_tokens=400, extra_body={"ignore_eos": True}
        )
        task = asyncio.create_task(call)
        await asyncio.to_thread(wait_until, lambda: load() > 0)
        task.cancel()
        await asyncio.to_thread(wait_until, lambda: load() == 0)


@refused("tools are not supported", naming="tool")
def tools() -> None:
    function = {"type": "function", "function": {"name": "f", "parameters": PERSON}}
    client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[function])


@refused("images are not supported", naming="content")
def images() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": [part]}])


@works
def stored_responses() -> None:
    first = client.responses.create(model=MODEL, input=PROMPT, max_output_tokens=8)
    second = client.responses.create(
        model=MODEL, input="And then?", max_output_tokens=8, previous_response_id=first.id
    )
    assert second.output_text
    assert client.responses.retrieve(second.id) == second
    client.responses.delete(second.id)
    missing = raised_by(lambda: client.responses.retrieve(second.id))
    assert isinstance(missing, openai.NotFoundError)


@works
def responses() -> None:
    answer = client.responses.create(model=MODEL, input=PROMPT, max_output_tokens=8, temperature=0)
    assert answer.output_text
    events = client.responses.create(
        model=MODEL, input=PROMPT, max_output_tokens=8, temperature=0, stream=True
    )
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == answer.output_text
