"""Keys, limits and pages of the server that tests/server/http/conftest.py guards."""

KEY = "secret key-1é"
KEYS = ("first", KEY, "the last, with a comma")
LIMIT = 50_000
PAGE = "https://page.example"


def bearer(key: str, scheme: str = "Bearer") -> dict[bytes, bytes]:
    """Return the header with a key."""
    return {b"authorization": f"{scheme} {key}".encode()}
