"""PTX as text: modules, functions, and their instructions, registers and labels."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from .dtypes import NUMPY, STORAGE
from .faults import UnsupportedInstruction


class Instruction(NamedTuple):
    """One instruction, as it stands there.

    Attributes:
        text: All of it.
        guard: The predicate register that it depends on, or "".
        negated: It runs where the guard is false.
        opcode: ``ld`` of ``ld.global.b32``.
        modifiers: The words after the opcode.
        operands: The operands; a vector or an address is one.
        line: In the PTX.
        source: File and line that it was compiled from.
    """

    text: str
    guard: str
    negated: bool
    opcode: str
    modifiers: list[str]
    operands: list[str]
    line: int
    source: str

    def __str__(self) -> str:
        return f"{' '.join(self.text.split())!r} (PTX line {self.line}, {self.source})"


def split_operands(text: str) -> list[str]:
    """Splits at commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    return [*parts, text[start:].strip()] if text.strip() else []


class Function:
    """An entry or a function that it calls.

    Attributes:
        name: Its name.
        params: Name and declaration of each parameter.
        instructions: In order.
        labels: Label -> index of the instruction after it.
        tables: Label -> labels, of branches through a table.
        registers: Name -> index and dtype of its storage.
        local_variables: Name -> offset in the local memory of a thread.
        local_size: Bytes of them.
    """

    def __init__(self, name: str, params: str, body: str, first_line: int, files: dict[str, str]) -> None:
        self.name = name
        self.params = [(declared.split()[-1].split("[")[0], declared) for declared in split_operands(params)]
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}
        self.registers: dict[str, tuple[int, np.dtype[Any]]] = {}
        self.local_variables: dict[str, int] = {}
        self.local_size = 0
        # Blocks in braces have registers of their own.
        self._scopes: list[dict[str, str]] = [{}]
        self._parse(body, first_line, files)

    def _parse(self, body: str, first_line: int, files: dict[str, str]) -> None:
        pending, source, label = "", "?", ""
        for number, full_line in enumerate(body.split("\n"), first_line):
            line = full_line.strip()
            if location := re.match(r"\.loc\s+(\d+)\s+(\d+)", line):
                source = f"{files.get(location[1], '?')}:{location[2]}"
                continue
            while line := line.strip():
                if not pending and line[0] in "{}":
                    self._scopes.append({}) if line[0] == "{" else self._scopes.pop()
                    line = line[1:]
                elif not pending and (labelled := re.match(r"([\w$]+):(?!:)", line)):
                    label = labelled[1]
                    self.labels[label] = len(self.instructions)
                    line = line[labelled.end() :]
                else:
                    head, end, line = line.partition(";")
                    pending += f"{head} "
                    if end:
                        self._parse_statement(pending.strip(), number, source, label)
                        pending = ""

    def _parse_statement(self, text: str, line: int, source: str, label: str) -> None:
        if declared := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text):
            for name in split_operands(declared[2]):
                self._declare_registers(name, NUMPY[declared[1]], line)
        elif declared := re.match(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", text):
            start = -(-self.local_size // int(declared[1])) * int(declared[1])
            self.local_variables[declared[2]], self.local_size = start, start + int(declared[3])
        elif targets := re.match(r"\.branchtargets\s+(.*)", text):
            self.tables[label] = split_operands(targets[1])
        elif text.startswith((".pragma", ".param")):
            return
        else:
            match = re.fullmatch(r"(?:@(!?)([^\s]+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL)
            if match is None:
                raise UnsupportedInstruction(f"cannot read {text!r} (PTX line {line})")
            opcode, *modifiers = match[3].split(".")
            operands = [re.sub(r"[%\w$]+", lambda m: self._resolve(m[0]), part) for part in split_operands(match[4])]
            guard = self._resolve(match[2]) if match[2] else ""
            self.instructions.append(
                Instruction(text, guard, match[1] == "!", opcode, modifiers, operands, line, source)
            )

    def _declare_registers(self, name: str, dtype: np.dtype[Any], line: int) -> None:
        counted = re.fullmatch(r"(.*)<(\d+)>", name)
        for own in [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [name]:
            unique = own if len(self._scopes) == 1 else f"{own}@{line}"
            self._scopes[-1][own] = unique
            self.registers[unique] = (len(self.registers), dtype if dtype.kind == "b" else STORAGE[dtype.itemsize])

    def _resolve(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), name)


class Module:
    """A module: its functions, of which one is the entry, and its variables.

    Attributes:
        functions: By name.
        entry: Name of the entry.
        threads: Of a program.
        constants: Variables in memory that programs only read. Each in host memory of its own.
        shared: Name -> offset of variables in shared memory.
        static_shared: Bytes of them.
    """

    def __init__(self, text: str) -> None:
        plain = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), re.sub(r"//[^\n]*", "", text), flags=re.DOTALL)
        found = re.finditer(r'^\s*\.file\s+(\d+)\s+"(.*?)"', plain, re.MULTILINE)
        files = {match[1]: match[2].rsplit("/", 1)[-1] for match in found}
        self.functions: dict[str, Function] = {}
        self.entry = ""
        self.threads = int((re.findall(r"\.reqntid\s+(\d+)", plain) or ["0"])[0])
        self.constants: dict[str, Any] = {}
        self.shared: dict[str, int] = {}
        self.static_shared = 0
        head = re.compile(r"\.(entry|func)\s*(?:\(([^)]*)\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?([^{};]*)([{;])")
        outside, position = "", 0
        while match := head.search(plain, position):
            outside += plain[position : match.start()]
            position = match.end()
            if match[6] == "{":
                position = _end_of_block(plain, match.end())
                first_line = plain.count("\n", 0, match.end()) + 1
                body = plain[match.end() : position - 1]
                self.functions[match[3]] = Function(match[3], match[4] or "", body, first_line, files)
                self.entry = match[3] if match[1] == "entry" else self.entry
        variable = r"\.(global|const|shared)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(\[\d*\])?\s*(?:=\s*([^;]*))?;"
        for declared in re.finditer(variable, outside):
            self._declare(*declared.groups())

    def _declare(self, space: str, align: str, kind: str, name: str, count: str | None, values: str | None) -> None:
        dtype, number = NUMPY[kind], int(count[1:-1] or 0) if count else 1
        if space == "shared":
            start = -(-self.static_shared // int(align or 1)) * int(align or 1)
            self.shared[name], self.static_shared = start, start + number * dtype.itemsize
            return
        # 16 bytes more than needed, for an aligned start.
        raw = np.zeros(number * dtype.itemsize + 16, np.uint8)
        start = -raw.ctypes.data % 16
        self.constants[name] = raw[start : start + number * dtype.itemsize].view(dtype)
        if values:
            given = [int(value, 0) for value in values.strip("{} \n").split(",")]
            self.constants[name][: len(given)] = given


def _end_of_block(text: str, start: int) -> int:
    """Where the block ends whose opening brace is before ``start``."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.end()
    raise UnsupportedInstruction("unbalanced braces")
