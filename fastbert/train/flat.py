"""All parameters of a model in flat buffers: fp32 masters, gradients, the weights in use.

A step then clips, updates and writes back in a handful of passes whatever the number of tensors
(199 in BERT-base), gradients never need to be allocated, and a checkpoint is a few large tensors.
"""

import torch
from torch import Tensor, nn

_ALIGNMENT = 64  # elements: every parameter starts on a 128-byte boundary even in bf16


class FlatParameters:
    """Moves a model's parameters into flat buffers; the module's parameters become views.

    The buffers are split once: `decay` holds matrices, `no_decay` biases and LayerNorms, so that an
    optimizer sees two tensors. In bf16 the module computes with rounded copies and the fp32
    masters stay here.

    Attributes:
        master: (P,) fp32.
        grad: (P,) fp32, filled by `collect_gradients`.
        names: parameter names in buffer order.
        decay_end: `master[:decay_end]` is weight-decayed, the rest is not.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        named = dict(model.named_parameters())
        order = sorted(named, key=lambda name: named[name].dim() < 2)  # stable: matrices first
        self.names = order
        self._parameters = [named[name] for name in order]
        self._spans: dict[str, tuple[int, int]] = {}
        offset = 0
        self.decay_end = 0
        for name, parameter in zip(order, self._parameters, strict=True):
            self._spans[name] = (offset, offset + parameter.numel())
            offset += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
            if parameter.dim() > 1:
                self.decay_end = offset
        device = self._parameters[0].device
        self.master = torch.zeros(offset, device=device)
        self.grad = torch.zeros(offset, device=device)
        self.weights = self.master if dtype == torch.float32 else self.master.to(dtype)
        self._gradient_views = self.views(self.grad)
        masters, weights = self.views(self.master), self.views(self.weights)
        with torch.no_grad():
            for name, parameter in zip(order, self._parameters, strict=True):
                masters[name].copy_(parameter)
                weights[name].copy_(parameter)
                parameter.data = weights[name]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The named parameters' places in a buffer laid out like `master`."""
        return {
            name: flat[slice(*self._spans[name])].view_as(parameter)
            for name, parameter in zip(self.names, self._parameters, strict=True)
        }

    def groups(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The decayed and the undecayed part of a buffer laid out like `master`."""
        return flat[: self.decay_end], flat[self.decay_end :]

    @torch.no_grad()
    def collect_gradients(self, *, accumulate: bool) -> None:
        """Moves the module's gradients into `grad`, replacing or adding, and frees them."""
        for view, parameter in zip(self._gradient_views.values(), self._parameters, strict=True):
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                if not accumulate:
                    view.zero_()
            elif accumulate:
                # Mixed-dtype add_ is not vectorised on CPUs (14.8 ms against 3 for 11M elements).
                view.add_(gradient.to(view.dtype))
            else:
                view.copy_(gradient)

    @torch.no_grad()
    def write_back(self) -> None:
        """Rounds the masters into the weights the module computes with."""
        if self.weights is not self.master:
            self.weights.copy_(self.master)
