"""What a Chrome trace of torch.profiler says about a training step: kernels, and where they belong.

Layers and ops are ranges in the trace (`profile.step` sets them up), steps are ranges
`step 0`, `step 1`, ... The backward is placed by autograd's sequence numbers: a node carries that
of the forward op that made it.
"""

import dataclasses
import difflib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

BETWEEN = "between ops"
"""Stands for a CPU's time outside of any op: Python, autograd, the profiler itself."""
_EVALUATE = "autograd::engine::evaluate_function: "
_STEP_LAYERS = ("counts", "gradients", "optimizer")
_LAYER = re.compile(
    r"layer \d+|embeddings|masked words|pooler|next sentence|" + "|".join(_STEP_LAYERS)
)
_OP = re.compile(r"(\w+)((?: [A-Z]=\d+)+)")
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}
"""Where the first factor stands among the arguments."""
_SYNC = re.compile(
    r"aten::_local_scalar_dense|cu(da)?(Stream|Device|Event|Ctx)Synchronize|cudaMemcpy|.*DtoH.*"
)
_ITEM_BYTES = {"float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8}


@dataclasses.dataclass(eq=False)
class Event:
    """One slice of a Chrome trace; times in microseconds."""

    name: str
    kind: str
    start: float
    end: float
    args: Mapping[str, Any]
    parent: "Event | None" = None
    covered: float = 0.0
    """Time of the slices directly below."""


class Place(NamedTuple):
    layer: str
    op: str
    """With sizes, as "linear T=9 H=8 F=8"; empty for what belongs to no op of ours."""
    direction: str


class Kernel(NamedTuple):
    """One launch (on a CPU: one op) of a recorded step."""

    step: int
    name: str
    start: float
    us: float
    place: Place
    bytes: int
    flops: int


@dataclasses.dataclass
class Recorded:
    """What the trace of some steps says."""

    steps: int
    kernels: list[Kernel]
    calls: Counter[Place]
    """How often each op was called, forward, in all steps."""
    syncs: Counter[tuple[str, Place]]

    def host_syncs(self) -> list[dict[str, Any]]:
        """How often a step asks the host something, and where; the most frequent first."""
        return [
            {"name": name, "calls": count / self.steps, "where": " ".join(filter(None, place))}
            for (name, place), count in self.syncs.most_common()
        ]


def _nested(slices: Iterable[Mapping[str, Any]]) -> Iterator[Event]:
    """The slices of one thread, each with the one it lies in."""
    open_events: list[Event] = []
    for one in sorted(slices, key=lambda one: (one["ts"], -one["dur"])):
        event = Event(
            one["name"], one["cat"], one["ts"], one["ts"] + one["dur"], one.get("args") or {}
        )
        while open_events and open_events[-1].end <= event.start:
            open_events.pop()
        if open_events:
            event.parent = open_events[-1]
            event.parent.covered += event.end - event.start
        open_events.append(event)
        yield event


def _chain(event: Event) -> Iterator[Event]:
    """An event and those around it, the innermost first."""
    found: Event | None = event
    while found is not None:
        yield found
        found = found.parent


class _Trace:
    """A trace of steps, each in a range `step 0`, `step 1`, ..."""

    def __init__(self, trace: Mapping[str, Any]) -> None:
        threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
        self.device: list[Event] = []
        for one in trace["traceEvents"]:
            kind = one.get("cat")
            if one.get("ph") != "X":
                continue
            if kind in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
                threads[one["tid"]].append(one)
            elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
                self.device += _nested([one])
        self.host = [event for slices in threads.values() for event in _nested(slices)]
        self.device.sort(key=lambda event: event.start)
        self.steps = sorted(
            (event for event in self.host if re.fullmatch(r"step \d+", event.name)),
            key=lambda event: event.start,
        )
        # Several events share a number: the last to begin is the one that made the node.
        self._makers: dict[int, Event] = {}
        for event in sorted(self.host, key=lambda event: event.start):
            number = event.args.get("Sequence number", -1)
            if number >= 0 and event.args.get("Fwd thread id", 0) == 0:
                self._makers[number] = event
        self._launches = {
            event.args["correlation"]: event for event in self.host if "correlation" in event.args
        }
        self._by_id = {
            event.args.get("External id"): event for event in self.host if event.kind == "cpu_op"
        }

    def step_at(self, time: float) -> int | None:
        """The step that began last; what a device still does after it counts as its."""
        begun = [index for index, step in enumerate(self.steps) if step.start <= time]
        return begun[-1] if begun else None

    def launcher_of(self, event: Event) -> Event:
        """What on the host asked for a kernel."""
        launch = self._launches.get(event.args.get("correlation"), event)
        if launch.parent is None:
            launch = self._by_id.get(event.args.get("External id"), launch)
        return launch

    def place(self, event: Event) -> Place:
        layer, op = "", ""
        for outer in _chain(event):
            if outer.name.startswith(_EVALUATE):
                maker = self._makers.get(outer.args.get("Sequence number", -1))
                if maker is None:  # a leaf's node
                    return Place("gradients", "", "backward")
                made = self.place(maker)
                return made if made.direction == "both" else made._replace(direction="backward")
            if outer.kind == "user_annotation":
                layer = outer.name if _LAYER.fullmatch(outer.name) else layer
                op = outer.name if _OP.fullmatch(outer.name) else op
        direction = "step" if layer in _STEP_LAYERS else "forward"
        if op.startswith("linear_cross_entropy"):
            direction = "both"
        return Place(layer or "rest of the step", op, direction)


def analyse(trace: Mapping[str, Any], cuda: bool) -> Recorded:
    """Kernels of the steps in a Chrome trace of torch.profiler, each with its place."""
    read = _Trace(trace)
    kernels: list[Kernel] = []
    calls: Counter[Place] = Counter()
    syncs: Counter[tuple[str, Place]] = Counter()
    for event in read.host:
        step = read.step_at(event.start)
        if step is None or event.start > read.steps[step].end:
            continue
        if _SYNC.fullmatch(event.name):
            syncs[event.name, read.place(event)] += 1
        if event.kind == "user_annotation" and _OP.fullmatch(event.name):
            calls[read.place(event)] += 1
        us = event.end - event.start - event.covered
        if not cuda and us > 0:
            name = _op_name(event)
            cost = _product(event) if name in PRODUCTS else (0, 0)
            kernels.append(Kernel(step, name, event.start, us, read.place(event), *cost))
    products: set[int] = set()
    for event in read.device if cuda else ():
        step = read.step_at(event.start)
        if step is None:
            continue
        launch = read.launcher_of(event)
        place, cost = read.place(launch), (0, 0)
        if _SYNC.fullmatch(event.name):
            syncs[event.name, place] += 1
        product = next((outer for outer in _chain(launch) if outer.name in PRODUCTS), None)
        if product is not None and id(product) not in products:  # it may take two kernels
            products.add(id(product))
            cost = _product(product)
        us = event.end - event.start
        kernels.append(Kernel(step, event.name, event.start, us, place, *cost))
    return Recorded(len(read.steps), kernels, calls, syncs)


def _op_name(event: Event) -> str:
    if "ompiled" in event.name:
        return "torch.compile"
    is_op = event.kind == "cpu_op" and re.match(r"(?!autograd|torch)\w+::", event.name)
    return event.name if is_op else BETWEEN


def _product(event: Event) -> tuple[int, int]:
    """Bytes and FLOPs of a matrix product, each factor read once and the result written once."""
    at = PRODUCTS[event.name]
    shapes, types = event.args["Input Dims"], event.args["Input type"]
    a, b = shapes[at], shapes[at + 1]
    out = [*a[:-1], b[-1]]
    # A result of another type (fp32 sums of bf16 factors) is among the arguments.
    kinds = [types[at]] + [k for shape, k in zip(shapes, types, strict=True) if shape == out]
    item, out_item = _ITEM_BYTES.get(types[at], 4), _ITEM_BYTES.get(kinds[-1], 4)
    moved = item * (math.prod(a) + math.prod(b)) + out_item * math.prod(out)
    return moved, 2 * math.prod(out) * a[-1]


def label_like(graph: Recorded, eager: Recorded) -> Recorded:
    """A graph's kernels with the places (and calls) of the eager step's, matched in their order."""
    last = [kernel for kernel in eager.kernels if kernel.step == eager.steps - 1]
    labelled: list[Kernel] = []
    for step in range(graph.steps):
        mine = [kernel for kernel in graph.kernels if kernel.step == step]
        mine = [kernel._replace(place=Place("not attributed", "", "step")) for kernel in mine]
        theirs, names = ([kernel.name for kernel in kernels] for kernels in (last, mine))
        matcher = difflib.SequenceMatcher(None, theirs, names, autojunk=False)
        for first, second, count in matcher.get_matching_blocks():
            for offset in range(count):
                like = last[first + offset]
                mine[second + offset] = mine[second + offset]._replace(
                    place=like.place, bytes=like.bytes, flops=like.flops
                )
        labelled += mine
    return dataclasses.replace(graph, kernels=labelled, calls=eager.calls)
