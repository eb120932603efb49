"""Every kernel of a training step, listed on a machine without a GPU; ours are compiled ahead.

The step runs on CPU tensors with our Triton ops. A stub takes the place of the launch, so that
nothing they write is computed, and each launch is noted with what the JIT makes a variant of:
dtypes, alignment, constants, options. A dispatch mode notes the kernels that PyTorch launches
between them. Names and variants depend on widths, lengths and settings, not on how many tokens
there are, so that a small batch stands for a large one. `compile_all` hands the noted launches back
to the JIT, which compiles them into Triton's cache, for a GPU that is there or for one that is not.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import gc
import importlib
import itertools
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastbert_kernels
from fastbert.config import ModelConfig, model_config
from fastbert.model.bert import Bert
from fastbert.ops import Ops, triton_ops
from fastbert.train.step import TrainStep, model_inputs
from fastbert_bench.estimate import launch_list
from fastbert_bench.estimate.launch_list import PRODUCTS, Array, Kernel
from fastbert_bench.gpu import smoke as gpu_smoke
from fastbert_bench.kernels import checks as kernel_checks
from fastbert_bench.kernels import sass
from fastbert_bench.measure import processes
from fastbert_bench.measure.workloads import TINY, WORKLOADS
from fastbert_bench.suites.contenders import make_batches, make_recipe
from fastbert_kernels.compile_cases import op_of

ALIGNMENT = 16  # bytes: what Triton asks of a pointer


@dataclasses.dataclass(frozen=True)
class Pointer:
    """Stands for a tensor: what the JIT looks at when it chooses a variant."""

    dtype: torch.dtype
    aligned: bool

    def data_ptr(self) -> int:
        return 0 if self.aligned else self.dtype.itemsize

    @staticmethod
    def ptr_range() -> int:
        """Bytes behind the pointer, of which some back ends make a variant; 0: not known."""
        return 0


@dataclasses.dataclass(frozen=True)
class Launch:
    """One call of one kernel."""

    kernel: Any
    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """Such as layer_norm._backward_kernel."""
        return f"{op_of(self.kernel)}.{self.kernel.__name__}"

    def variant(self) -> str:
        """What tells the compiled forms of a kernel apart, as the JIT under a driver sees it."""
        from triton.runtime.driver import driver

        *_, binder = self.kernel.device_caches[driver.active.get_current_device()]
        options = {"debug": False, "instrumentation_mode": "", **dict(self.options)}
        return f"{self.name} {binder(*self.args, **options)[1:]}"

    def compile(self) -> Any:
        """Compiles without launching; the result's `run` loads it onto a GPU."""
        return self.kernel.run(*self.args, grid=self.grid, warmup=True, **dict(self.options))


class NoGpu:
    """A Triton driver that knows a GPU's architecture and has no GPU."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)


@contextlib.contextmanager
def no_gpu(arch: int) -> Iterator[None]:
    """Lets the JIT compile for `arch` (90 for sm_90) where there is no such GPU."""
    from triton.runtime.driver import driver

    kernels = [value for module in _modules() for value in vars(module).values() if _is_jit(value)]
    before = driver._active
    driver.set_active(NoGpu(arch))
    try:
        yield
    finally:
        driver._active = before
        for kernel in kernels:  # what it compiled belongs to a device that is not there
            kernel.device_caches.clear()


def _modules() -> list[Any]:
    names = [module.name for module in pkgutil.iter_modules(fastbert_kernels.__path__)]
    return [importlib.import_module(f"fastbert_kernels.{name}") for name in names]


def _is_jit(value: Any) -> bool:
    import triton

    return isinstance(value, triton.JITFunction)


# No kernel: they make a view or memory that holds nothing yet.
_NOTHING = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "lift_fresh"}
_OVERWRITES = {"copy_", "_foreach_copy_", "fill_", "zero_"}
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class _Recorder(TorchDispatchMode):
    """Notes kernels in their order; those of ours, and products, are not run."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.direction = "step"
        self._fresh: set[int] = set()
        """Addresses of memory that nobody has written yet."""
        self._updated: set[int] | None = None
        """Addresses that kernels of the op of ours that is running may update in place."""

    def _note(
        self,
        name: str,
        read: Sequence[Tensor],
        written: Sequence[Tensor],
        launch: Launch | None = None,
    ) -> None:
        backward = torch._C._current_graph_task_id() != -1
        direction = "backward" if backward else self.direction
        self.kernels.append(Kernel(name, direction, _arrays(read), _arrays(written), launch))
        self._fresh -= {_address(tensor) for tensor in written}

    def launched(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Stands for `JITFunction.run`."""
        names = kernel.arg_names
        args = (*args, *(options.pop(name) for name in names[len(args) :]))
        # Each once: what a kernel does not use stands in for itself as some other tensor.
        tensors = list({id(arg): arg for arg in args if isinstance(arg, Tensor)}.values())
        args = tuple(_stand_in(arg) for arg in args)
        launch = Launch(kernel, args, tuple(sorted(options.items())), tuple(grid))
        read = [tensor for tensor in tensors if _address(tensor) not in self._fresh]
        outputs = self._fresh | (self._updated or set())
        written = [tensor for tensor in tensors if _address(tensor) in outputs]
        self._note(launch.name, read, written, launch)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        written = list(_written(func, args, kwargs))
        if space != "aten":  # an op of ours: what it launches is noted
            around, self._updated = self._updated, {_address(tensor) for tensor in written}
            with self:
                out = func.redispatch(_CPU, *args, **kwargs)
            self._updated = around
            return out
        into = kwargs.get("out")
        read = _tensors((args[1:] if kwargs.get("beta") == 0 else args, kwargs | {"out": None}))
        if f"aten.{name}" in PRODUCTS:
            out = _product(args) if into is None else into
        else:
            out = func(*args, **kwargs)
        if name in _NOTHING:
            self._fresh |= {_address(tensor) for tensor in _tensors(out)}
        elif not _is_view(func):
            if name in _OVERWRITES:
                read = [tensor for tensor in read if all(tensor is not one for one in written)]
            elif name.startswith("new_") or name.endswith("_like"):
                read = []
            written = written or _tensors(out)
            self._note(f"aten.{name}", read, written)
            if self._updated is not None:
                self._updated |= {_address(tensor) for tensor in written}
        return out


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _arrays(tensors: Sequence[Tensor]) -> tuple[Array, ...]:
    return tuple(Array(tuple(tensor.shape), tensor.dtype) for tensor in tensors)


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)


def _is_view(func: Any) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _product(args: tuple[Any, ...]) -> Tensor:
    """The result as memory had it: products are where a CPU's time would go, for no one."""
    *_, a, b = _tensors(args)
    dtype = next((arg for arg in args if isinstance(arg, torch.dtype)), a.dtype)
    return torch.empty(*a.shape[:-1], b.shape[-1], dtype=dtype)


@contextlib.contextmanager
def recorded(arch: int) -> Iterator[_Recorder]:
    """Notes every kernel instead of launching it, on CPU tensors that take a GPU's paths.

    Args:
        arch: compute capability whose tiles are chosen, 90 for sm_90.
    """
    import triton

    recorder, machine = _Recorder(), sass.MACHINES.get(arch, sass.MACHINES[90])
    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(Tensor, "normal_", lambda tensor, *_, **__: tensor))
        stack.enter_context(patch(Tensor, "is_cuda", True))
        launched = recorder.launched
        stack.enter_context(patch(triton.JITFunction, "run", lambda *a, **k: launched(*a, **k)))
        stubs = {
            "require_launchable": lambda *_: None,
            "capability": lambda _: arch,
            "multiprocessors": lambda _: machine.multiprocessors,
        }
        for module, (name, stub) in itertools.product(_modules(), stubs.items()):
            if hasattr(module, name):
                stack.enter_context(patch(module, name, stub))
        stack.enter_context(recorder)
        yield recorder


def _stand_in(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return Pointer(arg.dtype, arg.data_ptr() % ALIGNMENT == 0)
    return arg


@functools.cache
def _batch(S: int, vocab_size: int, T: int) -> Any:
    rng = np.random.default_rng(1)
    lengths = np.array([S] * (T // S) + [T % S] * bool(T % S))
    return make_batches(lengths, S, vocab_size, rng)[1][0]


def step_trace(
    model: str,
    S: int,
    *,
    arch: int = 90,
    layers: int = 2,
    T: int = 0,
    vocab_size: int = 0,
    dropout: float | None = None,
    evaluates: bool = False,
    ops: Ops | None = None,
    **changes: Any,
) -> list[Kernel]:
    """Every kernel of one training step in bf16, in their order.

    Args:
        model: a preset.
        S: the longest sequence.
        arch: compute capability.
        layers: of the model: two stand for all, since all but the last launch the same.
        T: tokens of the batch; 0 for a little more than S.
        vocab_size: 0 for the preset's.
        dropout: None for the preset's.
        evaluates: whether an evaluation follows.
        ops: None for Triton's.
        changes: settings of the recipe that differ from `contenders.make_recipe`'s.
    """
    sizes = _with_layers(model, layers)
    if vocab_size:
        sizes = dataclasses.replace(sizes, vocab_size=vocab_size)
    if dropout is not None:
        sizes = dataclasses.replace(
            sizes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
        )
    batch = _batch(S, sizes.vocab_size, T or S + 24)
    with recorded(arch) as recorder:
        bert = Bert(sizes, ops or triton_ops())
        step = TrainStep(bert, make_recipe(1, **changes), torch.bfloat16)
        recorder.kernels.clear()
        step.model.register_forward_pre_hook(lambda *_: setattr(recorder, "direction", "forward"))
        step.model.register_forward_hook(lambda *_: setattr(recorder, "direction", "step"))
        step([batch])
        if evaluates:
            recorder.direction = "forward"
            with torch.no_grad():
                step.model.eval().predict(*model_inputs(batch))
    return recorder.kernels


LISTED_TOKENS = 16 * 512 + 17
"""Tokens of the step that is listed: no size of it is a multiple of another."""


def listed() -> list[launch_list.Row]:
    """The lines of launch_list.json: a step of BERT-base on sm_90, sizes as symbols.

    Two layers beside one show what a layer adds. What handles all parameters or layers at once runs
    once, with the arrays of two layers.
    """
    rows: dict[int, list[launch_list.Row]] = {}
    for layers in (1, 2):
        sizes, batch = _with_layers("base", layers), _batch(512, 30_522, LISTED_TOKENS)
        M, N = batch.masked_labels.numel(), batch.num_sequences
        names = launch_list.symbols(launch_list.sizes_of(sizes, LISTED_TOKENS, N, M))
        kernels = step_trace("base", 512, layers=layers, T=LISTED_TOKENS)
        for kernel in kernels:  # the flat buffer's length: parameters, and what aligns them
            if kernel.name == "optimizer._adamw_kernel":
                names[kernel.inputs[0].shape[0]] = "P"
        rows[layers] = [launch_list.row_of(one, launch_list.ONCE, names) for one in kernels]

    def keys(layers: int) -> list[tuple[str, ...]]:
        return [tuple(row[:3] if row[1] == "step" else row) for row in rows[layers]]

    found: list[launch_list.Row] = []
    changes = difflib.SequenceMatcher(None, keys(1), keys(2), autojunk=False)
    for kind, _, _, first, last in changes.get_opcodes():
        if kind not in ("equal", "insert"):
            raise RuntimeError(f"a step of two layers changes what one of one layer does: {kind}")
        times = launch_list.ONCE if kind == "equal" else launch_list.PER_LAYER
        found += [[times, *row[1:]] for row in rows[2][first:last]]
    return found


def step_launches(model: str, S: int, **options: Any) -> list[Launch]:
    """Those of our own kernels in `step_trace`."""
    return launches_of(step_trace(model, S, **options))


def launches_of(kernels: Sequence[Kernel]) -> list[Launch]:
    """The launches of our own kernels among these."""
    return [kernel.launch for kernel in kernels if kernel.launch is not None]


def _with_layers(model: str, layers: int) -> ModelConfig:
    return dataclasses.replace(model_config(model), num_hidden_layers=layers)


def forward_launches(model: str, S: int, *, arch: int = 90) -> list[Launch]:
    """Those of the fp32 forwards, with and without dropout, that show contenders to be equal."""
    sizes = _with_layers(model, 2)
    batch = _batch(S, sizes.vocab_size, S + 24)
    with recorded(arch) as recorder, torch.no_grad():
        bert = Bert(sizes, triton_ops())
        bert.eval().predict(*model_inputs(batch))
        bert.train()(*model_inputs(batch), batch.masked_labels, batch.next_sentence_labels)
    return launches_of(recorder.kernels)


def distinct(launches: Sequence[Launch]) -> list[Launch]:
    """One launch of each variant, in the order of the first; needs a driver, as of `no_gpu`."""
    found: dict[str, Launch] = {}
    for launch in launches:
        found.setdefault(launch.variant(), launch)
    return list(found.values())


def compile_all(launches: Sequence[Launch], load: bool) -> Iterator[tuple[Launch, str]]:
    """Compiles each into Triton's cache; yields it with what went wrong, "" where nothing did.

    Args:
        load: also load it onto the current GPU, which makes the launcher that Triton needs.
    """
    for launch in launches:
        try:
            compiled = launch.compile()
            if load:
                compiled.run  # noqa: B018  a property: loads the machine code, builds the launcher
            yield launch, ""
        except Exception as error:
            yield launch, f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def share_of(makers: Sequence[Callable[[], list[Launch]]], index: int, count: int) -> list[Launch]:
    """Of all variants that the makers' launches have, the index-th of `count` equal shares."""
    found: list[Launch] = []
    for make in makers:
        found += make()
        gc.collect()
    return distinct(found)[index::count]


# What `python -m fastbert_bench.gpu` launches


def smoke_launches(arch: int) -> list[Launch]:
    """Those of the ops' smoke cases, at the shapes that run on a GPU."""
    cpu = torch.device("cpu")
    with recorded(arch) as recorder:
        for op in gpu_smoke.SHAPES:
            for case in gpu_smoke.smoke_cases(op, cpu, torch.bfloat16):
                kernel_checks.results(case.op, case.tensors(), case.dtype, case.dtype)
    return launches_of(recorder.kernels)


def makers(arch: int) -> list[Callable[[], list[Launch]]]:
    """The launches of the stages smoke, pretrain, step and trace, by kind."""
    step = functools.partial(step_launches, arch=arch)
    found: list[Callable[[], list[Launch]]] = [lambda: smoke_launches(arch)]
    several: tuple[dict[str, Any], ...] = (
        {"dropout": 0.0, "optim": "muon"},
        {"optim": "muon", "ops": gpu_smoke.muon_in(triton_ops(), torch.float32)},
        {"optim": "lamb"},
        {"vocab_size": 8192, "evaluates": True},
    )
    found += [functools.partial(step, "base", 512, **changes) for changes in several]
    shapes = dict.fromkeys(
        (workload.model, workload.S) for workload in WORKLOADS.values() if workload.name != TINY
    )
    for shape in shapes:
        found.append(functools.partial(step, *shape))
        found.append(functools.partial(forward_launches, *shape, arch=arch))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles one share of what the GPU command launches, into Triton's cache."""
    parser = argparse.ArgumentParser(prog="python -m fastbert_bench.gpu.launches")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="default all")
    parser.add_argument("--out", type=Path, help="a JSON file of what was compiled")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu: a rehearsal, which compiles two kernels for a GPU that is not there",
    )  # fmt: skip
    parser.add_argument(
        "--arch", type=int, help="compile all for this capability without a GPU, 90 for sm_90"
    )
    parser.add_argument("--wait", action="store_true", help="begin when a line comes on stdin")
    parser.add_argument(
        "--list", action="store_true", help=f"write {launch_list.FILE.name}; compiles nothing"
    )
    args = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)
    if args.list:
        with no_gpu(90):
            launch_list.write(listed())
        return 0
    if args.wait:
        processes.wait()
    index, count = map(int, args.share.split("/"))
    there = args.device == "cuda" and not args.arch
    major, minor = torch.cuda.get_device_capability() if there else divmod(args.arch or 90, 10)
    arch = 10 * major + minor
    wrong = []
    with contextlib.nullcontext() if there else no_gpu(arch):
        rehearsed = 2 if args.device == "cpu" and not args.arch else None
        share = share_of(makers(arch)[:rehearsed], index, count)[:rehearsed]
        for launch, why in compile_all(share, load=there):
            wrong += [f"{launch.name}: {why}"] * bool(why)
    if args.out:
        processes.write_json(args.out, {"compiled": len(share), "failures": wrong})
    print(f"{len(share)} compiled, {len(wrong)} failures")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
