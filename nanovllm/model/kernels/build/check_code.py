"""Emission of the check of an address (bounds.py), which needs LLVM."""

from typing import Any

from llvmlite import ir

from nanovllm.model.kernels.build.bounds import (
    ADDRESS,
    BYTES,
    FAULTS,
    LIST_OFFSET,
    REGIONS,
    SUBSTITUTE,
    Table,
    shared_table,
)
from nanovllm.model.kernels.build.layout import INT_BYTES

_INTEGER = ir.IntType(64)
_NAME = "nanovllm_checked"


def checked(builder: Any, address: Any, size: int, *, writes: bool) -> Any:
    """Emit a check of `size` bytes at an address; return the address, or that of a substitute."""
    table = shared_table()
    function = builder.module.globals.get(_NAME) or _emit(builder.module, table)
    return builder.call(
        function, [address, _INTEGER(size), _INTEGER(table.sink if writes else table.zeros)]
    )


def size_of(kind: Any) -> int:
    """Return the bytes of an LLVM scalar or vector type."""
    if isinstance(kind, ir.VectorType):
        return int(kind.count) * size_of(kind.element)
    if isinstance(kind, ir.IntType):
        return int(kind.width) // 8
    return {ir.FloatType(): 4, ir.DoubleType(): 8}[kind]


def _emit(module: Any, table: Table) -> Any:
    """Emit checked(address, size, substitute), a linear search of the regions.

    Every module has a copy, and linking merges them.
    """
    function = ir.Function(module, ir.FunctionType(_INTEGER, [_INTEGER] * 3), _NAME)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    address, size, substitute = function.args
    entry, head, compare, advance, inside, outside, done = (
        function.append_basic_block() for _ in range(7)
    )
    builder = ir.IRBuilder(entry)

    def pointer(address: Any) -> Any:
        return builder.inttoptr(address, ir.PointerType(_INTEGER))

    def field(index: int) -> Any:
        return pointer(_INTEGER(table.address + index * INT_BYTES))

    list_start = _INTEGER(table.address + LIST_OFFSET)
    regions = builder.load(field(REGIONS))
    list_end = builder.add(builder.mul(regions, _INTEGER(2 * INT_BYTES)), list_start)
    builder.branch(head)

    builder.position_at_end(head)
    region = builder.phi(_INTEGER)
    region.add_incoming(list_start, entry)
    builder.cbranch(builder.icmp_unsigned("<", region, list_end), compare, outside)

    builder.position_at_end(compare)
    start = builder.load(pointer(region))
    end = builder.load(pointer(builder.add(region, _INTEGER(INT_BYTES))))
    begins_inside = builder.and_(
        builder.icmp_unsigned(">=", address, start), builder.icmp_unsigned("<=", address, end)
    )
    fits = builder.icmp_unsigned(">=", builder.sub(end, address), size)
    builder.cbranch(builder.and_(begins_inside, fits), inside, advance)

    builder.position_at_end(advance)
    region.add_incoming(builder.add(region, _INTEGER(2 * INT_BYTES)), advance)
    builder.branch(head)

    builder.position_at_end(inside)
    builder.ret(address)

    builder.position_at_end(outside)
    faults_before = builder.atomic_rmw("add", field(FAULTS), _INTEGER(1), "seq_cst")
    with builder.if_then(builder.icmp_unsigned("==", faults_before, _INTEGER(0))):
        for index, value in ((ADDRESS, address), (BYTES, size), (SUBSTITUTE, substitute)):
            builder.store(value, field(index))
    builder.branch(done)

    builder.position_at_end(done)
    builder.ret(substitute)
    return function
