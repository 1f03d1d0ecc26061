"""Examples of one scored reply each, some of which have the same prompt: with packing it is computed once for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from lowlevel.batch.layout import PackedBatch, build_batch
from lowlevel.batch.packing import Layout, micro_batch_rows
from lowlevel.batch.segments import Branch, Segment, build_segment
from lowlevel.labels import IGNORED


@dataclass(frozen=True)
class Reply:
    """An example of a step, and what the layout needs of the others."""

    example: Any  # an SFTExample, or a Rollout
    start: int  # of the reply in its tokens
    prompt: bytes  # the tokens before it
    first_row: int  # data row of the step's first example with this prompt
    branch: int  # 1 for that one, 2 for the next, ...

    def __len__(self) -> int:
        """Positions of the reply; the first of them is the prompt's last token."""
        return len(self.example.input_ids) - self.start


def replies(examples: Sequence[Any]) -> list[Reply]:
    """The examples of a whole step, so that dropout keys do not depend on how it is divided."""
    made: list[Reply] = []
    rows: dict[bytes, list[int]] = {}  # by prompt
    for example in examples:
        start = int((example.labels != IGNORED).argmax())
        prompt = example.input_ids[:start].tobytes()
        same = rows.setdefault(prompt, [])
        same.append(example.row)
        made.append(Reply(example, start, prompt, same[0], len(same)))
    return made


def by_prompt(found: Sequence[Reply], capacity: int) -> list[list[Reply]]:
    """Groups of one prompt; a group ends before it exceeds `capacity` positions, so 0 gives each reply its own."""
    groups: list[list[Reply]] = []
    last: dict[bytes, list[Reply]] = {}
    for reply in found:
        group = last.get(reply.prompt)
        if group is None or positions(group) + len(reply) > capacity:
            group = last[reply.prompt] = []
            groups.append(group)
        group.append(reply)
    return groups


def positions(group: Sequence[Reply]) -> int:
    """How many positions a prompt takes with its replies."""
    return group[0].start - 1 + sum(map(len, group))


def segment(group: Sequence[Reply], numbers: Iterator[int]) -> Segment:
    """A prompt with its replies, which take their numbers from `numbers`."""
    branches = []
    for reply in group:
        ids, labels = reply.example.input_ids[reply.start - 1 : -1], reply.example.labels[reply.start :]
        branches.append(Branch(next(numbers), reply.branch, ids, labels))
    return build_segment(group[0].first_row, group[0].example.input_ids[: group[0].start - 1], branches)


def lay_out_replies(examples: Sequence[Any], layout: Layout) -> list[tuple[PackedBatch, list[Any]]]:
    """The micro-batches of one step, each with its examples in the order of their sequences."""
    shape, found = layout.shape, []
    room = shape.capacity if shape else layout.row_length
    groups = by_prompt(replies(examples), room if layout.packing else 0)
    for rows in micro_batch_rows(groups, positions, layout):
        numbers, inside = count(), [reply.example for row in rows for group in row for reply in group]
        segments = [[segment(group, numbers) for group in row] for row in rows]
        values = [x.values for x in inside] if layout.columns else None
        batch = build_batch(segments, pairs=False, shape=shape, values=values)
        found.append((replace(batch, data_rows=tuple(x.row for x in inside)), inside))
    return found
