"""Results of the client checks in results.json, and docs/reference/clients.md made of them."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.clients.clients import CLIENTS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
PAGE = HERE.parents[1] / "docs" / "reference" / "clients.md"

_HEAD = """# Clients

`make clients` runs each client below in a separate environment and writes this page. All of them
use one `nanovllm serve` of the bundled model, with a chat template and an API key. The scripts are
in `tests/clients/scripts`. `make clients ONLY=litellm,openai` runs two of them.
"""
_Rows = Sequence[tuple[str | None, ...]]
_REFUSED = "The server answers each of these with an error that names the reason.\n"


@dataclass(frozen=True, slots=True)
class Check:
    """One check, why the server must refuse it (or None), and its error (or None)."""

    name: str
    refusal: str | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one client, or the reason why it did not run."""

    versions: dict[str, str]
    checks: tuple[Check, ...]
    not_run: str | None = None

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.error is not None]


def read_results(path: Path = RESULTS) -> dict[str, Result]:
    """Return the stored results by client."""
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
    """Store results in the order of the clients."""
    ordered = {
        client.name: asdict(results[client.name]) for client in CLIENTS if client.name in results
    }
    path.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def render(results: dict[str, Result]) -> str:
    """Return the page as Markdown."""
    ran = {name: result for name, result in results.items() if not result.not_run}
    settings = [(c.name, c.setting) for c in CLIENTS if c.setting and c.name in results]
    refusals = [
        (name, check.name, check.refusal)
        for name, result in ran.items()
        for check in result.checks
        if check.refusal is not None and check.error is None
    ]
    failures = [
        (name, check.name, _one_line(check.error or ""))
        for name, result in ran.items()
        for check in result.failures
    ]
    missing = [(name, result.not_run) for name, result in results.items() if result.not_run]
    tables: list[tuple[str, str, tuple[str, ...], _Rows]] = [
        ("Settings", "", ("client", "what to set"), settings),
        ("Refused", _REFUSED, ("client", "what", "why"), refusals),
        ("Failed", "", ("client", "check", "error"), failures),
        ("Not run", "", ("client", "why"), missing),
    ]
    parts = [_HEAD, _clients_table(ran), "## What works\n", _works(ran)]
    for title, text, head, rows in tables:
        if rows:
            parts += [f"## {title}\n", *([text] if text else []), _table(head, rows)]
    return "\n".join(parts)


def _clients_table(results: dict[str, Result]) -> str:
    rows = []
    for name, result in results.items():
        passed = f"{len(result.checks) - len(result.failures)} of {len(result.checks)}"
        versions = ", ".join(f"{package} {version}" for package, version in result.versions.items())
        rows.append((name, versions, passed))
    return _table(("client", "version", "checks passed"), rows)


def _works(results: dict[str, Result]) -> str:
    lines = []
    for name, result in results.items():
        names = [check.name for check in result.checks if check.refusal is None and not check.error]
        if names:
            item = f"- **{name}**: {', '.join(names)}"
            lines.append(
                textwrap.fill(item, 100, subsequent_indent="  ", break_on_hyphens=False) + "\n"
            )
    return "".join(lines)


def _table(head: tuple[str, ...], rows: _Rows) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:200]
