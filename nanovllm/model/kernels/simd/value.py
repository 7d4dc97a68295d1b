"""Values of compiled code: Python's operators emit LLVM instructions.

    slope = 1.0 - t * t                 fmul, fsub
    whole = count & -lanes              and
    is_above = score > best             fcmp ogt

A `Value` is a scalar or a vector that is known only when the code runs. An operator on it emits an
instruction and returns the instruction's result. A Python number beside a value is a constant of
the value's type, in every lane of a vector. Integers are signed: `<`, `>>` and the conversions
follow C's int32 and int64. Comparisons of floats are false where either is NaN.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from nanovllm.model.kernels.build.check_code import size_of

F32, F64 = ir.FloatType(), ir.DoubleType()
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))

Operator = Callable[["Value", "Value | float"], "Value"]


def _operator(on_floats: str | None, on_integers: str | None) -> tuple[Operator, Operator]:
    """Return the methods of an operator and of its reflection.

    The names are those of IRBuilder's methods; None where the operator has no meaning.
    """

    def emit(self: "Value", a: "Value | float", b: "Value | float") -> "Value":
        name = on_floats if self._is_float else on_integers
        assert name is not None, f"no such operator for {self.type}"
        instruction = getattr(self.builder, name)
        return Value(self.builder, instruction(self._operand(a), self._operand(b)))

    return lambda self, other: emit(self, self, other), lambda self, other: emit(self, other, self)


def _comparison(operator: str) -> Operator:
    """Return the method of a comparison."""

    def emit(self: "Value", other: "Value | float") -> "Value":
        assert not (operator == "!=" and self._is_float)
        compare = self.builder.fcmp_ordered if self._is_float else self.builder.icmp_signed
        return Value(self.builder, compare(operator, self.ir, self._operand(other)))

    return emit


class Value:
    """A scalar or a vector of compiled code, and the builder that emits its operations.

    Attributes:
        builder: llvmlite's IRBuilder.
        ir: llvmlite's value.
    """

    __slots__ = ("builder", "ir")

    def __init__(self, builder: Any, ir_value: Any) -> None:
        """Wrap a value of llvmlite."""
        self.builder = builder
        self.ir = ir_value

    @property
    def type(self) -> Any:
        """The LLVM type."""
        return self.ir.type

    __add__, __radd__ = _operator("fadd", "add")
    __sub__, __rsub__ = _operator("fsub", "sub")
    __mul__, __rmul__ = _operator("fmul", "mul")
    __truediv__, __rtruediv__ = _operator("fdiv", None)
    __floordiv__ = _operator(None, "sdiv")[0]  # of integers that are not negative
    __and__ = _operator(None, "and_")[0]
    __or__ = _operator(None, "or_")[0]
    __xor__ = _operator(None, "xor")[0]
    __lshift__, __rlshift__ = _operator(None, "shl")
    __rshift__ = _operator(None, "ashr")[0]
    __lt__, __le__, __gt__, __ge__ = map(_comparison, ("<", "<=", ">", ">="))
    __eq__ = _comparison("==")  # type: ignore[assignment]
    __ne__ = _comparison("!=")  # type: ignore[assignment]

    def __neg__(self) -> "Value":
        return Value(self.builder, self.builder.fneg(self.ir))

    def __invert__(self) -> "Value":
        return Value(self.builder, self.builder.not_(self.ir))

    def lshr(self, other: "Value | int") -> "Value":
        """Emit the shift to the right that shifts zeros in."""
        return Value(self.builder, self.builder.lshr(self.ir, self._operand(other)))

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        """Refuse: a value is not known when the code is emitted."""
        raise TypeError("a Value has no truth when code is emitted; use Vectors.where or when")

    def not_below(self, other: "Value | float") -> "Value":
        """Emit not (self < other) of floats: self >= other, or either is NaN."""
        return Value(self.builder, self.builder.fcmp_unordered(">=", self.ir, self._operand(other)))

    def is_nan(self) -> "Value":
        """Emit whether a float is NaN."""
        return Value(self.builder, self.builder.fcmp_unordered("uno", self.ir, self.ir))

    def unsigned_at_least(self, other: "Value | int") -> "Value":
        """Emit self >= other of unsigned integers."""
        return Value(self.builder, self.builder.icmp_unsigned(">=", self.ir, self._operand(other)))

    def bitcast(self, element: Any) -> "Value":
        """Emit the same bits as another type; a vector of narrower elements has more lanes."""
        kind = element
        if isinstance(self.type, ir.VectorType):
            kind = ir.VectorType(element, size_of(self.type) // size_of(element))
        return Value(self.builder, self.builder.bitcast(self.ir, kind))

    def trunc(self, element: Any) -> "Value":
        """Emit the lower bits of an integer as a narrower one."""
        return Value(self.builder, self.builder.trunc(self.ir, self._shaped(element)))

    def zext(self, element: Any) -> "Value":
        """Emit a wider integer, extended by zeros."""
        return Value(self.builder, self.builder.zext(self.ir, self._shaped(element)))

    def sext(self, element: Any) -> "Value":
        """Emit a wider integer, extended by the sign."""
        return Value(self.builder, self.builder.sext(self.ir, self._shaped(element)))

    def to_float(self) -> "Value":
        """Emit the float32 of an integer."""
        return Value(self.builder, self.builder.sitofp(self.ir, self._shaped(F32)))

    def to_double(self) -> "Value":
        """Emit the float64 of a float32."""
        return Value(self.builder, self.builder.fpext(self.ir, self._shaped(F64)))

    def to_single(self) -> "Value":
        """Emit the float32 of a float64, rounded to nearest even."""
        return Value(self.builder, self.builder.fptrunc(self.ir, self._shaped(F32)))

    def lane(self, index: int) -> "Value":
        """Emit one lane of a vector."""
        return Value(self.builder, self.builder.extract_element(self.ir, I32(index)))

    @property
    def _is_float(self) -> bool:
        kind = self.type.element if isinstance(self.type, ir.VectorType) else self.type
        return kind in (F32, F64)

    def _shaped(self, element: Any) -> Any:
        """Return the type with as many lanes as this value, each of type `element`."""
        if isinstance(self.type, ir.VectorType):
            return ir.VectorType(element, self.type.count)
        return element

    def _operand(self, operand: "Value | float") -> Any:
        """Return an operand's llvmlite value; a number is a constant of this value's type."""
        return operand.ir if isinstance(operand, Value) else constant(self.type, operand)


def constant(kind: Any, number: float) -> Any:
    """Return llvmlite's constant of a scalar type, or of a vector type with it in every lane."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [ir.Constant(kind.element, number)] * kind.count)
    return ir.Constant(kind, number)
