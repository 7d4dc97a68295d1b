"""Peak multiply-adds a second of this CPU's instructions, and the faster ones for bfloat16.

A CPU may have dot products of bfloat16 that are slower than multiply-adds of float32: with those,
an AMD Zen 4 computes twice as many operations a second as in float32, an Intel Emerald Rapids half
as many or fewer. So both are measured at the first start. The result is kept with the compiled
kernels, because it decides the bits of the output.

The measured loops are many independent chains of one instruction, in LLVM's language and without
Numba.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from hashlib import sha256
from typing import Any, NamedTuple

from nanovllm.model.kernels.build.codegen import (
    Library,
    LLVMCpu,
    choice_of,
    cpu_of_linux,
    create_target_machine,
    host_cpu,
    llvm,
    this_cpu,
)
from nanovllm.model.kernels.build.object_cache import MEASURED, user_cache
from nanovllm.model.kernels.build.shipped import find_shipped
from nanovllm.model.machine import cpu_name

BFLOAT16_VARIABLE = "NANOVLLM_BFLOAT16"
LEAST_GAIN = 1.2
"""A special instruction must be so much faster, so that noise does not decide."""
_PEAK_S = 0.03
_READINGS, _ROUNDS = 4, 3
_WORD = 0x3F803F80
"""What is multiplied: 1.0 in bfloat16, about that in float32."""
_FORMAT = 1
"""Of what is kept; another number makes every start measure once more."""


class Instruction(NamedTuple):
    """A multiply-add of vectors, in LLVM's language.

    Attributes:
        name: name of the intrinsic function.
        total, factor: types of the vector that it adds to, and of its factors.
        arguments: its arguments: a factor twice, and the total.
        per_word: numbers of a factor in 32 bits.
    """

    name: str
    total: str
    factor: str
    arguments: str
    per_word: int


def instruction(kind: str, lanes: int) -> Instruction:
    """Return the multiply-add of a type: "float32", "bfloat16" or "int8".

    Dot products in vectors of 4 lanes are ARM's. They multiply signed by signed bytes, those of x86
    unsigned by signed ones.
    """
    bits, floats = 32 * lanes, f"<{lanes} x float>"
    if kind == "float32":  # without FMA, this is a multiplication and an addition
        name = f"llvm.fmuladd.v{lanes}f32"
        return Instruction(name, floats, floats, "{factor}, {factor}, {total}", 1)
    order = "{total}, {factor}, {factor}"
    if kind == "bfloat16":
        x86 = f"llvm.x86.avx512bf16.dpbf16ps.{bits}"
        name = "llvm.aarch64.neon.bfdot.v4f32.v8bf16" if lanes == 4 else x86
        return Instruction(name, floats, f"<{2 * lanes} x bfloat>", order, 2)
    if kind != "int8":
        raise ValueError(f"no multiply-add of {kind} is known; give float32, bfloat16 or int8")
    x86 = f"llvm.x86.avx512.vpdpbusd.{bits}"
    name = "llvm.aarch64.neon.sdot.v4i32.v16i8" if lanes == 4 else x86
    return Instruction(name, f"<{lanes} x i32>", f"<{4 * lanes} x i8>", order, 4)


def _assembly(kind: str, lanes: int) -> str:
    """Return LLVM code of spin(count, word) -> the bits of a lane of the chains, all of them equal.

    Each chain adds `count` products of a vector of words with itself.
    """
    name, total, factor, arguments, _ = instruction(kind, lanes)
    words, numbers = f"<{lanes} x i32>", range(_chains(lanes))
    call = arguments.format(factor=f"{factor} %factor", total=f"{total} %total#")
    lines = {
        "totals": f"%total# = phi {total} [ zeroinitializer, %entry ], [ %new#, %loop ]",
        "calls": f"%new# = call {total} @{name}({call})",
        "bits": f"%bits# = bitcast {total} %new# to {words}",
    }
    every = {
        key: "\n  ".join(line.replace("#", str(number)) for number in numbers)
        for key, line in lines.items()
    }
    joined = "\n  ".join(
        f"%all{number} = or {words} %{'all' if number > 1 else 'bits'}{number - 1}, %bits{number}"
        for number in numbers[1:]
    )
    return f"""
declare {total} @{name}({arguments.format(factor=factor, total=total)})
define i32 @spin(i64 %count, i64 %word) {{
entry:
  %narrow = trunc i64 %word to i32
  %first = insertelement {words} undef, i32 %narrow, i32 0
  %words = shufflevector {words} %first, {words} undef, {words} zeroinitializer
  %factor = bitcast {words} %words to {factor}
  br label %loop
loop:
  %index = phi i64 [ 0, %entry ], [ %next, %loop ]
  {every["totals"]}
  {every["calls"]}
  %next = add i64 %index, 1
  %continues = icmp slt i64 %next, %count
  br i1 %continues, label %loop, label %end
end:
  {every["bits"]}
  {joined}
  %result = extractelement {words} %all{numbers[-1]}, i32 0
  ret i32 %result
}}
"""


@cache
def make_spin(kind: str, lanes: int) -> tuple[Callable[[int, int], int], int]:
    """Return spin(count, word) and its number of chains; see `_assembly`."""
    library = Library(find_shipped(peak_name(kind, lanes)) or emit_spin(kind, lanes), ["spin"])
    return library.functions["spin"], _chains(lanes)


def _chains(lanes: int) -> int:
    """Return how many instructions are under way at once.

    Two units with a latency of four cycles need eight chains; AVX has registers for 12, AVX-512 and
    NEON for 16.
    """
    return 12 if lanes == 8 else 16


def peak_name(kind: str, lanes: int) -> str:
    """Return the name of the shared object of `spin` (shipped.py)."""
    return f"peak-{kind}-{lanes}"


def emit_spin(
    kind: str, lanes: int, cpu: LLVMCpu | None = None, *, is_shared: bool = False
) -> bytes:
    """Return the object file of `spin` for a CPU, by default the one that `host_cpu` names."""
    module = llvm().parse_assembly(_assembly(kind, lanes))
    machine = create_target_machine(cpu or host_cpu(), is_shared=is_shared)
    return bytes(machine.emit_object(module))


def measure_instruction(kind: str, lanes: int, threads: int = 1) -> float:
    """Return multiplications and additions a second of `threads` threads together."""
    spin, chains = make_spin(kind, lanes)
    operations = chains * lanes * 2 * instruction(kind, lanes).per_word
    return measure_spin(spin, operations, threads)


def measure_spin(spin: Callable[[int, int], int], operations: int, threads: int) -> float:
    """Return operations a second of threads that call spin(count, word): `operations` a count."""
    with ThreadPoolExecutor(threads) as pool:

        def run(count: int) -> float:
            started_s = time.perf_counter()
            list(pool.map(spin, [count] * threads, [_WORD] * threads))
            return time.perf_counter() - started_s

        run(1)
        count = 1000
        while run(count) < _PEAK_S:
            count *= 2
        best_s = min(run(count) for _ in range(_READINGS))
    return count * operations * threads / best_s


def bfloat16_choice() -> str:
    """Return dot products ("dot") or multiply-adds of weights widened to float32, or "".

    Raises ValueError as `choice_of` does.
    """
    return choice_of(BFLOAT16_VARIABLE, "dot", "float32")


@cache
def is_bfloat16_dot_faster(cpu: LLVMCpu, lanes: int) -> bool:
    """Return whether a CPU that has dot products of bfloat16 should use them.

    Another CPU's code, which this one cannot run, is not measured and uses them.
    """
    this = this_cpu()
    if "+avx512bf16" not in this.features.split(",") and cpu != this:
        return True
    kinds = ("bfloat16", "float32")
    speeds = keep_findings(f"bfloat16, {lanes} lanes", lambda: measure_by_turns(kinds, lanes))
    return bool(speeds["bfloat16"] >= LEAST_GAIN * speeds["float32"])


def keep_findings(about: str, find: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return what `find` returned when it was first called for `about`, if it could be kept.

    The key says what this machine's CPU is, in the same words with and without LLVM.
    """
    store = user_cache(MEASURED)
    key = sha256(repr((_FORMAT, cpu_name(), cpu_of_linux(), about)).encode()).hexdigest()
    content = store.load(key)
    if content is None:
        with store.exclusive(key):
            content = store.load(key)
            if content is None:
                content = json.dumps(find()).encode()
                store.save(key, content)
    kept: dict[str, Any] = json.loads(content)
    return kept


def measure_by_turns(
    kinds: Sequence[str], lanes: int, **others: Callable[[], float]
) -> dict[str, float]:
    """Return operations a second of instructions on one thread, and what the others measure.

    They take turns, because another program may slow one turn; the best of each counts.
    """
    measures = {kind: partial(measure_instruction, kind, lanes) for kind in kinds} | others
    rounds = [{name: measure() for name, measure in measures.items()} for _ in range(_ROUNDS)]
    return {name: max(speeds[name] for speeds in rounds) for name in measures}
