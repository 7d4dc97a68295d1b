"""Chat templates: rendering as in transformers, the sandbox, and its limits."""

import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pytest

from nanovllm.engine.chat import template as chat_template
from nanovllm.engine.chat.template import (
    MAX_RENDERED_CHARACTERS,
    MAX_TEMPLATE_CHARACTERS,
    ChatTemplate,
)
from nanovllm.errors import CheckpointError, InvalidRequestError
from tests.support.templates import CHATML, CHATML_TEMPLATE, MESSAGES, one_of


def render(
    source: str,
    messages: list[dict[str, Any]] | None = None,
    special: Mapping[str, str] | None = None,
) -> str:
    return (
        ChatTemplate(source, "test", special)
        .render(MESSAGES if messages is None else messages)
        .text
    )


def test_chatml_is_rendered_as_transformers_does() -> None:
    """White space around blocks is removed. The expected texts are those of transformers."""
    expected = (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render(CHATML) == expected
    indented = (
        "{% for message in messages %}\n    {% if true %}\n{{ message.role }}|\n    {% endif %}\n"
        "{% endfor %}\n"
    )
    assert render(indented) == "system|\nuser|\n"


USES_OF_TRANSFORMERS = {
    "{{ messages[0] | tojson }}": '{"role": "system", "content": "Be short."}',
    "{{ {'b': '<é>', 'a': 1} | tojson(indent=1, sort_keys=true) }}": '{\n "a": 1,\n "b": "<é>"\n}',
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
    "{{ m.content }}{% break %}{% endfor %}": "Why?",
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ nothing }}": "<|endoftext|><|endoftext|>",
    "{% if tools is none and documents is none and add_generation_prompt %}yes{% endif %}": "yes",
    "a\n  {% generation %}\nb\n  {%- endgeneration -%}\n c": "a\nbc",
    "a\n  {% if true %}\nb\n  {%- endif -%}\n c": "a\nbc",
}


def test_what_templates_of_transformers_use() -> None:
    rendered = render("||".join([*USES_OF_TRANSFORMERS, "{{ strftime_now('%Y') }}"])).split("||")
    assert rendered[:-1] == list(USES_OF_TRANSFORMERS.values())
    assert rendered[-1] in {str(datetime.now().astimezone().year + i) for i in (-1, 0)}
    special = {"eos_token": "</s>", "messages": "x"}
    assert render("{{ eos_token }}{{ messages | length }}", special=special) == "</s>2"


def test_a_template_may_refuse_messages() -> None:
    with pytest.raises(
        InvalidRequestError, match="refuses the messages: only user and system alternate"
    ) as caught:
        render("{{ raise_exception('only user and system alternate') }}")
    assert caught.value.param == "messages"


def test_the_generation_prompt_may_be_left_out() -> None:
    rendered = CHATML_TEMPLATE.render(MESSAGES, end="closed").text
    assert rendered == CHATML_TEMPLATE.render(MESSAGES).text.removesuffix("<|im_start|>assistant\n")


TRIMMED = CHATML.replace("message['content']", "message['content'] | trim")
NOT_AS_IT_IS = {"upper case": "| upper", "without": "| length", "escaped": "| tojson"}


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        (CHATML, "Sure, ", "Sure, "),
        (CHATML, "two\nlines", "two\nlines"),
        (CHATML, "", ""),
        (TRIMMED, " Sure,\n", "Sure,"),
        (f"{CHATML}a\nfooter", "Sure,", "Sure,"),
    ],
)
def test_the_last_message_may_go_on(source: str, content: str, expected: str) -> None:
    """transformers' apply_chat_template with continue_final_message gave the expected texts."""
    template = ChatTemplate(source, "test")
    messages = [*MESSAGES, {"role": "assistant", "content": content}]
    rendered = template.render(messages, end="open")
    before = template.render(MESSAGES, end="closed").text
    assert rendered.text == before.removesuffix("a\nfooter") + f"<|im_start|>assistant\n{expected}"
    assert max(end for _, end in rendered.spans) <= len(rendered.text)


@pytest.mark.parametrize("name", NOT_AS_IT_IS)
def test_a_message_that_is_not_written_as_it_is_cannot_go_on(name: str) -> None:
    template = ChatTemplate(f"{{{{ messages[-1].content {NOT_AS_IT_IS[name]} }}}}", "test")
    messages = [{"role": "assistant", "content": 'say "yes"'}]
    with pytest.raises(InvalidRequestError, match="continue_final_message is true, but") as caught:
        template.render(messages, end="open")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 5 }}",
        "{{ messages[0]['content']['x']['y'] }}",
        "{{ 'a' | int + none }}",
    ],
)
def test_a_template_that_fails_is_the_requests_error(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="cannot render these messages"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['re'] }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{{ ('{0.__class__.__mro__}').format(1) }}",
    ],
)  # fmt: skip
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="cannot render these messages"):
        render(source)


def test_what_a_template_writes_is_bounded() -> None:
    assert len(render("{% for i in range(50) %}{{ 'x' * 1000 }}{% endfor %}")) == 50_000
    with pytest.raises(
        InvalidRequestError, match=f"more than {MAX_RENDERED_CHARACTERS} characters"
    ):
        render("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}")
    with pytest.raises(InvalidRequestError, match="Range too big"):
        render("{% for i in range(10 ** 9) %}{% endfor %}")


LOOP, END = "{% for a in range(99999) %}", "{% endfor %}"
ENDLESS = {
    "nested loops": f"{LOOP}{LOOP}{END}{END}",
    "loops over messages": (
        "{% for a in messages * 9999 %}{% for b in messages * 9999 %}{% endfor %}{% endfor %}"
    ),
    "a filter": LOOP + "{% set x = range(99999) | map('string') | list %}" + END,
    "filters with defaults": LOOP + LOOP + "{% set x = 'x' | int(0) | float(0) %}" + END + END,
    "macros": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_how_long_a_template_works_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.05)
    before = sys.gettrace()
    with pytest.raises(
        InvalidRequestError,
        match=r"takes more than 0\.05 s; send fewer messages, or start",
    ) as caught:
        render(ENDLESS[name])
    assert caught.value.param == "messages"
    assert sys.gettrace() is before
    assert render("{% for a in range(999) %}{{ a }}{% endfor %}"), "the next one has its own time"


GREEDY = {
    "powers": "{{ 10 ** (10 ** 10) }}",
    "products": "{{ 'x' * 10 ** 10 }}",
    "lists": "{{ 10 ** 10 * messages }}",
    "a width": "{{ '%900000000s' % messages[0].content }}",
    "a filter that is constant": "{{ [1]|slice(100000000)|list|length }}",
    "indentation": "{{ [[1]]|tojson(indent=500000000)|length }}",
    "doubling": (
        "{% set n = namespace(s='x') %}"
        "{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
    ),
    "methods": "{{ messages[0].content.ljust(10 ** 10) }}",
}


def test_what_a_template_computes_at_once_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of a template that reaches a limit ends, and the next chat gets another one."""
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.3)
    template = one_of({**GREEDY, "nothing": "ok"})
    for name in GREEDY:
        with pytest.raises(InvalidRequestError, match=r"more than (256 MiB of memory|0\.3 s)"):
            template.render([{"role": "user", "content": "x", "case": name}])
        assert template.render([{"role": "user", "content": "x", "case": "nothing"}]).text == "ok"


def test_what_a_template_computes_is_computed() -> None:
    assert (
        render("{{ 2 ** 10 * 3 }} {{ 'ab' * 3 }} {{ 1.5 * 2 }} {{ 2 ** -1 }} {{ 2 ** 0.5 > 1 }}")
        == "3072 ababab 3.0 0.5 True"
    )
    with pytest.raises(InvalidRequestError, match="cannot render these messages"):
        render("{{ 9 ** 9999 * 9 ** 19999 }}")


def test_a_constant_is_not_computed_at_the_start() -> None:
    """Jinja itself evaluates constants when compiling, before any limit of rendering."""
    ChatTemplate("{{ [1]|slice(100000000)|list|length }}{{ 'x' * 10 ** 10 }}", "test").check()


def test_many_messages_are_rendered_in_time() -> None:
    content = "x" * 1000
    rendered = render(CHATML, [{"role": "user", "content": content}] * 2048)
    assert rendered.count(content) == 2048


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ messages",
        "{% for x in messages %}",
        "{{ x | no_such_filter }}",
        "(" * 10 + "{{ " + "(" * 9999,
    ],
)
def test_an_invalid_template_is_reported(source: str) -> None:
    template = ChatTemplate(source, "the/file", {})
    for use in (template.check, lambda: template.render(MESSAGES)):
        with pytest.raises(CheckpointError, match="the chat template the/file is not valid"):
            use()


def test_a_template_over_the_limit_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match=f"has {MAX_TEMPLATE_CHARACTERS + 1} characters, the limit is"
    ):
        ChatTemplate("x" * (MAX_TEMPLATE_CHARACTERS + 1), "the/file").check()
