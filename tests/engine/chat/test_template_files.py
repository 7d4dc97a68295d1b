"""Where chat templates come from: files, stop strings in their comments, special tokens."""

import json
from pathlib import Path

import pytest

from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import CheckpointError
from nanovllm.llm import LLM
from nanovllm.sampling_params import MAX_STOP_STRINGS, SamplingParams
from nanovllm.structured_outputs import StructuredOutputs


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
    assert template.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<pad>"}, (
        "a null token is undefined"
    )


@pytest.mark.parametrize(
    ("tokenizer_class", "expected"),
    [("GPT2TokenizerFast", "<|endoftext|>"), ("Qwen2Tokenizer", ""), ("LlamaTokenizer", "")],
)
def test_special_tokens_that_are_not_named_are_gpt2s_for_gpt2_only(
    tmp_path: Path, tokenizer_class: str, expected: str
) -> None:
    write(
        tmp_path,
        tokenizer_config={
            "tokenizer_class": tokenizer_class,
            "chat_template": "{{ bos_token }}",
            "eos_token": "</s>",
        },
    )
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render([{"role": "user", "content": ""}]).text == expected


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
