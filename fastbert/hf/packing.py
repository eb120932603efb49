"""A padded batch without its padding: which tokens are computed, and attention among them.

Two kinds of token are kept: what the mask calls real, and the first of each sequence even where it
is padding, because poolers read it there. Such a token asks, but is no key: that is what the mask
says in transformers. All other padding has no influence on anything that is read, and is left out.

B sequences padded to S, T tokens kept, W any width, A heads, D head dimension; groups are n
sequences of similar length, padded to s; P slots of all groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.hf.dropout import draws_bytes, dropped_attention
from fastbert.ops import Ops


@dataclass(frozen=True, eq=False)
class Slots:
    """Rows in a wider layout, where some slots hold none."""

    source: Tensor  # (P,) int64, the row of each slot; any row where it holds none
    pads: Tensor | None  # (P, 1) bool, the slots that hold none
    target: Tensor  # (T,) int64, the slot of each row; any slot for one that has none
    missing: Tensor | None = None  # (T, 1) bool, the rows that have none

    def spread(self, rows: Tensor) -> Tensor:  # (T, W) -> (P, W), zeros in empty slots
        """Each slot its row."""
        out: Tensor = _Move.apply(rows, self, True)
        return out

    def collect(self, slots: Tensor) -> Tensor:  # (P, W) -> (T, W)
        """Each row out of its slot, zeros for one that has none."""
        out: Tensor = _Move.apply(slots, self, False)
        return out


# The gradient of a gather whose indices are distinct is a gather, too. Autograd would scatter with
# an addition for each row, on a CPU one after the other.
class _Move(torch.autograd.Function):
    """Rows into their slots (`spread`), or out of them; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Slots, spread: bool) -> Tensor:
        ctx.slots, ctx.spread = slots, spread
        moved = x.index_select(0, slots.source if spread else slots.target)
        empty = slots.pads if spread else slots.missing
        return moved if empty is None else moved.masked_fill_(empty, 0.0)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        back = ctx.slots.collect if ctx.spread else ctx.slots.spread
        return back(dout), None, None


@dataclass(frozen=True, eq=False)
class Plan:
    """How the tokens of a batch lie, made once a forward and read by every layer.

    Layers see (1, T, W): what transformers calls a batch of one.
    """

    shape: tuple[int, int]  # B, S
    slots: Slots | None  # in the padded batch; None: nothing is padded
    keys: Tensor | None  # (T,) bool, tokens that are keys; None: all
    cu_seqlens: Tensor  # (N + 1,) int32, where each of N sequences' tokens begin
    longest: int  # kept tokens of a sequence
    even: tuple[int, int] | None  # n, s: n sequences of s tokens, each a key; None: they differ
    wanted: Tensor | None = None  # (R,) tokens whose last hidden state is read; None: all
    last: Any = None  # the layer that makes it
    pooled: bool = False  # whether the last B of `wanted` are the first tokens
    _elsewhere: dict[torch.device, "Plan"] = field(default_factory=dict)

    @classmethod
    def of(
        cls, attention_mask: Tensor | None, shape: tuple[int, int], device: torch.device
    ) -> "Plan":
        """Reads a mask, which on a GPU is waited for.

        Args:
            attention_mask: (B, S) of any dtype, 0 at padding; None: nothing is padded.
            shape: B and S, both at least 1.
            device: of the inputs.
        """
        B, S = shape
        if device.type == "cpu" and attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None  # where nobody waits, what is often so is asked first
        if attention_mask is not None:
            real = attention_mask.to(device) != 0
            asked = real.clone()
            asked[:, 0] = True
            lengths = asked.sum(1)
            told = torch.stack((lengths.sum(), lengths.max(), real[:, 0].all().long()))
            T, longest, all_begin = told.tolist()
            if T < B * S or not all_begin:
                kept = asked.flatten()
                target = torch.nonzero_static(kept, size=T).squeeze(1)
                source = (kept.cumsum(0) - 1).clamp_(min=0)
                return cls(
                    shape,
                    Slots(source, ~kept[:, None], target),
                    None if all_begin else real.flatten()[target],
                    F.pad(lengths.cumsum(0), (1, 0)).int(),
                    longest,
                    (B, longest) if T == B * longest and all_begin else None,
                )
        cu_seqlens = torch.arange(0, B * S + 1, S, dtype=torch.int32, device=device)
        return cls(shape, None, None, cu_seqlens, S, (B, S))

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device) -> "Plan":
        """Of sequences that lie end to end already: a batch of one, (1, T), to `pack` and `pad`.

        Args:
            lengths: of at least one sequence, each at least 1.
            device: of the inputs.
        """
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        N, longest, T = len(lengths), max(lengths), sum(lengths)
        even = (N, longest) if T == N * longest else None
        return cls((1, T), None, None, ends.to(device), longest, even)

    def to(self, device: torch.device) -> "Plan":
        """The same on another device, for a model that lies on several."""
        if self.cu_seqlens.device == device:
            return self
        if device not in self._elsewhere:
            names = ("keys", "cu_seqlens", "wanted")
            moved: dict[str, Any] = {
                name: value.to(device)
                for name in names
                if (value := getattr(self, name)) is not None
            }
            if self.slots is not None:
                pads = None if self.slots.pads is None else self.slots.pads.to(device)
                moved["slots"] = Slots(
                    self.slots.source.to(device), pads, self.slots.target.to(device)
                )
            self._elsewhere[device] = replace(self, **moved, _elsewhere={})
        return self._elsewhere[device]

    def pack(self, padded: Tensor) -> Tensor:  # (B, S) or (B, S, W) -> (1, T) or (1, T, W)
        """The kept tokens, laid end to end."""
        if self.slots is None:
            return padded if padded.shape[0] == 1 else padded.flatten(0, 1)[None]
        flat = padded.flatten(0, 1)
        return (self.slots.collect(flat) if flat.dim() > 1 else flat[self.slots.target])[None]

    def pad(self, packed: Tensor) -> Tensor:  # (1, T, W) -> (B, S, W), zeros at padding
        """Back to the shape that came in."""
        rows = packed if self.slots is None else self.slots.spread(packed.squeeze(0))
        return rows.view(*self.shape, -1)

    def places(self, flat: Tensor) -> Tensor:  # (M,) places in (B * S) -> (M,) among the tokens
        """Where kept tokens lie."""
        return flat if self.slots is None else self.slots.source[flat]

    @property
    def sequences(self) -> int:
        """N."""
        return len(self.cu_seqlens) - 1

    @property
    def first(self) -> Tensor:  # (N,) int64
        """The first token of each sequence."""
        return self.cu_seqlens[:-1].long()

    # For attention by kernels, which know no mask

    @cached_property
    def askers(self) -> "_Askers":
        """First tokens that ask without being keys, and the keys as sequences of their own."""
        assert self.keys is not None
        counted = F.pad(self.keys.cumsum(0), (1, 0))
        cu_keys = counted.index_select(0, self.cu_seqlens.long())
        asks = ~self.keys.index_select(0, self.first) & (cu_keys.diff() > 0)
        return _Askers(
            self.keys.nonzero().squeeze(1),
            cu_keys.int(),
            self.first[asks],
            cu_keys[:-1][asks],
            F.pad(asks.cumsum(0), (1, 0)).int(),
        )

    # For attention in plain PyTorch

    @cached_property
    def groups(self) -> tuple[list["_Group"], Slots]:
        """Sequences by length, so that the cost follows the sum of squares: at 55% real tokens 40%.

        At most 16 groups; 4 at S = 128, where 2 and 8 are slower.
        """
        bounds = self.cu_seqlens.tolist()
        lengths = [end - begin for begin, end in pairwise(bounds)]
        multiple = max(32, self.longest // 16)
        by_length: dict[int, list[int]] = {}
        for sequence, length in enumerate(lengths):
            padded = min(-(-length // multiple) * multiple, self.longest)
            by_length.setdefault(padded, []).append(sequence)
        device = self.cu_seqlens.device
        parts, tokens, valid = [], [], []
        for padded, members in sorted(by_length.items()):
            begins = torch.tensor([bounds[i] for i in members], device=device)[:, None]
            ends = torch.tensor([bounds[i + 1] for i in members], device=device)[:, None]
            of_group = begins + torch.arange(padded, device=device)
            inside = of_group < ends
            of_group = torch.minimum(of_group, ends - 1)
            seen = inside if self.keys is None else inside & self.keys[of_group]
            mask = None if bool(seen.all()) else seen[:, None, None, :]
            parts.append((len(members), padded, mask))
            tokens.append(of_group.flatten())
            valid.append(inside.flatten())
        source, filled = torch.cat(tokens), torch.cat(valid)
        places = filled.nonzero().squeeze(1)
        target = torch.empty_like(places).scatter_(0, source[filled], places)
        pads = None if bool(filled.all()) else ~filled[:, None]
        return parts, Slots(source, pads, target)

    @cached_property
    def padded_groups(self) -> tuple[list["_Group"], Slots]:
        """`groups` whose rows are those of the padded batch (B * S)."""
        parts, slots = self.groups
        if self.slots is None:
            return parts, slots
        source, target = self.slots.target[slots.source], slots.target[self.slots.source]
        return parts, Slots(source, slots.pads, target, self.slots.pads)


class _Askers(NamedTuple):
    keys: Tensor  # (K,) int64, which tokens are keys
    cu_seqlens: Tensor  # (B + 1,) int32, where each sequence's keys begin among them
    tokens: Tensor  # (R,) int64, which ask only
    positions: Tensor  # (R,) int64, of their sequence's first key among the keys
    cu_queries: Tensor  # (B + 1,) int32


_Group = tuple[int, int, Tensor | None]  # n, s, (n, 1, 1, s) bool: which are keys


def attend(
    plan: Plan,
    q: Tensor,  # (T, A D)
    k: Tensor,  # (T, A D)
    v: Tensor,  # (T, A D)
    heads: int,
    dropout_p: float,
    scale: float,
) -> Tensor:  # (T, A D)
    """softmax(Q Kᵀ · scale) V within each sequence, dropout by torch's generator.

    Groups of similar length go through torch's scaled_dot_product_attention.
    """
    if plan.even is not None:
        return _sdpa(q, k, v, (*plan.even, None), heads, dropout_p, scale)
    return _attend_groups(*plan.groups, q, k, v, heads, dropout_p, scale)


def attend_padded(
    plan: Plan,
    q: Tensor,  # (B S, A D)
    k: Tensor,  # (B S, A D)
    v: Tensor,  # (B S, A D)
    heads: int,
    dropout_p: float,
    scale: float,
) -> Tensor:  # (B S, A D), zeros where no token is kept
    """The same of rows that lie padded."""
    return _attend_groups(*plan.padded_groups, q, k, v, heads, dropout_p, scale)


def _attend_groups(
    parts: list["_Group"],
    slots: Slots,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    dropout_p: float,
    scale: float,
) -> Tensor:
    q, k, v = (slots.spread(x) for x in (q, k, v))
    if len(parts) == 1:
        return slots.collect(_sdpa(q, k, v, parts[0], heads, dropout_p, scale))
    sizes = [n * s for n, s, _ in parts]
    each = zip(q.split(sizes), k.split(sizes), v.split(sizes), parts, strict=True)
    return slots.collect(torch.cat([_sdpa(*one, heads, dropout_p, scale) for one in each]))


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: _Group,
    heads: int,
    dropout_p: float,
    scale: float,
) -> Tensor:  # (n s, A D)
    n, s, mask = group
    q, k, v = (x.view(n, s, heads, -1).transpose(1, 2) for x in (q, k, v))
    if draws_bytes(q, dropout_p) and (mask is None or bool(mask.any(-1).all())):
        out = dropped_attention(q, k, v, mask, dropout_p, scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale)
    return out.transpose(1, 2).reshape(n * s, -1)


def attend_with(
    ops: Ops,
    plan: Plan,
    qkv: Tensor,  # (T, 3, A, D)
    dropout_p: float,
) -> Tensor:  # (T, A, D)
    """The same by one of our kernels; dropout's bits are drawn from torch's generator, too."""
    seed = dropout_seed(qkv.device, dropout_p)
    if plan.keys is None:
        return ops.attention(qkv, plan.cu_seqlens, plan.longest, dropout_p, seed, 0)
    at = plan.askers
    out = qkv[:, 0] * 0.0  # of sequences without a key
    if len(at.keys):
        own = ops.attention(
            qkv.index_select(0, at.keys), at.cu_seqlens, plan.longest, dropout_p, seed, 0
        )
        out = out.index_copy(0, at.keys, own)
    if len(at.tokens):
        own = ops.attention_at(
            qkv[:, 0].index_select(0, at.tokens), qkv[:, 1:].index_select(0, at.keys),
            at.positions, at.cu_queries, at.cu_seqlens, plan.longest, dropout_p, seed, 1,
        )  # fmt: skip
        out = out.index_copy(0, at.tokens, own)
    return out


def dropout_seed(device: torch.device, dropout_p: float) -> Tensor:  # (3,) int64
    """What a kernel draws its dropout from: words of torch's generator, where there is dropout.

    Checkpointing restores that generator, so a forward made again draws the same.
    """
    return torch.randint(2**29, (3,), device=device) if dropout_p else _no_seed(device)


@cache
def _no_seed(device: torch.device) -> Tensor:
    """What no kernel reads: one for all, not a launch for each of three in every layer."""
    with torch.inference_mode(False):  # a backward may keep it
        return torch.zeros(3, dtype=torch.int64, device=device)
