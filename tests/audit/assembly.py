"""Readers of PTX and AMDGCN text, as far as the retire protocol needs them."""

from __future__ import annotations

import re

from .control_flow import Instruction, Listing

# Where control flow cannot be read off the text.
OPAQUE_BRANCHES = ("brx", "call", "s_setpc", "s_swappc", "s_call", "s_cbranch_i_fork", "s_cbranch_g_fork")


class UnreadableError(ValueError):
    """The listing holds something these readers do not know."""


def _first_operand(operands: str) -> tuple[str, str]:
    """The first operand and the rest: split at the first comma outside brackets."""
    depth = 0
    for position, character in enumerate(operands):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            return operands[:position], operands[position + 1 :]
    return operands, ""


def _ptx_registers(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"%[a-z]+\d+", text))


def _read_ptx_instruction(text: str, source_line: int) -> Instruction:
    instruction = re.fullmatch(r"(?:@!?(%\w+)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL)
    if instruction is None:
        raise UnreadableError(f"cannot read {text!r}")
    guard, opcode, operands = instruction.groups()
    if opcode.startswith(OPAQUE_BRANCHES):
        raise UnreadableError(f"cannot follow {text!r}")
    if opcode.startswith("bra"):
        return Instruction(text, targets=(operands.strip(),), falls_through=guard is not None, source_line=source_line)
    if opcode in ("ret", "exit", "trap"):
        return Instruction(text, falls_through=guard is not None, source_line=source_line)
    parts = opcode.split(".")
    kind = {"ld": "load", "ldu": "load", "st": "store", "atom": "atomic", "red": "atomic"}.get(parts[0], "other")
    if any(part.startswith(("shared", "param", "const", "local")) for part in parts[1:2]):
        kind = "other"
    # A barrier for some threads alone, or under a guard, is none.
    if re.match(r"(bar|barrier)(\.cta)?\.sync", opcode) and guard is None and operands.strip() == "0":
        kind = "barrier"
    first, rest = _first_operand(operands)
    has_result = parts[0] not in ("st", "red", "bar", "barrier")
    return Instruction(
        text,
        kind,
        writes=_ptx_registers(first) if has_result else frozenset(),
        reads=_ptx_registers(rest if has_result else operands),
        addresses=_ptx_registers(" ".join(re.findall(r"\[(.*?)\]", operands))),
        loads_clock=_ptx_registers(first) if re.search(r"\[\w+_param_0\]", operands) else frozenset(),
        source_line=source_line,
    )


def parse_ptx(text: str) -> Listing:
    """Reads the entry of a PTX module.

    Raises:
        UnreadableError: There is no entry, or a branch whose targets are not in the text.
    """
    body = re.search(r"\.entry\s+\w+\(.*?\)[^{]*\n\{\n(.*?)\n\}", text, re.DOTALL)
    if body is None:
        raise UnreadableError("no entry in the PTX")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source_line = 0
    for line in body[1].splitlines():
        line = line.split("//")[0].strip()
        if location := re.match(r"\.loc\s+\d+\s+(\d+)", line):
            source_line = int(location[1])
        elif label := re.fullmatch(r"([\w$]+):", line):
            labels[label[1]] = len(instructions)
        else:
            # A brace that opens a statement or stands alone is a scope.
            statements = (part.strip().lstrip("{}").lstrip() for part in line.split(";"))
            instructions += [_read_ptx_instruction(s, source_line) for s in statements if s and not s.startswith(".")]
    return Listing(instructions, labels)


def _amdgcn_registers(text: str) -> list[str]:
    """Registers in order: ``s[2:3]`` is s2, s3."""
    registers = []
    for kind, single, first, last in re.findall(r"\b([sva])(?:(\d+)\b|\[(\d+):(\d+)\])", text):
        registers += [f"{kind}{number}" for number in range(int(single or first), int(single or last) + 1)]
    return registers


def _read_amdgcn_instruction(text: str, source_line: int) -> Instruction:
    opcode, _, operands = text.partition(" ")
    if opcode.startswith(OPAQUE_BRANCHES):
        raise UnreadableError(f"cannot follow {text!r}")
    if opcode.startswith(("s_branch", "s_cbranch")):
        is_conditional = opcode != "s_branch"
        return Instruction(text, targets=(operands,), falls_through=is_conditional, source_line=source_line)
    if opcode == "s_endpgm":
        return Instruction(text, falls_through=False, source_line=source_line)
    kind = "other"
    access = re.match(r"(?:global|flat|buffer|s)_(?:buffer_)?(load|store|atomic)", opcode)
    if access:
        kind = access[1]
    elif opcode == "s_barrier":
        kind = "barrier"
    first, rest = _first_operand(operands)
    # An atomic returns its old value only when asked to.
    has_result = kind != "store" and not re.match(r"ds_(write|add)|s_(barrier|waitcnt|nop|cmp|bitcmp)", opcode)
    if kind == "atomic" and not re.search(r"\b(sc0|glc)\b", operands):
        has_result = False
    reads = _amdgcn_registers(rest if has_result else operands)
    loads_clock: frozenset[str] = frozenset()
    if opcode.startswith("s_load") and re.fullmatch(r".*,\s*0x0", rest.strip()):
        # The clock's address is the first argument.
        loads_clock = frozenset(_amdgcn_registers(first)[:2])
    return Instruction(
        text,
        kind,
        writes=frozenset(_amdgcn_registers(first)) if has_result else frozenset(),
        reads=frozenset(reads),
        addresses=frozenset(reads) if kind != "other" else frozenset(),
        loads_clock=loads_clock,
        counter=("lgkmcnt" if opcode.startswith("s_") else "vmcnt") if kind == "load" else "",
        awaits=frozenset(re.findall(r"(\w+)\(0\)", operands)) if opcode == "s_waitcnt" else frozenset(),
        source_line=source_line,
    )


def parse_amdgcn(text: str) -> Listing:
    """Reads the kernel of an AMDGCN listing.

    Raises:
        UnreadableError: There is no kernel, or a branch whose targets are not in the text.
    """
    body = re.search(r"^\w+:\s*; @\w+\n(.*?)^\.Lfunc_end0:", text, re.DOTALL | re.MULTILINE)
    if body is None:
        raise UnreadableError("no kernel in the AMDGCN")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source_line = 0
    for line in body[1].splitlines():
        line = line.split(";")[0].strip()
        if location := re.match(r"\.loc\s+\d+\s+(\d+)", line):
            source_line = int(location[1])
        elif label := re.fullmatch(r"([\w.$]+):", line):
            labels[label[1]] = len(instructions)
        elif line and not line.startswith("."):
            instructions.append(_read_amdgcn_instruction(re.sub(r"\s+", " ", line), source_line))
    # The calling convention: s[0:1] points to the arguments.
    arguments = frozenset({("s0", "arguments"), ("s1", "arguments")})
    return Listing(instructions, labels, arguments)
