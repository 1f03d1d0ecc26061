"""Sequences with the same beginning, such as prompts with the same few-shot examples: it is computed once for all."""

from collections.abc import Iterator, Sequence
from os.path import commonprefix

SHARE = 0.5  # of the tokens of a group that its beginning must save; else its sequences stay apart


def by_beginning(sequences: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
    """Groups of sequences: the length of their common beginning, and their indices. The last one has those without.

    At least one token of each sequence is no part of the beginning. Equal sequences count as one.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for place, sequence in enumerate(sequences):
        places.setdefault(tuple(sequence), []).append(place)
    groups: list[list[tuple[int, ...]]] = []
    for one in sorted(places):
        if groups and len(commonprefix([groups[-1][-1], one])) > SHARE * min(len(groups[-1][-1]), len(one)):
            groups[-1].append(one)
        else:
            groups.append([one])
    alone: list[int] = []
    for group in groups:
        own = sorted(place for one in group for place in places[one])
        length = min(len(commonprefix([group[0], group[-1]])), min(map(len, group)) - 1)
        if length * (len(group) - 1) > SHARE * sum(map(len, group)):
            yield length, own
        else:
            alone += own
    if alone:
        yield 0, sorted(alone)
