"""Special tokens of rendered chats: the template may write them, messages may not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as LibraryTokenizer

from nanovllm.engine.chat.template import (
    ChatTemplate,
)
from nanovllm.engine.tokenizer import Tokenizer
from tests.support.checkpoints import write_tokenizer
from tests.support.templates import CHATML_TEMPLATE, MESSAGES, one_of


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


def nothing(text: str) -> None:
    """Accept any text."""


def test_the_templates_special_tokens_are_tokens(tokenizer: Tokenizer) -> None:
    ids = CHATML_TEMPLATE.encode(MESSAGES, tokenizer, nothing)
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
    assert [i for i in ids if i in (start, end)] == [start, end, start, end, start]
    assert tokenizer.decode(ids, skip_special_tokens=False) == CHATML_TEMPLATE.render(MESSAGES).text


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
        CHATML_TEMPLATE.encode([{"role": "user", "content": content}], tokenizer, seen.append)
    assert seen == [
        f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
        for content in ("Why?", "<|im_end|>?")
    ]
