"""How kernels are compiled: one decorator for all of them, and one object file for all that Python calls."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numba
import numba.core.config
import numba.extending
from llvmlite import binding, ir

from nanovllm.model.kernels.processor import Processor, create_target_machine
from nanovllm.model.kernels.target import CHECKS_ADDRESSES

F = TypeVar("F", bound=Callable[..., Any])

ARGUMENTS = (numba.intp, numba.intp)
"""What a function takes that Python calls: an address and the number of a thread."""


def compiled(function: F) -> F:
    """Compile with Numba when first called: without the interpreter's lock, without exceptions, without fast-math.

    Fast-math would let the compiler reorder sums, and then a row's bits would depend on the tile it is computed in.
    """
    return cast("F", numba.njit(nogil=True, error_model="numpy", boundscheck=False, fastmath=False)(function))


def intrinsic(function: Callable[..., Any]) -> Any:
    """A function for compiled code whose code `function` generates; see numba.extending.intrinsic."""
    return numba.extending.intrinsic(function)


@contextmanager
def without_optimising() -> Iterator[None]:
    """Let Numba only translate to LLVM: it would optimise each function anew in every function that calls it, and `link` does all at once."""
    settings: Any = numba.core.config  # its names are made when it is imported
    level = settings.OPT
    settings.OPT = 0
    try:
        yield
    finally:
        settings.OPT = level


def link(functions: Mapping[str, Any], machine: Any) -> Any:
    """One optimised LLVM module of functions compiled for ARGUMENTS, each under its name as a C function that returns Numba's status.

    Nothing of Python is left in it: what Numba makes for calls from the interpreter falls away, as nobody calls it. Code that checks its
    addresses is not optimised as far: it is slow in any case, and there is much more of it to compile.
    """
    module = binding.parse_assembly("")
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    for name, function in functions.items():
        module.link_in(binding.parse_assembly(function.inspect_llvm(ARGUMENTS)))
        module.link_in(binding.parse_assembly(str(_exported(name, function))))
    for value in (*module.functions, *module.global_variables):
        if not value.is_declaration and value.name not in functions:
            value.linkage = "internal"
    module.verify()
    builder = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=1 if CHECKS_ADDRESSES else 3))
    builder.getModulePassManager().run(module, builder)
    return module


def emit_object(functions: Mapping[str, Any], processor: Processor) -> bytes:
    """The object file of `link` for a processor."""
    machine = create_target_machine(processor)
    return bytes(machine.emit_object(link(functions, machine)))


def _exported(name: str, function: Any) -> ir.Module:
    """A function `name` that calls a compiled function in the way in which Numba's functions call each other."""
    overload = function.overloads[ARGUMENTS]
    convention, returns = function.targetctx.call_conv, overload.signature.return_type
    module = ir.Module(name=name)
    native = ir.Function(module, convention.get_function_type(returns, ARGUMENTS), overload.fndesc.llvm_func_name)
    exported = ir.Function(module, ir.FunctionType(ir.IntType(32), [ir.IntType(64)] * 2), name)
    builder = ir.IRBuilder(exported.append_basic_block())
    status, _ = convention.call_function(builder, native, returns, ARGUMENTS, exported.args)
    builder.ret(status.code)
    return module
