"""Self-signed certificates by the `openssl` command; without it, tests are skipped."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="needs the openssl command to make a certificate"
)


@dataclass(frozen=True)
class Certificate:
    """A certificate for 127.0.0.1 and its private key, as PEM files."""

    certfile: Path
    keyfile: Path


def make_certificate(folder: Path, *, password: str | None = None) -> Certificate:
    """Write both files to `folder`; a password encrypts the key."""
    certificate = Certificate(folder / "certificate.pem", folder / "key.pem")
    encryption = ["-nodes"] if password is None else ["-passout", f"pass:{password}"]
    subject = [
        "-subj",
        "/CN=nanovllm test",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-addext",
        "keyUsage=critical,digitalSignature,keyCertSign",
    ]
    files = ["-keyout", str(certificate.keyfile), "-out", str(certificate.certfile)]
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-days",
        "2",
        *subject,
        *encryption,
        *files,
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return certificate
