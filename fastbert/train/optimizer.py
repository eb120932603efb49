"""AdamW over the flat buffers: clipped by the global norm, non-finite steps skipped."""

import torch
from torch import Tensor, nn

from fastbert.config import PretrainConfig
from fastbert.train.flat import FlatParameters


class FlatAdamW:
    """AdamW (Loshchilov & Hutter 2019) with decay on matrices only.

    torch's fused AdamW does the arithmetic, on two tensors: the decayed half of the flat buffer and
    the rest.
    """

    def __init__(self, flat: FlatParameters, config: PretrainConfig) -> None:
        self.flat, self.max_grad_norm = flat, config.max_grad_norm
        parameters = [nn.Parameter(part) for part in flat.groups(flat.master)]
        for parameter, gradient in zip(parameters, flat.groups(flat.grad), strict=True):
            parameter.grad = gradient
        self._adamw = torch.optim.AdamW(
            [
                {"params": parameters[:1], "weight_decay": config.weight_decay},
                {"params": parameters[1:], "weight_decay": 0.0},
            ],
            lr=0.0,  # set at each step
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(flat.master), torch.zeros_like(flat.master)
        self._attach(0)

    def _attach(self, updates: int) -> None:
        moments = zip(
            self.flat.groups(self.exp_avg), self.flat.groups(self.exp_avg_sq), strict=True
        )
        for group, (exp_avg, exp_avg_sq) in zip(self._adamw.param_groups, moments, strict=True):
            step = torch.tensor(float(updates), device=self.flat.master.device)
            state = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
            self._adamw.state[group["params"][0]] = state

    @property
    def updates(self) -> int:
        """How many updates were made; skipped steps do not count."""
        (first, *_) = self._adamw.state.values()
        return int(first["step"])

    @torch.no_grad()
    def step(self, learning_rate: float) -> tuple[float, bool]:
        """Clips, updates the masters and writes the weights back.

        Returns:
            The gradient's norm before clipping, and whether the update was made: a gradient that is
            not finite leaves everything as it was.
        """
        norm = float(torch.linalg.vector_norm(self.flat.grad))
        if not norm < float("inf"):
            return norm, False
        if 0.0 < self.max_grad_norm < norm:
            self.flat.grad.mul_(self.max_grad_norm / (norm + 1e-6))
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self.flat.write_back()
        return norm, True

    def state_dict(self) -> dict[str, Tensor]:
        """The moments, as `exp_avg.<parameter>` and `exp_avg_sq.<parameter>`."""
        buffers = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {
            f"{kind}.{name}": view
            for kind, buffer in buffers.items()
            for name, view in self.flat.views(buffer).items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        """Restores what `state_dict` gave; raises KeyError where a tensor is missing."""
        for name, view in self.state_dict().items():
            view.copy_(state[name])
        self._attach(updates)
