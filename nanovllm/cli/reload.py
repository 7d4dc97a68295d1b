"""Reload the API keys and the TLS certificate while the server runs.

Everything is read and checked before anything changes: after an error the old keys and the old
certificate stay in use. Requests and connections in progress are not affected.
"""

import os
import ssl

import uvicorn
from uvicorn.config import create_ssl_context

from nanovllm.cli.security_options import check_certificate, read_api_keys
from nanovllm.cli.serve_options import ServeOptions
from nanovllm.server.service import ServerControl


def reload_credentials(options: ServeOptions, http: uvicorn.Config, control: ServerControl) -> str:
    """Read the files of the options again, and return what was read.

    It is blocking, may be called on any thread, and raises ValueError or OSError if a file is not
    valid.
    """
    keys, done = None, []
    if options.api_key_file is not None:
        keys = read_api_keys(options.api_key, options.api_key_file, os.environ)
        done.append("the API key" if len(keys) == 1 else f"{len(keys)} API keys")
    if http.ssl is not None:
        check_certificate(options.ssl_certfile, options.ssl_keyfile)
        _replace_certificate(http.ssl, _new_context(http))
        done.append("the TLS certificate")
    if keys is not None:
        control.api_keys.replace(keys)
    return " and ".join(done)


def _new_context(http: uvicorn.Config) -> ssl.SSLContext:
    """Return a context with the settings of the server and the current files."""
    return create_ssl_context(
        http.ssl_certfile or "",
        http.ssl_keyfile,
        http.ssl_keyfile_password,
        http.ssl_version,
        http.ssl_cert_reqs,
        http.ssl_ca_certs,
        http.ssl_ciphers,
    )


def _replace_certificate(listening: ssl.SSLContext, new: ssl.SSLContext) -> None:
    """Let the handshakes of a listening socket use another context.

    Loading files into the listening context would leave it without a key if they do not match.
    """

    def choose(
        connection: ssl.SSLSocket | ssl.SSLObject, server_name: str, context: ssl.SSLContext
    ) -> None:
        connection.context = new

    listening.sni_callback = choose
