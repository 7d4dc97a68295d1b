"""Checks beside schemathesis's own, which loads this file by the variable SCHEMATHESIS_HOOKS."""

from typing import Any

import schemathesis

from tests.support.openapi import Contract

LONGEST_ERROR_BYTES = 6000
_contracts: dict[int, Contract] = {}


def _contract(case: Any) -> Contract:
    document = case.operation.schema.raw_schema
    if id(document) not in _contracts:  # it lives as long as the run
        _contracts[id(document)] = Contract(document)
    return _contracts[id(document)]


@schemathesis.check
def kept_contract(_ctx: Any, response: Any, case: Any) -> None:
    """Responses and events of a stream have described fields only; errors are short."""
    contract = _contract(case)
    if case.method.upper() not in {
        method for method, path in contract.operations if path == case.operation.path
    }:
        assert response.status_code in (401, 405), (
            f"{case.method} is answered with {response.status_code}"
        )
        if case.method.upper() != "HEAD":
            assert response.json()["error"]["code"] == response.status_code
        return
    contract.check(case.method, case.operation.path, response)
    if response.status_code >= 400:
        assert response.json()["error"]["code"] == response.status_code
        assert len(response.content) < LONGEST_ERROR_BYTES, (
            f"an error of {len(response.content)} bytes"
        )


@schemathesis.check
class EveryRouteWasTried:
    """Fails if some route never succeeded or never refused a body, since the run tested nothing."""

    def __init__(self) -> None:
        self.expected: set[tuple[str, str, int]] = set()
        self.seen: set[tuple[str, str, int]] = set()

    def after_response(self, _ctx: Any, response: Any, case: Any) -> None:
        """Record a response."""
        method, path = case.operation.method.upper(), case.operation.path
        self.expected |= {
            (method, path, status) for status in _contract(case).statuses(method, path) & {200, 400}
        }
        self.seen.add((case.method.upper(), case.operation.path, response.status_code))

    def after_run(self, _ctx: Any) -> None:
        """Compare the records."""
        missing = sorted(self.expected - self.seen)
        assert not missing, f"never seen: {missing}"
