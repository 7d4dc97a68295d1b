"""ARM's dot products: which CPUs have them, and the machine code of a tile on any machine."""

import re

import pytest
from llvmlite import binding, ir

from nanovllm.model.kernels.build.codegen import LLVMCpu
from nanovllm.model.kernels.build.target import KernelTarget, features_of
from nanovllm.model.kernels.simd.formats import weight_format
from nanovllm.model.kernels.simd.rows import Rows
from nanovllm.model.kernels.simd.tile import TILE_ROWS, TileInput, emit_tile
from nanovllm.model.kernels.simd.value import I64, Value
from nanovllm.model.kernels.simd.vector import Vectors

TRIPLE = "aarch64-unknown-linux-gnu"
DOTS = KernelTarget(lanes=4, bfloat16_dot=True, int8_dot=True)


@pytest.fixture(scope="module", autouse=True)
def arm() -> None:
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()


@pytest.mark.parametrize(
    ("name", "features", "expected"),
    [
        ("cortex-a72", "", set()),
        ("neoverse-n1", "", {"dotprod"}),
        ("apple-m1", "", {"dotprod"}),
        ("neoverse-v1", "", {"dotprod", "bf16"}),
        ("apple-m2", "", {"dotprod", "bf16"}),
        ("generic", "+dotprod,-bf16", {"dotprod"}),
        ("neoverse-v1", "-dotprod,+bf16", {"bf16"}),
    ],
)
def test_dot_products_follow_from_name_and_features(
    name: str, features: str, expected: set[str]
) -> None:
    assert features_of(LLVMCpu(TRIPLE, name, features)) == expected


@pytest.mark.parametrize(
    ("kind", "instruction"), [("float32", "fmla"), ("bfloat16", "bfdot"), ("int8", "sdot")]
)
def test_a_step_of_a_tile_is_dot_products_and_loads(kind: str, instruction: str) -> None:
    code = loop_of(assembly(DOTS, kind))
    found = [line.split()[0] for line in code]
    assert found.count(instruction) == TILE_ROWS * DOTS.panel_vectors
    others = set(found) - {instruction}
    assert others <= {"ldp", "ldr", "ld1r", "mov", "add", "subs", "b.ne"}, code
    assert not [line for line in code if "sp" in line], "accumulators stay in registers"


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_without_dot_products_weights_are_widened(kind: str) -> None:
    code = "\n".join(assembly(KernelTarget(lanes=4), kind))
    assert not re.search("bfdot|sdot", code)
    assert re.search("fmla" if kind == "bfloat16" else "mla", code)


def assembly(target: KernelTarget, kind: str) -> list[str]:
    """Return the instructions of a whole tile: tile(inputs, row_bytes, panel, steps, out)."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 5), "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    inputs, row_bytes, panel, steps, out = (Value(builder, each) for each in function.args)
    v, panel_format = Vectors(builder, target), weight_format(target, kind)
    zero = v.integers(0) if panel_format.accumulates_int32 else v.constant(0.0)
    sums = emit_tile(
        v,
        panel_format,
        TileInput(inputs, row_bytes, panel_format.input_bytes),
        [Rows(panel, v.scalar(4 * target.panel_width))],
        steps,
        [[zero] * target.panel_vectors] * TILE_ROWS,
    )
    for number, vector in enumerate(each for row in sums for each in row):
        v.store(vector, out, 16 * number)
    builder.ret_void()
    cpu = "neoverse-v1" if target.int8_dot else "cortex-a72"
    machine = binding.Target.from_triple(TRIPLE).create_target_machine(cpu=cpu, opt=3)
    text = machine.emit_assembly(optimized(str(module), machine))
    return [line.strip() for line in text.splitlines() if line.startswith(("\t", ".L"))]


def optimized(code: str, machine: binding.TargetMachine) -> binding.ModuleRef:
    module = binding.parse_assembly(code)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    builder = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options())
    builder.getModulePassManager().run(module, builder)
    return module


def loop_of(code: list[str]) -> list[str]:
    """Return the instructions of the innermost loop: from a label to the jump to it."""
    end = next(
        i
        for i, line in enumerate(code)
        if re.match(r"b\.\w+\t\.LBB0_\d+$", line) and f"{line.split()[1]}:" in " ".join(code[:i])
    )
    start = max(i for i, line in enumerate(code[:end]) if line.startswith(code[end].split()[1]))
    return [line for line in code[start + 1 : end + 1] if not line.startswith(".")]
