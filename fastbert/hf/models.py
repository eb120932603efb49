"""transformers' BERT classes: the same names and parameters, and a forward without padding.

`BertModel` leaves the padding out before its first layer and puts it back after its last; heads
tell it which tokens they read. What cannot be done so takes transformers' own path, and the log
says once why. Devlin et al. 2019.

B sequences padded to S, T tokens kept, M labelled tokens, V vocabulary, H hidden size.
"""

import inspect
from dataclasses import replace
from functools import wraps
from logging import INFO
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    MaskedLMOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert as theirs
from transformers.utils import output_capturing
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

import fastbert.hf.attention  # noqa: F401  attn_implementation="fastbert"
from fastbert.hf import layers
from fastbert.hf.layers import (
    is_known,
    is_of_libraries,
    is_plain,
    is_product,
    is_watched,
    kernels_for,
    note,
    own_forward,
)
from fastbert.hf.packing import Plan
from fastbert.hf.recorded import unreadable
from fastbert.hf.stack import Stack


class _Keywords:
    """A forward with the signature of transformers', that gets all its arguments by keyword."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        of = next(
            (base for base in cls.__mro__ if base.__module__.startswith("transformers.")), None
        )
        if of is None or "forward" in vars(cls):
            return
        parameters = inspect.signature(of.forward).parameters.values()  # type: ignore[attr-defined]
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]

        @wraps(of.forward)  # type: ignore[attr-defined]
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if len(args) > len(names):
                takes = f"{type(self).__name__}.forward() takes {len(names)} positional arguments"
                raise TypeError(f"{takes}, not {len(args)}")
            return self._forward(**dict(zip(names, args, strict=False)), **kwargs)

        cls.forward = forward  # type: ignore[attr-defined]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        wanted = type(self).config_class  # type: ignore[attr-defined]
        if not isinstance(config, wanted):
            kind = f"{type(self).__name__} takes a {wanted.__name__}"
            raise TypeError(f"{kind}, not a {type(config).__name__}")
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        from fastbert.hf.accelerate import accelerate

        accelerate(self)  # type: ignore[type-var]

    def _packs(self, given: dict[str, Any]) -> bool:
        """Whether it takes sequences end to end, (1, T), beside a `fastbert_plan` of theirs.

        Args:
            given: these inputs, by the forward's names.
        """
        return False


# Encoders


class Encoder(_Keywords):
    """Embeddings, layers and pooler in transformers' module tree."""

    attention_class: ClassVar[type]
    output_class: ClassVar[type] = BaseModelOutputWithPoolingAndCrossAttentions

    def _forward(
        self: Any,
        *,
        fastbert_plan: Plan | str | None = None,  # made by a head; a text: why there is none
        fastbert_pooled: bool = False,  # only first tokens are read
        **given: Any,
    ) -> Any:
        plan = self._plan(given) if fastbert_plan is None else fastbert_plan
        if isinstance(plan, str):
            note(f"{type(self).__name__}: transformers' own path: {plan}")
            return super().forward(**given)  # type: ignore[misc]
        where = plan.cu_seqlens.device.type
        note(f"{type(self).__name__}: no padding is computed, on {where}", INFO)
        if fastbert_pooled:
            plan = self._wanting(plan, None, True, given)
        return self._packed(plan, given, fastbert_pooled)

    def _packs(self: Any, given: dict[str, Any]) -> bool:
        """See `_Keywords`."""
        return not self._why_not(given)

    def _plan(self: Any, given: dict[str, Any]) -> Plan | str:
        """How to lay out a batch, or why that cannot be done.

        Raises:
            ValueError: a mask of another shape.
            IndexError: a negative id (on a GPU as in transformers: by the device).
        """
        why = self._why_not(given)
        if why:
            return why
        embeds: Any = given.get("inputs_embeds")
        inputs: Any = given.get("input_ids") if embeds is None else embeds
        B, S = inputs.shape[:2]
        mask = given.get("attention_mask")
        if mask is not None and mask.shape != (B, S):
            raise ValueError(f"attention_mask must be {(B, S)}, not {tuple(mask.shape)}")
        plan = Plan.of(mask, (B, S), inputs.device)
        if plan.slots is not None:  # else each id is looked up
            _refuse_negative(given)
        return plan

    def _why_not(self: Any, given: dict[str, Any]) -> str:
        config = self.config
        unread = unreadable(given)
        if unread:
            return unread
        if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
            return "a decoder"
        for name in ("encoder_hidden_states", "encoder_attention_mask", "past_key_values"):
            if given.get(name) is not None:
                return name
        if given.get("is_causal", getattr(config, "is_causal", None)):
            return "is_causal"
        if given.get("output_attentions", config.output_attentions):
            return "output_attentions"
        if config.chunk_size_feed_forward:
            return "chunk_size_feed_forward"
        inputs: Any = given.get("input_ids")
        embeds: Any = given.get("inputs_embeds")
        if (inputs is None) == (embeds is None):
            return "both or none of input_ids and inputs_embeds"
        shape = inputs.shape if embeds is None else embeds.shape[:-1]
        if len(shape) != 2 or not shape.numel():
            return "inputs that are not (batch, sequence), or empty"
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            return "an attention_mask that is not (batch, sequence)"
        # Who registers an attention wants that one. "eager" is not in the register.
        registered = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation)
        if registered is not None and not registered.__module__.startswith(
            ("transformers.", "fastbert.")
        ):
            return f"attn_implementation {config._attn_implementation!r}"
        for part in (self.embeddings, self._stack()):
            if not is_known(part):
                return f"a {type(part).__name__} of another make"
            if is_watched(part):
                return f"a hook on {type(part).__name__}"
        for layer in self._stack().layer:
            try:
                attention, *others = self._parts(layer)
            except AttributeError:
                return f"a {type(layer).__name__} among its layers"
            if type(attention) is not self.attention_class or not own_forward(attention):
                return f"an attention that is not {self.attention_class.__name__} itself"
            for part in (layer, attention, *others):
                if not is_known(part):
                    return f"a {type(part).__name__} of another make"
                if is_watched(part):
                    return f"a hook on {type(part).__name__}"
        return ""

    def _wanting(
        self: Any, plan: Plan, places: Tensor | None, pooled: bool, given: dict[str, Any]
    ) -> Plan:
        """The plan where only these tokens' last hidden states are read, if nobody sees others.

        Args:
            plan: of the whole batch.
            places: (M,) in the padded batch (B * S); None for none.
            pooled: whether the first token of each sequence is read, too.
            given: the arguments of the forward.
        """
        stack = self._stack()
        *before, last = stack.layer or [None]
        if last is None or any(layer is last for layer in before):
            return plan
        pooler = getattr(self, "pooler", None)
        if pooled and not (is_known(pooler) and (pooler is None or not is_watched(pooler))):
            return plan
        seen = (last, last.attention, stack, self)
        if (
            given.get("output_hidden_states", self.config.output_hidden_states)
            or not isinstance(last, layers.Layer)
            or not all(is_plain(module, type(module)) for module in seen)
        ):
            return plan
        wanted = [] if places is None else [plan.places(places)]
        wanted += [plan.first] if pooled else []
        return replace(plan, wanted=torch.cat(wanted), last=last, pooled=pooled, _elsewhere={})

    def _packed(self: Any, plan: Plan, given: dict[str, Any], only_firsts: bool = False) -> Any:
        """The forward over kept tokens.

        Where only some are wanted, `last_hidden_state` is (1, M, H) of those, or (N, 1, H) of the
        first tokens where only they are. Of sequences that came end to end it is (1, T, H).
        """
        N = plan.sequences
        return_dict = given.get("return_dict")
        hidden_states = None
        asked = given.get("output_hidden_states", self.config.output_hidden_states)
        # Or a model around this one records: nothing of its layers may be among that.
        if asked or output_capturing._active_collector.get() is not None:
            flags = {name: value for name, value in given.items() if name.startswith("output_")}
            output = self._captured(plan, given, return_dict=True, **flags)
            x, hidden_states = output.last_hidden_state, output.hidden_states
        else:
            x = self._layers(plan, given)
        pooler = getattr(self, "pooler", None)
        if plan.wanted is None:
            states = firsts = plan.pad(x)
            if N != plan.shape[0]:
                firsts = x.index_select(1, plan.first).view(N, 1, -1)
                states = firsts if only_firsts else states
        else:
            states, firsts = x, x
            if plan.pooled:
                states, firsts = x.split((x.shape[1] - N, N), dim=1)
                firsts = firsts.view(N, 1, -1)
                states = states if states.shape[1] else firsts
        found: dict[str, Any] = {"last_hidden_state": states}
        if pooler is not None:
            found["pooler_output"] = pooler(firsts)
        if hidden_states is not None:
            found["hidden_states"] = tuple(
                states if state is x else None if state is None else plan.pad(state)
                for state in hidden_states
            )
        output = self.output_class(**found)  # anew, because its order is that of its fields
        whole = self.config.return_dict if return_dict is None else return_dict
        return output if whole else output.to_tuple()

    @capture_outputs
    def _captured(self: Any, plan: Plan, given: dict[str, Any], **_: Any) -> Any:
        """What transformers' hooks find is added to this."""
        return self.output_class(last_hidden_state=self._layers(plan, given))

    def _layers(self: Any, plan: Plan, given: dict[str, Any]) -> Tensor:
        """The last hidden states: (1, T, H), or (1, R, H) of those wanted."""
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        types = given.get("token_type_ids")
        packed = {
            "input_ids": None if ids is None else plan.pack(ids),
            "position_ids": plan.pack(self._positions(plan.shape, given)),
            "token_type_ids": None if types is None else plan.pack(types.expand(plan.shape)),
            "inputs_embeds": None if embeds is None else plan.pack(embeds),
        }
        try:
            x = self._embed(**packed)
        except (IndexError, RuntimeError):  # torch does not say which
            _refuse_negative(given)
            raise
        read = Stack.of(self, self._stack(), x.device)
        if read is None:
            out = self._stack()(x, fastbert_plan=plan).last_hidden_state
        else:
            out = read(x.squeeze(0), plan)[None]
        return out.to(x.dtype)

    def last_states(
        self: Any, plan: Plan, given: dict[str, Any], wanted: Tensor | None = None
    ) -> Tensor:  # (T, H), or (M, H)
        """Last hidden states of sequences that lie end to end.

        Args:
            plan: `Plan.of_lengths`.
            given: `input_ids` and `position_ids`, (1, T).
            wanted: (M,) tokens that are read; None: all.

        Raises:
            ValueError: the model is set up so that they cannot lie so.
        """
        given = given | {"output_attentions": False, "output_hidden_states": False}
        why = self._why_not(given)
        if why:
            raise ValueError(f"{type(self).__name__} cannot take texts end to end: {why}")
        if wanted is not None:
            plan = self._wanting(plan, wanted, False, given)
        x: Tensor = self._layers(plan, given).squeeze(0)
        return x if wanted is None or plan.wanted is not None else x.index_select(0, wanted)

    def positions(self: Any) -> int:
        """Tokens of a sequence at most; families that count from their padding id have fewer."""
        table = self.embeddings.position_embeddings
        unused = 0 if table.padding_idx is None else table.padding_idx + 1
        return table.num_embeddings - unused

    # Where families differ

    def _stack(self: Any) -> Any:
        """The module whose `layer` holds the layers."""
        return self.encoder

    def _parts(self: Any, layer: Any) -> tuple[Any, ...]:
        """A layer's self attention, and what else is called with all its tokens."""
        attention = layer.attention
        return attention.self, attention, attention.output, layer.intermediate, layer.output

    def _embed(self: Any, **packed: Tensor | None) -> Tensor:  # (1, T, H)
        """What the first layer gets, of packed inputs by transformers' names."""
        return self.embeddings(**packed)

    def _positions(self: Any, shape: tuple[int, int], given: dict[str, Any]) -> Tensor:  # (B, S)
        """The position of each token; ValueError: more tokens than positions."""
        positions = given.get("position_ids")
        if positions is None:
            positions = self.embeddings.position_ids[:, : shape[1]]
            table = getattr(self.embeddings.position_embeddings, "num_embeddings", shape[1])
            most = min(table, self.embeddings.position_ids.shape[1])
            if shape[1] > most:
                raise ValueError(f"sequences of {shape[1]} tokens: the model has {most} positions")
        return positions.expand(shape)


def _refuse_negative(given: dict[str, Any]) -> None:
    for name in ("input_ids", "token_type_ids", "position_ids"):
        ids = given.get(name)
        if ids is not None and ids.device.type == "cpu" and bool((ids < 0).any()):
            raise IndexError(f"{name} holds {int(ids.min())}: ids begin at 0")


# Heads


def _base(model: Any, given: dict[str, Any]) -> Any:
    """A head's encoder, if it takes plans and one can be made; else None."""
    base: Any = getattr(model, model.base_model_prefix)
    knows_plans = isinstance(base, Encoder) and own_forward(base)  # type: ignore[arg-type]
    return base if knows_plans and not unreadable(given) else None


def reads_firsts(model: Any, given: dict[str, Any]) -> bool:
    """Whether nobody's code behind an encoder can see other tokens than the first."""
    base = _base(model, given)
    if base is None:
        return False
    if getattr(base, "pooler", None) is not None:  # what follows sees what that makes
        return True
    heads = (child for child in model.children() if child is not base)
    parts = [part for child in heads for part in child.modules()]
    return all(is_of_libraries(part) and not is_watched(part) for part in parts)


def _base_packs(model: Any, given: dict[str, Any]) -> bool:
    base = _base(model, given)
    return base is not None and base._packs(given)


class Pooled(_Keywords):
    """A head that reads the first token of each sequence."""

    def _packs(self: Any, given: dict[str, Any]) -> bool:
        return reads_firsts(self, given) and _base_packs(self, given)

    def _forward(self: Any, **given: Any) -> Any:
        if reads_firsts(self, given):
            given["fastbert_pooled"] = True
        return super().forward(**given)  # type: ignore[misc]


def _on_padding(labels: Tensor | None, given: dict[str, Any]) -> bool:
    """Whether a token is labelled that has no hidden state here, and one in transformers."""
    mask = given.get("attention_mask")
    if labels is None or mask is None or mask.numel() != labels.numel():
        return False
    return bool(((labels.reshape(mask.shape) != -100) & (mask == 0)).any())


_LABELLED_PADDING = "labels on padding"


class EveryToken(_Keywords):
    """A head that reads each token, and may have a label for each."""

    def _packs(self: Any, given: dict[str, Any]) -> bool:
        return _base_packs(self, given)

    def _forward(self: Any, **given: Any) -> Any:
        if _base(self, given) is not None and _on_padding(given.get("labels"), given):
            given["fastbert_plan"] = _LABELLED_PADDING
        return super().forward(**given)  # type: ignore[misc]


class Span(_Keywords):
    """Question answering: its softmax runs over all positions, those of padding included.

    With `fastbert_unpadded` it runs over real tokens only: the logits of padding are the least that
    their dtype holds. Labels are then the caller's.
    """

    def _packs(self: Any, given: dict[str, Any]) -> bool:
        return _base_packs(self, given)

    def _forward(self: Any, *, fastbert_unpadded: bool = False, **given: Any) -> Any:
        mask = given.get("attention_mask")
        if fastbert_unpadded:
            output = super().forward(**given)  # type: ignore[misc]
            if mask is not None:
                for name in ("start_logits", "end_logits"):
                    logits = output[name]
                    least = torch.finfo(logits.dtype).min
                    output[name] = logits.masked_fill(mask == 0, least)
            return output
        if _base(self, given) is not None and mask is not None and not bool((mask != 0).all()):
            given["fastbert_plan"] = "question answering over padding"
        return super().forward(**given)  # type: ignore[misc]


class Words(_Keywords):
    """A head over the vocabulary: features of a hidden state, and a decoder."""

    def _features(self: Any, x: Tensor) -> Tensor:  # (1, M, H) -> (1, M, W)
        return self.cls.predictions.transform(x)

    def _decoder(self: Any) -> Any:
        return self.cls.predictions.decoder

    def _scores(self: Any, x: Tensor) -> Tensor:  # (1, M, H) -> (1, M, V)
        return self.cls(x)

    def _around(self: Any) -> tuple[nn.Module, ...]:
        """Modules that `_scores` calls and the other two pass by."""
        return self.cls, getattr(self.cls, "predictions", self.cls)

    def _before(self: Any) -> nn.Module | None:
        """The module that makes features, where that is none of these."""
        return getattr(self._around()[-1], "transform", None)


class MaskedWords(Words):
    """A head over the vocabulary. Training with labels, it scores the labelled tokens alone.

    `logits` are then None: `output_logits=True` asks for all of them. With `num_items_in_batch` the
    loss is the sum over labels divided by it: of all batches that are accumulated, as Trainer
    counts (transformers 5 takes the mean of each, so that n of them count n times).
    """

    @can_return_tuple
    def _forward(
        self: Any,
        *,
        labels: Tensor | None = None,  # (B, S), -100 where nothing is predicted
        output_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **given: Any,
    ) -> Any:
        if labels is None:
            return super().forward(**given)  # type: ignore[misc]
        rows = None
        if self.training and not output_logits:
            rows = labelled_rows(self, labels, given, pooled=False)
        if rows is None:
            if _base(self, given) is not None and _on_padding(labels, given):
                given["fastbert_plan"] = _LABELLED_PADDING
            given["return_dict"] = True
            output = super().forward(**given)  # type: ignore[misc]
            scores = output.logits.flatten(0, -2)
            loss = _mean(F.cross_entropy, scores, labels.flatten(), num_items_in_batch)
            return type(output)(loss=loss, **output)
        x, targets, output = rows
        return MaskedLMOutput(
            loss=words_loss(self, x, targets, num_items_in_batch),
            hidden_states=output.hidden_states,
        )


class WordsAndNextSentence(Words):
    """Both heads of pre-training; `logits` as in `MaskedWords`."""

    def _scores(self: Any, x: Tensor) -> Tensor:
        return self.cls.predictions(x)

    @can_return_tuple
    def _forward(
        self: Any,
        *,
        labels: Tensor | None = None,  # (B, S), -100 where nothing is predicted
        next_sentence_label: Tensor | None = None,  # (B,) 0 = B follows A, 1 = B is random
        output_logits: bool | None = None,
        **given: Any,
    ) -> Any:
        rows = None
        if labels is not None and next_sentence_label is not None:
            if self.training and not output_logits and is_plain(self.cls, type(self.cls)):
                rows = labelled_rows(self, labels, given, pooled=True)
            if rows is None and _base(self, given) is not None and _on_padding(labels, given):
                given["fastbert_plan"] = _LABELLED_PADDING
        if rows is None or next_sentence_label is None:
            given |= {"labels": labels, "next_sentence_label": next_sentence_label}
            return super().forward(**given)  # type: ignore[misc]
        x, targets, output = rows
        scores = self.cls.seq_relationship(output.pooler_output)
        next_sentence = F.cross_entropy(scores.view(-1, 2), next_sentence_label.view(-1))
        return theirs.BertForPreTrainingOutput(
            loss=words_loss(self, x, targets, None) + next_sentence,
            seq_relationship_logits=scores,
            hidden_states=output.hidden_states,
        )


def labelled_rows(
    model: Any, labels: Tensor, given: dict[str, Any], pooled: bool
) -> tuple[Tensor, Tensor, Any] | None:
    """Last hidden states (1, M, H) and labels (M,) of labelled tokens, and the encoder's output.

    None where that is not to be had: transformers' path then says why.

    Raises:
        ValueError: labels of another shape than the inputs.
    """
    base = _base(model, given)
    plan = base._plan(given) if base is not None else ""
    if isinstance(plan, str) or _on_padding(labels, given):
        return None
    for part in (*model._around(), model._before()):
        if not is_known(part) or isinstance(part, nn.Linear):
            why = f"a {type(part).__name__} does it"
        elif part is not None and is_watched(part):
            why = f"a hook on {type(part).__name__}"
        else:
            continue
        note(f"{type(model).__name__}: every token is scored: {why}")
        return None
    if labels.shape not in (plan.shape, (plan.shape[0] * plan.shape[1],)):
        raise ValueError(f"labels must be {plan.shape}, not {tuple(labels.shape)}")
    places = (labels.flatten() != -100).nonzero().squeeze(1)
    plan = base._wanting(plan, places, pooled, given)
    given = {name: value for name, value in given.items() if value is not None}
    output = base(**given | {"fastbert_plan": plan, "return_dict": True})
    x = output.last_hidden_state
    if plan.wanted is None:
        x = x.flatten(0, 1).index_select(0, places)[None]
    elif pooled:
        x = x[:, : len(places)] if len(places) else x.transpose(0, 1)[:, :0]
    return x, labels.flatten().index_select(0, places), output


def words_loss(
    model: Any,
    x: Tensor,  # (1, M, H)
    targets: Tensor,  # (M,)
    num_items: Tensor | int | None,
) -> Tensor:
    """The loss of labelled tokens: their mean, or their sum divided by `num_items`."""
    decoder = model._decoder()
    plain = is_product(decoder) and all(is_plain(one, type(one)) for one in model._around())
    ops = kernels_for(x, x.shape[-1], decoder.in_features) if plain and len(targets) else None
    if ops is None:
        return _mean(F.cross_entropy, model._scores(x).squeeze(0), targets, num_items)
    features = model._features(x).squeeze(0)
    weight, bias = (one.to(features.dtype) for one in (decoder.weight, decoder.bias))
    total = ops.linear_cross_entropy(features, weight, bias, targets)
    return total / (len(targets) if num_items is None else num_items)


def _mean(
    cross_entropy: Any, scores: Tensor, labels: Tensor, num_items: Tensor | int | None
) -> Tensor:
    if num_items is None:
        return cross_entropy(scores, labels)
    return cross_entropy(scores, labels, reduction="sum") / num_items


# BERT


class BertSelfAttention(layers.SelfAttention, theirs.BertSelfAttention):
    """transformers' BertSelfAttention over kept tokens."""


class BertSelfOutput(layers.AddNorm, theirs.BertSelfOutput):
    """transformers' BertSelfOutput, fused on a GPU."""


class BertIntermediate(layers.Intermediate, theirs.BertIntermediate):
    """transformers' BertIntermediate, fused on a GPU."""


class BertOutput(layers.AddNorm, theirs.BertOutput):
    """transformers' BertOutput, fused on a GPU."""


class BertLayer(layers.Layer, theirs.BertLayer):
    """transformers' BertLayer; the last makes only what is read."""


class BertPredictionHeadTransform(layers.Transform, theirs.BertPredictionHeadTransform):
    """transformers' BertPredictionHeadTransform, fused on a GPU."""


class BertModel(Encoder, theirs.BertModel):
    """transformers' BertModel. Hidden states at padding are 0, where those are meaningless."""

    attention_class = BertSelfAttention


class BertForPreTraining(WordsAndNextSentence, theirs.BertForPreTraining):
    """transformers' BertForPreTraining; `output_logits` as in `BertForMaskedLM`."""


class BertForMaskedLM(MaskedWords, theirs.BertForMaskedLM):
    """transformers' BertForMaskedLM.

    In training with labels, `logits` are left out (None) unless `output_logits=True` asks for them.
    The loss honours `num_items_in_batch`.
    """


class BertForNextSentencePrediction(Pooled, theirs.BertForNextSentencePrediction):
    """transformers' BertForNextSentencePrediction."""


class BertForSequenceClassification(Pooled, theirs.BertForSequenceClassification):
    """transformers' BertForSequenceClassification."""


class BertForMultipleChoice(Pooled, theirs.BertForMultipleChoice):
    """transformers' BertForMultipleChoice."""


class BertForTokenClassification(EveryToken, theirs.BertForTokenClassification):
    """transformers' BertForTokenClassification."""


class BertForQuestionAnswering(Span, theirs.BertForQuestionAnswering):
    """transformers' BertForQuestionAnswering; with padding, by transformers' own path."""
