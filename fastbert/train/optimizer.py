"""AdamW, LAMB and Muon over the flat buffers: clipped by the global norm, non-finite steps skipped.

Every implementation computes the same update (the equations are `reference_optimizer`'s) on the
same buffers; `update` asks nothing of the host, so a CUDA graph can hold it (apex's excepted).
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.config import ModelConfig, PretrainConfig
from fastbert.errors import UserError
from fastbert.ops import Buffers, Hyperparameters, Ops
from fastbert.train import muon
from fastbert.train.flat import FlatParameters
from fastbert_kernels.reference_optimizer import MuonHyperparameters, update_matrices

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Part(NamedTuple):
    """A stretch of the flat buffers that AdamW treats alike."""

    span: slice
    weight_decay: float
    lr_factor: float


def _parts(flat: FlatParameters, config: PretrainConfig) -> list[_Part]:
    """What AdamW updates: decayed and undecayed; the embeddings apart where their rate differs."""
    decay, factor = config.weight_decay, config.embedding_lr_factor
    first = flat.embedding_end if factor != 1 else 0
    found = [
        _Part(slice(0, first), decay, factor),
        _Part(slice(first, flat.decay_end), decay, 1.0),
        _Part(slice(flat.decay_end, flat.last_begin), 0.0, 1.0),
    ]
    return found if first else found[1:]


class FlatOptimizer(ABC):
    """The moments and counters of an update, all on the device.

    Attributes:
        exp_avg: (P,) fp32, the first moment.
        exp_avg_sq: (P,) fp32, the second; it ends before Muon's matrices, which have none.
        lr: () fp32, the learning rate that the next update reads.
        updates, skipped: () int64, how many updates were made, and skipped for a non-finite
            gradient.
        grad_norm: () fp32, of the last gradient before clipping.
    """

    def __init__(self, flat: FlatParameters, config: PretrainConfig) -> None:
        self.flat, self.config = flat, config
        self.exp_avg = torch.zeros_like(flat.master)
        self.exp_avg_sq = torch.zeros_like(flat.master[: flat.last_begin])
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
        """The moments, as `exp_avg.<parameter>` and, where it has one, `exp_avg_sq.<parameter>`."""
        buffers = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {
            f"{kind}.{name}": view
            for kind, buffer in buffers.items()
            for name, view in self.flat.views(buffer).items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], updates: int, skipped: int) -> None:
        """Restores what `state_dict` gave.

        Raises:
            UserError: a tensor is missing, as where it was given by another `optim`.
        """
        for name, view in self.state_dict().items():
            if name not in state:
                raise UserError(
                    f"optim = {self.config.optim!r} needs {name}, which the saved optimizer lacks: "
                    "go on with the optim and the model that it was saved with"
                )
            view.copy_(state[name])
        self.updates.fill_(updates)
        self.skipped.fill_(skipped)

    def _buffers(self, grad_scale: Tensor) -> Buffers:
        flat = self.flat
        weights = None if flat.weights is flat.master else flat.weights
        return Buffers(
            flat.master, flat.grad, self.exp_avg, self.exp_avg_sq, weights,
            self.lr, self.updates, self.skipped, grad_scale, self.grad_norm,
        )  # fmt: skip


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
            embedding_end=flat.embedding_end,
            embedding_lr_factor=config.embedding_lr_factor,
        )

    def update(self, grad_scale: Tensor) -> None:
        self._function(self._buffers(grad_scale), self._hyper)


class _TorchFused(FlatOptimizer):
    """torch.optim.AdamW(fused=True) on the tensors of `_parts`, and Muon in plain PyTorch."""

    def __init__(
        self,
        flat: FlatParameters,
        config: PretrainConfig,
        matrices: MuonHyperparameters | None = None,
        spread: muon.Spread | None = None,
    ) -> None:
        super().__init__(flat, config)
        self._matrices, self._spread = matrices, spread
        self._parts = _parts(flat, config)
        self._parameters = [nn.Parameter(flat.master[part.span]) for part in self._parts]
        for parameter, part in zip(self._parameters, self._parts, strict=True):
            parameter.grad = flat.grad[part.span]
        self._rates = [
            self.lr if part.lr_factor == 1 else torch.zeros_like(self.lr) for part in self._parts
        ]
        self._adamw: Any = torch.optim.AdamW(
            [
                {"params": [parameter], "weight_decay": part.weight_decay, "lr": rate}
                for parameter, part, rate in zip(
                    self._parameters, self._parts, self._rates, strict=True
                )
            ],
            lr=self.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
            capturable=flat.master.is_cuda,
        )
        self._attach()

    def _attach(self) -> None:
        for parameter, part in zip(self._parameters, self._parts, strict=True):
            self._adamw.state[parameter] = {
                "step": self.updates.float(),
                "exp_avg": self.exp_avg[part.span],
                "exp_avg_sq": self.exp_avg_sq[part.span],
            }

    @torch.no_grad()
    def update(self, grad_scale: Tensor) -> None:
        torch.linalg.vector_norm(self.flat.grad, out=self.grad_norm)
        self.grad_norm.div_(grad_scale)
        skip = ~self.grad_norm.isfinite()
        if self.config.max_grad_norm > 0:
            clip = (self.config.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
            grad_scale = grad_scale / clip
        for part, rate in zip(self._parts, self._rates, strict=True):
            if rate is not self.lr:
                torch.mul(self.lr, part.lr_factor, out=rate)
        # What a GradScaler would set: torch divides the gradient by the one, and obeys the other.
        self._adamw.grad_scale, self._adamw.found_inf = grad_scale, skip.float()
        self._adamw.step()
        self.skipped.add_(skip)
        self.updates.add_(~skip)
        if self._matrices is not None and not bool(skip):  # plain PyTorch is in no CUDA graph
            self.flat.grad[self._matrices.begin :].div_(grad_scale)
            buffers = self._buffers(grad_scale)
            update_matrices(buffers, self.flat.grad, self._matrices, self._spread)
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
        self._parts = _parts(flat, config)

        # LAMB's trust ratios are of whole parameters; AdamW wants as few tensors as possible.
        def split(buffer: Tensor) -> list[Tensor]:
            views = flat.views(buffer).values() if lamb else None
            return [*(views or (buffer[part.span] for part in self._parts))]

        self._views = [split(b) for b in (flat.grad, self.exp_avg, self.exp_avg_sq)]
        self._parameters = [nn.Parameter(view) for view in split(flat.master)]
        own: dict[str, Any] = {"max_grad_norm": config.max_grad_norm or 1e30} if lamb else {}
        self._clips = lamb
        self._rule = rule(
            [
                {
                    "params": [
                        parameter
                        for parameter in self._parameters
                        if part.span.start <= parameter.storage_offset() < part.span.stop
                    ],
                    "weight_decay": part.weight_decay,
                }
                for part in self._parts
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
        for group, part in zip(self._rule.param_groups, self._parts, strict=True):
            group["lr"] = float(self.lr) * part.lr_factor
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


def flat_parameters(
    model: nn.Module,
    config: PretrainConfig,
    dtype: torch.dtype = torch.float32,
    *,
    main_grads: bool = True,
) -> FlatParameters:
    """A model's parameters in buffers laid out for the optimizer that `config.optim` names.

    Args:
        model, dtype, main_grads: see `FlatParameters`.
        config: also says in what precision gradients are added up.
    """
    gradient_dtype = torch.bfloat16 if config.gradient_precision == "bf16" else torch.float32
    last = muon.names(model) if config.optim == "muon" else ()
    return FlatParameters(model, dtype, gradient_dtype, main_grads=main_grads, last=last)


def make_optimizer(
    flat: FlatParameters, config: PretrainConfig, ops: Ops, group: "ProcessGroup | None" = None
) -> FlatOptimizer:
    """The optimizer that `config.optim` names.

    | optim | with our kernels | without |
    |---|---|---|
    | adamw | a kernel | torch's fused AdamW; the reference for bf16 gradients |
    | lamb | a kernel | the reference, plain PyTorch |
    | muon | kernels | torch's fused AdamW and plain PyTorch; the reference for bf16 gradients |
    | adamw_torch_fused | torch's fused AdamW | the same |
    | adamw_apex_fused, lamb_apex_fused | apex's | the same |

    Args:
        flat: as `flat_parameters` lays them out for this `config`.
        config: the recipe, resolved.
        ops: whose update to take.
        group: processes that hold the same gradients and divide Muon's matrices among them.

    Raises:
        UserError: apex is not there, or gradients are bf16 where the optimizer takes only fp32.
    """
    optim, wide = config.optim, flat.grad.dtype == torch.float32
    if optim not in ("adamw", "lamb", "muon") and not wide:
        raise UserError(
            f"optim = {optim!r} takes gradients in fp32: use gradient_precision = 'fp32', or "
            f"optim = '{'lamb' if 'lamb' in optim else 'adamw'}'"
        )
    fused = wide and not ops.kernels
    if optim == "muon":
        matrices = muon.hyperparameters(flat, config)
        spread = muon.spread_over(group) if group is not None else None
        if fused:
            return _TorchFused(flat, config, matrices, spread)
        return _Functional(flat, config, partial(ops.muon_step, muon=matrices, spread=spread))
    if optim == "adamw_torch_fused" or (optim == "adamw" and fused):
        return _TorchFused(flat, config)
    if optim == "adamw":
        return _Functional(flat, config, ops.adamw_step)
    if optim == "lamb":
        return _Functional(flat, config, partial(ops.lamb_step, spans=flat.spans))
    return _Apex(flat, config, "FusedLAMB" if "lamb" in optim else "FusedAdam")


def described(config: PretrainConfig, sizes: ModelConfig, ops: Ops) -> str:
    """What `make_optimizer` makes, in a line."""
    optim, wide = config.optim, config.gradient_precision == "fp32"
    ours = "our kernels" if ops.kernels else "plain PyTorch"
    by = "apex's, fused" if optim.endswith("_apex_fused") else ours
    if optim == "adamw_torch_fused" or (wide and not ops.kernels and optim in ("adamw", "muon")):
        by = "torch's, fused"
    line = f"{'LAMB' if 'lamb' in optim else 'AdamW'} ({by})"
    if optim == "muon":
        split = config.muon_split_qkv
        count, parameters = sum(muon.shapes(sizes, split).values()), muon.num_parameters(sizes)
        line = (
            f"Muon for {count} matrices ({parameters / 1e6:.1f}M parameters; q, k, v "
            f"{'each' if split else 'joined'}; {ours}), AdamW for the rest ({by})"
        )
    factor = config.embedding_lr_factor
    return line + (f", embedding tables at {factor:g} x its rate" if factor != 1 else "")
