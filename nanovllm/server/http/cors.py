"""CORS: which web pages may read responses (https://fetch.spec.whatwg.org/#http-cors-protocol)."""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware as StarletteCORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from nanovllm.server.http.errors import error_response


class CORSMiddleware(StarletteCORSMiddleware):
    """Add CORS headers and answer preflight requests.

    A preflight request carries no key, so this layer goes outside of the API key check.
    """

    def __init__(self, app: ASGIApp, allowed_origins: Sequence[str]) -> None:
        """Allow these origins; `*` allows all.

        Keys travel in a header, not in cookies, so credentials are not allowed.
        """
        super().__init__(
            app,
            allowed_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after", "x-should-retry", "x-nanovllm-engine"),
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight request; refuse it in the API's error format."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        headers = {
            name: value
            for name, value in response.headers.items()
            if name not in ("content-length", "content-type")
        }
        message = f"the request of a web page is refused: {bytes(response.body).decode()}"
        return error_response(response.status_code, message, headers=headers)
