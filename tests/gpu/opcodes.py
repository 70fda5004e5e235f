"""What instructions do to the registers and predicates of a thread, as far as the way through a kernel hangs on it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.gpu.sass import WORD, Instruction

if TYPE_CHECKING:
    from tests.gpu.warp import Warp

REGISTER = re.compile(r"^([-~|]*)(U?R)(Z|\d+)\|?((?:\.\w+)*)$")
CONSTANT = re.compile(r"^([-~]*)c\[0x0\]\[(0x[0-9a-f]+)\]((?:\.\w+)*)$")
_LOCAL = re.compile(r"^\[(R\d+)?\+?(-?0x[0-9a-f]+)?\]$")
Bits = tuple[int, int]  # a word, and which of its bits are known; the others are 0
UNKNOWN: Bits = (0, 0)


def signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def width(step: Instruction) -> int:
    """How many registers an instruction may write that is not followed."""
    if found := re.match(r"[HQI]GMMA\.\d+x(\d+)x", step.name):
        return int(found[1]) // 2
    if step.op in ("HMMA", "QMMA"):
        return 4
    if step.op == "LDTM":
        return next((int(x[1:]) for x in step.modifiers if re.match(r"^x\d+$", x)), 1)
    if step.op.startswith("F") and step.op.endswith("2"):
        return 2
    numbers = [int(x) // 32 for x in step.modifiers if x in ("64", "128", "256")]
    if step.op == "LDSM":
        return int(step.modifiers[-1]) if step.modifiers[-1].isdigit() else 1
    return max([1, *numbers, 2 * any(x in ("F64", "WIDE", "64", "U64", "S64") for x in step.modifiers)])


def _parts(step: Instruction) -> tuple[str, list[str], list[str]]:
    """The target, the predicates that are written behind it, and the operands that are read."""
    target, *rest = step.operands
    written = []
    while rest and re.match(r"^U?P(T|\d)$", rest[0]):
        written.append(rest.pop(0))
    return target, written, rest


def _add(warp: Warp, step: Instruction, sure: bool) -> None:
    target, written, rest = _parts(step)
    if "64" in step.modifiers:
        values = [warp.wide(x) for x in rest]
        warp.put(target, None if None in values else sum(values) & (1 << 64) - 1, sure, 2)  # type: ignore[arg-type]
        return
    numbers = [x for x in rest if not re.match(r"^!?U?P(T|\d)$", x)]
    total: int | None = 0
    for text in numbers:
        sign, x, _ = warp.words(text)
        if x is None or total is None:
            total = None
        else:
            total += (~x & WORD) + ("-" in sign) if sign else x
    if "X" in step.modifiers:
        for text in rest[len(numbers) :]:
            carry = warp.predicate(text)
            total = None if carry is None or total is None else total + carry
    for place, name in enumerate(written):
        warp.set(name, None if total is None else total >> 32 > place, sure)
    warp.put(target, None if total is None else total & WORD, sure)


def _multiply(warp: Warp, step: Instruction, sure: bool) -> None:
    target, written, rest = _parts(step)
    a, b = warp.value(rest[0]), warp.value(rest[1])
    wide = "WIDE" in step.modifiers
    c = warp.wide(rest[2]) if wide else warp.value(rest[2])
    if 0 in (a, b):
        a = b = 0
    if a is None or b is None or c is None:
        value = None
    else:
        if (wide or "HI" in step.modifiers) and "U32" not in step.modifiers:
            a, b = signed(a), signed(b)
        value = a * b
        value = (value >> 32) + c if "HI" in step.modifiers else value + c
        if "X" in step.modifiers:
            carry = warp.predicate(rest[3])
            value = None if carry is None else value + carry
    for name in written:
        warp.set(name, None, sure)
    warp.put(target, value, sure, 2 if wide else 1)


def _shift_add(warp: Warp, step: Instruction, sure: bool) -> None:
    """LEA a, b, [c,] shift [, carry]."""
    target, written, rest = _parts(step)
    carry: bool | None = False
    if "X" in step.modifiers:
        carry = warp.predicate(rest.pop())
    shift = int(rest[-1], 0) if rest[-1].startswith(("0x", "0")) else None
    sign, a, _ = warp.words(rest[0])
    b = warp.value(rest[1])
    high = "HI" in step.modifiers
    c = warp.value(rest[2]) if high and "SX32" not in step.modifiers and len(rest) == 4 else 0
    if None in (a, b, c, shift, carry):
        value = None
    else:
        assert a is not None and b is not None and c is not None and shift is not None and carry is not None  # noqa: PT018
        x = signed(a) if "SX32" in step.modifiers else c << 32 | a
        x = -x if "-" in sign else x
        x = (x << shift) >> 32 & WORD if high else x << shift & WORD
        value = x + b + carry
    for place, name in enumerate(written):
        warp.set(name, None if value is None else value >> 32 > place, sure)
    warp.put(target, value, sure)


def _shift(warp: Warp, step: Instruction, sure: bool) -> None:
    """SHF low, shift, high: a funnel."""
    target, _, rest = _parts(step)
    low, by, high = (warp.value(x) for x in rest)
    kinds, value = step.modifiers, None
    if by is not None:
        by = by & 63 if {"U64", "S64"} & {*kinds} else by & 31 if "W" in kinds else min(by, 32)
        if "L" in kinds and "HI" not in kinds:
            value = None if low is None else low << by
        elif "L" in kinds:
            value = None if low is None or high is None else (high << 32 | low) << by >> 32
        elif "HI" in kinds:
            value = None if high is None else (signed(high) if "S32" in kinds else high) >> by
        else:
            value = None if low is None or high is None else (high << 32 | low) >> by
    warp.put(target, None if value is None else value & WORD, sure)


def _logic(warp: Warp, step: Instruction, sure: bool) -> None:
    operands = list(step.operands)
    predicate = operands.pop(0) if re.match(r"^U?P(T|\d)$", operands[0]) else None
    target, *rest = operands
    table = int(rest[3], 16)
    can = [0, 0]  # bits that may be 0, and that may be 1, whatever the unknown ones are
    given = [warp.bits(x) for x in rest[:3]]
    for bits in itertools.product((0, 1), repeat=3):
        possible = WORD
        for (value, known), bit in zip(given, bits, strict=True):
            possible &= ~known | (value if bit else ~value)
        can[table >> (bits[0] * 4 + bits[1] * 2 + bits[2]) & 1] |= possible
    known, value = ~(can[0] & can[1]) & WORD, can[1] & ~can[0] & WORD
    if predicate is not None:
        warp.set(predicate, True if value else False if known == WORD else None, sure)
    if (register := REGISTER.match(target)) and register[3] != "Z":
        warp.put_bits(register[2] + register[3], (value, known), sure)


def _predicate_logic(warp: Warp, step: Instruction, sure: bool) -> None:
    first, second, *rest = step.operands
    inputs = [warp.predicate(x) for x in rest[:3]]
    for target, table in ((first, int(rest[3], 16)), (second, int(rest[4], 16))):
        results = set()
        for guess in itertools.product((False, True), repeat=inputs.count(None)):
            guesses = iter(guess)
            a, b, c = (next(guesses) if x is None else x for x in inputs)
            results.add(bool(table >> (a * 4 + b * 2 + c) & 1))
        warp.set(target, results.pop() if len(results) == 1 else None, sure)


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def _compare(warp: Warp, step: Instruction, sure: bool) -> None:
    first, second, left, right, other, *low = step.operands
    a, b = warp.value(left), warp.value(right)
    kind = step.modifiers[0]
    found: bool | None
    if kind in ("T", "F"):
        found = kind == "T"
    elif a is None or b is None:
        found = None
    else:
        if "U32" not in step.modifiers:
            a, b = signed(a), signed(b)
        found = _COMPARE[kind](a, b)
        if "EX" in step.modifiers:  # the upper halves; the lower ones were compared before
            below = warp.predicate(low[0])
            if kind == "EQ":
                found = warp.both(found, [below])
            elif a == b:
                found = below
            elif kind in ("LE", "GE"):
                found = a < b if kind == "LE" else a > b
    combine = next(x for x in step.modifiers if x in ("AND", "OR", "XOR"))
    given = warp.predicate(other)
    for target, value in ((first, found), (second, None if found is None else not found)):
        if combine == "AND":
            value = warp.both(value, [given])
        elif combine == "OR":
            value = True if True in (value, given) else None if None in (value, given) else False
        else:
            value = None if value is None or given is None else value != given
        warp.set(target, value, sure)


def _select(warp: Warp, step: Instruction, sure: bool) -> None:
    target, a, b, which = step.operands
    first = warp.predicate(which)
    x, y = warp.value(a), warp.value(b)
    warp.put(target, (x if x == y else None) if first is None else x if first else y, sure)


def _extremum(warp: Warp, step: Instruction, sure: bool) -> None:
    """IMNMX a, b, p: the least where p holds, else the greatest. VIADDMNMX: of a + b and c."""
    target, written, rest = _parts(step)
    *numbers, least = rest
    values = [warp.value(x) for x in numbers]
    value, way = None, warp.predicate(least)
    if None not in values and way is not None:
        given = [x for x in values if x is not None]
        if "ADD" in step.op:
            given = [given[0] + given[1] & WORD, given[2]]
        unsigned = "U32" in step.modifiers
        value = (min if way else max)(given, key=lambda x: x if unsigned else signed(x))
    for name in written:
        warp.set(name, None, sure)
    warp.put(target, value, sure)


def _move(warp: Warp, step: Instruction, sure: bool) -> None:
    words = 2 if "64" in step.modifiers else 4 if "128" in step.modifiers else 1
    source = step.operands[
        -2 if step.op == "MOV" and re.match(r"^0x\w+$", step.operands[-1]) and len(step.operands) > 2 else -1
    ]
    if words == 1:
        warp.put(step.operands[0], warp.value(source), sure)
    elif found := CONSTANT.match(source):
        for word in range(words):
            value = warp.constants.get(int(found[2], 16) + 4 * word)
            register = REGISTER.match(step.operands[0])
            if register and register[3] != "Z":
                warp.put(f"{register[2]}{int(register[3]) + word}", value, sure)
    else:
        warp.put(step.operands[0], warp.wide(source) if words == 2 else None, sure, words)


def _special(warp: Warp, step: Instruction, sure: bool) -> None:
    places = {f"SR_CTAID.{axis}": value for axis, value in zip("XYZ", warp.place, strict=True)}
    places |= dict.fromkeys(
        ("SR_TID.X", "SR_TID.Y", "SR_TID.Z", "SR_LANEID", "SRZ", "SR_CgaCtaId", "SR_VIRTUALSMID"), 0
    )
    places |= {"SR_CTAID": warp.place[0]}
    words = 2 if step.op == "CS2R" and "32" not in step.modifiers else 1
    warp.put(step.operands[0], places.get(step.operands[1]), sure, words)


def _first_lane(warp: Warp, step: Instruction, sure: bool) -> None:
    """SHFL p, target, source, …: all lanes have what thread 0 has, where it is known."""
    if "IDX" in step.modifiers:
        warp.put(step.operands[1], warp.value(step.operands[2]), sure)
    else:
        warp.put(step.operands[1], None, sure)
    warp.set(step.operands[0], None, sure)


def _vote(warp: Warp, step: Instruction, sure: bool) -> None:
    *targets, source = step.operands
    for target in targets:
        if re.match(r"^U?P\d$", target):
            warp.set(target, warp.predicate(source), sure)
        else:
            warp.put(target, None, sure)


def _arrived(warp: Warp, step: Instruction, sure: bool) -> None:
    """A barrier that is tried has been passed, thread 0 is the one elected, and there is tensor memory."""
    for target in step.operands:
        if re.match(r"^U?P\d$", target):
            warp.set(target, True, sure)
        elif REGISTER.match(target):
            warp.put(target, None, sure)


def _pack(warp: Warp, step: Instruction, sure: bool) -> None:
    """P2R target, PR, RZ, mask: the predicates as bits."""
    target, _, before, mask = step.operands
    bits = [place for place in range(7) if int(mask, 0) >> place & 1]
    known, rest = [warp.predicate(f"P{place}") for place in bits], warp.value(before)
    value = None if None in known or rest is None else rest & ~int(mask, 0)
    for place, bit in zip(bits, known, strict=True):
        value = None if value is None else value | bool(bit) << place
    warp.put(target, value, sure)


def _unpack(warp: Warp, step: Instruction, sure: bool) -> None:
    _, source, mask = step.operands
    value = warp.value(source)
    for place in range(7):
        if int(mask, 0) >> place & 1:
            warp.set(f"P{place}", None if value is None else bool(value >> place & 1), sure)


def _extend(warp: Warp, step: Instruction, sure: bool) -> None:
    """SGXT target, x, bits: the lowest bits, with their sign."""
    target, x, bits = step.operands
    value, size = warp.value(x), warp.value(bits)
    if value is not None and size is not None:
        value &= (1 << size) - 1
        if "U32" not in step.modifiers and value >> size - 1 & 1:
            value |= WORD & ~((1 << size) - 1)
    warp.put(target, None if size is None else value, sure)


def _ordinary(warp: Warp, step: Instruction, sure: bool) -> None:
    """FCHK: the operands of a division are ordinary numbers."""
    warp.set(step.operands[0], False, sure)


def _local(warp: Warp, step: Instruction, sure: bool) -> None:
    load = step.op == "LDL"
    target, address = step.operands if load else step.operands[::-1]
    words, found = width(step), _LOCAL.match(address)
    base = warp.value(found[1]) if found and found[1] else 0
    register = REGISTER.match(target)
    if found is None or base is None or register is None:
        if load:
            warp.put(target, None, sure, words)
        else:
            warp.local.clear()
        return
    at = base + int(found[2] or "0", 16)
    for word in range(words):
        name = "RZ" if register[3] == "Z" else f"R{int(register[3]) + word}"
        if load and name != "RZ":
            warp.put_bits(name, warp.local.get(at + 4 * word, UNKNOWN), sure)
        elif not load:
            warp.local[at + 4 * word] = warp.bits(name) if sure else UNKNOWN


def _permute(warp: Warp, step: Instruction, sure: bool) -> None:
    target, a, how, b = step.operands
    x, selector, y = (warp.value(t) for t in (a, how, b))
    value = None
    if None not in (x, selector, y) and not step.modifiers:
        assert x is not None and y is not None and selector is not None  # noqa: PT018
        both, value = y << 32 | x, 0
        for byte in range(4):
            pick = selector >> 4 * byte & 15
            part = both >> 8 * (pick & 7) & 255
            value |= (255 if pick & 8 and part >> 7 else 0 if pick & 8 else part) << 8 * byte
    warp.put(target, value, sure)


RULES: dict[str, Callable[[Warp, Instruction, bool], None]] = {
    **dict.fromkeys(("IADD3", "IADD", "VIADD"), _add),
    "IMAD": _multiply,
    "LEA": _shift_add,
    "SHF": _shift,
    "LOP3": _logic,
    "PLOP3": _predicate_logic,
    "ISETP": _compare,
    "SEL": _select,
    **dict.fromkeys(("IMNMX", "VIMNMX", "VIADDMNMX"), _extremum),
    **dict.fromkeys(("MOV", "LDC", "ULDC", "LDCU", "R2UR"), _move),
    **dict.fromkeys(("S2R", "S2UR", "CS2R"), _special),
    "SHFL": _first_lane,
    **dict.fromkeys(("VOTE", "VOTEU"), _vote),
    **dict.fromkeys(("SYNCS", "ELECT", "UTCATOMSWS"), _arrived),
    "FCHK": _ordinary,
    "P2R": _pack,
    "R2P": _unpack,
    "SGXT": _extend,
    **dict.fromkeys(("LDL", "STL"), _local),
    "PRMT": _permute,
}
