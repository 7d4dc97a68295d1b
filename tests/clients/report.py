"""Outcomes of the clients' checks, kept in results.json, and docs/clients.md, which is written from them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.clients.clients import CLIENTS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
PAGE = HERE.parents[1] / "docs" / "clients.md"

_HEAD = """# Clients

`make clients` runs each client below in an environment of its own against one `nanovllm serve` of the bundled
model, with a chat template and an API key, and writes this page. The scripts are in `tests/clients/scripts`.
`make clients ONLY=litellm,openai` runs two of them.
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One check: `refusal` says why the server must refuse, `error` what went wrong."""

    name: str
    refusal: str | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one client; `not_run` says why there is none."""

    versions: dict[str, str]
    checks: tuple[Check, ...]
    not_run: str | None = None

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.error is not None]


def read_results(path: Path = RESULTS) -> dict[str, Result]:
    """Return the kept results by client."""
    if not path.exists():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: Result(
            result["versions"],
            tuple(Check(**check) for check in result["checks"]),
            result["not_run"],
        )
        for name, result in kept.items()
    }


def write_results(results: dict[str, Result], path: Path = RESULTS) -> None:
    """Keep results, in the order of the clients."""
    ordered = {
        client.name: asdict(results[client.name]) for client in CLIENTS if client.name in results
    }
    path.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def render(results: dict[str, Result]) -> str:
    """Return the page as Markdown."""
    parts = [_HEAD, _clients_table(results)]
    refusals = [
        (name, check.name, check.refusal)
        for name, result in results.items()
        for check in result.checks
        if check.refusal is not None and check.error is None
    ]
    if refusals:
        parts += ["## Refused\n\nThe server refuses these in an error that names the reason.\n"]
        parts += [_table(("client", "what", "why"), refusals)]
    failures = [
        (name, check.name, _one_line(check.error or ""))
        for name, result in results.items()
        for check in result.failures
    ]
    if failures:
        parts += ["## Failed\n", _table(("client", "check", "error"), failures)]
    missing = [(name, result.not_run) for name, result in results.items() if result.not_run]
    if missing:
        parts += ["## Not run\n", _table(("client", "why"), missing)]
    return "\n".join(parts)


def _clients_table(results: dict[str, Result]) -> str:
    rows = []
    for name, result in results.items():
        if result.not_run:
            continue
        works = [check.name for check in result.checks if check.refusal is None and not check.error]
        passed = f"{len(result.checks) - len(result.failures)} of {len(result.checks)}"
        versions = ", ".join(f"{package} {version}" for package, version in result.versions.items())
        rows.append((name, versions, passed, ", ".join(works)))
    return _table(("client", "version", "checks passed", "works"), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str | None, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:200]
