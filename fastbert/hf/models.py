"""Models with Hugging Face's signature."""

import os
import warnings
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.config import ModelConfig, model_config
from fastbert.hf.weights import local_folder, read_weights, save_folder, to_hf
from fastbert.model.bert import Bert
from fastbert.ops import REFERENCE, Ops
from fastbert.settings import settings


class _HuggingFaceModel(nn.Module):
    """What the three models share: a packed `Bert` inside, checkpoints, the padded entrance.

    Attributes:
        config: sizes and dropout.
        packed: the `Bert` that does the work; call it to train on packed tokens.
    """

    architecture: str
    parts: dict[str, bool]

    def __init__(self, config: Any, ops: Ops = REFERENCE) -> None:
        """Builds the model with fresh weights.

        Args:
            config: a `ModelConfig`, or anything with BertConfig's attributes.
            ops: which implementation of the fused ops to use.
        """
        super().__init__()
        if not isinstance(config, ModelConfig):
            names = [setting.name for setting in settings(ModelConfig)]
            config = ModelConfig(**{name: getattr(config, name) for name in names})
        self.config: ModelConfig = config
        self.packed = Bert(config, ops, **self.parts)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | os.PathLike[str], ops: Ops = REFERENCE) -> Self:
        """Loads a Hugging Face BERT checkpoint in fp32, dropout off (`eval()`).

        Args:
            name_or_folder: a folder holding config.json and weights, or a hub name where
                transformers can reach a hub or its cache.
            ops: which implementation of the fused ops to use.

        Raises:
            UserError: no such folder, unreadable or mis-shapen weights, an encoder weight missing.
                A missing head is initialised afresh, with a warning that names it.
        """
        folder = local_folder(name_or_folder)
        config = model_config(os.fspath(folder))
        model = cls(config, ops)
        parameters = dict(model.packed.named_parameters())
        state, missing = read_weights(folder, parameters, config)
        if missing:
            names = ", ".join(sorted(to_hf({n: parameters[n] for n in missing}, config)))
            warnings.warn(f"{folder}: not in the checkpoint, set at random: {names}", stacklevel=2)
        with torch.no_grad():
            for name, tensor in state.items():
                parameters[name].copy_(tensor)
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors`, for transformers' class of the same name.

        Raises:
            RunError: the folder cannot be written.
        """
        save_folder(folder, dict(self.packed.named_parameters()), self.config, self.architecture)

    def hf_state_dict(self) -> dict[str, Tensor]:
        """The weights under transformers' names (those of BertForPreTraining)."""
        return to_hf(dict(self.packed.named_parameters()), self.config)

    def hf_gradients(self) -> dict[str, Tensor]:
        """The gradients under transformers' names, to be compared with `named_parameters()`."""
        gradients = {
            name: parameter.grad
            for name, parameter in self.packed.named_parameters()
            if parameter.grad is not None
        }
        return to_hf(gradients, self.config)

    def _unpad(
        self,
        input_ids: Tensor,  # (B, S)
        attention_mask: Tensor | None,  # (B, S)
        token_type_ids: Tensor | None,  # (B, S)
        position_ids: Tensor | None,  # (B, S) or (1, S)
        inputs_embeds: None,
    ) -> "_Unpadded":
        if inputs_embeds is not None:
            raise ValueError("inputs_embeds is not supported: give input_ids")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be (B, S), not {tuple(input_ids.shape)}")
        B, S = input_ids.shape
        if S > self.config.max_position_embeddings and position_ids is None:
            raise ValueError(
                f"sequences of {S} tokens: the model has "
                f"{self.config.max_position_embeddings} positions"
            )
        device = input_ids.device
        if attention_mask is None:
            attention_mask = torch.ones(B, S, dtype=torch.bool, device=device)
        if attention_mask.shape != (B, S):
            raise ValueError(
                f"attention_mask must be (B, S) = {(B, S)}, not {tuple(attention_mask.shape)}"
            )
        real = attention_mask != 0
        lengths = real.sum(1)
        indices = real.flatten().nonzero().squeeze(1)  # the one synchronisation: T must be known
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(S, device=device).unsqueeze(0)
        if self.training:
            # One draw from torch's generator a step, so that torch.manual_seed governs dropout.
            self.packed.dropout_state[:, 0] = torch.randint(2**31, (), device=device)
        return _Unpadded(
            indices,
            (
                input_ids.flatten()[indices],
                token_type_ids.flatten()[indices],
                position_ids.expand(B, S).flatten()[indices],
                F.pad(lengths.cumsum(0), (1, 0)).int(),
                S,
            ),
            (B, S),
        )


class _Unpadded:
    """A padded batch laid end to end, and the way back."""

    def __init__(
        self,
        indices: Tensor,  # (T,) where each token stood in (B * S)
        packed: tuple[Tensor, Tensor, Tensor, Tensor, int],
        shape: tuple[int, int],
    ) -> None:
        self.indices, self.packed, self.shape = indices, packed, shape
        cu_seqlens = packed[3]
        self.first_tokens = cu_seqlens[:-1].long().clamp(max=max(len(indices) - 1, 0))

    def pad(self, rows: Tensor) -> Tensor:  # (T, W) -> (B, S, W), zeros at padding
        padded = rows.new_zeros(self.shape[0] * self.shape[1], rows.shape[-1])
        return padded.index_copy(0, self.indices, rows).view(*self.shape, -1)

    def labelled(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (M,) among the packed tokens and labels (M,) of what is to be predicted.

        Raises:
            ValueError: the labels' shape is wrong, or a padding token has a label.
        """
        if labels.shape != self.shape:
            raise ValueError(f"labels must be (B, S) = {self.shape}, not {tuple(labels.shape)}")
        packed = labels.flatten()[self.indices]
        positions = (packed != -100).nonzero().squeeze(1)
        if positions.numel() != int((labels != -100).sum()):
            raise ValueError("labels must be -100 wherever attention_mask is 0")
        return positions, packed[positions]


class BertModel(_HuggingFaceModel):
    """The encoder and its pooler, with transformers' BertModel signature.

    Hidden states at padding positions are zero (transformers leaves meaningless numbers there), and
    a sequence's pooled output is taken at its first real token.
    """

    architecture = "BertModel"
    parts = {"pooler": True, "mlm": False, "next_sentence": False}  # noqa: RUF012

    def forward(
        self,
        input_ids: Tensor,  # (B, S)
        attention_mask: Tensor | None = None,  # (B, S) 1 for real tokens, 0 for padding
        token_type_ids: Tensor | None = None,  # (B, S)
        position_ids: Tensor | None = None,  # (B, S)
        inputs_embeds: None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """Returns BaseModelOutputWithPoolingAndCrossAttentions, or a tuple of its fields."""
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

        batch = self._unpad(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        if output_hidden_states:
            states = self.packed.hidden_states(*batch.packed)
        else:
            states = [self.packed.encode(*batch.packed)]
        assert self.packed.pooler is not None
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=batch.pad(states[-1]),
            pooler_output=self.packed.pooler(states[-1][batch.first_tokens]),
            hidden_states=tuple(map(batch.pad, states)) if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()


class _MaskedLanguageModel(_HuggingFaceModel):
    def _heads(
        self,
        batch: _Unpadded,
        labels: Tensor | None,
        output_logits: bool | None,
        output_hidden_states: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, tuple[Tensor, ...] | None]:
        """Mean MLM loss, logits (B, S, V), [CLS] states (B, H), hidden states (B, S, H)."""
        bert = self.packed
        assert bert.mlm is not None
        if output_logits is None:
            output_logits = labels is None or not self.training
        word = bert.embeddings.word
        states = None
        cls, positions = batch.first_tokens, None
        if labels is not None:
            positions, targets = batch.labelled(labels)
        if output_hidden_states:
            states = bert.hidden_states(*batch.packed)
            x = states[-1]
        elif output_logits or positions is None:
            x = bert.encode(*batch.packed)
        else:  # only labelled and [CLS] tokens leave the last layer
            x = bert.encode(*batch.packed, rows=torch.cat((positions, cls)))
            cls = torch.arange(len(positions), len(x), device=x.device)
            positions = torch.arange(len(positions), device=x.device)
        loss = None
        if positions is not None:
            loss = bert.mlm(x[positions], word, targets) / len(targets)
        logits = batch.pad(bert.mlm.logits(x, word)) if output_logits else None
        padded = tuple(map(batch.pad, states)) if states is not None else None
        return loss, logits, x[cls], padded


class BertForMaskedLM(_MaskedLanguageModel):
    """Masked-word prediction, with transformers' BertForMaskedLM signature."""

    architecture = "BertForMaskedLM"
    parts = {"pooler": False, "mlm": True, "next_sentence": False}  # noqa: RUF012

    def forward(
        self,
        input_ids: Tensor,  # (B, S)
        attention_mask: Tensor | None = None,  # (B, S)
        token_type_ids: Tensor | None = None,  # (B, S)
        position_ids: Tensor | None = None,  # (B, S)
        inputs_embeds: None = None,
        labels: Tensor | None = None,  # (B, S) -100 where nothing is predicted
        output_logits: bool | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """Returns MaskedLMOutput, or a tuple of its fields.

        Logits (B, S, V) are zero at padding. `output_logits` = None leaves them out (None) when
        training with labels, where the loss needs the labelled rows only; True forces them.

        Raises:
            ValueError: shapes that do not fit, or a label on padding.
        """
        from transformers.modeling_outputs import MaskedLMOutput

        batch = self._unpad(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        loss, logits, _, states = self._heads(batch, labels, output_logits, output_hidden_states)
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=states)
        return output if return_dict else output.to_tuple()


class BertForPreTraining(_MaskedLanguageModel):
    """MLM and next-sentence prediction, with transformers' BertForPreTraining signature."""

    architecture = "BertForPreTraining"
    parts = {"pooler": True, "mlm": True, "next_sentence": True}  # noqa: RUF012

    def forward(
        self,
        input_ids: Tensor,  # (B, S)
        attention_mask: Tensor | None = None,  # (B, S)
        token_type_ids: Tensor | None = None,  # (B, S)
        position_ids: Tensor | None = None,  # (B, S)
        inputs_embeds: None = None,
        labels: Tensor | None = None,  # (B, S) -100 where nothing is predicted
        next_sentence_label: Tensor | None = None,  # (B,) 0 = B follows A, 1 = B is random
        output_logits: bool | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """Returns BertForPreTrainingOutput, or a tuple of its fields.

        The loss is the sum of the means of the losses whose labels are given. `output_logits` and
        the errors are those of `BertForMaskedLM`; next-sentence logits are always there.
        """
        from transformers.models.bert.modeling_bert import BertForPreTrainingOutput

        batch = self._unpad(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        loss, logits, cls, states = self._heads(batch, labels, output_logits, output_hidden_states)
        assert self.packed.pooler is not None and self.packed.next_sentence is not None
        scores = self.packed.next_sentence(self.packed.pooler(cls))
        if next_sentence_label is not None:
            next_sentence = F.cross_entropy(scores.float(), next_sentence_label.view(-1))
            loss = next_sentence if loss is None else loss + next_sentence
        output = BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=logits,
            seq_relationship_logits=scores,
            hidden_states=states,  # type: ignore[arg-type]  # annotated as a tuple of one
        )
        return output if return_dict else output.to_tuple()
