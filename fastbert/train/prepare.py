"""Everything before the first step: the run's folder, its tokenizer and token shards, the device,
the model's sizes, and the checkpoint that it goes on from.
"""

import dataclasses
import errno
import json
import os
import shlex
import shutil
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

from fastbert.config import (
    KEPT_SIZES,
    PRESETS,
    ModelConfig,
    PretrainConfig,
    holds_weights,
    initial_folder,
    model_config,
    stable_decay_steps,
    to_hf_dict,
)
from fastbert.data.corpus import Skipped, corpus_bytes, map_corpus
from fastbert.data.pack import next_sentence_labels
from fastbert.data.shards import (
    Found,
    Shards,
    build_shards,
    examine_shards,
    files_digest,
    fingerprint,
)
from fastbert.data.tokenize import WordPiece
from fastbert.data.tokenizer_files import DESCRIPTION, VOCABULARY
from fastbert.data.tokenizer_training import count_chunks
from fastbert.data.vocabulary import with_words_of_file, with_words_of_text
from fastbert.errors import RunError, UserError
from fastbert.model.bert import Bert
from fastbert.progress import progress_bar
from fastbert.recipes import CLASSIC, of_recipe
from fastbert.schedules import changes, phase_at
from fastbert.settings import sealed_toml, settings
from fastbert.train import checkpoint, lock
from fastbert.train.build import unused_position_init
from fastbert.train.device import Execution, check_memory, choose_execution
from fastbert.train.initial import Initial, NewTokens, ReadInitial, begin_with
from fastbert.train.interrupts import held_signals

CheckTokenizer = Callable[[WordPiece, Path], None]
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
_OF_TOKENIZER = ("vocab_size", "pad_token_id")
RUNS = Path("runs")
_PREPARED = ("config.toml", KEPT_SIZES, "tokenizer", "data", "metrics.jsonl", "tensorboard")
_FULL = (errno.ENOSPC, errno.EDQUOT)


def say_of_warmup(config: PretrainConfig) -> None:
    """Says so where the learning rate never reaches its peak, or leaps from it."""
    wsd = config.lr_scheduler_type == "warmup_stable_decay"
    if config.rising_steps >= config.max_steps:
        say(
            f"warmup_steps = {config.rising_steps} is not less than max_steps = "
            f"{config.max_steps}: the learning rate never reaches its peak"
        )
    elif wsd and config.rising_steps + config.stable_decay_steps > config.max_steps:
        say(
            f"the warm-up of {config.rising_steps} steps and the fall of "
            f"{config.stable_decay_steps} overlap in max_steps = {config.max_steps}: the learning "
            "rate leaps down from one to the other"
        )


def say_of_recipe(config: PretrainConfig) -> None:
    """Says what a run's recipe sets, and what of that is otherwise."""
    say(f"recipe: {of_recipe(config)}")


def say(line: str) -> None:
    """Prints a line of the log on stderr."""
    print(line, file=sys.stderr)


class Prepared(NamedTuple):
    """What a run begins with."""

    sizes: ModelConfig
    execution: Execution
    tokenizer: WordPiece
    train: Shards
    validation: Shards | None  # None without a held-out part
    initial: Initial | None = None  # weights to begin with


def check_request(config: PretrainConfig) -> None:
    """A wrong device, or a model that cannot fit on it, is told before the work.

    Raises:
        UserError: so it is.
    """
    sizes = _asked_model(config)
    execution = choose_execution(config, sizes)
    # The vocabulary is the tokenizer's, yet unknown.
    least = dataclasses.replace(sizes, vocab_size=1, pad_token_id=0)
    check_memory(config, least, execution.device, execution.dtype)


def prepare(
    config: PretrainConfig,
    run: Path,
    check_tokenizer: CheckTokenizer | None,
    read_initial: ReadInitial | None,
) -> Prepared:
    """Makes or finds all that the steps need, and says how it was chosen.

    Args:
        config: what was asked for.
        run: the run's folder.
        check_tokenizer: see `prepare_data`.
        read_initial: reads the weights of `init_from`; None where a checkpoint has others.

    Raises:
        UserError: data, tokenizer, model and device do not fit each other.
        RunError: the folder cannot be written.
    """
    initial = None
    if config.init_from and read_initial is not None:  # bad weights are told before the data's work
        initial = read_initial(initial_folder(config.init_from), _asked_model(config), config.nsp)
    elif not (config.init_from or config.model in PRESETS or (run / "checkpoints").exists()):
        _say_of_weights(config.model)
    # What we trained is of a kind that is tested; the check takes seconds.
    check = check_tokenizer if config.tokenizer != "train" else None
    tokenizer, train, validation = prepare_data(config, run, check)
    sizes = _model_sizes(config, tokenizer)
    execution = choose_execution(config, sizes)
    check_memory(config, sizes, execution.device, execution.dtype)
    say_of_warmup(config)
    for line in execution.reasons:
        say(line)
    return Prepared(sizes, execution, tokenizer, train, validation, initial)


def _say_of_weights(model: str) -> None:
    if holds_weights(model):
        say(
            f"model = {model!r}: its sizes are taken, not its weights; --init-from "
            f"{shlex.quote(model)} begins with them"
        )


def begin(config: PretrainConfig, initial: Initial, tokenizer: WordPiece, model: Bert) -> None:
    """Gives a model the weights to begin with, and says which they are.

    Raises:
        UserError: the checkpoint's tokenizer has changed since the run was prepared.
    """
    base = _initial_tokenizer(config)
    if base.tokens != tokenizer.tokens[: base.vocab_size]:
        raise UserError(
            f"init_from = {config.init_from!r}: its tokenizer has changed since the run in "
            f"{config.out} was prepared: put it back, or start a new run with another --out"
        )
    new = NewTokens(base.vocab_size, base.pieces(tokenizer.tokens[base.vocab_size :]))
    for line in (*begin_with(initial, model, new), *unused_position_init(config)):
        say(line)


def restored_state(config: PretrainConfig, run: Path) -> checkpoint.Checkpoint | None:
    """The checkpoint that a run goes on from; None where it begins.

    Raises:
        UserError: it is damaged, or of another recipe.
    """
    if not config.resume:
        return None
    if config.resume == "auto":
        found = checkpoint.load_newest(run, say)
        if found is None:
            _check_recipe_name(config, run)
            say(f"resume: {run} has no checkpoint yet, starting at step 0")
            return None
    else:
        found = checkpoint.load(Path(config.resume))
    for line in checkpoint.check_recipe(
        found.state["recipe"], dataclasses.asdict(config), f"the checkpoint of step {found.step}"
    ):
        say(f"resume: {line}")
    _say_of_shares(config, found)
    _say_of_fall(config, found, run)
    say(f"resume: going on from step {found.step}")
    return found


def _say_of_shares(config: PretrainConfig, found: checkpoint.Checkpoint) -> None:
    """Says what changes at once because settings are shares of another max_steps."""
    was = found.state["recipe"].get("max_steps", config.max_steps)
    before, step = dataclasses.replace(config, max_steps=was), found.step
    moved = changes(*(phase_at(one.phases(), step) for one in (before, config)))
    if moved:
        say(f"resume: step {step} of {config.max_steps} is in another phase: {moved} from here")
    old, new = before.rising_steps, config.rising_steps
    if old != new and step < max(old, new):
        say(f"resume: the warm-up ends at step {new} of {config.max_steps}, was {old} of {was}")


def _say_of_fall(config: PretrainConfig, found: checkpoint.Checkpoint, run: Path) -> None:
    """Says so where a rate that had begun to fall rises again, as max_steps has grown."""
    was = found.state["recipe"].get("max_steps", config.max_steps)
    fall = was - stable_decay_steps(config.decay_steps, was)
    wsd = config.lr_scheduler_type == "warmup_stable_decay"
    if not wsd or config.max_steps <= was or found.step <= fall + 1:  # the rate at `fall` is whole
        return
    before = checkpoint.newest_folder(run, fall + 1)
    better = f"--resume {before} goes on from before" if before else "no checkpoint is from before"
    say(
        f"resume: the learning rate fell from step {fall} on, and rises again with max_steps = "
        f"{config.max_steps}: {better} its fall"
    )


def check_sizes(
    config: PretrainConfig, sizes: ModelConfig, restored: checkpoint.Checkpoint
) -> None:
    """Compares the model's sizes with those of a checkpoint.

    A dropout that the settings name is theirs (`check_recipe`): the model's own then matters to who
    fine-tunes only, and older checkpoints have the trained one in its place.

    Raises:
        UserError: a size has changed.
    """
    for name, was in restored.state["sizes"].items():
        now = getattr(sizes, name)
        if now != was and not (name in DROPOUTS and getattr(config, name) is not None):
            raise UserError(
                f"model = {config.sizes_from!r} has {name} = {now}, but had {was} at the "
                f"checkpoint of step {restored.step}: put it back, or start a new run"
            )


def _check_recipe_name(config: PretrainConfig, run: Path) -> None:
    began = _written(run, "recipe") or CLASSIC  # once there were none
    if (run / "config.toml").exists() and config.recipe != began:
        raise UserError(
            f"recipe = {config.recipe!r}, but the run in {run} began with {began!r}: leave it out "
            "to go on, or start a new run with another --out"
        )


def _asked_model(config: PretrainConfig) -> ModelConfig:
    sizes = model_config(config.sizes_from)
    kept = config.sizes_from == str(Path(config.out) / KEPT_SIZES)
    if config.init_from and config.model != "auto" and not kept:
        asked = model_config(config.model)
        for name in (one.name for one in settings(ModelConfig)):
            mine, theirs = getattr(asked, name), getattr(sizes, name)
            if mine != theirs and name not in _OF_TOKENIZER:
                raise UserError(
                    f"model = {config.model!r} has {name} = {mine}, but init_from = "
                    f"{config.init_from!r} has {theirs}: leave model out"
                )
    if config.max_seq_length > sizes.max_position_embeddings:
        raise UserError(
            f"max_seq_length = {config.max_seq_length} must be at most the model's "
            f"max_position_embeddings = {sizes.max_position_embeddings}"
        )
    if config.nsp and sizes.type_vocab_size < 2:
        raise UserError(
            f"model = {config.sizes_from!r} has type_vocab_size = {sizes.type_vocab_size}: "
            "sentence pairs need 2; give another model, or --no-nsp"
        )
    return sizes


def _model_sizes(config: PretrainConfig, tokenizer: WordPiece) -> ModelConfig:
    sizes = _asked_model(config)
    rows = sizes.vocab_size if config.init_from else 0  # more of them than tokens may be there
    return dataclasses.replace(
        config.initialized(sizes),
        vocab_size=max(rows, tokenizer.vocab_size),
        pad_token_id=tokenizer.pad_id,
    )


class Request(Protocol):
    """What a run's folder is found by."""

    command: ClassVar[str]  # its default's name: runs/COMMAND-001

    @property
    def out(self) -> str: ...

    @property
    def resume(self) -> str | bool: ...


def run_folder(config: Request) -> Path:
    """The folder of the run: as told by `out`, by `resume`, or the next free runs/pretrain-NNN.

    What is in it counts only once its lock is held: a folder that has one passes here.

    Raises:
        UserError: the folder holds something that is not to be written into, or `resume` is not one
            of its checkpoints.
    """
    if isinstance(config.resume, str) and config.resume not in ("", "auto"):
        return _run_of(Path(config.resume), config.out)
    if config.out != "auto":
        run = Path(config.out)
    else:
        run = _numbered(config.command, newest=bool(config.resume))
    try:
        has_lock = (run / lock.NAME).is_file()
    except OSError as error:
        raise UserError(f"out = {str(run)!r} cannot be used: {error.strerror}") from None
    if not has_lock:
        _check_content(run, config)
    return run


def _check_content(run: Path, config: Request) -> None:
    try:
        if run.exists() and not run.is_dir():
            raise UserError(f"out = {str(run)!r} is a file: name a folder")
        holds_files = run.is_dir() and not _is_empty(run)
        holds_run = (run / "config.toml").exists()
    except OSError as error:
        raise UserError(f"out = {str(run)!r} cannot be used: {error.strerror}") from None
    if holds_files and not holds_run:
        raise UserError(f"out = {str(run)!r} already holds other files: name another folder")
    if holds_files and not config.resume:
        raise UserError(
            f"out = {str(run)!r} already holds another run: name another folder, or continue it "
            f"with --resume{' auto' if isinstance(config.resume, str) else ''}"
        )


def _is_empty(run: Path) -> bool:
    return all(path.name == lock.NAME for path in run.iterdir())


@contextmanager
def held_run(config: Request) -> Iterator[Path]:
    """The folder of the run, made if missing, its lock held before anything in it is read.

    Folders made for it go again where the run fails and leaves nothing in them.

    Raises:
        UserError: as `run_folder`; another process works there; it cannot be made or written.
        RunError: the disk is full.
    """
    with ExitStack() as stack:
        with held_signals():  # amid this, what was made would stay
            while True:
                run = run_folder(config)
                numbered = config.out == "auto" and not config.resume
                made = make_folder(run, ours_alone=numbered)
                if made is not None:  # else another process was given the same number
                    break
            stack.push(partial(_unmake, made))
            stack.enter_context(lock.locked(run, say))
        if config.resume in ("", "auto", True, False):
            _check_content(run, config)
        yield run


def _unmake(folders: list[Path], error: type[BaseException] | None, *about: object) -> None:
    for folder in folders if error else ():
        with suppress(OSError):
            folder.rmdir()


def _run_of(checkpoint: Path, out: str) -> Path:
    shown = f"resume = {str(checkpoint)!r}"
    if (checkpoint / "checkpoints").is_dir():
        raise UserError(f"{shown} is a run, not a checkpoint: use --resume auto --out {checkpoint}")
    if not (checkpoint / "state.json").is_file():
        raise UserError(
            f"{shown} is not a whole checkpoint: it holds no state.json; --resume auto takes the "
            "newest whole one"
        )
    run = checkpoint.resolve().parent.parent
    if out != "auto" and Path(out).resolve() != run:
        raise UserError(f"out = {out!r} is not the run of {shown}: leave --out away")
    return run


@contextmanager
def taken_back_on_failure(run: Path, names: Sequence[str] = _PREPARED) -> Iterator[None]:
    """Removes what a new run has written if its preparation fails, so that it can start again.

    Args:
        run: the folder, which is there already, and held.
        names: of what its preparation may have written.
    """
    is_new = _is_empty(run)
    try:
        yield
    except BaseException:
        for name in names if is_new else ():
            if (run / name).is_dir():
                shutil.rmtree(run / name, ignore_errors=True)
            else:
                with suppress(OSError):
                    (run / name).unlink()
        raise


def make_folder(run: Path, *, ours_alone: bool = False) -> list[Path] | None:
    """Makes the run's folder and returns those that were missing, the innermost first.

    Args:
        run: the folder.
        ours_alone: None is returned where it is there already.

    Raises:
        UserError: it cannot be made there.
        RunError: the disk is full.
    """
    try:
        made = [folder for folder in (run, *run.parents) if not folder.exists()]
        for parent in reversed(made[1:]):
            parent.mkdir(exist_ok=True)
        try:
            run.mkdir(exist_ok=not ours_alone)
        except FileExistsError:
            if run.is_dir():
                return None
            raise
        if not os.access(run, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return made
    except OSError as error:
        kind = RunError if error.errno in _FULL else UserError
        raise kind(
            f"out = {str(run)!r} cannot be written: {error.strerror}; name another folder"
        ) from None


def _numbered(command: str, newest: bool) -> Path:
    taken = sorted(
        (int(path.name.removeprefix(f"{command}-")), path)
        for path in RUNS.glob(f"{command}-*")
        if path.name.removeprefix(f"{command}-").isdecimal()
    )
    if newest and taken:
        return taken[-1][1]
    return RUNS / f"{command}-{taken[-1][0] + 1 if taken else 1:03d}"


def prepare_data(
    config: PretrainConfig,
    run: Path,
    check_tokenizer: CheckTokenizer | None = None,
) -> tuple[WordPiece, Shards, Shards | None]:
    """Makes (or finds, in a run that goes on) the tokenizer and the token shards of a run.

    Args:
        config: where they are, and how they are made.
        run: the run's folder.
        check_tokenizer: called with the tokenizer and the folder it has been saved in.

    Returns:
        The tokenizer, the training shards, and the held-out shards (None without a held-out part).

    Raises:
        UserError: unreadable or empty data, an unusable tokenizer.
        RunError: the folder cannot be written.
    """
    tokenizer_folder, data_folder = run / "tokenizer", run / "data"
    make_folder(run)
    tokenizer = _tokenizer(config, tokenizer_folder)
    found = examine_shards(data_folder)
    begun = (run / "checkpoints").exists()
    changed = False
    if found is not None and found.meta is not None:
        key = fingerprint(
            config.data,
            tokenizer,
            validation_fraction=config.validation_fraction,
            seed=config.seed,
            splitter=config.sentence_splitter,
            folder=data_folder,
        )
        changed = found.meta["fingerprint"] != key
    if changed and begun:
        if found and found.meta and found.meta["vocab_digest"] != tokenizer.digest:
            raise UserError(
                f"{tokenizer_folder}: is not the tokenizer that the run in {run} began with: put "
                "it back as it was, or start a new run with another --out"
            )
        raise UserError(
            f"data = {config.data!r} has changed since the run in {run} began: put it back as "
            "it was, or start a new run with another --out"
        )
    if not begun:
        _write_settings(config, tokenizer, run)
        if check_tokenizer is not None:
            check_tokenizer(tokenizer, run / "tokenizer")
    if found is None or changed or found.damage:
        damage = found.damage if found else f"{data_folder} is missing" if begun else ""
        if damage:
            say(f"data: {damage}; prepared again from {config.data}")
        stats = build_shards(
            config.data,
            tokenizer,
            data_folder,
            validation_fraction=config.validation_fraction,
            seed=config.seed,
            progress=True,
            splitter=config.sentence_splitter,
            expected=_begun_with(run, found) if begun else "",
        )
        for line in stats.skipped:
            say(f"data: {line}")
        total = sum(stats.tokens.values())
        say(
            f"data: {sum(stats.documents.values()):,} documents, {total:,} tokens "
            f"({stats.unknown / max(total, 1):.2%} unknown, for "
            f"{stats.unknown_characters / max(stats.characters, 1):.2%} of the characters), "
            f"{stats.tokens['validation']:,} held out; {total / stats.seconds:,.0f} tokens/s"
        )
    if begun:  # only now is it sure that the run goes on
        _write_settings(config, tokenizer, run)
    train = Shards.open(data_folder, "train")
    validation = Shards.open(data_folder, "validation")
    if config.nsp and not begun:
        _check_labels(config, train, validation)
    return tokenizer, train, validation if validation.num_tokens else None


def _check_labels(config: PretrainConfig, train: Shards, validation: Shards) -> None:
    """Refuses to train next-sentence prediction on one label, and says where a test is of one."""
    labels_of = partial(
        next_sentence_labels,
        max_seq_length=config.max_seq_length,
        short_seq_prob=config.short_seq_prob,
        seed=config.seed,
    )
    labels = labels_of(train)
    if not labels.mixed:
        raise UserError(
            f"data = {config.data!r}: {labels.note}; give more text, or leave next-sentence "
            "prediction out with --no-nsp"
        )
    if validation.num_tokens:
        labels = labels_of(validation)
        if labels.note:
            say(f"data: {labels.note}")


def _begun_with(run: Path, found: Found | None) -> str:
    """The digest of the data that a run's checkpoints go on with, "" where nothing tells it."""
    if found is not None and found.meta is not None:
        return files_digest(found.meta["files"])
    for state in sorted(run.glob("checkpoints/*/state.json"), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            return str(json.loads(state.read_text(encoding="utf-8"))["data"]["shape"]["data"])
    return found.digest if found is not None else ""  # of a version that kept none


def _write_settings(config: PretrainConfig, tokenizer: WordPiece, run: Path) -> None:
    sizes = model_config(config.sizes_from)
    try:
        _write_config(dataclasses.replace(config, do_lower_case=tokenizer.do_lower_case), run)
        if config.init_from:
            content = json.dumps(to_hf_dict(sizes, "BertForPreTraining"), indent=2) + "\n"
            write_whole(run / KEPT_SIZES, content)
        tokenizer.save(run / "tokenizer", model_max_length=sizes.max_position_embeddings)
    except RunError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"{run}: cannot be written: {reason}") from None


def _write_config(config: PretrainConfig, run: Path) -> None:
    written = dataclasses.replace(config, resume="", stop_at_step=0)
    write_whole(run / "config.toml", sealed_toml(written))


def write_whole(path: Path, content: str) -> None:
    """Writes a text file that is never there in part.

    Raises:
        RunError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            temporary.write_text(content, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None


def _written(run: Path, name: str) -> object:
    """A setting of a run's config.toml, None where that does not tell."""
    with suppress(OSError, ValueError):
        return tomllib.loads((run / "config.toml").read_text(encoding="utf-8")).get(name)
    return None


def _tokenizer(config: PretrainConfig, of_run: Path) -> WordPiece:
    asked = (config.do_lower_case, config.strip_accents)
    if config.resume and (of_run / "tokenizer.json").exists():
        for name in ("init_from", "add_tokens"):
            began = _written(of_run.parent, name) or ""
            if getattr(config, name) != began:
                raise UserError(
                    f"{name} = {getattr(config, name)!r}, but the run in {of_run.parent} began "
                    f"with {began!r}: leave it out to go on, or start a new run with another --out"
                )
        tokenizer = WordPiece.load(of_run, *asked)
        # What the run itself began with needs not be there any more.
        if config.tokenizer not in ("auto", "train", _written(of_run.parent, "tokenizer")):
            other = WordPiece.load(config.tokenizer, *asked)
            if other.digest != tokenizer.digest:
                raise UserError(
                    f"tokenizer = {config.tokenizer!r} is not the one in {of_run}, which this run "
                    "began with: leave it out to go on, or start a new run with another --out"
                )
        return tokenizer
    if config.init_from:
        return _extended(config, _initial_tokenizer(config))
    if config.tokenizer != "train":
        given = WordPiece.load(config.tokenizer, *asked)
        _say_notes(given)
        return given
    tokenizer = WordPiece.train(
        _chunks(config),
        config.vocab_size,
        config.do_lower_case is not False,
        config.strip_accents,
        progress=True,
    )
    fewer = f" of {config.vocab_size:,} asked for: the text has no more"
    say(
        f"tokenizer: WordPiece trained, {tokenizer.vocab_size:,} tokens"
        f"{fewer if tokenizer.vocab_size < config.vocab_size else ''}"
    )
    _say_notes(tokenizer)
    return tokenizer


def _say_notes(tokenizer: WordPiece) -> None:
    for note in tokenizer.notes:
        say(f"tokenizer: {note}")


def _initial_tokenizer(config: PretrainConfig) -> WordPiece:
    """The tokenizer whose ids the weights to begin with know."""
    path, folder = config.tokenizer, initial_folder(config.init_from)
    if path == "auto":
        if not any(os.path.isfile(os.path.join(folder, n)) for n in (DESCRIPTION, VOCABULARY)):
            raise UserError(
                f"init_from = {config.init_from!r}: the folder holds neither {DESCRIPTION} nor "
                f"{VOCABULARY}: give its --tokenizer"
            )
        path = folder
    tokenizer = WordPiece.load(path, config.do_lower_case, config.strip_accents)
    rows, tokens = model_config(config.sizes_from).vocab_size, tokenizer.vocab_size
    if tokens > rows:
        raise UserError(
            f"tokenizer = {path!r} has {tokens:,} tokens, but init_from = {config.init_from!r} has "
            f"word embeddings of {rows:,}: give the tokenizer that it was trained with"
        )
    return tokenizer


def _extended(config: PretrainConfig, tokenizer: WordPiece) -> WordPiece:
    _say_notes(tokenizer)
    rows, tokens = model_config(config.sizes_from).vocab_size, tokenizer.vocab_size
    if tokens < rows:
        say(f"tokenizer: {tokens:,} tokens, and {rows:,} rows in the word embedding")
    if not config.add_tokens:
        return tokenizer
    if config.add_tokens.isdecimal():
        extended, note = with_words_of_text(tokenizer, _chunks(config), int(config.add_tokens))
    else:
        extended, note = with_words_of_file(tokenizer, config.add_tokens)
    say(f"tokenizer: {note}")
    return extended


def _chunks(config: PretrainConfig) -> Counter[str]:
    chunks: Counter[str] = Counter()
    total = corpus_bytes(config.data)
    with progress_bar(total=total, unit="B", unit_scale=True, desc="reading") as bar:
        for counted in map_corpus(
            config.data,
            Skipped(),
            count_chunks,
            bar.update,
            splitter=config.sentence_splitter,
        ):
            chunks.update(counted)
    return chunks
