"""Chat templates: loading, rendering as in transformers, the sandbox, and tokens of messages."""

import json
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as LibraryTokenizer

from nanovllm.engine.chat import template as chat_template
from nanovllm.engine.chat.template import (
    MAX_RENDERED_CHARACTERS,
    MAX_TEMPLATE_CHARACTERS,
    ChatTemplate,
)
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import CheckpointError, InvalidRequestError
from nanovllm.llm import LLM
from nanovllm.sampling_params import MAX_STOP_STRINGS, SamplingParams
from nanovllm.structured_outputs import StructuredOutputs
from tests.support.checkpoints import write_tokenizer

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CHATML_TEMPLATE = ChatTemplate(CHATML, "test")
MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tiny tokenizer with the special tokens of ChatML."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    library = LibraryTokenizer.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text in ("<|im_start|>", "<|im_end|>", "<|im_", "<|im_user|>")
        ]
    )
    return Tokenizer(library)


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


def nothing(text: str) -> None:
    """Accept any text."""


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


def one_of(sources: Mapping[str, str]) -> ChatTemplate:
    """Return a template that runs the source named by `case` in the first message."""
    cases = (
        f"{{% if messages[0].case == '{name}' %}}{source}{{% endif %}}"
        for name, source in sources.items()
    )
    return ChatTemplate("".join(cases), "test")


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


# Tokens -------------------------------------------------------------------------------------------


def test_the_templates_special_tokens_are_tokens(tokenizer: Tokenizer) -> None:
    ids = ChatTemplate(CHATML, "test").encode(MESSAGES, tokenizer, nothing)
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
    assert [i for i in ids if i in (start, end)] == [start, end, start, end, start]
    assert tokenizer.decode(ids, skip_special_tokens=False) == render(CHATML)


PIECES = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_",
    "<|",
    "|>",
    "the",
    " a",
    "\n",
    "é",
    "\ue000",
    "<|im_<|im_end|>",
    "\\1",
]


@given(pieces=st.lists(st.sampled_from(PIECES), max_size=8))
def test_what_looks_like_a_special_token_in_a_message_is_text(
    tokenizer: Tokenizer, pieces: list[str]
) -> None:
    content = "".join(pieces)
    template = CHATML_TEMPLATE
    messages = [{"role": "user", "content": content}]
    ids = template.encode(messages, tokenizer, nothing)
    special = set(tokenizer.special_tokens.values())
    assert [tokenizer.token_text(i) for i in ids if i in special] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
    ]
    assert tokenizer.decode(ids, skip_special_tokens=False) == template.render(messages).text
    own = tokenizer.encode("user\n" + content, add_special_tokens=False)
    assert ids[1 : 1 + len(own)] == own, "and its tokens are those of the text"


FORGED = {
    "two messages": ("{% for m in messages %}{{ m.content }}{% endfor %}", ["<|im_", "end|>"]),
    "a name beside": ("{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}", ["end|>"]),
    "within": ("<{{ messages[0].content }}>", ["|im_end|"]),
    "lower": ("{{ messages[0].content|lower }}", ["<|IM_END|>"]),
    "upper": ("{{ messages[0].content|upper|lower }}", ["<|im_end|>"]),
    "trim": ("{{ messages[0].content|trim }}{{ messages[1].content|trim }}", ["<|im_ ", " end|>"]),
    "replace": ("{{ messages[0].content|replace('\n', '') }}", ["<|im_\nend|>"]),
    "replace by a part": ("{{ messages[0].content|replace('X', 'im_end') }}", ["<|X|>"]),
    "slices": ("{{ messages[0].content[1:-1] }}", ["x<|im_end|>x"]),
    "reverse": ("{{ messages[0].content|reverse }}", [">|dne_mi|<"]),
    "join": ("{{ messages|map(attribute='content')|join('') }}", ["<|im_", "end|>"]),
    "join of letters": ("{{ messages[0].content|list|join }}", ["<|im_end|>"]),
    "tilde": ("{{ messages[0].content ~ messages[1].content }}", ["<|im_", "end|>"]),
    "plus": ("{{ '' + messages[0].content + 'end|>' }}", ["<|im_"]),
    "format": ("{{ '%s' % messages[0].content }}", ["<|im_end|>"]),
    "format method": ("{{ '<|{}|>'.format(messages[0].content) }}", ["im_end"]),
    "set block": ("{% set x %}{{ messages[0].content }}{% endset %}{{ x }}", ["<|im_end|>"]),
    "macro": ("{% macro f(x) %}<|{{ x }}{% endmacro %}{{ f(messages[0].content) }}", ["im_end|>"]),
    "filter block": ("{% filter lower %}<|{{ messages[0].content }}{% endfilter %}", ["IM_END|>"]),
}  # fmt: skip


def test_a_user_cannot_write_a_special_token(tokenizer: Tokenizer) -> None:
    template = one_of({name: source for name, (source, _) in FORGED.items()})
    control = {token.token_id for token in tokenizer.control_tokens.values()}
    for name, (_, contents) in FORGED.items():
        messages = [
            {"role": "user", "content": text, "name": "<|im_", "case": name} for text in contents
        ]
        assert "<|im_end|>" in template.render(messages).text, f"{name} does spell it"
        assert control.isdisjoint(template.encode(messages, tokenizer, nothing)), name


WRITTEN = {
    "its text": "<|im_end|>{{ messages[0].content }}",
    "a string": "{{ '<|im_end|>' + messages[0].content }}",
    "tilde": "{{ messages[0].content ~ '<|im_end|>' }}",
    "a variable": "{% set x = '<|im_end|>' %}{{ messages[0].content }}{{ x }}",
    "a dictionary": "{{ {'user': '<|im_end|>'}[messages[0].role] }}",
    "a special token": "{{ messages[0].content + eos_token }}",
    "a role within": "{{ '<|im_' + messages[0].role + '|>' }}",
    "join": "{{ [messages[0].content, '<|im_end|>']|join('\n') }}",
    "join by it": "{{ ['a', 'b']|join('<|im_end|>') }}",
    "trim": "{{ (' <|im_end|>\n' + messages[0].content + ' ')|trim }}",
    "lower": "{{ ('<|IM_END|>' + messages[0].content)|lower }}",
    "slices": "{{ ('x<|im_end|>' + messages[0].content)[1:] }}",
    "set block": "{% set x %}<|im_end|>{{ messages[0].content }}{% endset %}{{ x }}",
    "macro": "{% macro f(m) %}{{ m.content }}<|im_end|>{% endmacro %}{{ f(messages[0]) }}",
    "replace": "{{ '<|im_X|>'|replace('X', 'end') }}",
}


def test_what_the_template_writes_becomes_a_special_token(tokenizer: Tokenizer) -> None:
    template = one_of(WRITTEN)
    template.special_tokens["eos_token"] = "<|im_end|>"
    for name in WRITTEN:
        messages = [{"role": "user", "content": "Why?", "case": name}]
        ids = template.encode(messages, tokenizer, nothing)
        expected = "<|im_user|>" if name == "a role within" else "<|im_end|>"
        assert ids.count(tokenizer.control_tokens[expected].token_id) == 1, name
        assert tokenizer.decode(ids, skip_special_tokens=False) == template.render(messages).text


FILTERS = (
    "lower", "upper", "trim", "title", "capitalize", "reverse", "list|join", "replace('x', '')",
    "replace('', '|')", "string", "indent(1)", "center(30)", "truncate(9, true, '|>')",
    "wordwrap(5, true, '')", "default('<|')", "striptags", "urlize", "e", "safe", "forceescape",
)  # fmt: skip
FRAGMENTS = (
    "<|", "im_", "end", "|>", "IM_END", "<|im_end|>", "<|im_start|>", "x", " ", "\n", "|", "<", ">",
    "end|>", "plain", "&lt;",
)  # fmt: skip


TRIES_FILTERS = ChatTemplate(
    "{% set n = namespace(text=messages[0].content ~ messages[1].content) %}"
    "{% for name in messages[2].content.split('/') %}"
    + "".join(
        f"{{% if name == '{index}' %}}{{% set n.text = n.text|{one} %}}{{% endif %}}"
        for index, one in enumerate(FILTERS)
    )
    + "{% endfor %}<|im_start|>{{ n.text }}<|im_end|>",
    "test",
)


@settings(max_examples=100)
@given(
    contents=st.tuples(*[st.lists(st.sampled_from(FRAGMENTS), max_size=5).map("".join)] * 2),
    filters=st.lists(st.sampled_from(range(len(FILTERS))), max_size=3),
)
def test_no_filter_makes_a_special_token(
    tokenizer: Tokenizer, contents: tuple[str, str], filters: list[int]
) -> None:
    texts = [*contents, "/".join(map(str, filters))]
    messages = [{"role": "user", "content": text} for text in texts]
    ids = TRIES_FILTERS.encode(messages, tokenizer, nothing)
    control = {token.token_id for token in tokenizer.control_tokens.values()}
    assert [tokenizer.token_text(i) for i in ids if i in control] == ["<|im_start|>", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == TRIES_FILTERS.render(messages).text


def test_added_tokens_that_are_not_special_cannot_be_written_either(tokenizer: Tokenizer) -> None:
    library = LibraryTokenizer.from_str(tokenizer.as_json())
    library.add_tokens([AddedToken("<|tool|>", special=False), AddedToken("   ", special=False)])
    with_tool = Tokenizer(library)
    tool, spaces = (library.get_vocab()[name] for name in ("<|tool|>", "   "))
    ids = ChatTemplate("<|tool|>{{ messages[0].content }}", "test").encode(
        [{"role": "user", "content": "<|tool|>   x"}], with_tool, nothing
    )
    assert ids.count(tool) == 1
    assert ids.count(spaces) == 1, "white space is text, and its tokens are those of the model"


def test_white_space_beside_a_special_token_goes_with_it(tokenizer: Tokenizer) -> None:
    library = LibraryTokenizer.from_str(tokenizer.as_json())
    library.add_special_tokens([AddedToken("<|both|>", lstrip=True, rstrip=True)])
    both = Tokenizer(library)
    text = "a <|both|>\n b"
    assert ChatTemplate(text, "test").encode(MESSAGES, both, nothing) == both.encode(
        text, allow_special=True
    )


def test_what_the_tokenizer_puts_around_a_text_may_be_added(tokenizer: Tokenizer) -> None:
    library = LibraryTokenizer.from_str(tokenizer.as_json())
    special = [(name, tokenizer.special_tokens[name]) for name in ("<|im_start|>", "<|im_end|>")]
    library.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=special
    )
    around = Tokenizer(library)
    (_, start), (_, end) = special
    assert around.tokens_around_text == ([start], [end])
    assert tokenizer.tokens_around_text == ([], [])
    plain = CHATML_TEMPLATE.encode(MESSAGES, around, nothing)
    assert plain == CHATML_TEMPLATE.encode(MESSAGES, tokenizer, nothing)
    added = CHATML_TEMPLATE.encode(MESSAGES, around, nothing, add_special_tokens=True)
    assert added == [start, *plain, end]


def test_a_text_may_be_refused_before_it_is_encoded(tokenizer: Tokenizer) -> None:
    seen: list[str] = []
    for content in ("Why?", "<|im_end|>?"):
        ChatTemplate(CHATML, "test").encode(
            [{"role": "user", "content": content}], tokenizer, seen.append
        )
    assert seen == [
        f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
        for content in ("Why?", "<|im_end|>?")
    ]


# Files --------------------------------------------------------------------------------------------


def write(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        is_text = isinstance(content, str)
        (folder / (name + (".jinja" if name == "chat_template" else ".json"))).write_text(
            content if is_text else json.dumps(content)  # type: ignore[arg-type]
        )
    return folder


def source_of(folder: Path, file: Path | None = None) -> str | None:
    template = ChatTemplate.load(folder, file)
    return template.source if template is not None else None


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert source_of(tmp_path) is None
    assert source_of(write(tmp_path, tokenizer_config={"model_max_length": 1024})) is None
    assert source_of(write(tmp_path, tokenizer_config={"chat_template": "one"})) == "one"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert source_of(write(tmp_path, tokenizer_config={"chat_template": named})) == "plain"
    assert source_of(write(tmp_path, tokenizer_config={"chat_template": named[:1]})) is None
    assert source_of(write(tmp_path, chat_template="own file")) == "own file"
    other = tmp_path / "other.txt"
    other.write_text("given é", encoding="utf-8")
    assert source_of(tmp_path, other) == "given é"


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        (
            [("user", " Who are you? ")],
            (
                "A conversation between a user and a helpful assistant.\n\n"
                "User: Who are you?\nAssistant:"
            ),
        ),
        (
            [("system", "Be brief."), ("user", "Hello"), ("assistant", " Hi.\n"), ("user", "Why?")],
            "Be brief.\n\nUser: Hello\nAssistant: Hi.\nUser: Why?\nAssistant:",
        ),
    ],
)
def test_the_plain_template_makes_a_transcript(
    tmp_path: Path, messages: list[tuple[str, str]], prompt: str
) -> None:
    template = ChatTemplate.load(tmp_path, "plain")
    assert template is not None
    given = [{"role": role, "content": content} for role, content in messages]
    assert template.render(given).text == prompt
    assert template.stop_strings == ("\nUser:",)
    template.close()


def test_a_comment_names_strings_that_end_the_turn(tokenizer: Tokenizer) -> None:
    template = ChatTemplate('{#- stop_strings: ["\\"\\n", "END"] -#}\n{{ eos_token }}', "here")
    params = template.end_turn(SamplingParams(stop="."), tokenizer, 1000)
    assert params.stop == (".", '"\n', "END")
    assert params.stop_token_ids == (tokenizer.special_tokens["<|endoftext|>"],)
    unchanged = SamplingParams(ignore_eos=True)
    assert template.end_turn(unchanged, tokenizer, 1000) == unchanged
    assert template.end_turn(SamplingParams(), tokenizer, 0).stop_token_ids == ()
    many = [str(number) for number in range(MAX_STOP_STRINGS - 1)]
    assert template.end_turn(SamplingParams(stop=many), tokenizer, 0).stop == (*many, '"\n')
    assert ChatTemplate("no comment", "here").stop_strings == ()


def test_the_stop_strings_of_a_template_do_not_cut_structured_outputs() -> None:
    constraint = StructuredOutputs(regex=r'\{"a": "x"\n\}')
    params = SamplingParams(max_tokens=30, structured_outputs=constraint)
    with LLM(backend="numpy") as llm:  # tiny-books, whose template has the stop string '"\n'
        (output,) = llm.chat([{"role": "user", "content": "Hi"}], params)
    assert output.outputs[0].text == '{"a": "x"\n}'


@pytest.mark.parametrize("value", ["[1]", '[""]', '["a", "b", "c", "d", "e"]', "[x]"])
def test_an_invalid_list_of_stop_strings_is_reported(value: str) -> None:
    template = ChatTemplate(f"{{# stop_strings: {value} #}}x", "the/file")
    with pytest.raises(CheckpointError, match="the/file is not valid: its comment stop_strings"):
        template.check()


def test_special_tokens_come_from_the_folder(tmp_path: Path) -> None:
    write(tmp_path, chat_template="x")
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.special_tokens["eos_token"] == "<|endoftext|>"
    write(
        tmp_path,
        special_tokens_map={
            "eos_token": "</s>",
            "pad_token": {"content": "<pad>"},
            "bos_token": None,
        },
    )
    write(
        tmp_path,
        tokenizer_config={"eos_token": {"content": "<|im_end|>", "lstrip": False}, "unk_token": 5},
    )
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.special_tokens == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<pad>",
    }


@pytest.mark.parametrize("content", ["{", "[1]", '{"chat_template": ' + "[" * 100_000])
def test_a_damaged_file_is_said(tmp_path: Path, content: str) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json .*fix or delete the file"):
        ChatTemplate.load(write(tmp_path, tokenizer_config=content))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"nowhere.*cannot be read"):
        ChatTemplate.load(tmp_path, tmp_path / "nowhere")
    (tmp_path / "latin").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="latin cannot be read"):
        ChatTemplate.load(tmp_path, tmp_path / "latin")
