"""BERT's relatives: RoBERTa, XLM-R, CamemBERT, ELECTRA and DistilBERT, without padding.

Liu et al. 2019, Conneau et al. 2020, Martin et al. 2020, Clark et al. 2020, Sanh et al. 2019. As in
`models.py` each class is a mixin before transformers' own class of the same name. They are made a
family at a time when the first is asked for, so that nobody waits for transformers' five files who
needs none of them: `from fastbert.hf.relatives import RobertaModel`, and what pickle finds.

B sequences padded to S, T tokens kept, M labelled tokens, H hidden size, V vocabulary.
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from threading import RLock
from typing import Any

from torch import Tensor, nn
from transformers.activations import gelu
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
)

from fastbert.hf import layers
from fastbert.hf.layers import is_plain
from fastbert.hf.models import (
    Encoder,
    EveryToken,
    MaskedWords,
    Pooled,
    Span,
    _base,
    _base_packs,
    _Keywords,
    reads_firsts,
)
from fastbert.hf.packing import Plan

# RoBERTa, XLM-R, CamemBERT


class _RobertaEncoder(Encoder):
    """Positions are counted over what is no padding token, and begin after its id."""

    def _positions(self: Any, shape: tuple[int, int], given: dict[str, Any]) -> Tensor:  # (B, S)
        positions = given.get("position_ids")
        if positions is not None:
            return positions.expand(shape)
        embeddings, ids = self.embeddings, given.get("input_ids")
        first = embeddings.padding_idx + 1
        most = embeddings.position_embeddings.num_embeddings - first
        if ids is not None:
            positions = embeddings.create_position_ids_from_input_ids(ids, embeddings.padding_idx)
        else:
            positions = embeddings.create_position_ids_from_inputs_embeds(
                given["inputs_embeds"], embeddings.padding_idx
            )
        if shape[1] > most and (found := int(positions.max()) - first + 1) > most:
            raise ValueError(f"sequences of {found} tokens: the model has {most} positions")
        return positions


class _RobertaLMHead:
    """Features and decoder in one module."""

    def features(self: Any, x: Tensor) -> Tensor:
        return layers.gelu_norm(x, self.dense, gelu, self.layer_norm)

    def forward(self: Any, features: Tensor, **_: Any) -> Tensor:
        return self.decoder(self.features(features))


class _RobertaWords(MaskedWords):
    def _features(self: Any, x: Tensor) -> Tensor:
        return self.lm_head.features(x)

    def _decoder(self: Any) -> Any:
        return self.lm_head.decoder

    def _scores(self: Any, x: Tensor) -> Tensor:
        return self.lm_head(x)

    def _around(self: Any) -> tuple[nn.Module, ...]:
        return (self.lm_head,)


# ELECTRA


class _ElectraEncoder(Encoder):
    output_class = BaseModelOutputWithPastAndCrossAttentions

    def _embed(self: Any, **packed: Tensor | None) -> Tensor:
        x = self.embeddings(**packed)
        project = getattr(self, "embeddings_project", None)
        return x if project is None else project(x)


class _Generator:
    """LayerNorm(GELU(x W + b)), as wide as embeddings."""

    def forward(self: Any, generator_hidden_states: Tensor) -> Tensor:
        return layers.gelu_norm(
            generator_hidden_states, self.dense, self.activation, self.LayerNorm
        )


class _ElectraWords(MaskedWords):
    def _features(self: Any, x: Tensor) -> Tensor:
        return self.generator_predictions(x)

    def _decoder(self: Any) -> Any:
        return self.generator_lm_head

    def _scores(self: Any, x: Tensor) -> Tensor:
        return self.generator_lm_head(self.generator_predictions(x))

    def _around(self: Any) -> tuple[nn.Module, ...]:
        return ()

    def _before(self: Any) -> nn.Module:
        return self.generator_predictions


class _Discriminator(_Keywords):
    """Which tokens were replaced. Its loss reads only those that the mask calls real."""

    def _forward(self: Any, **given: Any) -> Any:
        return super().forward(**given)  # type: ignore[misc]


class _Summary(_Keywords):
    """Multiple choice by a summary: of the first token, or of tokens that may be padding."""

    def _packs(self: Any, given: dict[str, Any]) -> bool:
        first = self.sequence_summary.summary_type == "first"
        return first and reads_firsts(self, given) and _base_packs(self, given)

    def _forward(self: Any, **given: Any) -> Any:
        kind, mask = self.sequence_summary.summary_type, given.get("attention_mask")
        if _base(self, given) is None:
            pass
        elif kind == "first":
            given["fastbert_pooled"] = reads_firsts(self, given)
        elif mask is not None and not bool((mask != 0).all()):
            given["fastbert_plan"] = f"a summary ({kind}) over padding"
        return super().forward(**given)  # type: ignore[misc]


# DistilBERT


class _DistilEncoder(Encoder):
    output_class = BaseModelOutput

    def _stack(self: Any) -> Any:
        return self.transformer

    def _parts(self: Any, layer: Any) -> tuple[Any, ...]:
        return layer.attention, layer.attention.out_lin, layer.ffn

    def _embed(self: Any, **packed: Tensor | None) -> Tensor:
        del packed["token_type_ids"]  # transformers takes and ignores them, too
        return self.embeddings(**packed)


class _DistilAttention(layers.SelfAttention):
    """BERT's under other names, the projection of its output included."""

    num_attention_heads = property(lambda self: self.n_heads)
    query = property(lambda self: self.q_lin)
    key = property(lambda self: self.k_lin)
    value = property(lambda self: self.v_lin)

    def forward(
        self: Any,
        hidden_states: Tensor,  # (1, T, H) with a plan, else (B, S, H)
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        fastbert_plan: Plan | None = None,
        **kwargs: Any,
    ) -> Any:
        if fastbert_plan is None:
            theirs: Any = super(layers.SelfAttention, self)
            return theirs.forward(hidden_states, attention_mask=attention_mask, **kwargs)
        return self.out_lin(self.context(hidden_states, fastbert_plan)), None

    def context(self: Any, hidden_states: Tensor, plan: Plan) -> Tensor:  # (1, T, H)
        return layers.SelfAttention.forward(self, hidden_states, fastbert_plan=plan)[0]


class _DistilLayer(layers.Layer):
    """Both halves; what belongs to the end of the first lies in its attention."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        *args: Any,
        fastbert_plan: Plan | None = None,
        **kwargs: Any,
    ) -> Any:
        plan, x = fastbert_plan, hidden_states
        if plan is None:
            theirs: Any = super(layers.Layer, self)
            return theirs.forward(x, *args, **kwargs)
        attention, ffn, norm = self.attention, self.ffn, self.output_layer_norm
        if is_plain(attention, type(attention)):
            context = attention.context(x, plan)
            wanted = plan.to(x.device).wanted if plan.last is self else None
            if wanted is not None:  # only where the attention is plain: Encoder._wanting
                context, x = context.index_select(1, wanted), x.index_select(1, wanted)
            x = layers.add_norm(context, x, attention.out_lin, self.sa_layer_norm)
        else:
            x = self.sa_layer_norm(attention(x, fastbert_plan=plan)[0] + x)
        if not is_plain(ffn, type(ffn)):
            return norm(ffn(x) + x)
        inner = layers.linear_gelu(x, ffn.lin1, ffn.activation)
        return layers.add_norm(inner, x, ffn.lin2, norm, ffn.dropout)


class _DistilWords(MaskedWords):
    def _forward(self: Any, **given: Any) -> Any:
        loss = self.mlm_loss_fct
        usual = is_plain(loss, nn.CrossEntropyLoss) and loss.weight is None
        options = ("reduction", "ignore_index", "label_smoothing")
        if usual and [getattr(loss, name) for name in options] == ["mean", -100, 0.0]:
            return super()._forward(**given)
        if _base(self, given) is not None and given.get("labels") is not None:
            given["fastbert_plan"] = "an mlm_loss_fct of its own"
        return super().forward(**given)  # type: ignore[misc]

    def _features(self: Any, x: Tensor) -> Tensor:
        return layers.gelu_norm(x, self.vocab_transform, self.activation, self.vocab_layer_norm)

    def _decoder(self: Any) -> Any:
        return self.vocab_projector

    def _scores(self: Any, x: Tensor) -> Tensor:
        return self.vocab_projector(self._features(x))

    def _around(self: Any) -> tuple[nn.Module, ...]:
        return ()

    def _before(self: Any) -> None:
        return None


# Families

_HEADS = {
    "ForSequenceClassification": Pooled,
    "ForMultipleChoice": Pooled,
    "ForTokenClassification": EveryToken,
    "ForQuestionAnswering": Span,
}
_LAYERS = {
    "SelfAttention": layers.SelfAttention,
    "SelfOutput": layers.AddNorm,
    "Intermediate": layers.Intermediate,
    "Output": layers.AddNorm,
    "Layer": layers.Layer,
}
_ROBERTA = _LAYERS | {
    "LMHead": _RobertaLMHead,
    "Model": _RobertaEncoder,
    "ForMaskedLM": _RobertaWords,
    **_HEADS,
}


@dataclass(frozen=True)
class Family:
    """One of transformers' modeling files, and what makes its classes ours."""

    title: str
    module: str  # of transformers.models
    mixins: dict[str, type]  # of its classes, by their names

    @property
    def source(self) -> str:
        """The full name of transformers' module."""
        return f"transformers.models.{self.module}.modeling_{self.module}"


def _named(prefix: str, mixins: dict[str, Any]) -> dict[str, type]:
    return {f"{prefix}{name}": mixin for name, mixin in mixins.items()}


FAMILIES = (
    Family("RoBERTa", "roberta", _named("Roberta", _ROBERTA)),
    Family("XLM-R", "xlm_roberta", _named("XLMRoberta", _ROBERTA)),
    Family("CamemBERT", "camembert", _named("Camembert", _ROBERTA)),
    Family(
        "ELECTRA",
        "electra",
        _named("Electra", _LAYERS | _HEADS)
        | {
            "ElectraGeneratorPredictions": _Generator,
            "ElectraModel": _ElectraEncoder,
            "ElectraForPreTraining": _Discriminator,
            "ElectraForMaskedLM": _ElectraWords,
            "ElectraForMultipleChoice": _Summary,
        },
    ),
    Family(
        "DistilBERT",
        "distilbert",
        _named("DistilBert", _HEADS)
        | {
            "DistilBertSelfAttention": _DistilAttention,
            "TransformerBlock": _DistilLayer,
            "DistilBertModel": _DistilEncoder,
            "DistilBertForMaskedLM": _DistilWords,
        },
    ),
)
_FAMILY_OF = {name: family for family in FAMILIES for name in family.mixins}
_made: dict[str, dict[type, type]] = {}
_making = RLock()


def classes_of(family: Family) -> dict[type, type]:
    """transformers' class of each of ours; made once, and then names of this module."""
    with _making:
        if family.module not in _made:
            theirs = import_module(family.source)
            made: dict[type, type] = {}
            for name, mixin in family.mixins.items():
                base = getattr(theirs, name)
                own = {"__module__": __name__, "__doc__": f"transformers' {name}, by fastbert."}
                made[base] = type(name, (mixin, base), own)
            kinds: list[Any] = list(made.values())
            attention = next(one for one in kinds if issubclass(one, layers.SelfAttention))
            for one in kinds:
                if issubclass(one, Encoder):
                    one.attention_class = attention
            globals().update({one.__name__: one for one in kinds})
            _made[family.module] = made
        return _made[family.module]


def imported() -> dict[type, type]:
    """The same of all families whose models can be there: transformers' module is imported."""
    table: dict[type, type] = {}
    for family in FAMILIES:
        if family.source in sys.modules:
            table |= classes_of(family)
    return table


def __getattr__(name: str) -> Any:
    if name not in _FAMILY_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    classes_of(_FAMILY_OF[name])
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_FAMILY_OF})
