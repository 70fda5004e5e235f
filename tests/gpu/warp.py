"""One warp on its way through a kernel: the registers of its thread 0 that are known, and what it issues."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from tests.gpu.opcodes import CONSTANT, REGISTER, RULES, UNKNOWN, WORD, Bits, width
from tests.gpu.sass import Instruction, Program

LIMIT = 20_000_000  # instructions of one warp; a loop that does not end would have more


@dataclass
class Warp:
    program: Program
    constants: dict[int, int]
    place: tuple[int, int, int]
    registers: dict[str, Bits] = field(default_factory=dict)
    predicates: dict[str, bool] = field(default_factory=dict)
    local: dict[int, Bits] = field(default_factory=dict)

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
            going = self.predicate(step.guard) if step.guard else True
            if step.op in ("EXIT", "RET", "BRA", "CALL"):
                if step.op == "BRA":
                    going = self.both(going, [self.predicate(x) for x in step.operands[:-1]])
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
    def both(a: bool | None, others: list[bool | None]) -> bool | None:
        all_of = [a, *others]
        return False if False in all_of else None if None in all_of else True

    # Operands

    def predicate(self, text: str) -> bool | None:
        name = text.lstrip("!")
        value = True if name in ("PT", "UPT") else self.predicates.get(name)
        return value if value is None or not text.startswith("!") else not value

    def words(self, text: str) -> tuple[str, int | None, int | None]:
        """The sign in front of an operand, its value, and that of the register behind it."""
        if found := REGISTER.match(text):
            sign, kind, number, _ = found.groups()
            if number == "Z":
                return sign, 0, 0
            return sign, self._register(kind + number), self._register(f"{kind}{int(number) + 1}")
        if found := CONSTANT.match(text):
            at = int(found[2], 16)
            return found[1], self.constants.get(at), self.constants.get(at + 4)
        if re.match(r"^-?(0x[0-9a-f]+|\d+)$", text):
            value = int(text, 0)
            return "", value & WORD, value >> 32 & WORD
        return "", None, None

    def _register(self, name: str) -> int | None:
        value, known = self.registers.get(name, UNKNOWN)
        return value if known == WORD else None

    def bits(self, text: str) -> Bits:
        """What is known of a word without a sign."""
        found = REGISTER.match(text)
        if found and found[3] != "Z" and not found[1] and not found[4].startswith((".H", ".B")):
            return self.registers.get(found[2] + found[3], UNKNOWN)
        value = self.value(text)
        return UNKNOWN if value is None else (value, WORD)

    def value(self, text: str) -> int | None:
        sign, x, _ = self.words(text)
        if x is None or "|" in sign or re.search(r"\.(H|B)\d", text):
            return None
        return -x & WORD if "-" in sign else ~x & WORD if "~" in sign else x

    def wide(self, text: str) -> int | None:
        sign, low, high = self.words(text)
        if low is None or high is None or sign:
            return None
        return high << 32 | low

    # Results

    def put(self, target: str, value: int | None, sure: bool, words: int = 1) -> None:
        found = REGISTER.match(target)
        if found is None or found[3] == "Z":
            return
        for word in range(words):
            name = f"{found[2]}{int(found[3]) + word}"
            self.put_bits(name, UNKNOWN if value is None else (value >> 32 * word & WORD, WORD), sure)

    def put_bits(self, name: str, new: Bits, sure: bool) -> None:
        if not sure:  # bits that are the same either way
            value, known = self.registers.get(name, UNKNOWN)
            known &= new[1] & ~(value ^ new[0])
            new = value & known, known
        self.registers[name] = new

    def set(self, target: str, value: bool | None, sure: bool) -> None:
        if target in ("PT", "UPT"):
            return
        if value is None or not sure:
            self.predicates.pop(target, None)
        else:
            self.predicates[target] = value

    def _execute(self, step: Instruction, sure: bool) -> None:
        op = step.op
        if op not in RULES and op.startswith("U"):
            op = op[1:]
        if op in RULES:
            RULES[op](self, step, sure)
            return
        for place, target in enumerate(step.operands):
            if re.match(r"^U?P(T|\d)$", target):
                self.set(target, None, sure)
            elif place == 0:
                self.put(target, None, sure, width(step))
            else:
                break
