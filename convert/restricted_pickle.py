"""Read a pickle as data: an interpreter of its opcodes that cannot run anything.

A pickle is a program. Python's own reader imports whatever that program names and calls it, and even its C version with
a strict ``find_class`` can be made to fill the memory by a single opcode. So this is a small machine of its own: a name
is looked up in the caller's table and nowhere else, a call reaches a function of that table and nothing else, and
opcodes that state dicts do not use are refused. Opcodes and their arguments are taken apart by the standard library's
``pickletools``, which reads no more than the data holds.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


class Refused(ValueError):
    """The pickle asks for something that is not data of the kinds we read."""


@dataclass(frozen=True)
class Named:
    """A name that the pickle asked for, with what the caller's table has for it."""

    name: str
    value: Any


@dataclass
class Machine:
    """A pickle's stack and memo.

    Attributes:
        known: what a name stands for: a function that the pickle may call, or a constant.
        persistent: makes an object of a persistent id.
        stack: the values since the last mark.
        marked: the stacks below, one per mark.
        memo: values to be used again. A dict, because the pickle chooses the numbers.
    """

    known: Mapping[str, Any]
    persistent: Callable[[Any], Any]
    stack: list[Any] = field(default_factory=list)
    marked: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        """Everything since the last mark."""
        values, self.stack = self.stack, self.marked.pop()
        return values

    def drop(self) -> None:
        """Forget the last value, or the last mark when nothing stands above it."""
        if self.stack:
            self.stack.pop()
        else:
            self.drop_mark()

    def drop_mark(self) -> None:
        self.stack = self.marked.pop()

    def find(self, name: str) -> None:
        if name not in self.known:
            raise Refused(f"asks for {name[:100]!r}, which is not part of a state dict")
        self.push(Named(name, self.known[name]))

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Named) or not callable(function.value) or not isinstance(arguments, tuple):
            raise Refused("calls something that is not a function of a state dict")
        self.push(function.value(*arguments))

    def set_items(self, values: list[Any]) -> None:
        table = self.stack[-1]
        if not isinstance(table, dict) or len(values) % 2:
            raise ValueError("its pickle puts items into something that is not a table")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Other keys name no tensor, and the hash of a nested tuple can take for ever.
            if isinstance(key, str):
                table[key] = value

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("its pickle appends to something that is not a list")
        self.stack[-1].extend(values)

    def last(self, count: int) -> tuple[Any, ...]:
        """Take ``count`` values off the stack."""
        if len(self.stack) < count:
            raise IndexError
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = (
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8",
)  # fmt: skip

# What an opcode does, given the machine and the opcode's own argument. Sets are read as lists: nothing looks into them.
OPCODES: dict[str, Callable[[Machine, Any], None]] = {
    **{name: lambda m, value: m.push(value) for name in LITERALS},
    **{name: lambda m, _, value=value: m.push(value) for name, value in CONSTANTS.items()},  # type: ignore[misc]
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "STOP": lambda m, _: None,
    "MARK": lambda m, _: m.mark(),
    "POP": lambda m, _: m.drop(),
    "POP_MARK": lambda m, _: m.drop_mark(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE1": lambda m, _: m.push(m.last(1)),
    "TUPLE2": lambda m, _: m.push(m.last(2)),
    "TUPLE3": lambda m, _: m.push(m.last(3)),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "LIST": lambda m, _: m.push(m.pop_mark()),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.pop_mark()),
    "EMPTY_SET": lambda m, _: m.push([]),
    "ADDITEMS": lambda m, _: m.extend(m.pop_mark()),
    "FROZENSET": lambda m, _: m.push(m.pop_mark()),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "SETITEM": lambda m, _: m.set_items(list(m.last(2))),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "PUT": lambda m, number: m.memo.update({number: m.stack[-1]}),
    "BINPUT": lambda m, number: m.memo.update({number: m.stack[-1]}),
    "LONG_BINPUT": lambda m, number: m.memo.update({number: m.stack[-1]}),
    "MEMOIZE": lambda m, _: m.memo.update({len(m.memo): m.stack[-1]}),
    "GET": lambda m, number: m.push(m.memo[number]),
    "BINGET": lambda m, number: m.push(m.memo[number]),
    "LONG_BINGET": lambda m, number: m.push(m.memo[number]),
    "GLOBAL": lambda m, name: m.find(name.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda m, _: m.find(".".join(m.last(2))),
    "BINPERSID": lambda m, _: m.push(m.persistent(m.pop())),
    "REDUCE": lambda m, _: m.call(),
    "BUILD": lambda m, _: m.drop(),  # attributes, such as a state dict's _metadata: of no use to us
}


def read_pickle(data: bytes, known: Mapping[str, Any], persistent: Callable[[Any], Any]) -> Any:
    """The object that a pickle describes, made of dicts, lists, tuples, numbers, text and what ``known`` gives.

    Args:
        data: the pickle, protocol 2 to 5.
        known: "module.name" to a function that the pickle may call or to a constant, which it gets as a ``Named``.
        persistent: makes an object of a persistent id.

    Returns:
        The object. Items of a dict whose key is not text are left out.

    Raises:
        Refused: the pickle asks for a name that is not in ``known``, or uses an opcode that makes objects.
        Exception: the pickle is damaged; of many kinds, as with Python's own reader.
    """
    machine = Machine(known, persistent)
    for opcode, argument, _ in pickletools.genops(data):  # ends behind STOP, or raises
        if opcode.name not in OPCODES:
            raise Refused(f"uses the pickle instruction {opcode.name}, which is not part of a state dict")
        OPCODES[opcode.name](machine, argument)
    return machine.pop()
