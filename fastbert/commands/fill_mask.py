"""`fastbert fill-mask`: what a model would say for the masks of some texts."""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice

from fastbert.commands.checks import check_path
from fastbert.commands.options import Commands
from fastbert.errors import UserError

_TOGETHER = 32


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add(
        "fill-mask", "say what a model would put for [MASK]", run, usage="MODEL_FOLDER [TEXT ...]"
    )
    parser.add_argument("model", metavar="MODEL_FOLDER", help="as transformers saves it")
    parser.add_argument(
        "texts", metavar="TEXT", nargs="*", help="with one or more [MASK]; none: standard input"
    )
    parser.add_argument("--file", metavar="FILE", help="texts, one a line, instead")
    parser.add_argument("--top-k", metavar="N", default="5", help="guesses a mask (default: 5)")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each mask")


def run(args: Namespace) -> None:
    """Prints a line for each mask.

    Raises:
        UserError: no such folder or file, a text without a mask, or a model without its head.
    """
    check_path("MODEL_FOLDER", args.model, words=())
    if args.file and args.texts:
        raise UserError("--file stands instead of texts: give one of both")
    if args.file:
        check_path("--file", args.file, words=())
    if not args.file and not args.texts and sys.stdin.isatty():
        raise UserError('no text: fastbert fill-mask MODEL_FOLDER "the [MASK] sat"')
    try:
        top_k = int(args.top_k)
    except ValueError:
        raise UserError(f"--top-k {args.top_k}: must be an integer") from None
    from fastbert.hf.fill_mask import MaskFiller

    fill = MaskFiller(args.model)
    texts, done = _texts(args), 0
    while together := list(islice(texts, _TOGETHER)):
        for filled in fill(together, top_k, done + 1):
            if args.json:
                names = ("token_str", "token", "score")
                guesses = [dict(zip(names, guess, strict=True)) for guess in filled.guesses]
                line = {"text": filled.text, "mask": filled.mask, "guesses": guesses}
                print(json.dumps(line, ensure_ascii=False))
            else:
                print(filled)
        done += len(together)
    if not done:
        raise UserError("no text: every line is empty")


def _texts(args: Namespace) -> Iterator[str]:
    if args.texts:
        yield from args.texts
        return
    try:
        with open(args.file, encoding="utf-8") if args.file else nullcontext(sys.stdin) as lines:
            for line in lines:
                if line.strip():
                    yield line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{args.file or 'standard input'}: cannot be read: {error}") from None
