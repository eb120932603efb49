"""`fastbert serve`: a model as an HTTP service, with a page to try it on."""

import logging
import os
import sys
from argparse import Namespace

from fastbert.commands.checks import check_path
from fastbert.commands.options import Commands, given
from fastbert.errors import UserError
from fastbert.serve.config import LIBRARIES, ServeConfig
from fastbert.settings import read_text
from fastbert.train.interrupts import held_signals

_SHORTEST = 16  # characters of a token


def add(commands: Commands) -> None:
    """Adds the command."""
    commands.add("serve", "answer for a model over HTTP", run, ServeConfig, "--model DIR")


def run(args: Namespace) -> None:
    """Serves until a signal, then answers what was let in.

    Raises:
        UserError: a bad request, or no such model.
        RunError: the address cannot be had.
    """
    config: ServeConfig = given(args)
    check_path("model", config.model, words=())
    tokens = _tokens(config.token_file) if config.token_file else []
    with held_signals():
        from fastbert.finetune.needs import needs

        for module in LIBRARIES:
            needs(module)
        import torch

        from fastbert.serve.app import Service
        from fastbert.serve.models import load
        from fastbert.serve.server import serve
        from fastbert.train.device import keep_freed_memory
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    served = load(config)
    if served.device.type == "cpu":
        keep_freed_memory()
    if not tokens and config.host not in ("127.0.0.1", "localhost", "::1"):
        logging.getLogger("fastbert").warning(
            "%s: whoever reaches it is answered: --token-file asks for a token", config.host
        )
    print(f"model: {config.model}: {served.dtype} on {served.device}", file=sys.stderr)
    serve(Service(served, config, tokens), config)


def _tokens(path: str) -> list[str]:
    if not os.path.isfile(path):
        raise UserError(f"token_file = {path!r}: no such file")
    lines = [line.strip() for line in read_text(path, "a list of tokens", 2**20).split("\n")]
    tokens = [line for line in lines if line]
    if not tokens:
        raise UserError(f"{path}: holds no token")
    for token in tokens:
        if len(token) < _SHORTEST or not token.isascii() or " " in token:
            raise UserError(
                f"{path}: a token must have at least {_SHORTEST} ASCII characters and no space"
            )
    return tokens
