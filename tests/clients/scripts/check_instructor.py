"""instructor in its modes that need no tools."""

import instructor
from checks import MESSAGES, MODEL, V1, refused, works
from openai import OpenAI
from person import Person


def ask(mode: instructor.Mode) -> None:
    client = instructor.from_openai(OpenAI(base_url=V1, max_retries=0), mode=mode)
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=200, response_model=Person, max_retries=1
    )
    assert isinstance(answer, Person)


@works
def json_schema_mode() -> None:
    ask(instructor.Mode.JSON_SCHEMA)


@works
def streamed_partial_answers() -> None:
    client = instructor.from_openai(
        OpenAI(base_url=V1, max_retries=0), mode=instructor.Mode.JSON_SCHEMA
    )
    parts = client.chat.completions.create_partial(
        model=MODEL, messages=MESSAGES, max_tokens=200, response_model=Person
    )
    assert list(parts)[-1].age is not None


@works
def a_list_of_answers() -> None:
    client = instructor.from_openai(
        OpenAI(base_url=V1, max_retries=0), mode=instructor.Mode.JSON_SCHEMA
    )
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=400, response_model=list[Person], max_retries=3
    )
    assert all(isinstance(person, Person) for person in answer)


@refused("tools are not supported", naming="tool")
def tools_mode() -> None:
    ask(instructor.Mode.TOOLS)
