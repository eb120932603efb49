"""A share of examples split off for evaluation: of each class its part, equal texts on one side."""

import math
from collections import Counter
from collections.abc import Collection, Hashable, Sequence

import numpy as np


def split(
    texts: Sequence[Hashable], classes: Sequence[Collection[str]], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Splits a share off, the same one on every machine and with every version of Python.

    The rarest class is shared out first, then, of what is left, the next: what an example that has
    several counts for each (iterative stratification, Sechidis et al. 2011).

    Args:
        texts: of each example; equal ones stay together.
        classes: of each example; those without one are a class as well.
        share: more than 0 and less than 1.
        seed: from 0 on.

    Returns:
        Places of the examples that stay, and of those that are split off, ascending. All classes
        are among the former; among the latter those of two texts or more, if the share has as many
        examples as there are classes, and equal texts are few. None of the latter where each class
        has one text alone.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, text in enumerate(texts):
        groups.setdefault(text, []).append(place)
    draws = np.random.PCG64(seed).random_raw(len(texts)).tolist()  # kept by NumPy for good
    members: dict[str, list[int]] = {}  # places of groups' first examples, in the order drawn
    holds: dict[int, dict[str, int]] = {}  # by the same: examples of each class
    sizes: Counter[str] = Counter()
    for group in sorted(groups.values(), key=lambda group: (draws[group[0]], group[0])):
        held = holds[group[0]] = {}
        for place in group:
            for name in set(classes[place]) or ("",):
                held[name] = held.get(name, 0) + 1
                sizes[name] += 1
        for name in held:
            members.setdefault(name, []).append(group[0])
    left = {name: len(of_class) for name, of_class in members.items()}
    has: Counter[str] = Counter()
    taken: set[int] = set()

    def take(first: int) -> bool:
        if any(left[name] < 2 for name in holds[first]):
            return False  # training would lack it
        for name, count in holds[first].items():
            left[name] -= 1
            has[name] += count
        taken.add(first)
        return True

    decided: set[int] = set()
    for name, wanted in _quotas(sizes, share).items():
        for first in members[name]:
            if first not in decided and 2 * (wanted - has[name]) > holds[first][name]:
                take(first)
        decided.update(members[name])
    smallest = sorted(holds, key=lambda first: len(groups[texts[first]]))
    if not taken:  # of a small file
        any(map(take, smallest))
    held_out = sorted(place for text in groups.values() if text[0] in taken for place in text)
    return sorted(set(range(len(texts))).difference(held_out)), held_out


def _quotas(sizes: Counter[str], share: float) -> dict[str, int]:
    """Examples of each class to split off, the rarest class first; rounding goes to the next."""
    least = int(len(sizes) <= share * sizes.total())
    found, rest = {}, 0.0
    for name in sorted(sizes, key=lambda name: (sizes[name], name)):
        wanted = sizes[name] * share + rest
        whole = min(math.floor(wanted + 0.5), sizes[name] - 1)
        rest = wanted - whole
        found[name] = max(whole, min(least, sizes[name] - 1))
    return found
