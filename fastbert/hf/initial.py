"""A Hugging Face folder as what a run begins with."""

import os
import warnings
from pathlib import Path

import torch

from fastbert.config import ModelConfig, model_config
from fastbert.errors import UserError
from fastbert.hf.weights import local_folder, read_weights, to_hf
from fastbert.model.bert import Bert
from fastbert.train.initial import Initial


def read_initial(folder: str | os.PathLike[str], sizes: ModelConfig, nsp: bool) -> Initial:
    """Reads all weights of BERT and its pre-training heads that a folder holds.

    Args:
        folder: config.json and weights: safetensors or .bin, whole or in parts, of any head.
        sizes: what its config.json says.
        nsp: whether pooler and next-sentence head are to be trained.

    Raises:
        UserError: unreadable or mis-shapen weights, one of the encoder's is missing, or one that is
            to be trained is not finite.
    """
    with torch.device("meta"):
        wanted = dict(Bert(sizes).named_parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights, _, others = read_weights(Path(folder), wanted, sizes)
    names = {name: tuple(to_hf({name: parameter}, sizes)) for name, parameter in wanted.items()}
    trained = {
        name: tensor
        for name, tensor in weights.items()
        if nsp or not name.startswith(("pooler.", "next_sentence."))
    }
    for name, tensor in to_hf(trained, sizes).items():
        if not tensor.isfinite().all():
            raise UserError(f"{folder}: {name} holds NaN or infinity: a run cannot begin with it")
    told = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    notes = [note for note in told if "hold NaN or infinity" not in note]
    notes = [f"init: {note}" for note in notes]
    return Initial(os.fspath(folder), weights, names, tuple(notes), tuple(others))


def load_pretrained(name_or_folder: str | os.PathLike[str]) -> Bert:
    """The packed model of a Hugging Face checkpoint, with the heads it has, in fp32.

    Args:
        name_or_folder: a folder holding config.json and weights, or a run; or a hub name where
            transformers can reach a hub or its cache.

    Raises:
        UserError: no such folder, unreadable or mis-shapen weights, an encoder weight missing.
    """
    folder = local_folder(name_or_folder)
    sizes = model_config(os.fspath(folder))
    with torch.device("meta"):
        wanted = dict(Bert(sizes).named_parameters())
    weights, _, _ = read_weights(folder, wanted, sizes)

    def has(head: str) -> bool:
        return all(name in weights for name in wanted if name.startswith(f"{head}."))

    model = Bert(sizes, pooler=has("pooler"), mlm=has("mlm"), next_sentence=has("next_sentence"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model
