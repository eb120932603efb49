"""Every Triton launch of a training step, listed on a machine without a GPU, and compiled ahead.

A stub takes the place of the launch: the step runs on CPU tensors with our Triton ops, nothing they
write is computed, and each launch is noted with what the JIT makes a variant of: dtypes, alignment,
constants, options. The list depends on widths, lengths and settings, not on how many tokens there
are, so that a small batch stands for a large one. `compile_all` hands the noted launches back to
the JIT, which compiles them into Triton's cache, for a GPU that is there or for one that is not.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fastbert_kernels
from benchmarks import gpu_smoke, gpu_step, kernel_checks, processes
from benchmarks.contenders import make_batches, make_recipe
from fastbert.config import ModelConfig, model_config
from fastbert.model.bert import Bert
from fastbert.ops import triton_ops
from fastbert.train.step import TrainStep, model_inputs

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
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"

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


def _unless_differentiated(product: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A product that leaves its result as memory had it; autograd's own still need the true one."""

    def stub(a: Tensor, b: Tensor, *rest: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            return product(a, b, *rest, **options)
        if "out" in options:
            return options["out"]
        columns = b.shape[0 if name == "linear" else 1]
        return a.new_empty(a.shape[0], columns, dtype=options.get("out_dtype", a.dtype))

    return stub


# Where the time of a step on a CPU would go, for numbers that nobody reads.
_PRODUCTS = ((torch, "mm"), (torch, "addmm"), (Tensor, "__matmul__"), (F, "linear"))


@contextlib.contextmanager
def recorded(arch: int) -> Iterator[list[Launch]]:
    """Notes every launch of our kernels on CPU tensors instead of making it.

    Args:
        arch: compute capability whose tiles are chosen, 90 for sm_90.
    """
    import triton

    launches: list[Launch] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        names = kernel.arg_names
        args = (*args, *(options.pop(name) for name in names[len(args) :]))
        args = tuple(_stand_in(arg) for arg in args)
        launches.append(Launch(kernel, args, tuple(sorted(options.items())), tuple(grid)))

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Tensor, "normal_", lambda tensor, *_, **__: tensor))
        for place, name in _PRODUCTS:
            stub = _unless_differentiated(getattr(place, name), name)
            stack.enter_context(mock.patch.object(place, name, stub))
        stack.enter_context(mock.patch.object(triton.JITFunction, "run", note))
        for module in _modules():
            for name, stub in (
                ("require_launchable", lambda *_: None),
                ("_capability", lambda _: arch),
            ):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, stub))
        yield launches


def _stand_in(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return Pointer(arg.dtype, arg.data_ptr() % ALIGNMENT == 0)
    return arg


@functools.cache
def _batch(S: int, vocab_size: int, T: int) -> Any:
    rng = np.random.default_rng(1)
    lengths = np.array([S] * (T // S) + [T % S] * bool(T % S))
    return make_batches(lengths, S, vocab_size, rng)[1][0]


def step_launches(
    model: str,
    S: int,
    *,
    arch: int = 90,
    T: int = 0,
    vocab_size: int = 0,
    dropout: float | None = None,
    evaluates: bool = False,
    **changes: Any,
) -> list[Launch]:
    """The launches of one training step in bf16, in their order.

    Args:
        model: a preset; two of its layers stand for all, since each launches the same.
        S: the longest sequence.
        arch: compute capability.
        T: tokens of the batch; 0 for a little more than S.
        vocab_size: 0 for the preset's.
        dropout: None for the preset's.
        evaluates: whether an evaluation follows.
        changes: settings of the recipe that differ from `contenders.make_recipe`'s.
    """
    sizes = _two_layers(model)
    if vocab_size:
        sizes = dataclasses.replace(sizes, vocab_size=vocab_size)
    if dropout is not None:
        sizes = dataclasses.replace(
            sizes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
        )
    batch = _batch(S, sizes.vocab_size, T or S + 24)
    with recorded(arch) as launches:
        recipe = make_recipe(1, **changes)
        step = TrainStep(Bert(sizes, triton_ops()), recipe, torch.bfloat16)
        step([batch])
        if evaluates:
            with torch.no_grad():
                step.model.eval().predict(*model_inputs(batch))
    return launches


def _two_layers(model: str) -> ModelConfig:
    return dataclasses.replace(model_config(model), num_hidden_layers=2)


def forward_launches(model: str, S: int, *, arch: int = 90) -> list[Launch]:
    """Those of the fp32 forwards, with and without dropout, that show contenders to be equal."""
    sizes = _two_layers(model)
    batch = _batch(S, sizes.vocab_size, S + 24)
    with recorded(arch) as launches, torch.no_grad():
        bert = Bert(sizes, triton_ops())
        bert.eval().predict(*model_inputs(batch))
        bert.train()(*model_inputs(batch), batch.masked_labels, batch.next_sentence_labels)
    return launches


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


def share_of(
    makers: Sequence[Callable[[], list[Launch]]], index: int, count: int
) -> list[Launch]:
    """Of all variants that the makers' launches have, the index-th of `count` equal shares."""
    found: list[Launch] = []
    for make in makers:
        found += make()
        gc.collect()
    return distinct(found)[index::count]


# What `benchmarks.gpu` launches


def smoke_launches(arch: int) -> list[Launch]:
    """Those of the ops' smoke cases, at the shapes that run on a GPU."""
    cpu = torch.device("cpu")
    with recorded(arch) as launches:
        for op in gpu_smoke.SHAPES:
            for case in gpu_smoke.smoke_cases(op, cpu, torch.bfloat16):
                kernel_checks.results(case.op, case.tensors(), case.dtype, case.dtype)
    return launches


def makers(arch: int) -> list[Callable[[], list[Launch]]]:
    """The launches of the stages smoke, pretrain, step and trace, by kind."""
    step = functools.partial(step_launches, arch=arch)
    found: list[Callable[[], list[Launch]]] = [lambda: smoke_launches(arch)]
    for changes in ({"dropout": 0.0}, {"optim": "lamb"}, {"vocab_size": 8192, "evaluates": True}):
        found.append(functools.partial(step, "base", 512, **changes))
    shapes = dict.fromkeys(
        (workload.model, workload.S)
        for workload in gpu_step.WORKLOADS.values()
        if workload.name != gpu_step.TINY
    )
    for shape in shapes:
        found.append(functools.partial(step, *shape))
        found.append(functools.partial(forward_launches, *shape, arch=arch))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles one share of what the GPU command launches, into Triton's cache."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches")
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
    args = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)
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
