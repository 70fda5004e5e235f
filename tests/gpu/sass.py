"""Which instructions a program of a compiled kernel would issue, and how often: its SASS followed without a GPU.

A warp's way through a kernel depends on the arguments' sizes, the program's number and the grid, and hardly ever on
what is in memory. So the integers and predicates of thread 0 are computed as the GPU would, everything else is
unknown, and each instruction on the way is counted, once for every time it would be issued. A branch that hangs on
something unknown is not taken (it skips what a bounds check or a special value makes needless), and is an error where
it closes or skips a loop.

Opcodes: NVIDIA, CUDA Binary Utilities, "Instruction Set Reference". Their operands are printed by nvdisasm.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

WORD = 0xFFFFFFFF
LIMIT = 20_000_000  # instructions of one warp; a loop that does not end would have more
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?)(U?P\w+)\s+)?(\S+)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_\w+|[.\w$]+):")
_REGISTER = re.compile(r"^([-~|]*)(U?R)(Z|\d+)\|?((?:\.\w+)*)$")
_CONSTANT = re.compile(r"^([-~]*)c\[0x0\]\[(0x[0-9a-f]+)\]((?:\.\w+)*)$")
_LOCAL = re.compile(r"^\[(R\d+)?\+?(-?0x[0-9a-f]+)?\]$")


@dataclass(frozen=True)
class Instruction:
    op: str  # without modifiers
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None  # the predicate that it hangs on, with "!" where it is negated

    @property
    def name(self) -> str:
        return ".".join((self.op, *self.modifiers))


@dataclass(frozen=True)
class Program:
    """The machine code of one kernel."""

    code: tuple[Instruction, ...]
    labels: dict[str, int]

    @classmethod
    def of(cls, cubin: bytes, nvdisasm: Path) -> Program:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel.cubin")
            path.write_bytes(cubin)
            done = subprocess.run([nvdisasm, "-c", path], capture_output=True, text=True, check=True)
        code: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in done.stdout.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(code)
            elif found := _LINE.search(line):
                negated, guard, name, operands = found.groups()
                op, *modifiers = name.split(".")
                code.append(Instruction(op, tuple(modifiers), _split(operands), f"{negated}{guard}" if guard else None))
        return cls(tuple(code), labels)

    @cached_property
    def matrix_instructions(self) -> Counter[str]:
        return Counter(i.name for i in self.code if i.op in ("HGMMA", "HMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA"))

    def run(self, constants: dict[int, int], program: tuple[int, int, int]) -> Counter[str]:
        """How often one warp issues each instruction, by its full name.

        Args:
            constants: the words of constant bank 0 by address, see :func:`constant_bank`.
            program: tl.program_id of the axes.
        """
        return _Warp(self, constants, program).run()


def constant_bank(
    arch: int, sizes: list[int], values: list[int], grid: tuple[int, int, int], threads: int
) -> dict[int, int]:
    """Constant bank 0 as a kernel finds it: its arguments, of those sizes in bytes, the grid and the block."""
    bank: dict[int, int] = {}
    base = 0x160 if arch < 90 else 0x210 if arch < 100 else 0x380
    block_at, grid_at = (0x0, 0xC) if arch < 100 else (0x360, 0x370)
    for place, word in enumerate((threads, 1, 1)):
        bank[block_at + 4 * place] = word
    for place, word in enumerate(grid):
        bank[grid_at + 4 * place] = word
    bank[0x28 if arch < 100 else 0x37C] = 0x10000  # the top of the stack
    for size, value in zip(sizes, values, strict=True):
        base = (base + size - 1) // size * size
        for word in range(max(1, size // 4)):
            bank[base + 4 * word] = value >> 32 * word & WORD
        base += size
    return bank


def matrix_flops(name: str) -> int:
    """Floating-point operations that one warp's share of a matrix instruction does; 0 for other instructions."""
    if found := re.match(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)", name):  # of a warpgroup, four warps
        m, n, k = map(int, found.groups())
        return 2 * m * n * k // 4
    if found := re.match(r"HMMA\.16(8)(4|8|16)\b", name):
        return 2 * 16 * int(found[1]) * int(found[2])
    return 0


def _split(operands: str) -> tuple[str, ...]:
    """At commas outside of brackets."""
    return tuple(x.strip() for x in re.split(r",(?![^\[\(]*[\]\)])", operands) if x.strip())


def _signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


_Bits = tuple[int, int]  # a word, and which of its bits are known; the others are 0
_UNKNOWN: _Bits = (0, 0)


@dataclass
class _Warp:
    program: Program
    constants: dict[int, int]
    place: tuple[int, int, int]
    registers: dict[str, _Bits] = field(default_factory=dict)
    predicates: dict[str, bool] = field(default_factory=dict)
    local: dict[int, _Bits] = field(default_factory=dict)

    def run(self) -> Counter[str]:
        code, labels = self.program.code, self.program.labels
        issued = [0] * len(code)
        at, turns, returns = 0, 0, []
        while at < len(code):
            step = code[at]
            issued[at] += 1
            turns += 1
            if turns > LIMIT:
                raise RuntimeError(f"more than {LIMIT} instructions: {step}")
            going = self._predicate(step.guard) if step.guard else True
            if step.op in ("EXIT", "RET", "BRA", "CALL"):
                if step.op == "BRA":
                    going = self._both(going, [self._predicate(x) for x in step.operands[:-1]])
                    goal = labels[step.operands[-1].strip("`()")]
                    if going is None and "DIV" not in step.modifiers and self._decides(at, goal):
                        raise RuntimeError(f"how often a loop turns is not known: {step}")
                    if going and "DIV" not in step.modifiers:
                        if goal == at:  # the trap behind a kernel's end
                            break
                        at = goal
                        continue
                elif step.op == "CALL" and going:
                    returns.append(at + 1)
                    at = labels[step.operands[-1].strip("`()")]
                    continue
                elif step.op == "RET" and going:
                    at = returns.pop()
                    continue
                elif step.op == "EXIT" and going:
                    break
            elif going is not False:
                self._execute(step, sure=going is True)
            at += 1
        counts: Counter[str] = Counter()
        for step, times in zip(code, issued, strict=True):
            if times:
                counts[step.name] += times
        return counts

    def _decides(self, at: int, goal: int) -> bool:
        """Whether a branch closes a loop, or skips one that does more than wait."""
        code, labels = self.program.code, self.program.labels
        if goal <= at:
            return True
        for end in range(at + 1, goal):
            start = labels[code[end].operands[-1].strip("`()")] if code[end].op == "BRA" else len(code)
            if start <= end and not any(step.op == "NANOSLEEP" for step in code[start:end]):
                return True
        return False

    @staticmethod
    def _both(a: bool | None, others: list[bool | None]) -> bool | None:
        all_of = [a, *others]
        return False if False in all_of else None if None in all_of else True

    # Operands

    def _predicate(self, text: str) -> bool | None:
        name = text.lstrip("!")
        value = True if name in ("PT", "UPT") else self.predicates.get(name)
        return value if value is None or not text.startswith("!") else not value

    def _words(self, text: str) -> tuple[str, int | None, int | None]:
        """The sign in front of an operand, its value, and that of the register behind it."""
        if found := _REGISTER.match(text):
            sign, kind, number, _ = found.groups()
            if number == "Z":
                return sign, 0, 0
            return sign, self._register(kind + number), self._register(f"{kind}{int(number) + 1}")
        if found := _CONSTANT.match(text):
            at = int(found[2], 16)
            return found[1], self.constants.get(at), self.constants.get(at + 4)
        if re.match(r"^-?(0x[0-9a-f]+|\d+)$", text):
            value = int(text, 0)
            return "", value & WORD, value >> 32 & WORD
        return "", None, None

    def _register(self, name: str) -> int | None:
        value, known = self.registers.get(name, _UNKNOWN)
        return value if known == WORD else None

    def bits(self, text: str) -> _Bits:
        """What is known of a word without a sign."""
        found = _REGISTER.match(text)
        if found and found[3] != "Z" and not found[1] and not found[4].startswith((".H", ".B")):
            return self.registers.get(found[2] + found[3], _UNKNOWN)
        value = self._value(text)
        return _UNKNOWN if value is None else (value, WORD)

    def _value(self, text: str) -> int | None:
        sign, x, _ = self._words(text)
        if x is None or "|" in sign or re.search(r"\.(H|B)\d", text):
            return None
        return -x & WORD if "-" in sign else ~x & WORD if "~" in sign else x

    def _wide(self, text: str) -> int | None:
        sign, low, high = self._words(text)
        if low is None or high is None or sign:
            return None
        return high << 32 | low

    # Results

    def _put(self, target: str, value: int | None, sure: bool, words: int = 1) -> None:
        found = _REGISTER.match(target)
        if found is None or found[3] == "Z":
            return
        for word in range(words):
            name = f"{found[2]}{int(found[3]) + word}"
            self.put_bits(name, _UNKNOWN if value is None else (value >> 32 * word & WORD, WORD), sure)

    def put_bits(self, name: str, new: _Bits, sure: bool) -> None:
        if not sure:  # bits that are the same either way
            value, known = self.registers.get(name, _UNKNOWN)
            known &= new[1] & ~(value ^ new[0])
            new = value & known, known
        self.registers[name] = new

    def _set(self, target: str, value: bool | None, sure: bool) -> None:
        if target in ("PT", "UPT"):
            return
        if value is None or not sure:
            self.predicates.pop(target, None)
        else:
            self.predicates[target] = value

    def _execute(self, step: Instruction, sure: bool) -> None:
        op = step.op
        if op not in _RULES and op.startswith("U"):
            op = op[1:]
        if op in _RULES:
            _RULES[op](self, step, sure)
            return
        for place, target in enumerate(step.operands):
            if re.match(r"^U?P(T|\d)$", target):
                self._set(target, None, sure)
            elif place == 0:
                self._put(target, None, sure, _width(step))
            else:
                break


def _width(step: Instruction) -> int:
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


def _add(warp: _Warp, step: Instruction, sure: bool) -> None:
    target, written, rest = _parts(step)
    if "64" in step.modifiers:
        values = [warp._wide(x) for x in rest]
        warp._put(target, None if None in values else sum(values) & (1 << 64) - 1, sure, 2)  # type: ignore[arg-type]
        return
    numbers = [x for x in rest if not re.match(r"^!?U?P(T|\d)$", x)]
    total: int | None = 0
    for text in numbers:
        sign, x, _ = warp._words(text)
        if x is None or total is None:
            total = None
        else:
            total += (~x & WORD) + ("-" in sign) if sign else x
    if "X" in step.modifiers:
        for text in rest[len(numbers) :]:
            carry = warp._predicate(text)
            total = None if carry is None or total is None else total + carry
    for place, name in enumerate(written):
        warp._set(name, None if total is None else total >> 32 > place, sure)
    warp._put(target, None if total is None else total & WORD, sure)


def _multiply(warp: _Warp, step: Instruction, sure: bool) -> None:
    target, written, rest = _parts(step)
    a, b = warp._value(rest[0]), warp._value(rest[1])
    wide = "WIDE" in step.modifiers
    c = warp._wide(rest[2]) if wide else warp._value(rest[2])
    if 0 in (a, b):
        a = b = 0
    if a is None or b is None or c is None:
        value = None
    else:
        if (wide or "HI" in step.modifiers) and "U32" not in step.modifiers:
            a, b = _signed(a), _signed(b)
        value = a * b
        value = (value >> 32) + c if "HI" in step.modifiers else value + c
        if "X" in step.modifiers:
            carry = warp._predicate(rest[3])
            value = None if carry is None else value + carry
    for name in written:
        warp._set(name, None, sure)
    warp._put(target, value, sure, 2 if wide else 1)


def _shift_add(warp: _Warp, step: Instruction, sure: bool) -> None:
    """LEA a, b, [c,] shift [, carry]."""
    target, written, rest = _parts(step)
    carry: bool | None = False
    if "X" in step.modifiers:
        carry = warp._predicate(rest.pop())
    shift = int(rest[-1], 0) if rest[-1].startswith(("0x", "0")) else None
    sign, a, _ = warp._words(rest[0])
    b = warp._value(rest[1])
    high = "HI" in step.modifiers
    c = warp._value(rest[2]) if high and "SX32" not in step.modifiers and len(rest) == 4 else 0
    if None in (a, b, c, shift, carry):
        value = None
    else:
        assert a is not None and b is not None and c is not None and shift is not None and carry is not None  # noqa: PT018
        x = _signed(a) if "SX32" in step.modifiers else c << 32 | a
        x = -x if "-" in sign else x
        x = (x << shift) >> 32 & WORD if high else x << shift & WORD
        value = x + b + carry
    for place, name in enumerate(written):
        warp._set(name, None if value is None else value >> 32 > place, sure)
    warp._put(target, value, sure)


def _shift(warp: _Warp, step: Instruction, sure: bool) -> None:
    """SHF low, shift, high: a funnel."""
    target, _, rest = _parts(step)
    low, by, high = (warp._value(x) for x in rest)
    kinds, value = step.modifiers, None
    if by is not None:
        by = by & 63 if {"U64", "S64"} & {*kinds} else by & 31 if "W" in kinds else min(by, 32)
        if "L" in kinds and "HI" not in kinds:
            value = None if low is None else low << by
        elif "L" in kinds:
            value = None if low is None or high is None else (high << 32 | low) << by >> 32
        elif "HI" in kinds:
            value = None if high is None else (_signed(high) if "S32" in kinds else high) >> by
        else:
            value = None if low is None or high is None else (high << 32 | low) >> by
    warp._put(target, None if value is None else value & WORD, sure)


def _logic(warp: _Warp, step: Instruction, sure: bool) -> None:
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
        warp._set(predicate, True if value else False if known == WORD else None, sure)
    if (register := _REGISTER.match(target)) and register[3] != "Z":
        warp.put_bits(register[2] + register[3], (value, known), sure)


def _predicate_logic(warp: _Warp, step: Instruction, sure: bool) -> None:
    first, second, *rest = step.operands
    inputs = [warp._predicate(x) for x in rest[:3]]
    for target, table in ((first, int(rest[3], 16)), (second, int(rest[4], 16))):
        results = set()
        for guess in itertools.product((False, True), repeat=inputs.count(None)):
            guesses = iter(guess)
            a, b, c = (next(guesses) if x is None else x for x in inputs)
            results.add(bool(table >> (a * 4 + b * 2 + c) & 1))
        warp._set(target, results.pop() if len(results) == 1 else None, sure)


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def _compare(warp: _Warp, step: Instruction, sure: bool) -> None:
    first, second, left, right, other, *low = step.operands
    a, b = warp._value(left), warp._value(right)
    kind = step.modifiers[0]
    found: bool | None
    if kind in ("T", "F"):
        found = kind == "T"
    elif a is None or b is None:
        found = None
    else:
        if "U32" not in step.modifiers:
            a, b = _signed(a), _signed(b)
        found = _COMPARE[kind](a, b)
        if "EX" in step.modifiers:  # the upper halves; the lower ones were compared before
            below = warp._predicate(low[0])
            if kind == "EQ":
                found = warp._both(found, [below])
            elif a == b:
                found = below
            elif kind in ("LE", "GE"):
                found = a < b if kind == "LE" else a > b
    combine = next(x for x in step.modifiers if x in ("AND", "OR", "XOR"))
    given = warp._predicate(other)
    for target, value in ((first, found), (second, None if found is None else not found)):
        if combine == "AND":
            value = warp._both(value, [given])
        elif combine == "OR":
            value = True if True in (value, given) else None if None in (value, given) else False
        else:
            value = None if value is None or given is None else value != given
        warp._set(target, value, sure)


def _select(warp: _Warp, step: Instruction, sure: bool) -> None:
    target, a, b, which = step.operands
    first = warp._predicate(which)
    x, y = warp._value(a), warp._value(b)
    warp._put(target, (x if x == y else None) if first is None else x if first else y, sure)


def _extremum(warp: _Warp, step: Instruction, sure: bool) -> None:
    """IMNMX a, b, p: the least where p holds, else the greatest. VIADDMNMX: of a + b and c."""
    target, written, rest = _parts(step)
    *numbers, least = rest
    values = [warp._value(x) for x in numbers]
    value, way = None, warp._predicate(least)
    if None not in values and way is not None:
        given = [x for x in values if x is not None]
        if "ADD" in step.op:
            given = [given[0] + given[1] & WORD, given[2]]
        unsigned = "U32" in step.modifiers
        value = (min if way else max)(given, key=lambda x: x if unsigned else _signed(x))
    for name in written:
        warp._set(name, None, sure)
    warp._put(target, value, sure)


def _move(warp: _Warp, step: Instruction, sure: bool) -> None:
    words = 2 if "64" in step.modifiers else 4 if "128" in step.modifiers else 1
    source = step.operands[
        -2 if step.op == "MOV" and re.match(r"^0x\w+$", step.operands[-1]) and len(step.operands) > 2 else -1
    ]
    if words == 1:
        warp._put(step.operands[0], warp._value(source), sure)
    elif found := _CONSTANT.match(source):
        for word in range(words):
            value = warp.constants.get(int(found[2], 16) + 4 * word)
            register = _REGISTER.match(step.operands[0])
            if register and register[3] != "Z":
                warp._put(f"{register[2]}{int(register[3]) + word}", value, sure)
    else:
        warp._put(step.operands[0], warp._wide(source) if words == 2 else None, sure, words)


def _special(warp: _Warp, step: Instruction, sure: bool) -> None:
    places = {f"SR_CTAID.{axis}": value for axis, value in zip("XYZ", warp.place, strict=True)}
    places |= dict.fromkeys(
        ("SR_TID.X", "SR_TID.Y", "SR_TID.Z", "SR_LANEID", "SRZ", "SR_CgaCtaId", "SR_VIRTUALSMID"), 0
    )
    places |= {"SR_CTAID": warp.place[0]}
    words = 2 if step.op == "CS2R" and "32" not in step.modifiers else 1
    warp._put(step.operands[0], places.get(step.operands[1]), sure, words)


def _first_lane(warp: _Warp, step: Instruction, sure: bool) -> None:
    """SHFL p, target, source, …: all lanes have what thread 0 has, where it is known."""
    if "IDX" in step.modifiers:
        warp._put(step.operands[1], warp._value(step.operands[2]), sure)
    else:
        warp._put(step.operands[1], None, sure)
    warp._set(step.operands[0], None, sure)


def _vote(warp: _Warp, step: Instruction, sure: bool) -> None:
    *targets, source = step.operands
    for target in targets:
        if re.match(r"^U?P\d$", target):
            warp._set(target, warp._predicate(source), sure)
        else:
            warp._put(target, None, sure)


def _arrived(warp: _Warp, step: Instruction, sure: bool) -> None:
    """A barrier that is tried has been passed, thread 0 is the one elected, and there is tensor memory."""
    for target in step.operands:
        if re.match(r"^U?P\d$", target):
            warp._set(target, True, sure)
        elif _REGISTER.match(target):
            warp._put(target, None, sure)


def _pack(warp: _Warp, step: Instruction, sure: bool) -> None:
    """P2R target, PR, RZ, mask: the predicates as bits."""
    target, _, before, mask = step.operands
    bits = [place for place in range(7) if int(mask, 0) >> place & 1]
    known, rest = [warp._predicate(f"P{place}") for place in bits], warp._value(before)
    value = None if None in known or rest is None else rest & ~int(mask, 0)
    for place, bit in zip(bits, known, strict=True):
        value = None if value is None else value | bool(bit) << place
    warp._put(target, value, sure)


def _unpack(warp: _Warp, step: Instruction, sure: bool) -> None:
    _, source, mask = step.operands
    value = warp._value(source)
    for place in range(7):
        if int(mask, 0) >> place & 1:
            warp._set(f"P{place}", None if value is None else bool(value >> place & 1), sure)


def _extend(warp: _Warp, step: Instruction, sure: bool) -> None:
    """SGXT target, x, bits: the lowest bits, with their sign."""
    target, x, bits = step.operands
    value, size = warp._value(x), warp._value(bits)
    if value is not None and size is not None:
        value &= (1 << size) - 1
        if "U32" not in step.modifiers and value >> size - 1 & 1:
            value |= WORD & ~((1 << size) - 1)
    warp._put(target, None if size is None else value, sure)


def _ordinary(warp: _Warp, step: Instruction, sure: bool) -> None:
    """FCHK: the operands of a division are ordinary numbers."""
    warp._set(step.operands[0], False, sure)


def _local(warp: _Warp, step: Instruction, sure: bool) -> None:
    load = step.op == "LDL"
    target, address = step.operands if load else step.operands[::-1]
    words, found = _width(step), _LOCAL.match(address)
    base = warp._value(found[1]) if found and found[1] else 0
    register = _REGISTER.match(target)
    if found is None or base is None or register is None:
        if load:
            warp._put(target, None, sure, words)
        else:
            warp.local.clear()
        return
    at = base + int(found[2] or "0", 16)
    for word in range(words):
        name = "RZ" if register[3] == "Z" else f"R{int(register[3]) + word}"
        if load and name != "RZ":
            warp.put_bits(name, warp.local.get(at + 4 * word, _UNKNOWN), sure)
        elif not load:
            warp.local[at + 4 * word] = warp.bits(name) if sure else _UNKNOWN


def _permute(warp: _Warp, step: Instruction, sure: bool) -> None:
    target, a, how, b = step.operands
    x, selector, y = (warp._value(t) for t in (a, how, b))
    value = None
    if None not in (x, selector, y) and not step.modifiers:
        assert x is not None and y is not None and selector is not None  # noqa: PT018
        both, value = y << 32 | x, 0
        for byte in range(4):
            pick = selector >> 4 * byte & 15
            part = both >> 8 * (pick & 7) & 255
            value |= (255 if pick & 8 and part >> 7 else 0 if pick & 8 else part) << 8 * byte
    warp._put(target, value, sure)


_RULES: dict[str, Callable[[_Warp, Instruction, bool], None]] = {
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
