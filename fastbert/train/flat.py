"""All parameters of a model in flat buffers: fp32 masters, gradients, the weights in use.

A step then clips, updates and writes back in a handful of passes whatever the number of tensors
(199 in BERT-base), gradients never need to be allocated, and a checkpoint is a few large tensors.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from fastbert.ops import MainGrad

_ALIGNMENT = 64  # elements: every parameter starts on a 128-byte boundary even in bf16
_ROWS = 8  # of a matrix: behind 30,522 words lie 6 rows of zeros, which products may take along


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


class FlatParameters:
    """Moves a model's parameters into flat buffers; the module's parameters become views.

    The buffers are split once: the first part holds matrices, the tables of the embeddings before
    all, the second biases and LayerNorms, so that an optimizer sees two tensors; matrices that
    another optimizer takes lie behind them. In 16 bits the module computes with rounded copies and
    the fp32 masters stay here.

    Args:
        model: whose parameters they are.
        dtype: of the weights in use.
        gradient_dtype: of `grad`.
        main_grads: whether matrix products add weight gradients straight to `grad`; torch.compile
            cannot trace that.
        last: names of matrices that lie behind everything else.

    Attributes:
        master: (P,) fp32.
        weights: (P,) the weights in use; `master` itself in fp32.
        grad: (P,).
        names: parameter names in buffer order.
        spans: where each parameter starts and stops.
        embedding_end: `master[:embedding_end]` are the tables of the embeddings.
        decay_end: `master[:decay_end]` is weight-decayed, what follows is not.
        last_begin: `master[last_begin:]` are the matrices of `last`.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype = torch.float32,
        gradient_dtype: torch.dtype = torch.float32,
        *,
        main_grads: bool = True,
        last: Collection[str] = (),
    ) -> None:
        named = dict(model.named_parameters())
        tables = [n for n, p in named.items() if n.startswith("embeddings.") and p.dim() > 1]
        part = {name: 2 if name in last else int(named[name].dim() < 2) for name in named}
        self.names = sorted(named, key=part.__getitem__)  # stable
        assert self.names[: len(tables)] == tables, "an embedding_end needs them to be the first"
        self._parameters = [named[name] for name in self.names]
        self.spans: list[tuple[int, int]] = []
        end, ends = 0, dict.fromkeys(self.names, 0)
        rows = [_rounded_up(len(p), _ROWS if p.dim() > 1 else 1) for p in self._parameters]
        for name, parameter, padded in zip(self.names, self._parameters, rows, strict=True):
            self.spans.append((end, end + parameter.numel()))
            end += _rounded_up(parameter[0].numel() * padded, _ALIGNMENT)
            ends[name] = end
        self.embedding_end = max((ends[name] for name in tables), default=0)
        self.decay_end = max((ends[name] for name in self.names if part[name] == 0), default=0)
        self.last_begin = max(ends[name] for name in self.names if part[name] < 2)
        device = self._parameters[0].device
        self.master = torch.zeros(end, device=device)
        self.grad = torch.zeros(end, device=device, dtype=gradient_dtype)
        self.weights = self.master if dtype == torch.float32 else self.master.to(dtype)
        views = [self.views(flat).values() for flat in (self.master, self.weights, self.grad)]
        self._main_grads = list(map(MainGrad, views[2], rows))
        with torch.no_grad():
            for parameter, master, weight, main_grad in zip(
                self._parameters, views[0], views[1], self._main_grads, strict=True
            ):
                master.copy_(parameter)
                weight.copy_(parameter)
                parameter.data = weight
                parameter.main_grad = main_grad if main_grads else None  # type: ignore[attr-defined]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The named parameters' places in a buffer laid out like `master`, or like its beginning:
        without those beyond its end."""
        return {
            name: flat[slice(*span)].view_as(parameter)
            for name, span, parameter in zip(self.names, self.spans, self._parameters, strict=True)
            if span[1] <= len(flat)
        }

    def forget_gradients(self) -> None:
        """Lets the next gradient of each parameter overwrite its place: no memset."""
        for main_grad in self._main_grads:
            main_grad.empty = True

    def zero_gradients(self) -> None:
        """Zeros everywhere, to which every gradient adds: one memset, for a captured graph."""
        self.grad.zero_()
        for main_grad in self._main_grads:
            main_grad.empty = False

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Adds what autograd left in `.grad` (biases, norms, small tables) to `grad`, and frees it.

        A parameter without any gradient in this step gets zeros.
        """
        vectors: dict[bool, tuple[list[Tensor], list[Tensor]]] = {True: ([], []), False: ([], [])}
        for parameter, main_grad in zip(self._parameters, self._main_grads, strict=True):
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                if main_grad.empty:
                    main_grad.buffer.zero_()
            elif gradient.dim() > 1:
                main_grad.add(gradient)
            else:
                places, gradients = vectors[main_grad.empty]
                places.append(main_grad.buffer)
                gradients.append(gradient)
            main_grad.empty = False
        # A hundred small tensors in one launch each way.
        if vectors[True][0]:
            torch._foreach_copy_(*vectors[True])
        places, gradients = vectors[False]
        if places:
            wide = [torch.empty_like(place) for place in places]
            torch._foreach_copy_(wide, gradients)
            torch._foreach_add_(places, wide)

    @torch.no_grad()
    def write_back(self) -> None:
        """Rounds the masters into the weights the module computes with."""
        if self.weights is not self.master:
            self.weights.copy_(self.master)
