"""How kernels are compiled: one decorator for all of them, and one object file for all that Python calls.

    Python  --Numba-->  LLVM code of each function  --link-->  one module, optimised once  -->  one object file

Numba by itself goes all the way for every function: it optimises it with all that it calls, and makes machine code of it, which takes longer than
all the rest and which nobody would run. So the functions of this package have a target of their own, whose code generation stops at LLVM.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeVar, cast

import numba
import numba.extending
from llvmlite import binding, ir
from numba.core import codegen, registry, types

from nanovllm.model.kernels.build.codegen import LLVMCpu, create_target_machine
from nanovllm.model.kernels.build.target import CHECKS_ADDRESSES

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "boundscheck": False,
    "fastmath": False,
}

_OUTLINED: set[str] = set()
"""Parts of the names in LLVM code of the functions that are never inlined."""

ARGUMENTS = (numba.intp, numba.intp)
"""What a function takes that Python calls: an address and the number of a thread."""


class _Translation(codegen.AOTCodeLibrary):
    """LLVM code of one function and of all that it calls, as it was translated."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = str(self._codegen.target_data)

    def _optimize_final_module(self) -> None:
        """Nothing: `link` does that."""

    def get_pointer_to_function(self, name: str) -> int:
        """No machine code, so no address of it."""
        self._ensure_finalized()
        return 0


class _Translator(codegen.AOTCPUCodegen):
    _library_class = _Translation

    def set_env(self, name: str, env: Any) -> None:
        """Nothing: there is no machine code to tell about Python."""


class _Target(registry.CPUTarget):
    """Numba's own target with another way of making code."""

    typing_context = registry.cpu_target.typing_context

    @cached_property
    def target_context(self) -> Any:
        context = registry.cpu_target.target_context
        context.refresh()  # what Numba makes once for all that use it, it makes itself
        return context.subtarget(_internal_codegen=_Translator("nanovllm"))


class _Kernel(registry.CPUDispatcher):
    """A function that Numba translates to LLVM, for other such functions and for `link`; called from Python, it is compiled as any other."""

    targetdescr = _Target("cpu")

    def __call__(self, *arguments: Any) -> Any:
        """Compile it after all, and call it."""
        return self._ordinary(*arguments)

    def get_call_template(self, args: Any, kws: Any) -> Any:
        """Translate once for all integers: Numba would do so again for each constant that is passed."""
        return super().get_call_template(tuple(map(types.unliteral, args)), kws)

    @cached_property
    def _ordinary(self) -> Any:
        return numba.njit(**_OPTIONS)(self.py_func)


def compiled(function: F) -> F:
    """Compile with Numba when first called: without the interpreter's lock, without exceptions, without fast-math.

    Fast-math would let the compiler reorder sums, and then a row's bits would depend on the tile it is computed in.
    """
    return cast(
        "F",
        _Kernel(
            function,
            targetoptions={
                "nopython": True,
                "no_cpython_wrapper": True,
                "no_cfunc_wrapper": True,
                **_OPTIONS,
            },
        ),
    )


def outlined(function: F) -> F:
    """As `compiled`, but called and never inlined: a function with many callers and little to gain."""
    _OUTLINED.add(f"{len(function.__name__)}{function.__name__}B")  # as Numba mangles its name
    return compiled(function)


def intrinsic(function: Callable[..., Any]) -> Any:
    """A function for compiled code whose code `function` generates; see numba.extending.intrinsic."""
    return numba.extending.intrinsic(function)


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
    for function in module.functions:
        if not function.is_declaration and any(part in function.name for part in _OUTLINED):
            function.add_function_attribute("noinline")
    module.verify()
    builder = binding.create_pass_builder(
        machine, binding.create_pipeline_tuning_options(speed_level=1 if CHECKS_ADDRESSES else 3)
    )
    builder.getModulePassManager().run(module, builder)
    return module


def emit_object(functions: Mapping[str, Any], processor: LLVMCpu) -> bytes:
    """The object file of `link` for a processor."""
    machine = create_target_machine(processor)
    return bytes(machine.emit_object(link(functions, machine)))


def _exported(name: str, function: Any) -> ir.Module:
    """A function `name` that calls a compiled function in the way in which Numba's functions call each other."""
    overload = function.overloads[ARGUMENTS]
    convention, returns = function.targetctx.call_conv, overload.signature.return_type
    module = ir.Module(name=name)
    native = ir.Function(
        module, convention.get_function_type(returns, ARGUMENTS), overload.fndesc.llvm_func_name
    )
    exported = ir.Function(module, ir.FunctionType(ir.IntType(32), [ir.IntType(64)] * 2), name)
    builder = ir.IRBuilder(exported.append_basic_block())
    status, _ = convention.call_function(builder, native, returns, ARGUMENTS, exported.args)
    builder.ret(status.code)
    return module
