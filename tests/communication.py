"""What a compiled program sends between devices, read from its HLO."""

from __future__ import annotations

import re
from collections import Counter

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_LINE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


def collectives(program: str) -> list[tuple[str, list[tuple[int, ...]], int]]:
    """Return each collective of an HLO text: its kind, its results' shapes, and their bytes."""
    found = []
    for line in program.splitlines():
        if match := _LINE.search(line):
            shapes, size = [], 0
            for kind, text in _SHAPE.findall(match[1]):
                shape = tuple(int(number) for number in text.split(",") if number)
                shapes.append(shape)
                elements = 1
                for length in shape:
                    elements *= length
                size += BYTES[kind] * elements
            found.append((match[2], shapes, size))
    return found


def totals(program: str) -> Counter[str]:
    """Return the bytes of each kind of collective."""
    sums: Counter[str] = Counter()
    for kind, _, size in collectives(program):
        sums[kind] += size
    return sums
