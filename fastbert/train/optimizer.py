"""AdamW and LAMB over the flat buffers: clipped by the global norm, non-finite steps skipped.

Every implementation computes the same update (the equations are `reference_optimizer`'s) on the
same buffers; `update` asks nothing of the host, so a CUDA graph can hold it (apex's excepted).
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.config import PretrainConfig
from fastbert.errors import UserError
from fastbert.ops import Buffers, Hyperparameters, Ops
from fastbert.train.flat import FlatParameters


class FlatOptimizer(ABC):
    """The moments and counters of an update, all on the device.

    Attributes:
        exp_avg, exp_avg_sq: (P,) fp32 moments.
        lr: () fp32, the learning rate that the next update reads.
        updates, skipped: () int64, how many updates were made, and skipped for a non-finite
            gradient.
        grad_norm: () fp32, of the last gradient before clipping.
    """

    def __init__(self, flat: FlatParameters, config: PretrainConfig) -> None:
        self.flat, self.config = flat, config
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(flat.master), torch.zeros_like(flat.master)
        self.lr, self.grad_norm = flat.master.new_zeros(()), flat.master.new_zeros(())
        self.updates, self.skipped = self.lr.long(), self.lr.long()

    @abstractmethod
    def update(self, grad_scale: Tensor) -> None:
        """Unscales, clips, updates masters and moments, and writes the weights back.

        Args:
            grad_scale: () fp32, what the gradient was multiplied with. A gradient or a scale that
                is not finite leaves everything as it was and adds 1 to `skipped`.
        """

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Both buffers."""
        return self.exp_avg, self.exp_avg_sq

    def state_dict(self) -> dict[str, Tensor]:
        """The moments, as `exp_avg.<parameter>` and `exp_avg_sq.<parameter>`."""
        buffers = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {
            f"{kind}.{name}": view
            for kind, buffer in buffers.items()
            for name, view in self.flat.views(buffer).items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], updates: int, skipped: int) -> None:
        """Restores what `state_dict` gave; raises KeyError where a tensor is missing."""
        for name, view in self.state_dict().items():
            view.copy_(state[name])
        self.updates.fill_(updates)
        self.skipped.fill_(skipped)


class _Functional(FlatOptimizer):
    """One function does it all: our kernels, or their reference."""

    def __init__(
        self, flat: FlatParameters, config: PretrainConfig, function: Callable[..., None]
    ) -> None:
        super().__init__(flat, config)
        self._function = function
        self._hyper = Hyperparameters(
            decay_end=flat.decay_end,
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
        )

    def update(self, grad_scale: Tensor) -> None:
        flat = self.flat
        weights = None if flat.weights is flat.master else flat.weights
        buffers = Buffers(
            flat.master, flat.grad, self.exp_avg, self.exp_avg_sq, weights,
            self.lr, self.updates, self.skipped, grad_scale, self.grad_norm,
        )  # fmt: skip
        self._function(buffers, self._hyper)


class _TorchFused(FlatOptimizer):
    """torch.optim.AdamW(fused=True) on two tensors: the decayed part of the buffer and the rest."""

    def __init__(self, flat: FlatParameters, config: PretrainConfig) -> None:
        super().__init__(flat, config)
        self._parameters = [nn.Parameter(part) for part in flat.groups(flat.master)]
        for parameter, gradient in zip(self._parameters, flat.groups(flat.grad), strict=True):
            parameter.grad = gradient
        decays = (config.weight_decay, 0.0)
        self._adamw: Any = torch.optim.AdamW(
            [
                {"params": [parameter], "weight_decay": decay}
                for parameter, decay in zip(self._parameters, decays, strict=True)
            ],
            lr=self.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
            capturable=flat.master.is_cuda,
        )
        self._attach()

    def _attach(self) -> None:
        moments = (self.flat.groups(buffer) for buffer in (self.exp_avg, self.exp_avg_sq))
        for parameter, exp_avg, exp_avg_sq in zip(self._parameters, *moments, strict=True):
            self._adamw.state[parameter] = {
                "step": self.updates.float(),
                "exp_avg": exp_avg,
                "exp_avg_sq": exp_avg_sq,
            }

    @torch.no_grad()
    def update(self, grad_scale: Tensor) -> None:
        torch.linalg.vector_norm(self.flat.grad, out=self.grad_norm)
        self.grad_norm.div_(grad_scale)
        skip = ~self.grad_norm.isfinite()
        if self.config.max_grad_norm > 0:
            clip = (self.config.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
            grad_scale = grad_scale / clip
        # What a GradScaler would set: torch divides the gradient by the one, and obeys the other.
        self._adamw.grad_scale, self._adamw.found_inf = grad_scale, skip.float()
        self._adamw.step()
        self.skipped.add_(skip)
        self.updates.add_(~skip)
        self.flat.write_back()

    def load_state_dict(self, state: dict[str, Tensor], updates: int, skipped: int) -> None:
        super().load_state_dict(state, updates, skipped)
        self._attach()


class _Apex(FlatOptimizer):
    """NVIDIA apex's FusedAdam or FusedLAMB on views of the masters. Reads the norm on the host."""

    def __init__(self, flat: FlatParameters, config: PretrainConfig, name: str) -> None:
        super().__init__(flat, config)
        rule = getattr(_apex_optimizers(config.optim), name)
        lamb = name == "FusedLAMB"
        if lamb and config.weight_decay == 0:
            raise UserError(
                "optim = 'lamb_apex_fused' has no trust ratio where weight_decay = 0: use "
                "optim = 'lamb'"
            )
        # LAMB's trust ratios are of whole parameters; AdamW wants as few tensors as possible.
        split: Callable[[Tensor], Any] = (
            (lambda buffer: flat.views(buffer).values()) if lamb else flat.groups
        )
        self._views = [split(b) for b in (flat.grad, self.exp_avg, self.exp_avg_sq)]
        self._parameters = [nn.Parameter(part) for part in split(flat.master)]
        decayed = [p for p in self._parameters if p.storage_offset() < flat.decay_end]
        others = [p for p in self._parameters if p.storage_offset() >= flat.decay_end]
        own: dict[str, Any] = {"max_grad_norm": config.max_grad_norm or 1e30} if lamb else {}
        self._clips = lamb
        self._rule = rule(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=0.0,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            adam_w_mode=True,
            **own,
        )
        self._attach()

    def _attach(self) -> None:
        for group in self._rule.param_groups:
            group["step"] = int(self.updates)
        for parameter, grad, exp_avg, exp_avg_sq in zip(
            self._parameters, *self._views, strict=True
        ):
            parameter.grad = grad
            self._rule.state[parameter] = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    @torch.no_grad()
    def update(self, grad_scale: Tensor) -> None:
        grad = self.flat.grad
        torch.linalg.vector_norm(grad, out=self.grad_norm)
        self.grad_norm.div_(grad_scale)
        if not bool(self.grad_norm.isfinite()):
            self.skipped.add_(1)
            return
        factor = 1 / grad_scale
        if not self._clips and self.config.max_grad_norm > 0:
            factor *= (self.config.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        grad.mul_(factor)
        for group in self._rule.param_groups:
            group["lr"] = float(self.lr)
        self._rule.step()
        self.updates.add_(1)
        self.flat.write_back()

    def load_state_dict(self, state: dict[str, Tensor], updates: int, skipped: int) -> None:
        super().load_state_dict(state, updates, skipped)
        self._attach()


def _apex_optimizers(optim: str) -> Any:
    # Not "import apex and hope": the package of that name on PyPI is somebody else's.
    try:
        module = importlib.import_module("apex.optimizers")
    except ImportError:
        module = None
    if not (hasattr(module, "FusedAdam") and hasattr(module, "FusedLAMB")):
        raise UserError(
            f"optim = {optim!r} needs NVIDIA's apex (its module apex.optimizers): install it, or "
            f"use optim = '{'lamb' if 'lamb' in optim else 'adamw'}'"
        )
    return module


def make_optimizer(flat: FlatParameters, config: PretrainConfig, ops: Ops) -> FlatOptimizer:
    """The optimizer that `config.optim` names.

    | optim | with our kernels | without |
    |---|---|---|
    | adamw | a kernel | torch's fused AdamW; the reference for bf16 gradients |
    | lamb | a kernel | the reference, plain PyTorch |
    | adamw_torch_fused | torch's fused AdamW | the same |
    | adamw_apex_fused, lamb_apex_fused | apex's | the same |

    Raises:
        UserError: apex is not there, or gradients are bf16 where the optimizer takes only fp32.
    """
    optim, wide = config.optim, flat.grad.dtype == torch.float32
    if optim not in ("adamw", "lamb") and not wide:
        raise UserError(
            f"optim = {optim!r} takes gradients in fp32: use gradient_precision = 'fp32', or "
            f"optim = '{'lamb' if 'lamb' in optim else 'adamw'}'"
        )
    if optim == "adamw_torch_fused" or (optim == "adamw" and wide and not ops.kernels):
        return _TorchFused(flat, config)
    if optim == "adamw":
        return _Functional(flat, config, ops.adamw_step)
    if optim == "lamb":
        return _Functional(flat, config, partial(ops.lamb_step, spans=flat.spans))
    return _Apex(flat, config, "FusedLAMB" if "lamb" in optim else "FusedAdam")
