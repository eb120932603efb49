"""Whether a call is recorded or transformed, so that values and Python objects are not its own."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad


def is_traced() -> bool:
    """Whether this call is recorded rather than run."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def unreadable(given: dict[str, Any]) -> str:
    """Why nothing can be decided by the values of arguments; empty where it can."""
    if is_traced():
        return "it is compiled or traced"
    if torch._C._functorch.maybe_current_level() is not None:
        return "a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "forward-mode gradients"
    if any(isinstance(x, Tensor) and (x.is_meta or type(x) is FakeTensor) for x in given.values()):
        return "tensors without values"
    return ""
