"""Decodes functions into operations on a warp. What is not known is refused here, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import access, compute
from .compute import SIGNATURES, Run
from .dtypes import FULL, NUMPY
from .operands import Operands
from .text import Module, split_operands

if TYPE_CHECKING:
    from .machine import Warp

# Kinds of operations. SIMPLE: a `Run`. CONVERGENT: a `Run` that lanes elsewhere in the warp must come to first. BRANCH:
# guard (or None), negated, target. TABLE: what reads the index, targets. BARRIER: what reads its name.
SIMPLE, CONVERGENT, BRANCH, TABLE, RETURN, BARRIER = range(6)
Operation = tuple[int, Any]

RUNS: dict[str, Callable[..., Run]] = {
    **dict.fromkeys(SIGNATURES, compute.decode_arithmetic),
    **dict.fromkeys(("addc", "subc", "madc"), compute.decode_carry_chain),
    "mov": compute.decode_move,
    "cvt": compute.decode_conversion,
    "setp": compute.decode_comparison,
    "selp": compute.decode_selection,
    "ld": access.decode_load,
    "st": access.decode_store,
    "atom": access.decode_atomic,
    "cvta": access.decode_generic_address,
}
CONVERGENT_RUNS: dict[str, Callable[..., Run]] = {
    "shfl": access.decode_shuffle,
    "ldmatrix": access.decode_matrix_load,
    "stmatrix": access.decode_matrix_store,
}


class Kernel:
    """The entry of a module, decoded with what it calls.

    Attributes:
        module: The module.
        code: Function -> its operations; one more than instructions, which returns.
        unit: Bytes of the smallest access: a word of the race detector.
    """

    def __init__(self, text: str) -> None:
        self.module = module = Module(text)
        self.code: dict[str, list[Operation]] = {}
        for name, function in module.functions.items():
            operations = [_decode(Operands(module, function, pc)) for pc in range(len(function.instructions))]
            self.code[name] = [*operations, (RETURN, None)]
        instructions = [i for function in module.functions.values() for i in function.instructions]
        accesses = [i for i in instructions if i.opcode in ("ld", "st", "atom") and "param" not in i.modifiers]
        self.unit = min((NUMPY[i.modifiers[-1]].itemsize for i in accesses), default=4)


def _decode(o: Operands) -> Operation:
    try:
        kind, operation = _decode_unguarded(o)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise o.refuse(f"cannot decode, {error!r}") from error
    if o.modifiers:
        raise o.refuse(f"modifiers {o.modifiers} not implemented")
    if o.instruction.guard and kind != BRANCH:
        if kind != SIMPLE:
            raise o.refuse("guard not implemented here")
        return SIMPLE, _guarded(o, operation)
    return kind, operation


def _guarded(o: Operands, run: Run) -> Run:
    guard, negated = o.register(o.instruction.guard)[0], o.instruction.negated

    def guarded(w: Warp, mask: Any) -> None:
        wanted = ~w.registers[guard] if negated else w.registers[guard]
        wanted = wanted if mask is None else wanted & mask
        if wanted.all():
            run(w, None)
        elif wanted.any():
            run(w, wanted)

    return guarded


def _decode_unguarded(o: Operands) -> Operation:
    opcode, operands = o.instruction.opcode, o.instruction.operands
    if opcode in ("add", "sub", "mad") and "cc" in o.modifiers:
        return SIMPLE, compute.decode_carry_chain(o, *operands)
    if opcode in RUNS:
        return SIMPLE, RUNS[opcode](o, *operands)
    if opcode in CONVERGENT_RUNS:
        return CONVERGENT, CONVERGENT_RUNS[opcode](o, *operands)
    if opcode in CONTROL:
        return CONTROL[opcode](o, *operands)
    raise o.refuse()


# -- control -----------------------------------------------------------------------------------------------------------
def _decode_branch(o: Operands, label: str) -> Operation:
    o.take("uni")
    guard = o.register(o.instruction.guard)[0] if o.instruction.guard else None
    return BRANCH, (guard, o.instruction.negated, o.function.labels[label])


def _decode_table_branch(o: Operands, index: str, table: str) -> Operation:
    o.take("idx")
    return TABLE, (o.source(index, "u32"), [o.function.labels[label] for label in o.function.tables[table]])


def _decode_return(o: Operands) -> Operation:
    if o.instruction.guard:
        guard = o.register(o.instruction.guard)[0]
        return BRANCH, (guard, o.instruction.negated, len(o.function.instructions))
    return RETURN, None


def _decode_barrier(o: Operands, *operands: str) -> Operation:
    if o.take("warp"):
        o.take("sync")
        return CONVERGENT, lambda w, mask: w.grid.races.join([w], FULL if mask is None else mask)
    if not o.take("sync"):
        raise o.refuse()
    (name,) = operands
    return BARRIER, o.source(name, "u32")


def _decode_call(o: Operands, *operands: str) -> Operation:
    """Calls a function of the module; results come first, in brackets, if there are any."""
    o.take("uni")
    results = split_operands(operands[0][1:-1]) if operands[0].startswith("(") else []
    name, *rest = operands[bool(results) :]
    arguments = split_operands(rest[0][1:-1]) if rest else []
    callee = o.module.functions[name]

    def run(w: Warp, mask: Any) -> None:
        given = {name: w.params[own] for (name, _), own in zip(callee.params, arguments, strict=True)}
        active = (FULL if mask is None else mask)[:, None]
        for name, value in zip(results, w.call(callee, mask, given), strict=True):
            w.params[name] = np.where(active, value, w.params.get(name, value))

    return SIMPLE, run


CONTROL: dict[str, Callable[..., Operation]] = {
    "bra": _decode_branch,
    "brx": _decode_table_branch,
    "ret": _decode_return,
    "exit": _decode_return,
    "bar": _decode_barrier,
    "barrier": _decode_barrier,
    "call": _decode_call,
}
