"""A run that begins with a checkpoint's weights: their way into the model, new words included.

`fastbert.hf.initial` reads them; a run keeps them, as its checkpoint of step 0.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.config import ModelConfig
from fastbert.model.bert import Bert


class Initial(NamedTuple):
    """The weights of a checkpoint."""

    folder: str
    weights: dict[str, Tensor]  # under the names of `Bert`'s parameters, of any float dtype
    names: dict[str, tuple[str, ...]]  # what the checkpoint calls each of `Bert`'s parameters
    notes: tuple[str, ...] = ()  # what the user should know of them, one line each


_OF_TOKENS = {"embeddings.word", "mlm.bias"}

ReadInitial = Callable[[str, ModelConfig, bool], Initial]
"""(the Hugging Face folder, its sizes, whether the next-sentence head is trained)"""


class NewTokens(NamedTuple):
    """Tokens that the checkpoint has no row for, or none that was trained."""

    first: int  # id of the first; the others follow
    pieces: Sequence[Sequence[int]]  # of each, the tokens that it was cut into before


@torch.no_grad()
def begin_with(initial: Initial, model: Bert, new: NewTokens) -> list[str]:
    """Copies weights into a model; what the checkpoint lacks stays as it is.

    The rows of new tokens begin as the mean of the rows of their pieces, in the word embedding
    (V, H) and in the masked-word head's bias (V,).

    Args:
        initial: the weights; their word embedding may have fewer rows than the model's.
        model: of the checkpoint's sizes but for the vocabulary.
        new: empty where the vocabulary is the checkpoint's own.

    Returns:
        Lines for the log: what was taken, what is new, what has no place in the model.
    """
    parameters = dict(model.named_parameters())
    for name in _OF_TOKENS & initial.weights.keys():
        old = initial.weights[name].float()
        rows = [old[torch.tensor(pieces)].mean(0) for pieces in new.pieces]
        behind = old[new.first + len(rows) :]
        grown = torch.cat((old[: new.first], *(row[None] for row in rows), behind))
        parameters[name].copy_(grown)
    for name, parameter in parameters.items():
        if name in initial.weights and name not in _OF_TOKENS:
            parameter.copy_(initial.weights[name])

    def named(names: Iterable[str]) -> list[str]:
        return [theirs for name in names for theirs in initial.names[name]]

    taken = len(named(name for name in parameters if name in initial.weights))
    lacking = named(name for name in parameters if name not in initial.weights)
    unused = named(name for name in initial.weights if name not in parameters)
    line = f"init: {taken} weights of {initial.folder}"
    line += f"; new, set at random: {', '.join(lacking) or 'none'}"
    line += f"; not used: {', '.join(unused)}" if unused else ""
    return [*initial.notes, line]
