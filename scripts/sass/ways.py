"""Finds ways through a kernel: the cheapest loop, or the cheapest path to the end, that passes what
it is known by. So branches for other dtypes and for tails are left out, wherever they lie."""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Sequence

from sass.listing import Instruction, Kernel

ENDS = ("EXIT", "RET", "BRX")
# A branch that takes its condition as an operand.
CONDITION = re.compile(r"^!?U?P\d")


class Flow:
    """Basic blocks by their addresses, and which may follow which."""

    def __init__(self, kernel: Kernel) -> None:
        self.blocks: dict[int, list[Instruction]] = {}
        leaders = _leaders(kernel)
        for instruction in kernel.instructions:
            if instruction.address in leaders:
                block: list[Instruction] = []
                self.blocks[instruction.address] = block
            block.append(instruction)
        order = list(self.blocks)
        self.follow = {
            here: _following(self.blocks[here][-1], kernel.labels, after)
            for here, after in zip(order, [*([b] for b in order[1:]), []], strict=True)
        }

    @property
    def entry(self) -> int:
        return next(iter(self.blocks))

    def instructions(self, way: Sequence[int]) -> list[Instruction]:
        return [instruction for block in way for instruction in self.blocks[block]]

    def cheapest_loop(self, anchors: Sequence[str]) -> list[Instruction]:
        """The shortest way round a loop that executes the anchors, regular expressions, in order.

        Empty if there is none.
        """
        best: list[Instruction] = []
        heads = {to for here in self.blocks for to in self.follow[here] if to <= here}
        for head in sorted(heads):
            way = self._shortest(head, anchors, head)
            if way and (not best or len(way) < len(best)):
                best = way
        return best

    def cheapest_path(self, anchors: Sequence[str]) -> list[Instruction]:
        """The same from the kernel's entry to its end."""
        return self._shortest(self.entry, anchors, None)

    def _shortest(self, start: int, anchors: Sequence[str], goal: int | None) -> list[Instruction]:
        """Dijkstra's algorithm over blocks and how many anchors have been met.

        The goal is a block, which only a later one leads back to, or None for any end.
        """
        met = self._met(start, 0, anchors)
        heap = [(len(self.blocks[start]), start, met, (start,))]
        seen = set()
        while heap:
            cost, block, met, way = heapq.heappop(heap)
            if (block, met) in seen:
                continue
            seen.add((block, met))
            is_end = not self.follow[block] if goal is None else goal in self.follow[block]
            if is_end and met == len(anchors):
                return self.instructions(way)
            for to in self.follow[block]:
                if goal is None or to > goal:
                    longer = cost + len(self.blocks[to])
                    heapq.heappush(heap, (longer, to, self._met(to, met, anchors), (*way, to)))
        return []

    def _met(self, block: int, met: int, anchors: Sequence[str]) -> int:
        for instruction in self.blocks[block]:
            if met < len(anchors) and re.search(anchors[met], instruction.text):
                met += 1
        return met


def _leaders(kernel: Kernel) -> set[int]:
    code = kernel.instructions
    leaders = {code[0].address}
    for here, after in itertools.pairwise(code):
        if here.base in ("BRA", *ENDS):
            leaders.add(after.address)
    leaders |= {kernel.labels[i.target] for i in code if i.base == "BRA" and i.target}
    return leaders


def _following(last: Instruction, labels: dict[str, int], after: list[int]) -> list[int]:
    if last.base == "BRA" and last.target:
        is_certain = (
            ".DIV" not in last.opcode and not last.predicate and not CONDITION.match(last.operands)
        )
        return [labels[last.target], *([] if is_certain else after)]
    if last.base in ENDS:
        return after if last.predicate else []
    return after
