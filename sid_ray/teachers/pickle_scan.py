"""A look at a pickle before anything is built from it: what it names, and what it claims to hold.

`pickle` itself believes a file's numbers: a memo index of two billion is allocated, a tuple nested a million
times overflows the stack when it is hashed. The scan walks the opcodes without building a single object.
"""

from __future__ import annotations

import mmap
import pickletools
from pathlib import Path

DEEPEST_TUPLE = 50
NEVER = frozenset({"PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEXT_BUFFER", "READONLY_BUFFER"})
"""Opcodes for objects outside the file, extensions and old-style instances; no checkpoint has them."""
_TUPLES = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"})
_STORES = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_LOADS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_MARK = -1


class RefusedPickle(Exception):
    """The file asks for, or claims, something that no checkpoint needs; the message says what."""


def scan(path: Path) -> None:
    """RefusedPickle for opcodes, memo indices, lengths or nesting that no checkpoint has, and for what follows
    the pickle in the file. ValueError for a file that is no pickle."""
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            raise RefusedPickle("it is empty")
        # A memory map reads no more than there is, however much a length claims.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _walk(content)
            if content.tell() != len(content):
                raise RefusedPickle(f"{len(content) - content.tell()} bytes follow its end")


def _walk(content: mmap.mmap) -> None:
    stack: list[int] = []  # nesting of the tuple at each place; 0 for anything else, _MARK for a mark
    memo: dict[int, int] = {}
    for count, (opcode, argument, position) in enumerate(pickletools.genops(content)):  # type: ignore[arg-type]
        name = opcode.name
        if name in NEVER:
            raise RefusedPickle(f"it uses {name} at byte {position}, which no checkpoint needs")
        if name == "PROTO" and int(argument or 0) > 4:
            raise RefusedPickle(f"it is of pickle protocol {argument}; checkpoints have up to 4")
        if name == "FRAME" and int(argument or 0) > len(content):
            raise RefusedPickle(f"a frame at byte {position} claims {argument} bytes in a file of {len(content)}")
        if name in _STORES:
            index = len(memo) if name == "MEMOIZE" else int(argument or 0)
            if index > count:
                raise RefusedPickle(f"memo index {index} at byte {position} is beyond what the file can fill")
            memo[index] = stack[-1] if stack else 0
        elif name == "POP":
            stack[-1:] = []
        else:
            taken = _take(stack, opcode)
            depth = 1 + max([0, *taken]) if name in _TUPLES else 0
            if depth > DEEPEST_TUPLE:
                raise RefusedPickle(f"tuples are nested more than {DEEPEST_TUPLE} deep at byte {position}")
            if name in _LOADS:
                depth = memo.get(int(argument or 0), 0)
            elif name == "DUP":
                depth = max([0, *taken])
            elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):
                depth = 0
            stack.extend(_MARK if kind.name == "mark" else depth for kind in opcode.stack_after)


def _take(stack: list[int], opcode: pickletools.OpcodeInfo) -> list[int]:
    """Remove what the opcode takes from the stack, down to the last mark if it takes a slice."""
    kinds = [kind.name for kind in opcode.stack_before]
    if "mark" not in kinds:
        taken = stack[-len(kinds) :] if kinds else []
        stack[len(stack) - len(taken) :] = []
        return taken
    taken = []
    while stack and (top := stack.pop()) != _MARK:
        taken.append(top)
    for _ in range(kinds.index("mark")):
        if stack:
            taken.append(stack.pop())
    return taken
