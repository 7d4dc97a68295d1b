"""Read and check the security options of a server: API keys, hosts, origins and certificate.

All are checked before a model is loaded. Errors name the option, the file and the line, never a
key.
"""

import ipaddress
import json
import os
import re
import shlex
import ssl
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from nanovllm.cli.argument_types import read_lines
from nanovllm.cli.environment import API_KEY_VARIABLE
from nanovllm.server.http.auth import host_name, is_address

MAX_API_KEYS = 1000  # each request is compared with all
_MAX_SECRET_BYTES = 1 << 20
_ORIGIN = re.compile(
    r"[a-z][a-z0-9+.-]*://[a-z0-9._-]+(:[0-9]+)?|[a-z][a-z0-9+.-]*://\[[0-9a-f:]+\](:[0-9]+)?"
)
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_DEFAULT_PORTS = (("http://", ":80"), ("https://", ":443"))


def read_api_keys(
    flags: Sequence[str] | None, file: Path | None, environment: Mapping[str, str]
) -> tuple[str, ...]:
    """Return the API keys of --api-key and --api-key-file, or else of the environment.

    Raises ValueError for options that would leave the server open by mistake: an empty key, or a
    file that cannot be read or has no key.
    """
    if flags is None and file is None:
        return keys_in_environment(environment)
    keys = [key.strip() for key in flags or ()]
    if not all(keys):
        raise ValueError("--api-key is empty; give a key, or leave the flag out to serve everybody")
    for key in keys:
        _check_key(key, "a key of --api-key")
    if file is not None:
        keys += _keys_in_file(file)
    if len(keys) > MAX_API_KEYS:
        raise ValueError(f"there are {len(keys)} API keys, the limit is {MAX_API_KEYS}")
    return tuple(dict.fromkeys(keys))


def keys_in_environment(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the comma-separated keys of the variable, if set; raises ValueError if it is empty."""
    value = environment.get(API_KEY_VARIABLE, "")
    keys = [key.strip() for key in value.split(",") if key.strip()]
    if API_KEY_VARIABLE in environment and not keys:
        raise ValueError(
            f"{API_KEY_VARIABLE} has no key in it; set one or several, separated by commas, "
            "or unset it to serve without keys"
        )
    for key in keys:
        _check_key(key, f"a key in {API_KEY_VARIABLE}")
    return tuple(dict.fromkeys(keys))


def _keys_in_file(path: Path) -> list[str]:
    try:
        check_secret_file("--api-key-file", path)
        lines = [(number, line.strip()) for number, line in read_lines(path)]
    except OSError as error:
        raise ValueError(
            f"--api-key-file {path} cannot be read: {error.strerror or error}"
        ) from error
    keys = [(number, line) for number, line in lines if not line.startswith("#")]
    if not keys:
        raise ValueError(f"--api-key-file {path} has no key in it; write one on each line")
    for number, key in keys:
        _check_key(key, f"the key in line {number} of {path}")
    return [key for _, key in keys]


def check_secret_file(flag: str, path: Path) -> None:
    """Raise ValueError unless a path is a regular file that not everybody can write.

    It may have up to _MAX_SECRET_BYTES. A folder is left to the error of reading it.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError(
            f"{flag} {path} is not a regular file; give one, or the keys in {API_KEY_VARIABLE}"
        )
    if os.name == "posix" and status.st_mode & stat.S_IWOTH:
        raise ValueError(
            f"{flag} {path} can be written by everybody on this machine; "
            f"run: chmod o-w {shlex.quote(str(path))}"
        )
    if stat.S_ISREG(status.st_mode) and status.st_size > _MAX_SECRET_BYTES:
        raise ValueError(
            f"{flag} {path} has {status.st_size:,} bytes, the limit is {_MAX_SECRET_BYTES:,}; "
            "give a file with one key on each line"
        )


def _check_key(key: str, source: str) -> None:
    """Raise ValueError for a key with control characters or surrogates, which no header carries."""
    if not key.isprintable():
        raise ValueError(
            f"{source} has a character that no client can send in a header; use visible characters"
        )


def read_hosts(
    values: Sequence[str] | None, bind_host: str, *, has_keys: bool
) -> tuple[str, ...] | None:
    """Return the allowed `Host` names, or None for any; raises ValueError for an invalid one.

    By default names are checked on a loopback address without keys. There a web page could use the
    server by DNS rebinding, and no proxy for other machines is expected.
    """
    if values is None:
        return (host_name(bind_host),) if is_loopback(bind_host) and not has_keys else None
    if "*" in values:
        return None
    for value in values:
        if _HOST.fullmatch(value.lower().removesuffix(".")) is None and not is_address(
            value.strip("[]")
        ):
            raise ValueError(
                f"--allowed-hosts has {value[:200]!r} but takes a name such as gpu.example.org, "
                "without scheme and port; * allows any"
            )
    return tuple(dict.fromkeys(map(host_name, [*values, bind_host])))


def is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address, which other machines cannot reach."""
    name = host_name(host)
    return name == "localhost" or (is_address(name) and ipaddress.ip_address(name).is_loopback)


def read_origins(values: Sequence[str] | None) -> tuple[str, ...]:
    """Return the origins of --allowed-origins; raises ValueError for one that no browser sends."""
    origins: list[str] = []
    for value in values or ():
        origins += _json_list(value) if value.lstrip().startswith("[") else [value.strip()]
    for origin in origins:
        if origin != "*" and not _is_origin(origin):
            raise ValueError(
                f"--allowed-origins has {origin[:200]!r} but an origin is scheme://host in "
                "lowercase, with :port unless it is the scheme's default, and without a path, such "
                "as https://example.org; * allows all"
            )
    return tuple(dict.fromkeys(origins))


def _json_list(text: str) -> list[str]:
    try:
        origins = json.loads(text)
    except ValueError:
        origins = None
    if not isinstance(origins, list) or not all(isinstance(origin, str) for origin in origins):
        raise ValueError(
            f"--allowed-origins is {text[:200]!r}, which is no JSON list of strings such as "
            """'["https://example.org"]'"""
        )
    return origins


def _is_origin(text: str) -> bool:
    has_default_port = any(
        text.startswith(scheme) and text.endswith(port) for scheme, port in _DEFAULT_PORTS
    )
    return _ORIGIN.fullmatch(text) is not None and not has_default_port


def check_certificate(certfile: Path | None, keyfile: Path | None) -> None:
    """Raise ValueError with the remedy if a server cannot use these files for TLS."""
    if certfile is None:
        if keyfile is not None:
            raise ValueError(
                "--ssl-keyfile needs --ssl-certfile, the certificate that belongs to the key"
            )
        return
    for flag, path in (("--ssl-certfile", certfile), ("--ssl-keyfile", keyfile)):
        try:
            if path is not None and path.is_fifo():
                raise ValueError(f"{flag} {path} is not a regular file; give one")
            if path is not None:
                path.open("rb").close()
        except OSError as error:
            raise ValueError(f"{flag} {path} cannot be read: {error.strerror or error}") from error
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            certfile, keyfile, password=_refuse_to_ask
        )
    except ssl.SSLError as error:
        key = (
            f"the key in {keyfile}"
            if keyfile is not None
            else "its key, read from the same file because there is no --ssl-keyfile,"
        )
        reason = error.reason or "no certificate or key found"
        raise ValueError(
            f"the certificate in {certfile} and {key} cannot be used: both must be PEM and belong "
            f"together ({reason})"
        ) from error


def _refuse_to_ask() -> str:
    """Refuse an encrypted key: OpenSSL would prompt for its password and block the start."""
    raise ValueError(
        "the key for TLS is encrypted; give one without a password, made by: "
        "openssl pkey -in KEY -out PLAIN_KEY"
    )
