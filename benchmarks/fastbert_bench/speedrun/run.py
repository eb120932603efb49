"""`fastbert speedrun`: corpus, tokenizer, seeds, row.

A folder of its own holds all: packages/, the text and tokenizers of each corpus in corpora/, and a
folder for each set of settings, with its seeds, result.json and curves.png. What is there already
is not done again, so a killed speedrun goes on where it was.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastbert.config import PretrainConfig, model_config
from fastbert.data.corpus import Skipped, map_corpus
from fastbert.data.tokenize import WordPiece
from fastbert.data.tokenizer_training import count_chunks
from fastbert.errors import RunError
from fastbert.recipes import CLASSIC
from fastbert.train.device import choose_execution
from fastbert.train.prepare import say
from fastbert_bench.measure import result as results
from fastbert_bench.speedrun import race, rows
from fastbert_bench.speedrun.corpus import Corpus, prepare
from fastbert_bench.speedrun.tracks import Track

RESULT = "result.json"
_NO_MATTER = ("out", "dataloader_num_workers", "dataloader_prefetch_factor")
"""Settings that change neither the numbers nor, to speak of, the time of a run."""
_OF_DEVICE = ("device", "num_threads")
"""Told by the conditions."""


def speedrun(
    track: Track,
    corpus: Corpus,
    given: Mapping[str, Any],
    *,
    seeds: int,
    packages: str,
    table: str,
    note: str,
) -> dict[str, Any]:
    """Runs all seeds of a set of settings, writes what came out, and adds its row.

    Args:
        track, corpus: what is run, on which text.
        given: settings of `fastbert pretrain` that were typed.
        seeds: how many, from 1 on.
        packages: the folder of the corpus's packages; empty: below the speedrun's own.
        table: the file that gets the row; empty: none does.
        note: what was changed and why.

    Returns:
        The result, as result.json holds it.

    Raises:
        UserError: settings that do not fit, a package that cannot be had.
        RunError: a run failed, which the row says, or was stopped by a signal, and goes on with the
            same command.
    """
    asked = track.settings(given)
    out = asked.pop("out", "auto")
    home = Path(f"runs/speedrun/{track.name}" if out == "auto" else out)
    of_text = home / "corpora" / corpus.name
    plan = {**asked, "data": str(of_text / "train.txt"), "validation_fraction": 0.0}
    plan |= {"eval_steps": 0, "save_total_limit": 1, "report_to": "none"}
    plan["save_steps"] = max(1, asked["max_steps"] // race.POINTS)
    plan["logging_steps"] = max(1, min(10, plan["save_steps"]))
    checked = PretrainConfig(**plan)  # a wrong setting is told before the work
    execution = choose_execution(checked, model_config(checked.sizes_from))
    if checked.num_threads:
        torch.set_num_threads(checked.num_threads)
    texts = prepare(corpus, of_text, Path(packages or home / "packages"))
    tokenizer = _tokenizer(corpus, texts["train"], checked.vocab_size, of_text)
    plan |= {"tokenizer": str(of_text / f"tokenizer-{checked.vocab_size}")}
    held_out = race.held_out_batches(texts, tokenizer, checked.max_seq_length)

    folder = home / label(checked)
    hidden = ("recipe", *_OF_DEVICE, *_NO_MATTER)
    shown = {name: value for name, value in given.items() if name not in hidden}
    result: dict[str, Any] = {
        "track": track.name,
        "corpus": corpus.name,
        "recipe": checked.recipe,
        "label": folder.name,
        "given": shown,
        "note": note,
        "max_steps": checked.max_steps,
        "budget": track.tokens,
        "target": track.targets.get(corpus.name),
        "conditions": results.conditions(execution.device),
        "config": {**vars(checked), "data": corpus.name},
        "points": {},
    }
    if not track.tuned:
        say(f"speedrun: {track.name}: classic has not been tuned here, and there is no target yet")
    classic = _classic(home, result)
    try:
        for seed in range(1, seeds + 1):
            run = folder / f"seed-{seed}"
            say(f"speedrun: {track.name} on {corpus.name}, {folder.name}, seed {seed} of {seeds}")
            config = PretrainConfig(**plan, seed=seed, out=str(run))
            points = _seed(config, held_out, run, execution.device)
            result["points"][str(seed)] = [one._asdict() for one in points]
    except RunError as error:
        if str(error).startswith("stopped by"):
            stop = str(error).partition(";")[0]
            raise RunError(f"seed {seed} {stop}; the same command goes on from there") from None
        result["failed"] = f"seed {seed} failed: {error}"
        _finish(result, classic, folder, table)
        raise
    _finish(result, classic, folder, table)
    return result


def label(config: PretrainConfig) -> str:
    """The name of a set of settings: its recipe, and a digest of all that matters."""
    values = {name: value for name, value in vars(config).items() if name not in _NO_MATTER}
    for name in ("data", "tokenizer"):  # where the folder of all lies says nothing
        values[name] = Path(values[name]).parts[-2:]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return f"{Path(config.recipe).stem}-{digest[:8]}"


def _tokenizer(corpus: Corpus, text: Path, vocab_size: int, home: Path) -> WordPiece:
    """The tokenizer of a corpus, learnt from what is trained on.

    Raises:
        RunError: it is not the one that everybody has.
    """
    folder = home / f"tokenizer-{vocab_size}"
    if folder.exists():
        tokenizer = WordPiece.load(str(folder))
    else:
        say(f"speedrun: learning {vocab_size:,} tokens from {text}")
        chunks = Counter[str]()
        for counted in map_corpus(str(text), Skipped(), count_chunks):
            chunks.update(counted)
        tokenizer = WordPiece.train(chunks, vocab_size, True, None, progress=True)
        tokenizer.save(folder, model_max_length=512)
    wanted = corpus.tokenizers.get(str(vocab_size))
    if wanted is not None and tokenizer.digest != wanted:
        raise RunError(
            f"{folder}: the tokenizer came out with digest {tokenizer.digest} instead of {wanted}: "
            "remove the folder; if it comes again, this version of tokenizers learns another one"
        )
    return tokenizer


def _seed(
    config: PretrainConfig, held_out: Any, run: Path, device: torch.device
) -> list[race.Point]:
    done = run.with_suffix(".json")
    if done.exists():
        say(f"speedrun: {run.name} was run before: {done}")
        return [race.Point(**one) for one in json.loads(done.read_text(encoding="utf-8"))]
    resume = "auto" if (run / "config.toml").exists() else ""
    resumed = PretrainConfig(**{**vars(config), "resume": resume})
    points = race.run_seed(resumed, held_out, run.parent / f"{run.name}.points", device)
    done.write_text(json.dumps([one._asdict() for one in points], indent=1), encoding="utf-8")
    shutil.rmtree(run / "data", ignore_errors=True)  # as large as the corpus, and made again
    return points


def _classic(home: Path, result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The newest result of classic as tuned, on the same text and device, with whole budget."""
    found = home.glob(f"{CLASSIC}-*/{RESULT}")
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        other: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not other["given"] and "failed" not in other and _where(other) == _where(result):
            return other
    return None


def _where(result: Mapping[str, Any]) -> tuple[Any, ...]:
    conditions = result["conditions"]
    return result["track"], result["corpus"], conditions["device"], conditions["threads"]


def _finish(
    result: dict[str, Any], classic: dict[str, Any] | None, folder: Path, table: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / RESULT).exists():  # where nothing was run anew, the conditions are those of then
        before = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        if before["points"] == result["points"]:
            result["conditions"] = before["conditions"]
    text = json.dumps(result, indent=1) + "\n"
    (folder / RESULT).write_text(text, encoding="utf-8")
    if result["points"]:
        (folder / "curves.png").write_bytes(rows.picture(result, classic).png("light"))
        say(f"curves: {folder / 'curves.png'}")
    cells = rows.row(result, classic)
    if table:
        rows.append(cells, Path(table), text)
        say(f"row: {table}")
    for heading, cell in cells.items():
        print(f"{heading}: {cell}")
