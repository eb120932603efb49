"""The training step as CUDA graphs: recorded once for each batch shape, then replayed.

A step of BERT-base launches some 400 kernels; recorded, the host launches one graph. Kernels,
weights, gradients and counters are those of the eager step, so the losses are its losses too.
Not yet run on a GPU.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from fastbert.data.batch import Batch
from fastbert.train.phases import dropout_in_use
from fastbert.train.step import TrainStep

# Eager steps before recording: kernels get compiled, cuBLAS takes its workspace.
WARM_UP = 2

Work = Callable[[], None]


class Recorder(Protocol):
    """Records work."""

    def __call__(self, work: Work) -> Work:
        """Returns what repeats the work."""

    def forget(self) -> None:
        """Frees the memory of what was recorded, which nobody repeats any more."""


class CudaRecorder:
    """Records work as CUDA graphs that share one memory pool; made on a CUDA device.

    All work runs on one stream, as autograd's nodes remember the stream they were made on.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # "thread_local": what other threads do with CUDA meanwhile does not break the recording.
        with torch.cuda.graph(graph, self._pool, self.stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def forget(self) -> None:
        torch.cuda.synchronize(self.stream.device)
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()

    def run(self, work: Work) -> None:
        """Does work on the stream, after and before what the current stream does."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                work()
        finally:
            current.wait_stream(self.stream)


class _Recorded:
    """What is replayed for one batch shape, reading from a batch that stays where it is."""

    def __init__(self, step: TrainStep, like: Batch, accumulates: bool, record: Recorder) -> None:
        clones = {name: tensor.clone() for name, tensor in like.tensors()}
        self.batch = dataclasses.replace(like, **clones)  # type: ignore[arg-type]

        def add() -> None:
            step.accumulate(self.batch)

        def whole() -> None:
            step.eager([self.batch])

        def finish() -> None:
            add()
            step.update()
            step.flat.zero_gradients()

        # With micro-batches, all add to gradients that the last one leaves zero.
        self.add = record(add) if accumulates else None
        self.finish = record(finish if accumulates else whole)


class GraphedStep:
    """`TrainStep` as one recorded graph, or two where gradients are accumulated.

    The first steps of a shape run eagerly and count as steps. A new shape or another dropout, as
    the next phase brings them, replaces the one before: two recordings would hold memory for both.

    Args:
        step: what to record.
        accumulates: whether a step may have several micro-batches.
        record: records work; a `CudaRecorder` on a GPU.
    """

    def __init__(self, step: TrainStep, accumulates: bool, record: Recorder) -> None:
        self.step, self._accumulates, self._record = step, accumulates, record
        self._recording_of: tuple[float, ...] = ()
        self._eager_steps = 0  # of that
        self._recorded: _Recorded | None = None

    def __call__(self, batches: Sequence[Batch]) -> None:
        """Trains on the micro-batches of one step, all of one shape."""
        asked = *_shape(batches[0]), *dropout_in_use(self.step.model)
        if asked != self._recording_of:
            self._recording_of, self._eager_steps, self._recorded = asked, 0, None
            self._record.forget()
        if self._eager_steps < WARM_UP:
            self._eager_steps += 1
            self.step.eager(batches)
            return
        if self._recorded is None:
            # Counted before the recording, so that a step broken off in it can be begun anew.
            self.step.begin(batches)
            if self._accumulates:
                self.step.flat.zero_gradients()
            self._recorded = _Recorded(self.step, batches[0], self._accumulates, self._record)
        self._replay(self._recorded, batches)

    def _replay(self, recorded: _Recorded, batches: Sequence[Batch]) -> None:
        if self._accumulates:
            self.step.begin(batches)
        for batch in batches[:-1]:
            _copy(recorded.batch, batch)
            assert recorded.add is not None
            recorded.add()
        _copy(recorded.batch, batches[-1])
        recorded.finish()


def launcher(step: TrainStep, graph: bool, accumulates: bool) -> Callable[[Sequence[Batch]], None]:
    """What runs a step: the eager one, or its recording."""
    if not graph:
        return step.eager
    recorder = CudaRecorder(step.flat.master.device)
    graphed = GraphedStep(step, accumulates, recorder)
    return lambda batches: recorder.run(lambda: graphed(batches))


def _shape(batch: Batch) -> tuple[int, ...]:
    return (*(tensor.numel() for _, tensor in batch.tensors()), batch.max_seqlen)


def _copy(to: Batch, batch: Batch) -> None:
    """Copies all tensors in one launch for each dtype."""
    for dtype in (torch.int64, torch.int32):
        pairs = [
            (mine, theirs)
            for (_, mine), (_, theirs) in zip(to.tensors(), batch.tensors(), strict=True)
            if mine.dtype == dtype
        ]
        torch._foreach_copy_([mine for mine, _ in pairs], [theirs for _, theirs in pairs])
