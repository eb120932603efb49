"""Hugging Face at the border: checkpoints in and out, and models with Hugging Face's signature.

The only room that imports transformers, and only for its output classes and for reaching a hub;
folders are read and written without it. B sequences padded to S, N packed, T tokens, V vocabulary.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastbert.config import ModelConfig, model_config, to_hf_dict
from fastbert.data.tokenize import WordPiece
from fastbert.errors import RunError, UserError
from fastbert.model.bert import Bert
from fastbert.ops import REFERENCE, Ops
from fastbert.settings import settings

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
_LAYER = {
    "qkv.{}": tuple(f"attention.self.{part}.{{}}" for part in ("query", "key", "value")),
    "attention_out.{}": ("attention.output.dense.{}",),
    "attention_norm_{}": ("attention.output.LayerNorm.{}",),
    "up.{}": ("intermediate.dense.{}",),
    "down.{}": ("output.dense.{}",),
    "norm_{}": ("output.LayerNorm.{}",),
}
_OUTSIDE_LAYERS = {
    "embeddings.word": "bert.embeddings.word_embeddings.weight",
    "embeddings.position": "bert.embeddings.position_embeddings.weight",
    "embeddings.token_type": "bert.embeddings.token_type_embeddings.weight",
    "embeddings.norm_{}": "bert.embeddings.LayerNorm.{}",
    "pooler.{}": "bert.pooler.dense.{}",
    "mlm.transform.{}": "cls.predictions.transform.dense.{}",
    "mlm.norm_{}": "cls.predictions.transform.LayerNorm.{}",
    "mlm.bias": "cls.predictions.bias",
    "next_sentence.{}": "cls.seq_relationship.{}",
}


def _hf_names(num_hidden_layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our parameter names with Hugging Face's; a fused one has several, stacked along rows."""
    for ours, theirs in _OUTSIDE_LAYERS.items():
        for kind in ("weight", "bias") if "{}" in ours else ("",):
            yield ours.format(kind), (theirs.format(kind),)
    for index in range(num_hidden_layers):
        for ours, parts in _LAYER.items():
            for kind in ("weight", "bias"):
                prefix = f"bert.encoder.layer.{index}."
                yield (
                    f"layers.{index}.{ours.format(kind)}",
                    tuple(prefix + part.format(kind) for part in parts),
                )


def to_hf(named: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Renames (and unfuses) tensors named as `Bert`'s parameters: weights, gradients or moments.

    Names are those of transformers' BertForPreTraining; what `named` lacks is left out.
    """
    return {
        hf_name: part
        for ours, theirs in _hf_names(config.num_hidden_layers)
        if ours in named
        for hf_name, part in zip(theirs, named[ours].chunk(len(theirs)), strict=True)
    }


def from_hf(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `to_hf`; an incomplete fused tensor is left out."""
    return {
        ours: torch.cat([state[name] for name in theirs]) if len(theirs) > 1 else state[theirs[0]]
        for ours, theirs in _hf_names(config.num_hidden_layers)
        if all(name in state for name in theirs)
    }


# Folders


def save_folder(
    folder: str | os.PathLike[str],
    named: Mapping[str, Tensor],
    config: ModelConfig,
    architecture: str,
) -> None:
    """Writes `config.json` and `model.safetensors` as transformers' `architecture` would.

    Args:
        folder: made if missing; files of the same name are replaced whole, never half-written.
        named: tensors under `Bert`'s parameter names, any float dtype; written in fp32.
        config: the model's sizes.
        architecture: "BertModel", "BertForMaskedLM" or "BertForPreTraining".

    Raises:
        RunError: the folder cannot be written.
    """
    folder = Path(folder)
    # save_file wants each tensor in memory of its own: clone the thirds of the fused QKV.
    state = {
        name.removeprefix("bert.") if architecture == "BertModel" else name: tensor.detach()
        .float()
        .cpu()
        .clone(memory_format=torch.contiguous_format)
        for name, tensor in to_hf(named, config).items()
    }
    text = json.dumps(to_hf_dict(config, architecture), indent=2, sort_keys=True) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(
            folder / "model.safetensors", lambda path: save_file(state, path, {"format": "pt"})
        )
        _replace(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder}: cannot write the model: {error}") from None


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_state(folder: Path) -> dict[str, Tensor]:
    """Reads all weights of a Hugging Face folder: safetensors or .bin files, whole or sharded.

    A .bin file is read with `weights_only=True`: nothing in it is executed.

    Raises:
        UserError: no weights there, a file that cannot be read, or something else than weights.
    """
    for whole in ("model.safetensors", "pytorch_model.bin"):
        try:
            files = _weight_files(folder, whole)
            state: dict[str, Tensor] = {}
            for file in files:
                if file.suffix == ".bin":
                    state |= torch.load(file, map_location="cpu", weights_only=True)
                else:
                    state |= load_file(file)
        except UserError:
            raise
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder}: its weights cannot be read: {error}") from None
        except Exception as error:  # torch.load's UnpicklingError and zip errors
            kind = type(error).__name__
            raise UserError(f"{folder}: its weights cannot be read: {kind}") from None
        if files:
            return _checked_weights(state, folder)
    raise UserError(f"{folder}: holds neither model.safetensors nor pytorch_model.bin")


def _weight_files(folder: Path, whole: str) -> list[Path]:
    index = folder / f"{whole}.index.json"
    if not index.exists():
        return [folder / whole] if (folder / whole).exists() else []
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if any(os.path.basename(shard) != shard or not shard.strip(".") for shard in shards):
        raise UserError(f"{index}: names a file outside its folder")
    return [folder / shard for shard in sorted(shards)]


def _checked_weights(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{folder}: {str(name)[:100]!r} is no tensor: not a file of weights")
    return state


_WORD, _DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
_BIAS, _DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"


def _modern(state: dict[str, Tensor], *, mlm: bool = True) -> tuple[dict[str, Tensor], list[str]]:
    """Each weight under its one name of today, and what the user should know of it.

    "bert." stands in front, LayerNorm has weight and bias where old files have gamma and beta, and
    the output layer of `mlm` has the word embedding's matrix, from whichever of both is there, and
    one bias: as in transformers 5, the decoder's where there are two (transformers 4 ties them to
    the other).

    Raises:
        UserError: an output matrix that is not the word embedding, or a name given twice.
    """
    renamed: dict[str, Tensor] = {}
    for old, tensor in state.items():
        name = old.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if name.startswith(("embeddings.", "encoder.", "pooler.")):
            name = "bert." + name
        if name in renamed and not _same(renamed[name], tensor):
            raise UserError(f"{name} is there twice, with different values, by an old name as well")
        renamed[name] = tensor
    notes = []
    decoder, word = renamed.pop(_DECODER, None), renamed.get(_WORD)
    if decoder is not None and word is None:
        renamed[_WORD] = decoder
    elif decoder is not None and mlm and not _same(decoder, word):
        raise UserError("the output matrix is not tied to the word embedding: not a BERT we load")
    bias = renamed.pop(_DECODER_BIAS, None)
    if bias is not None:
        if mlm and _BIAS in renamed and not _same(bias, renamed[_BIAS]):
            notes.append(
                f"{_BIAS} and {_DECODER_BIAS} differ: the second is taken, as transformers 5 does "
                "(transformers 4 takes the first)"
            )
        renamed[_BIAS] = bias
    return renamed, notes


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one, other)


def _check_parts(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Checks type and shape of the weights that a model takes; returns what is to be said of them.

    Raises:
        UserError: one of them is no floating-point tensor of that shape.
    """
    infinite = []
    for name, parameter in wanted.items():
        tensor = state.get(name)
        if tensor is None:
            continue
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{name} is {kind}: weights must be fp32, fp16, bf16 or fp64")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UserError(f"{name} is no dense tensor")
        if tensor.shape != parameter.shape:
            raise UserError(
                f"{name} has shape {tuple(tensor.shape)}, but config.json asks for "
                f"{tuple(parameter.shape)}"
            )
        if not tensor.isfinite().all():
            infinite.append(name)
    if not infinite:
        return []
    return [f"{len(infinite)} weights hold NaN or infinity, {infinite[0]} first"]


def _local_folder(name_or_folder: str | os.PathLike[str]) -> Path:
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    try:
        from transformers.utils.hub import cached_file

        config_file = cached_file(os.fspath(name_or_folder), "config.json")
        for weights in ("model.safetensors", "pytorch_model.bin"):
            if cached_file(
                os.fspath(name_or_folder), weights, _raise_exceptions_for_missing_entries=False
            ):
                break
    except (OSError, ImportError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name_or_folder}: not a folder, and not to be had from a hub: {reason}"
        ) from None
    assert config_file is not None  # a missing file raises
    return Path(config_file).parent


# Models


class _HuggingFaceModel(nn.Module):
    """What the three models share: a packed `Bert` inside, checkpoints, the padded entrance.

    Attributes:
        config: sizes and dropout.
        packed: the `Bert` that does the work; call it to train on packed tokens.
    """

    architecture: str
    parts: dict[str, bool]
    required: tuple[str, ...] = ("embeddings.", "layers.")

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
        folder = _local_folder(name_or_folder)
        config = model_config(os.fspath(folder))
        model = cls(config, ops)
        parameters = dict(model.packed.named_parameters())
        try:
            theirs, notes = _modern(read_state(folder), mlm=cls.parts["mlm"])
            notes += _check_parts(theirs, to_hf(parameters, config))
        except UserError as error:
            told = str(error).startswith((f"{folder}:", f"{folder}{os.sep}"))
            where = "" if told else f"{folder}: "
            raise UserError(f"{where}{error}") from None
        for note in notes:
            warnings.warn(f"{folder}: {note}", stacklevel=2)
        state = from_hf(theirs, config)
        missing = [name for name in parameters if name not in state]
        lost = [name for name in missing if name.startswith(cls.required)]
        if lost:
            raise UserError(f"{folder}: {len(lost)} weights are missing, {lost[0]} first")
        if missing:
            names = ", ".join(sorted(to_hf({n: parameters[n] for n in missing}, config)))
            warnings.warn(f"{folder}: not in the checkpoint, set at random: {names}", stacklevel=2)
        with torch.no_grad():
            for name, tensor in state.items():
                if name in parameters:
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


_PROBES = (
    "er m\u00f6chte f\u00fcr die Caf\u00e9s",
    "UPPER lower \u0130stanbul \u039f\u0394\u039f\u03a3",
    "1,234.5 \u20ac -- (perhaps) 99%",
    "\u4e2d\u6587\u5b57 \u65e5\u672c\u8a9e\u304c \ud55c\uad6d\uc5b4",
    "\u0e44\u0e21\u0e48\u0e21\u0e35 \u0939\u093f\u0928\u094d\u0926\u0940 \u0645\u064f\u062d\u064e",
    "tabs\tand\u00a0spaces\u200b \x01 \u2028 \U0001f600 \u2764\ufe0f 1\ufe0f\u20e3",
    "x" * 101 + " " + "the" * 33,
    "[MASK] in [SEP]",
    "",
)


def check_tokenizer(tokenizer: WordPiece, folder: str | os.PathLike[str]) -> None:
    """Makes sure that transformers gives the ids which the model will be trained on.

    Args:
        tokenizer: what encodes the corpus.
        folder: where it was saved.

    Raises:
        UserError: transformers cannot load it, or gives other ids.
    """
    from transformers import PreTrainedTokenizerFast  # what AutoTokenizer finds there

    refused = "cannot be exported: give one with another normalizer or pre-tokenizer"
    try:
        theirs = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        texts = [*_PROBES, *tokenizer.tokens[-200:]]
        found = theirs(texts, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(
            f"the tokenizer {refused}: transformers cannot load it ({reason})"
        ) from None
    wanted = tokenizer.encode_batch(texts, parse_special=True)
    trained = tokenizer.encode_batch(texts)
    roles = {tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id}
    for text, a, b, c in zip(texts, wanted, found, trained, strict=True):
        if a != b or (a != c and not {*roles, tokenizer.mask_id} & set(a)):
            raise UserError(f"the tokenizer {refused}: transformers reads {text!r} otherwise")


def export_run(
    folder: str | os.PathLike[str],
    named: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer_folder: str | os.PathLike[str],
) -> None:
    """Writes a run's `hf/` folder: the model in the class it was trained as, and its tokenizer.

    Args:
        folder: where to.
        named: fp32 weights under `Bert`'s parameter names.
        config: the model's sizes.
        tokenizer_folder: holds tokenizer.json and its companions.

    Raises:
        RunError: the folder cannot be written.
    """
    trained_nsp = any(name.startswith("next_sentence.") for name in named)
    save_folder(folder, named, config, "BertForPreTraining" if trained_nsp else "BertForMaskedLM")
    try:
        for name in _TOKENIZER_FILES:
            source = Path(tokenizer_folder) / name
            if source.exists():
                shutil.copyfile(source, Path(folder) / name)
    except OSError as error:
        raise RunError(f"{folder}: cannot write the tokenizer: {error}") from None
