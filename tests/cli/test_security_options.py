"""Keys, origins and certificates: what is read, and what is refused before loading a model."""

import os
import stat
from pathlib import Path

import pytest

from nanovllm.cli.environment import API_KEY_VARIABLE
from nanovllm.cli.main import build_parser
from nanovllm.cli.security_options import (
    MAX_API_KEYS,
    check_certificate,
    is_loopback,
    keys_in_environment,
    read_api_keys,
    read_hosts,
    read_origins,
)
from nanovllm.cli.serve_options import ServeOptions
from nanovllm.cli.serving import server_settings
from nanovllm.server.service import ServerSettings
from tests.support.certificates import make_certificate, needs_openssl

SECRET = "s3cret"


def settings_of(*flags: str) -> ServerSettings:
    return server_settings(ServeOptions.of(build_parser().parse_args(["serve", *flags])))


@pytest.mark.parametrize(("value", "expected"), [
    ("a", ("a",)),
    (" a \n", ("a",)),
    ("a,b , c", ("a", "b", "c")),
    ("a,,b,", ("a", "b")),
    ("a,a", ("a",)),
    ("two words,ü", ("two words", "ü")),
])  # fmt: skip
def test_the_environment_has_keys_with_commas_between(
    value: str, expected: tuple[str, ...]
) -> None:
    assert keys_in_environment({API_KEY_VARIABLE: value}) == expected
    assert read_api_keys(None, None, {API_KEY_VARIABLE: value}) == expected


def test_without_a_key_there_is_none() -> None:
    assert read_api_keys(None, None, {}) == ()


def test_flags_and_a_file_add_up_and_the_environment_stays_out(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(
        "\ufeff# keys of the team\n\n  first  \nwith,comma\n"
        "   # and of the others\nwith # inside\r\nfirst\n",
        encoding="utf-8",
    )
    assert read_api_keys(None, file, {API_KEY_VARIABLE: "variable"}) == (
        "first",
        "with,comma",
        "with # inside",
    )
    assert read_api_keys(["flag", " first "], file, {}) == (
        "flag",
        "first",
        "with,comma",
        "with # inside",
    )
    assert read_api_keys(["a,b"], None, {API_KEY_VARIABLE: "variable"}) == ("a,b",)


def test_the_flag_may_be_given_several_times(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("c\n", encoding="utf-8")
    settings = settings_of("--api-key", "a", "--api-key", "b", "--api-key-file", f"{tmp_path}/keys")
    assert settings.api_keys == ("a", "b", "c")


@pytest.mark.parametrize("keys", [[""], [" "], ["a", ""]])
def test_an_empty_flag_is_refused(keys: list[str]) -> None:
    with pytest.raises(ValueError, match="--api-key is empty"):
        read_api_keys(keys, None, {})


@pytest.mark.parametrize("value", ["", " \n", ",", " , ,"])
def test_an_environment_without_a_key_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="NANOVLLM_API_KEY has no key"):
        read_api_keys(None, None, {API_KEY_VARIABLE: value})


@pytest.mark.parametrize(("content", "message"), [
    (b"", "has no key in it"),
    (b"\n \n", "has no key in it"),
    (b"# nothing yet\n", "has no key in it"),
    (b"good\n" + SECRET.encode() + b"\x00\n", "the key in line 2"),
    (SECRET.encode() + b"\n\xff\xfe\n", "not text in UTF-8"),
    (b"\n".join(b"%d" % i for i in range(MAX_API_KEYS + 1)), str(MAX_API_KEYS)),
    (b"x" * (1 << 20) + b"\n", "has 1,048,577 bytes, the limit is 1,048,576"),
])  # fmt: skip
def test_a_file_without_keys_to_use_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_api_keys(None, file, {})
    assert SECRET not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match=f"--api-key-file {path} cannot be read: .+ directory"):
            read_api_keys(None, path, {})


@pytest.mark.parametrize(
    "key", [f"{SECRET}\n{SECRET}", f"{SECRET}\x1b", f"{SECRET}\udcff", f"{SECRET}\u2028{SECRET}"]
)
def test_a_key_that_no_header_carries_is_refused_without_being_shown(key: str) -> None:
    for flags, environment in (([key], {}), (None, {API_KEY_VARIABLE: key})):
        with pytest.raises(ValueError, match="no client can send") as caught:
            read_api_keys(flags, None, environment)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(("values", "expected"), [
    (None, ()),
    (["*"], ("*",)),
    (["https://a.example", "http://localhost:3000"],
     ("https://a.example", "http://localhost:3000")),
    (['["https://a.example", "http://b.example"]', "http://c.example"],
     ("https://a.example", "http://b.example", "http://c.example")),
    (["[]"], ()),
    (["http://[::1]:8080", "app://host", "https://xn--bcher-kva.example", " https://a.example\n"],
     ("http://[::1]:8080", "app://host", "https://xn--bcher-kva.example", "https://a.example")),
    (["https://a.example", "https://a.example"], ("https://a.example",)),
])  # fmt: skip
def test_origins_may_be_given_one_by_one_or_as_a_list(
    values: list[str] | None, expected: tuple[str, ...]
) -> None:
    assert read_origins(values) == expected


@pytest.mark.parametrize("origin", [
    "", "a.example", "https://a.example/", "https://a.example/path", "https://",
    "https://A.example", "HTTPS://a.example", "https://*.example", "https://a.example:443",
    "http://a.example:80", "https://a.example,https://b.example", "https://a b", "null",
    "https://user@a.example",
    "https://bücher.example", '["https://a.example/"]', '["*", 5]', '["https://a.example"', "[5]",
])  # fmt: skip
def test_an_invalid_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match=r"--allowed-origins .*https://example\.org"):
        read_origins([origin])


def test_without_tls_there_is_nothing_to_check() -> None:
    check_certificate(None, None)


def test_a_key_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--ssl-keyfile needs --ssl-certfile"):
        check_certificate(None, tmp_path / "key.pem")


@needs_openssl
def test_a_certificate_and_its_key_are_accepted_in_two_files_and_in_one(tmp_path: Path) -> None:
    made = make_certificate(tmp_path)
    check_certificate(made.certfile, made.keyfile)
    both = tmp_path / "both.pem"
    both.write_bytes(made.certfile.read_bytes() + made.keyfile.read_bytes())
    check_certificate(both, None)


@needs_openssl
def test_files_that_cannot_be_used_for_tls_are_refused(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one, other = make_certificate(tmp_path / "one"), make_certificate(tmp_path / "other")
    text, missing = tmp_path / "text", tmp_path / "missing"
    text.write_text("no certificate\n", encoding="utf-8")
    for certfile, keyfile, message in (
        (missing, one.keyfile, f"--ssl-certfile {missing} cannot be read: No such file"),
        (one.certfile, missing, f"--ssl-keyfile {missing} cannot be read: No such file"),
        (tmp_path, one.keyfile, "--ssl-certfile .* cannot be read: Is a directory"),
        (one.certfile, other.keyfile, "belong together"),
        (one.certfile, None, "no --ssl-keyfile"),
        (text, one.keyfile, "must be PEM"),
        (one.certfile, text, "must be PEM"),
    ):
        with pytest.raises(ValueError, match=message):
            check_certificate(certfile, keyfile)


@needs_openssl
def test_an_encrypted_key_is_refused_without_a_prompt(tmp_path: Path) -> None:
    made = make_certificate(tmp_path, password=SECRET)
    with pytest.raises(ValueError, match="encrypted; give one without a password"):
        check_certificate(made.certfile, made.keyfile)


def test_prompts_are_logged_only_with_requests() -> None:
    with pytest.raises(ValueError, match="--log-prompts needs --log-requests"):
        settings_of("--log-prompts")
    settings = settings_of("--log-prompts", "--log-requests", "--allowed-origins", "*")
    assert (settings.log_requests, settings.log_prompts, settings.allowed_origins) == (
        True,
        True,
        ("*",),
    )


@pytest.mark.parametrize(
    ("flags", "timeout_s"),
    [([], None), (["--request-timeout-s", "2.5"], 2.5), (["--request-timeout-s", "inf"], None)],
)
def test_the_request_timeout_is_read(flags: list[str], timeout_s: float | None) -> None:
    assert settings_of(*flags).request_timeout_s == timeout_s


def test_streams_are_silent_unless_a_keep_alive_is_given() -> None:
    assert settings_of().keep_alive_s is None
    assert settings_of("--keep-alive-s", "15").keep_alive_s == 15


@pytest.mark.parametrize(
    "flags",
    [["--request-timeout-s", "0"], ["--max-queued-tokens", "0"], ["--max-queued-tokens", "many"]],
)
def test_limits_that_let_nothing_in_are_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", *flags])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_pipe_is_no_file_of_keys(tmp_path: Path) -> None:
    """Reading it would wait for somebody to write, without a word."""
    pipe = tmp_path / "keys"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="not a regular file"):
        read_api_keys(None, pipe, {})
    with pytest.raises(ValueError, match="not a regular file"):
        check_certificate(pipe, None)


@pytest.mark.skipif(os.name != "posix", reason="needs modes of files")
def test_a_world_writable_key_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("key")
    file.chmod(stat.S_IMODE(file.stat().st_mode) | stat.S_IWOTH)
    with pytest.raises(ValueError, match="chmod o-w"):
        read_api_keys(None, file, {})
    file.chmod(0o644)
    assert read_api_keys(None, file, {}) == ("key",)


@pytest.mark.parametrize(("values", "host", "has_keys", "expected"), [
    (None, "127.0.0.1", False, ("127.0.0.1",)),
    (None, "localhost", False, ("localhost",)),
    (None, "::1", False, ("::1",)),
    (None, "127.0.0.1", True, None),
    (None, "0.0.0.0", False, None),
    (None, "10.0.0.5", False, None),
    (["GPU.example."], "0.0.0.0", True, ("gpu.example", "0.0.0.0")),
    (["a", "b.c", "a"], "127.0.0.1", False, ("a", "b.c", "127.0.0.1")),
    (["*"], "127.0.0.1", False, None),
])  # fmt: skip
def test_hosts_are_checked_on_loopback_without_keys(
    values: list[str] | None, host: str, *, has_keys: bool, expected: tuple[str, ...] | None
) -> None:
    assert read_hosts(values, host, has_keys=has_keys) == expected


@pytest.mark.parametrize(
    "value", ["", "https://a.example", "a.example:80", "a b", "*.example", "a/b"]
)
def test_an_invalid_host_name_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="--allowed-hosts has"):
        read_hosts([value], "127.0.0.1", has_keys=False)


def test_loopback_addresses_are_known() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost", "LOCALHOST")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))
