"""`nanovllm learn race`: the reader's engine beside this project's, as bars."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanovllm.cli.bench.report import publish
from nanovllm.cli.lessons import require_folder
from nanovllm.cli.table import print_table
from nanovllm.config import BUNDLED_MODEL, EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.errors import counted
from nanovllm.hub import resolve_model
from nanovllm.learn.engine import engine_parts_of
from nanovllm.learn.parts import Parts, load_parts
from nanovllm.learn.race import WORKLOADS, FunctionTime, profile, race
from nanovllm.progress import progress_bar

_BAR = 40  # characters of the longest bar
_NUM_FUNCTIONS = 8
_NOT_MEASURED = "none of yours is written yet; begin with: nanovllm learn show 3"
_YOURS = "yours"
_VERSIONS = {
    "plain": "matmul_plain", "numba": "matmul_numba", "reordered": "matmul_reordered",
    "tiled": "matmul_tiled", "parallel": "matmul_parallel",
}  # fmt: skip
"""The versions that step 12 measures, and their functions."""


def run_race(parsed: argparse.Namespace) -> int:
    """Measure the engines, draw bars, and name what to speed up next."""
    folder = require_folder(parsed).path
    if parsed.json is not None and not parsed.json.parent.is_dir():
        raise ValueError(f"there is no folder {parsed.json.parent} for --json; make it first")
    parts = load_parts(folder.resolve())
    engines = _engines(parts, folder)
    runs = (parsed.rounds + 1) * len(WORKLOADS) * len(engines)
    with progress_bar(total=runs, desc="race", leave=False) as bar:
        rates = race(engines, WORKLOADS, parsed.rounds, bar.update)
    times = profile(engines[_YOURS], parts, WORKLOADS)
    matmul = _matmul(parts)
    for title, figures in rates.items():
        draw(f"{title}, in tokens a second", figures)
    _print_profile(times)
    if matmul:
        draw("matmul of step 12, 192 x 768 x 3072, in 10^9 operations a second", matmul)
    record = {
        "benchmark": "learn race",
        "model": BUNDLED_MODEL,
        "rounds": parsed.rounds,
        "tokens_per_s": rates,
        "functions": [asdict(one) for one in times],
        "matmul_gflops": matmul,
    }
    about = {"settings": f"{BUNDLED_MODEL}, float32, {counted(parsed.rounds, 'round')}, medians"}
    ratios = {
        f"yours / numpy, {title}": f"{figures[_YOURS] / figures['numpy']:.2f}"
        for title, figures in rates.items()
    }
    publish(about, ratios, record, parsed.json)
    return 0


def draw(title: str, figures: Mapping[str, float]) -> None:
    """Print figures as bars; the longest is the largest."""
    largest = max(figures.values())
    width = max(map(len, figures))
    print(title)
    for name, figure in figures.items():
        bar = "█" * max(round(_BAR * figure / largest), 1)
        print(f"  {name:{width}}  {bar:{_BAR}}  {figure:>10,.4g}  {figure / largest:6.1%}")
    print()


def _engines(parts: Parts, folder: Path) -> dict[str, Engine]:
    model = resolve_model(BUNDLED_MODEL)
    settings: dict[str, Any] = {
        "seed": 0, "enable_prefix_caching": False, "kv_cache_memory": "64MiB",
    }  # fmt: skip
    own = EngineConfig(backend="numpy", **settings)
    return {
        _YOURS: Engine.load(model, own, engine_parts_of(parts, folder)),
        "numpy": Engine.load(model, own),
        "numba": Engine.load(model, EngineConfig(backend="numba", **settings)),
    }


def _matmul(parts: Parts) -> dict[str, float]:
    """Return the figures of step 12 for the versions that the reader has written, and of `@`."""
    module, written = parts["step12_fast"], parts.written["step12_fast"]
    if not set(_VERSIONS.values()) & set(written):
        return {}
    with progress_bar(desc="matmul", bar_format="{desc}: {elapsed}", leave=False):
        found = module.measure(192, seconds=0.3)
    return {
        name: float(figure)
        for name, figure in found.items()
        if _VERSIONS.get(name, name) in written or name == "@"
    }


def _print_profile(times: list[FunctionTime]) -> None:
    """Print where the time of the reader's engine goes, and what to speed up next."""
    rows = [("share", "calls", "us each", "step", "code", "function")]
    for one in times[:_NUM_FUNCTIONS]:
        each_us = 1e6 * one.seconds / one.calls
        owner = "yours" if one.is_readers else "project's"
        share, step = f"{one.share:6.1%}", str(one.step)
        rows.append((share, f"{one.calls:,}", f"{each_us:,.0f}", step, owner, one.name))
    print("Where the time of your engine goes, without the time of nested functions")
    print_table(rows)
    others = 1 - sum(one.share for one in times)
    print(f"{others:6.1%}  outside the course's functions\n")
    own = [one for one in times if one.is_readers]
    if not own:
        print(f"Next: {_NOT_MEASURED}\n")
        return
    first = own[0]
    print(
        f"Next: {first.name} (step {first.step}) takes {first.share:.0%} of the time; twice as "
        f"fast, it would save {first.share / 2:.0%}. Step 12 shows how.\n"
    )
