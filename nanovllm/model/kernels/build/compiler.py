"""Decorators for compiled functions, and linking of all entries into one object file.

    Python --Numba--> LLVM IR of each function --link--> one module, optimised once --> object file

Numba alone would optimise every function together with its callees and generate machine code for
it. That takes longer than everything else, and nobody would run the result. The functions here have
a Numba target of their own, whose code generation stops at LLVM IR.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numba
import numba.extending
from llvmlite import binding, ir
from numba.core import codegen, event, registry, types

from nanovllm.model.kernels.build.codegen import LLVMCpu, create_target_machine
from nanovllm.model.kernels.build.target import CHECKS_ADDRESSES
from nanovllm.progress import progress_bar

if TYPE_CHECKING:
    from tqdm import tqdm

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "boundscheck": False,
    "fastmath": False,
}

_OUTLINED: set[str] = set()
"""Parts of the mangled names of the functions that are never inlined."""

ARGUMENTS = (numba.intp, numba.intp)
"""Arguments of an entry, a function that Python calls: an address and a thread number."""


class _Translation(codegen.AOTCodeLibrary):
    """Unoptimised LLVM IR of one function and its callees."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = str(self._codegen.target_data)

    def _optimize_final_module(self) -> None:
        """Do nothing: `link` optimises."""

    def get_pointer_to_function(self, name: str) -> int:
        """Return no address, because there is no machine code."""
        self._ensure_finalized()
        return 0


class _Translator(codegen.AOTCPUCodegen):
    _library_class = _Translation

    def set_env(self, name: str, env: Any) -> None:
        """Do nothing: there is no machine code that needs Python's environment."""


class _Target(registry.CPUTarget):
    """Numba's CPU target with another code generator."""

    typing_context = registry.cpu_target.typing_context

    @cached_property
    def target_context(self) -> Any:
        context = registry.cpu_target.target_context
        context.refresh()  # Numba builds its process-wide runtime with its own target, not ours
        return context.subtarget(_internal_codegen=_Translator("nanovllm"))


class _Kernel(registry.CPUDispatcher):
    """A function that Numba translates to LLVM IR, for other such functions and for `link`.

    Called from Python, it is compiled by Numba's own target.
    """

    targetdescr = _Target("cpu")

    def __call__(self, *arguments: Any) -> Any:
        """Compile to machine code with Numba's own target, and call it."""
        return self._njit(*arguments)

    def get_call_template(self, args: Any, kws: Any) -> Any:
        """Translate once for all integers, where Numba would specialise for each literal."""
        return super().get_call_template(tuple(map(types.unliteral, args)), kws)

    @cached_property
    def _njit(self) -> Any:
        return numba.njit(**_OPTIONS)(self.py_func)


def compiled(function: F) -> F:
    """Compile with Numba when first called: without the GIL, exceptions and fast-math.

    Fast-math would let the compiler reorder sums, so that a row's bits would depend on its tile.
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
    """Compile as `compiled` does, but never inline: for functions with many callers."""
    _OUTLINED.add(f"{len(function.__name__)}{function.__name__}B")  # as Numba mangles its name
    return compiled(function)


def intrinsic(function: Callable[..., Any]) -> Any:
    """Make a function for compiled code whose LLVM IR `function` emits; see numba.extending."""
    return numba.extending.intrinsic(function)


def link(functions: Mapping[str, Any], machine: Any) -> Any:
    """Link functions compiled for ARGUMENTS into one optimised LLVM module.

    Each is exported under its name as a C function that returns Numba's status. Numba's wrappers
    for calls from the interpreter are unreferenced and get eliminated. Code that checks addresses
    is optimised less: it is slow in any case, and there is much more of it to compile.
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


def emit_object(functions: Mapping[str, Any], cpu: LLVMCpu, *, is_shared: bool = False) -> bytes:
    """Return the object file of `link` for a CPU; `is_shared` as in create_target_machine."""
    machine = create_target_machine(cpu, is_shared=is_shared)
    return bytes(machine.emit_object(link(functions, machine)))


def _exported(name: str, function: Any) -> ir.Module:
    """Return a C function `name` that calls a compiled function by Numba's calling convention."""
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


def compile_entries(entries: Mapping[str, Any], cpu: LLVMCpu, *, is_shared: bool = False) -> bytes:
    """Compile functions, by name, to an object file; show a progress bar."""
    line = progress_bar(
        total=len(entries),
        bar_format="Compiling kernels for this CPU (once): "
        "{desc}{n}/{total} done{postfix} [{elapsed}]",
    )
    with line, event.install_listener("numba:compile", _Tell(line)):
        for name, function in entries.items():
            line.set_description(name)
            function.compile(ARGUMENTS)
            line.update()
        line.set_description("machine code")
        return emit_object(entries, cpu, is_shared=is_shared)


class _Tell(event.Listener):
    """Shows the function that Numba compiles, and how many it has compiled."""

    def __init__(self, line: "tqdm[Any]") -> None:
        self._line = line
        self._done = 0

    def on_start(self, event: Any) -> None:
        self._line.set_postfix_str(
            f"{self._done} functions, now {event.data['dispatcher'].py_func.__name__}"
        )

    def on_end(self, event: Any) -> None:
        self._done += 1
