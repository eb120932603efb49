"""A run's phases in the model and in its data: what it drops, and whose masks a checkpoint has."""

from collections.abc import Iterable
from typing import Any

from fastbert.data.mask import max_masked
from fastbert.model.bert import Bert
from fastbert.schedules import Phase


def use_dropout(model: Bert, phase: Phase) -> None:
    """Lets a model drop what the phase says; its sizes keep the model's own for who fine-tunes."""
    own, hidden, attention = model.config, *phase[2:4]
    hidden = own.hidden_dropout_prob if hidden is None else hidden
    model.embeddings.dropout_p = hidden
    layer: Any
    for layer in model.layers:
        layer.hidden_dropout_p = hidden
        layer.attention_dropout_p = (
            own.attention_probs_dropout_prob if attention is None else attention
        )


def dropout_in_use(model: Bert) -> tuple[float, float]:
    """Of hidden states and of attention, as `use_dropout` has set it."""
    layer: Any = model.layers[0]
    return layer.hidden_dropout_p, layer.attention_dropout_p


def is_of_another(shape: dict[str, Any], now: Phase, phases: Iterable[Phase]) -> bool:
    """Whether a packer's shapes are those of another phase than `now`, and of no other run.

    A checkpoint written at the end of a phase has them; so has one where max_steps, of which
    phases are shares, has changed.

    Args:
        shape: of the state of a `Packer`.
        now: the phase to go on with.
        phases: all there are.
    """

    def masked(phase: Phase) -> int:
        T, N = shape["tokens_per_batch"], shape["num_slots"]
        return max_masked(T, N, phase.mlm_probability)

    of_lengths = shape["max_seq_length"] in {phase.max_seq_length for phase in phases}
    of_masks = shape["max_masked"] in {masked(phase) for phase in phases}
    same = (shape["max_seq_length"], shape["max_masked"]) == (now.max_seq_length, masked(now))
    return of_lengths and of_masks and not same
