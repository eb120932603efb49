"""`fastbert explain`: attention, rollout and integrated gradients of some texts, as a page."""

import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from fastbert.commands.checks import check_output, check_path
from fastbert.commands.options import Commands
from fastbert.errors import UserError

if TYPE_CHECKING:
    from fastbert.finetune.explain import Explainer, Explanation

MOST_TEXTS = 100
"""A page of one text has 2 MB at 12 layers of 12 heads and 128 tokens."""


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add(
        "explain",
        "draw why a model says what it says of a text",
        run,
        usage="--model DIR [TEXT ...] [--out explain.html]",
    )
    parser.add_argument("texts", metavar="TEXT", nargs="*", help="none: standard input, by line")
    parser.add_argument(
        "--model", metavar="DIR", required=True, help="as transformers saves it, with any head"
    )
    parser.add_argument("--file", metavar="FILE", help="texts, one a line, instead")
    parser.add_argument("--pair", metavar="TEXT", help="the second text of each")
    parser.add_argument(
        "--question", metavar="TEXT", help="about each text, for a model that answers"
    )
    parser.add_argument(
        "--target", metavar="LABEL", help="label, tag or word for [MASK] (default: the best)"
    )
    parser.add_argument(
        "--word", metavar="N", help="whose tag (default: the first that has one other than O)"
    )
    parser.add_argument(
        "--mask", metavar="N", help="which [MASK], counted from 1 (default: the first)"
    )
    parser.add_argument("--max-length", metavar="N", help="tokens at most (default: the model's)")
    parser.add_argument(
        "--out", metavar="FILE", default="explain.html", help="the page (default: explain.html)"
    )


def run(args: Namespace) -> None:
    """Writes the page, and prints a line for each text.

    Raises:
        UserError: no such folder, file or label, or no text.
    """
    check_path("--model", args.model, words=())
    check_output("--out", args.out)
    if not args.out:
        raise UserError("--out is empty: give the path of a page")
    if args.file and args.texts:
        raise UserError("--file stands instead of texts: give one of both")
    if args.file:
        check_path("--file", args.file, words=())
    if not args.file and not args.texts and sys.stdin.isatty():
        raise UserError('no text: fastbert explain --model DIR "a text"')
    counts = ("word", "mask", "max_length")
    numbers = {one: _count(f"--{one.replace('_', '-')}", getattr(args, one)) for one in counts}
    texts = args.texts or _lines(args.file)
    if not texts:
        raise UserError("no text: every line is empty")
    if len(texts) > MOST_TEXTS:
        raise UserError(f"{len(texts)} texts: a page holds {MOST_TEXTS} at most")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise UserError(f"text {number} is empty")
    from fastbert.finetune.explain import Explainer
    from fastbert.finetune.explain_page import write_page

    asked = {"pair": args.pair, "question": args.question, "target": args.target, **numbers}
    found = _explained(Explainer(args.model), texts, asked)
    title = f"{os.path.basename(os.path.abspath(args.model))}, explained"
    size = write_page(args.out, found, title)
    print(f"{args.out}: {size / 1e3:,.0f} kB")


def _explained(
    explainer: "Explainer", texts: list[str], asked: dict[str, Any]
) -> Iterator["Explanation"]:
    from fastbert.finetune.explain import TOLERANCE
    from fastbert.progress import progress_bar

    several = len(texts) > 1
    bar = progress_bar(texts, desc="explain", unit="text", disable=not several)
    for number, text in enumerate(bar, 1):
        which = f"text {number}: " if several else ""
        try:
            one = explainer(text, **asked)
        except UserError as error:
            raise UserError(f"{which}{error}") from None
        print(f"{which}{one}")
        if one.cut:
            print(f"{which}{one.cut} tokens at the end were cut off", file=sys.stderr)
        if one.gradients is not None and one.gradients.error >= TOLERANCE:
            missed = f"miss their sum by {one.gradients.error:.1%}"
            said = f"{which}integrated gradients {missed} after {one.gradients.steps} steps"
            print(said, file=sys.stderr)
        yield one


def _count(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        number = int(text)
    except ValueError:
        raise UserError(f"{option} {text}: must be an integer") from None
    if number < 1:
        raise UserError(f"{option} {text}: must be at least 1")
    return number


def _lines(file: str | None) -> list[str]:
    try:
        with open(file, encoding="utf-8-sig") if file else nullcontext(sys.stdin) as lines:
            found = [line.rstrip("\r\n") for line in lines]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file or 'standard input'}: cannot be read: {error}") from None
    texts = [line for line in found if line.strip()]
    if len(texts) < len(found):
        print(f"{len(found) - len(texts)} empty lines were skipped", file=sys.stderr)
    return texts
