"""Weights under transformers' names: folders in and out, and what each name is called here.

Folders are read and written without transformers; only a hub's cache is asked through it.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastbert.config import ModelConfig, to_hf_dict
from fastbert.errors import RunError, UserError

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
        # safetensors lets its own user alone read, but services run as others.
        shutil.copymode(folder / "config.json", folder / "model.safetensors")
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


def local_folder(name_or_folder: str | os.PathLike[str]) -> Path:
    """A Hugging Face folder: the one named, `hf/` of a run, or what a hub or its cache has.

    Raises:
        UserError: there is none.
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        of_run = folder / "hf"
        is_run = not (folder / "config.json").exists() and (of_run / "config.json").exists()
        return of_run if is_run else folder
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


REQUIRED = ("embeddings.", "layers.")


def read_weights(
    folder: Path, wanted: Mapping[str, Tensor], config: ModelConfig
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The weights of a folder for a `Bert`, the names of those that it lacks, and of others.

    Warns of weights that are not finite, and of two output biases that differ.

    Args:
        folder: a Hugging Face folder.
        wanted: the parameters by name, for their shapes.
        config: the model's sizes.

    Returns:
        Tensors under the names of `wanted`, of whatever float dtype they have; the names in
        `wanted` of the heads that are not there; and what else the folder has, under its names.

    Raises:
        UserError: unreadable or mis-shapen weights, or one of the encoder's is missing.
    """
    try:
        theirs, notes = _modern(read_state(folder), mlm="mlm.bias" in wanted)
        known = to_hf(wanted, config)
        notes += _check_parts(theirs, known)
    except UserError as error:
        told = str(error).startswith((f"{folder}:", f"{folder}{os.sep}"))
        where = "" if told else f"{folder}: "
        raise UserError(f"{where}{error}") from None
    for note in notes:
        warnings.warn(f"{folder}: {note}", stacklevel=2)
    state = from_hf(theirs, config)
    missing = [name for name in wanted if name not in state]
    lost = [name for name in missing if name.startswith(REQUIRED)]
    if lost:
        raise UserError(f"{folder}: {len(lost)} weights are missing, {lost[0]} first")
    others = [name for name, one in theirs.items() if name not in known and one.is_floating_point()]
    return {name: tensor for name, tensor in state.items() if name in wanted}, missing, others
