"""Flags of `nanovllm serve`: settings, refusals, the curl command and the chat template."""

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nanovllm.cli.main import build_parser, main
from nanovllm.cli.options import engine_config
from nanovllm.cli.serve_options import ServeOptions
from nanovllm.cli.serving import load_server, server_settings, shell_key, startup_message
from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.errors import CheckpointError
from nanovllm.server.service import ServerSettings


def test_flags_are_taken_by_their_whole_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--max-num-seq", "3"])
    told = "unrecognized option --max-num-seq; did you mean --max-num-seqs?"
    assert told in capsys.readouterr().err


WRONG_FLAGS = {
    "a path to nothing": (("./nothing-here",), "does not exist", 1),
    "an empty key": (("--api-key", ""), "--api-key is empty", 1),
    "no file of keys": (
        ("--api-key-file", "./nothing-here"),
        "--api-key-file nothing-here cannot be read: No such file",
        1,
    ),
    "no origin": (
        ("--allowed-origins", "example.org"),
        "'example.org' but an origin is scheme://host",
        1,
    ),
    "no certificate": (("--ssl-keyfile", "key.pem"), "--ssl-keyfile needs --ssl-certfile", 1),
    "prompts without requests": (("--log-prompts",), "--log-prompts needs --log-requests", 1),
    "more context than there is": (
        ("--port", "0", "--max-model-len", "5000"),
        "nanovllm: max_model_len is 5000",
        1,
    ),
    "a port that is none": (("--port", "70000"), "70000 must be an integer, from 0 to 65535", 2),
    "no number of requests": (("--max-queued-requests", "0"), "at least 1", 2),
}


class ServedError(Exception):
    """Raised where a server would begin, by `never_serve`."""


def never_serve(monkeypatch: pytest.MonkeyPatch) -> list[ServerSettings]:
    """Stop `nanovllm serve` where it creates its application; return the settings."""
    given: list[ServerSettings] = []

    def stop(engine: object, settings: ServerSettings, *others: object, **parts: object) -> None:
        given.append(settings)
        raise ServedError

    monkeypatch.setattr("nanovllm.cli.serving.create_app", stop)
    return given


def test_forwarded_addresses_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def stop(*_: object, **options: Any) -> None:
        given.append(options)
        raise ServedError

    monkeypatch.setattr("nanovllm.cli.serving.uvicorn.Config", stop)
    parsed = build_parser().parse_args(["serve"])
    with pytest.raises(ServedError):
        parsed.run(parsed)
    assert given[0]["proxy_headers"] is False


@pytest.mark.parametrize("name", WRONG_FLAGS)
def test_an_invalid_option_is_an_error(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, message, expected = WRONG_FLAGS[name]
    never_serve(monkeypatch)
    try:
        code: object = main(["serve", *flags])
    except SystemExit as ending:
        code = ending.code
    out, errors = capsys.readouterr()
    assert (code, out) == (expected, "")
    assert message in errors


def serve_options(*flags: str) -> ServeOptions:
    return ServeOptions.of(build_parser().parse_args(["serve", *flags]))


@pytest.mark.parametrize("name", ["plain", "it's", 'a "quoted" one', "$HOME `x`", "naïve\\"])
@pytest.mark.parametrize(
    ("variable", "keys"), [("k 1", None), ("k 1,k 2,k 3", None), ("other", "# team\n\nk 1\nk 2\n")]
)
@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_the_curl_command_quotes_any_model_name(
    tmp_path: Path, name: str, variable: str, keys: str | None
) -> None:
    flags = [] if keys is None else ["--api-key-file", str(tmp_path / name.replace("/", ""))]
    if keys is not None:
        Path(flags[1]).write_text(keys, encoding="utf-8")
    key = shell_key(serve_options(*flags), variable.count(",") + 1)
    line = startup_message("http://127.0.0.1:1", name, 64, key).splitlines()[-1].strip()
    script = f"curl() {{ printf '%s\\0' \"$@\"; }}\n{line}"
    done = subprocess.run(
        ["sh", "-c", script],
        capture_output=True,
        check=True,
        env={**os.environ, "NANOVLLM_API_KEY": variable},
    )
    url, _, key, _, content_type, _, body = done.stdout.decode().rstrip("\0").split("\0")
    assert (url, key, content_type) == (
        "http://127.0.0.1:1/v1/completions",
        "Authorization: Bearer k 1",
        "Content-Type: application/json",
    )
    assert json.loads(body)["model"] == name
    assert json.loads(body)["max_tokens"] == 32  # half of the context, beside a short prompt


def test_flags_are_the_settings_names() -> None:
    parsed: argparse.Namespace = build_parser().parse_args(
        ["serve", "gpt2", "--max-num-seqs", "3", "--no-enable-prefix-caching", "--host", "::"]
    )
    assert (parsed.model, parsed.max_num_seqs, parsed.enable_prefix_caching, parsed.host) == (
        "gpt2",
        3,
        False,
        "::",
    )


def test_priorities_count_only_where_a_flag_says_so() -> None:
    parse = build_parser().parse_args
    for command in (["serve"], ["run-batch", "-i", "a", "-o", "b"]):
        assert engine_config(parse(command)).scheduling_policy == "fcfs"
        allowed = parse([*command, "--scheduling-policy", "priority"])
        assert engine_config(allowed).scheduling_policy == "priority"


@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        ((), "fcfs"),
        (("--api-key", "a"), "fcfs"),
        (("--api-key-file", "keys"), "fair"),
        (("--api-key", "a", "--api-key", "b"), "fair"),
        (("--api-key", "a", "--api-key", "b", "--scheduling-policy", "fcfs"), "fcfs"),
        (("--scheduling-policy", "fair"), "fair"),
    ],
)
def test_several_keys_get_equal_shares_unless_the_policy_is_set(
    flags: tuple[str, ...], policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may get more keys while the server runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").write_text("a\n", encoding="utf-8")
    configs = []
    monkeypatch.setattr(Engine, "check", lambda folder, config: configs.append(config))
    load_server(serve_options(*flags))
    assert [config.scheduling_policy for config in configs] == [policy]


@pytest.mark.parametrize(
    ("flags", "inspector"),
    [
        ((), (True, False, True)),
        (("--host", "0.0.0.0"), (True, False, False)),
        (("--host", "0.0.0.0", "--inspector-controls"), (True, False, True)),
        (("--no-inspector-controls",), (True, False, False)),
        (("--api-key", "k"), (True, False, False)),
        (("--api-key", "k", "--inspector-controls"), (True, False, True)),
        (("--no-inspector", "--inspector-shows-prompts"), (False, True, True)),
    ],
)
def test_controls_need_a_loopback_address_without_keys_or_a_flag(
    flags: tuple[str, ...], inspector: tuple[bool, bool, bool]
) -> None:
    settings = server_settings(serve_options(*flags))
    assert (
        settings.has_inspector,
        settings.inspector_shows_prompts,
        settings.inspector_controls,
    ) == inspector


def test_the_patience_with_clients_may_be_given() -> None:
    patient = server_settings(serve_options("--stalled-client-s", "2.5"))
    assert patient.stalled_client_s == 2.5
    default = ServerSettings(model_names=("x",)).stalled_client_s
    assert server_settings(serve_options()).stalled_client_s == default


def chat_template_of(monkeypatch: pytest.MonkeyPatch, *flags: str) -> ChatTemplate | None:
    """The template that the server would answer chats with."""
    given = never_serve(monkeypatch)
    parsed = build_parser().parse_args(["serve", *flags])
    with pytest.raises(ServedError):
        parsed.run(parsed)
    return given[0].chat_template


def test_the_chat_template_is_the_flags_or_the_models(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    assert chat_template_of(monkeypatch, str(folder)) is None
    (folder / "tokenizer_config.json").write_text(
        '{"chat_template": "{% of the model", "eos_token": "</s>"}'
    )
    own = chat_template_of(monkeypatch, str(folder))
    assert own is not None
    assert (own.source, own.special_tokens["eos_token"]) == ("{% of the model", "</s>"), (
        "a server goes on without chat where it is damaged"
    )
    plain = chat_template_of(monkeypatch, str(folder), "--chat-template", "plain")
    assert plain is not None
    assert plain.stop_strings == ("\nUser:",)
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0].content }}")
    given = chat_template_of(monkeypatch, str(folder), "--chat-template", str(file))
    assert given is not None
    assert (given.source, given.special_tokens["eos_token"]) == (
        "{{ messages[0].content }}",
        "</s>",
    )


def test_an_invalid_chat_template_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    for content, message in ((None, "cannot be read"), ("{% if %}", "is not valid")):
        if content is not None:
            file.write_text(content)
        parsed = build_parser().parse_args(["serve", str(tiny_model), "--chat-template", str(file)])
        with pytest.raises(
            CheckpointError, match=rf"the chat template \S*template\.jinja {message}"
        ):
            parsed.run(parsed)
