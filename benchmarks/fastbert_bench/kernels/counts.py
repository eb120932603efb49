"""The counts of every shipped kernel, committed in counts.json: what grows is said before it lands.

A line a case, in it a list a Triton, of `COLUMNS`: the programs that a multiprocessor holds, cycles
by pipe, and the cycles of the bound (`kernels.sass`), for 128 x 128 scores in attention and for
one pass of a program through its main loop elsewhere.
"""

import json
from collections.abc import Mapping, Set
from pathlib import Path

from fastbert_bench.kernels.sass import Cost

FILE = Path(__file__).with_name("counts.json")
COLUMNS = ("held", "issue", "ALU", "FMA", "MUFU", "tensor", "shared", "memory", "cycles")
GROWTH = 1.05

Counted = Mapping[str, list[int]]
Table = dict[str, dict[str, list[int]]]


def figures(held: int, cost: Cost) -> list[int]:
    """`COLUMNS` of one case."""
    return [held, *map(round, cost.cycles.values()), round(cost.total)]


def read(path: Path = FILE) -> Table:
    """Case -> Triton -> `COLUMNS`; nothing where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(table: Table, path: Path = FILE) -> None:
    rows = sorted(table.items())
    lines = [f"{json.dumps(case)}: {json.dumps(row, sort_keys=True)}" for case, row in rows]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def grown(table: Table, found: Counted, triton: str, shipped: Set[str] | None = None) -> list[str]:
    """What CI refuses: a count that grew by more than 5%, fewer programs at once.

    Args:
        table: the committed counts.
        found: case -> `COLUMNS`, under `triton`.
        shipped: all cases there are: each must be committed, and no other. None: not looked at.
    """
    if not any(triton in row for row in table.values()):
        return [] if shipped is None else [f"no counts are committed for Triton {triton}"]
    told = []
    for case, now in found.items():
        before = table.get(case, {}).get(triton)
        if before is None:
            told += [f"{case}: no counts are committed"] if shipped is not None else []
            continue
        for name, old, new in zip(COLUMNS, before, now, strict=True):
            if new < old if name == "held" else new > old * GROWTH:
                told.append(f"{case}: {name} {old:,} -> {new:,}")
    gone = sorted(table.keys() - shipped) if shipped is not None else []
    return told + [f"{case}: counts are committed, but it is not shipped" for case in gone]


def accept(table: Table, found: Counted, triton: str, shipped: Set[str] | None = None) -> Table:
    """The table with what was found, and without cases that are not shipped."""
    kept = {case: row for case, row in table.items() if shipped is None or case in shipped}
    return kept | {case: kept.get(case, {}) | {triton: now} for case, now in found.items()}
