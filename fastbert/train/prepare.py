"""Everything before the first step: the run's folder, its tokenizer, its token shards."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from fastbert.config import PretrainConfig, to_toml
from fastbert.data.corpus import Skipped, corpus_bytes, read_corpus
from fastbert.data.shards import Shards, build_shards, fingerprint, shards_fingerprint
from fastbert.data.tokenize import WordPiece
from fastbert.errors import RunError, UserError

RUNS = Path("runs")


def say(line: str) -> None:
    """Prints a line of the log on stderr."""
    print(line, file=sys.stderr)


def run_folder(config: PretrainConfig) -> Path:
    """The folder of the run: as told by `out`, by `resume`, or the next free runs/pretrain-NNN.

    Raises:
        UserError: the folder holds something that is not to be written into.
    """
    if config.out != "auto":
        run = Path(config.out)
    elif config.resume not in ("", "auto"):
        run = Path(config.resume).resolve().parent.parent
    else:
        run = _numbered(newest=config.resume == "auto")
    if run.exists() and not run.is_dir():
        raise UserError(f"out = {str(run)!r} is a file: name a folder")
    if not config.resume and run.is_dir() and any(run.iterdir()):
        what = "another run" if (run / "config.toml").exists() else "other files"
        raise UserError(
            f"out = {str(run)!r} already holds {what}: name another folder"
            + (", or continue it with --resume auto" if what == "another run" else "")
        )
    return run


def _numbered(newest: bool) -> Path:
    taken = sorted(
        (int(path.name.removeprefix("pretrain-")), path)
        for path in RUNS.glob("pretrain-*")
        if path.name.removeprefix("pretrain-").isdigit()
    )
    if newest and taken:
        return taken[-1][1]
    return RUNS / f"pretrain-{taken[-1][0] + 1 if taken else 1:03d}"


def prepare_data(config: PretrainConfig, run: Path) -> tuple[WordPiece, Shards, Shards | None]:
    """Makes (or finds, in a run that goes on) the tokenizer and the token shards of a run.

    Returns:
        The tokenizer, the training shards, and the held-out shards (None without a held-out part).

    Raises:
        UserError: unreadable or empty data, an unusable tokenizer.
        RunError: the folder cannot be written.
    """
    tokenizer_folder, data_folder = run / "tokenizer", run / "data"
    if config.resume and (tokenizer_folder / "tokenizer.json").exists():
        tokenizer = WordPiece.load(tokenizer_folder)
    else:
        tokenizer = _tokenizer(config)
    try:
        run.mkdir(parents=True, exist_ok=True)
        tokenizer.save(tokenizer_folder)
        _write_config(config, run)
    except OSError as error:
        raise RunError(f"{run}: cannot be written: {error.strerror}") from None
    key = fingerprint(
        config.data, tokenizer, validation_fraction=config.validation_fraction, seed=config.seed
    )
    found = shards_fingerprint(data_folder)
    if found != key:
        if found is not None and (run / "checkpoints").exists():
            raise UserError(
                f"data = {config.data!r} has changed since the run in {run} began: put it back as "
                "it was, or start a new run with another --out"
            )
        stats = build_shards(
            config.data,
            tokenizer,
            data_folder,
            validation_fraction=config.validation_fraction,
            seed=config.seed,
            progress=True,
        )
        for line in stats.skipped:
            say(f"data: {line}")
        total = sum(stats.tokens.values())
        say(
            f"data: {sum(stats.documents.values()):,} documents, {total:,} tokens "
            f"({stats.unknown / max(total, 1):.2%} unknown), {stats.tokens['validation']:,} held "
            f"out; {total / stats.seconds:,.0f} tokens/s"
        )
    train = Shards.open(data_folder, "train")
    validation = Shards.open(data_folder, "validation")
    return tokenizer, train, validation if validation.num_tokens else None


def _write_config(config: PretrainConfig, run: Path) -> None:
    temporary = run / ".config.toml.tmp"
    written = dataclasses.replace(config, resume="", stop_at_step=0)
    temporary.write_text(to_toml(written), encoding="utf-8")
    os.replace(temporary, run / "config.toml")


def _tokenizer(config: PretrainConfig) -> WordPiece:
    if config.tokenizer != "train":
        return WordPiece.load(config.tokenizer)
    tokenizer = WordPiece.train(_sentences(config.data), config.vocab_size, config.do_lower_case)
    say(f"tokenizer: WordPiece trained, {tokenizer.vocab_size:,} tokens")
    return tokenizer


def _sentences(data: str) -> Iterator[str]:
    with tqdm(
        total=corpus_bytes(data), unit="B", unit_scale=True, desc="reading", file=sys.stderr
    ) as bar:
        for document in read_corpus(data, Skipped(), bar.update):
            yield from document
