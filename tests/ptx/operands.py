"""Modifiers and operands of an instruction, decoded into what reads and writes the registers of a warp."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .dtypes import NUMPY, STORAGE, WARP
from .faults import UnsupportedInstruction
from .text import Function, Instruction, Module, split_operands

if TYPE_CHECKING:
    from .machine import Warp

# What reads a value of every lane, and what writes one for the lanes of a mask (None: all of them).
Read = Callable[["Warp"], Any]
Write = Callable[["Warp", Any, Any], None]

SPECIAL: dict[str, Read] = {
    "%tid.x": lambda w: w.tid,
    "%ntid.x": lambda w: w.ntid,
    "%ctaid.x": lambda w: w.ctaid,
    "%nctaid.x": lambda w: w.nctaid,
}


class Operands:
    """The modifiers and operands of one instruction. What nobody takes or knows is refused.

    Attributes:
        module: Where it is.
        function: Where it is.
        pc: Its index there.
        instruction: As text.
        modifiers: Those not taken yet.
    """

    def __init__(self, module: Module, function: Function, pc: int) -> None:
        self.module, self.function, self.pc = module, function, pc
        self.instruction: Instruction = function.instructions[pc]
        self.modifiers = list(self.instruction.modifiers)

    def refuse(self, why: str = "not implemented") -> UnsupportedInstruction:
        """The error to raise."""
        return UnsupportedInstruction(f"{why}: {self.instruction}")

    # -- modifiers ----------------------------------------------------------------------------------------------------
    def take(self, *names: str) -> str:
        """Removes the first of these modifiers that is there, and returns it."""
        found = next((modifier for modifier in self.modifiers if modifier in names), "")
        if found:
            self.modifiers.remove(found)
        return found

    def take_type(self) -> str:
        """Removes the type at the end, and returns it."""
        if not self.modifiers or self.modifiers[-1] not in NUMPY:
            raise self.refuse("no known type")
        return self.modifiers.pop()

    # -- operands -----------------------------------------------------------------------------------------------------
    def vector(self, text: str) -> list[str]:
        """The parts of ``{a, b}``."""
        return split_operands(text.strip()[1:-1]) if text.startswith("{") else [text]

    def register(self, name: str) -> tuple[int, np.dtype[Any]]:
        """Index and storage of a register."""
        if name not in self.function.registers:
            raise self.refuse(f"operand {name!r} not implemented")
        return self.function.registers[name]

    def constant(self, text: str, dtype: np.dtype[Any]) -> Any:
        """An immediate, or the address of a variable, for every lane."""
        value: int
        if text in self.module.constants:
            value = self.module.constants[text].ctypes.data
        elif text in self.module.shared:
            value = self.module.shared[text]
        elif match := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
            size, code = (4, "<f") if match[1] in "fF" else (8, "<d")
            bits = int(match[2], 16)
            if dtype.kind == "f":
                return np.full(WARP, struct.unpack(code, bits.to_bytes(size, "little"))[0], dtype)
            value = bits
        elif re.fullmatch(r"[+-]?(0[xX][0-9a-fA-F]+|\d+)U?", text) and dtype.kind != "f":
            value = int(text.rstrip("U"), 16 if "x" in text.lower() else 10)
        else:
            raise self.refuse(f"operand {text!r} not implemented")
        if dtype.kind == "b":
            return np.full(WARP, bool(value))
        bits = 8 * dtype.itemsize
        if not -(1 << (bits - 1)) <= value < 1 << bits:
            raise self.refuse(f"immediate {text!r} does not fit")
        return np.full(WARP, value % (1 << bits), STORAGE[dtype.itemsize]).view(dtype)

    def source(self, text: str, kind: str) -> Read:
        """What reads an operand as a type."""
        dtype = NUMPY[kind]
        if text in SPECIAL:
            special = SPECIAL[text]
            return special if dtype == np.uint32 else lambda w: special(w).view(dtype)
        if text in self.function.local_variables:
            start = self.function.local_variables[text]
            return lambda w: np.full(WARP, w.local.base + start, dtype)
        if text not in self.function.registers:
            if text.startswith("%"):
                raise self.refuse(f"special register {text!r} not implemented")
            value = self.constant(text, dtype)
            return lambda w: value
        index, storage = self.register(text)
        if storage == dtype:
            return lambda w: w.registers[index]
        if storage.kind == "b" or dtype.kind == "b" or storage.itemsize < dtype.itemsize:
            raise self.refuse(f"{text} cannot be read as {kind}")
        if storage.itemsize == dtype.itemsize:
            return lambda w: w.registers[index].view(dtype)
        return lambda w: w.registers[index].astype(STORAGE[dtype.itemsize]).view(dtype)

    def destination(self, text: str, kind: str) -> Write:
        """What writes a register; a wider one gets the value extended."""
        if text == "_":
            return lambda w, value, mask: None
        index, storage = self.register(text)
        dtype = NUMPY[kind]
        if (storage.kind == "b") != (dtype.kind == "b") or storage.itemsize < dtype.itemsize:
            raise self.refuse(f"{text} cannot hold {kind}")
        wide = np.dtype(f"i{storage.itemsize}") if dtype.kind == "i" else storage

        def write(w: Warp, value: Any, mask: Any) -> None:
            if storage.itemsize > dtype.itemsize:
                value = value.astype(wide)
            if dtype != storage:
                value = value.view(storage)
            w.registers[index] = value if mask is None else np.where(mask, value, w.registers[index])

        return write

    def address(self, text: str) -> Read:
        """What reads ``[register + offset]`` or ``[variable + offset]``."""
        match = re.fullmatch(r"\[\s*([%\w$@.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if match is None:
            raise self.refuse(f"address {text!r} not implemented")
        offset = np.uint64(int(match[2] or "0", 0) % 2**64)
        if match[1] not in self.function.registers:
            start = self.source(match[1], "u64")
            return lambda w: start(w) + offset
        index, storage = self.register(match[1])
        if storage.itemsize == 8:
            return (lambda w: w.registers[index] + offset) if offset else (lambda w: w.registers[index])
        return lambda w: w.registers[index].astype(np.uint64) + offset
