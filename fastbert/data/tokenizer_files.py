"""A tokenizer's files: vocab.txt or tokenizer.json, and what may stand beside them
(tokenizer_config.json, special_tokens_map.json, added_tokens.json).

All become one description, the content of a tokenizer.json: what is run is what is exported.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from fastbert.errors import UserError

ROLES = ("pad", "unk", "cls", "sep", "mask")
SPECIAL_TOKENS = tuple(f"[{role.upper()}]" for role in ROLES)
"""BERT's names for the five roles."""
MAX_WORD = 100
"""Characters of the longest word; WordPiece makes a longer one [UNK]."""
VOCABULARY, DESCRIPTION = "vocab.txt", "tokenizer.json"
CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"

# Settings of transformers' BertTokenizer, and what each is where nothing says it.
_BERT: dict[str, bool | None] = {
    "do_lower_case": True,
    "strip_accents": None,  # as do_lower_case
    "tokenize_chinese_chars": True,
    "clean_text": True,
    "do_basic_tokenize": True,
}
_FLAGS = {
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "single_word": False,
    "special": False,
}
_OWN_NORMALIZER = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes that take the normalizer of tokenizer.json and no setting beside it."""
_BERT_LIKE = (
    *("Bert", "ConvBert", "DistilBert", "DPRContextEncoder", "DPRQuestionEncoder", "DPRReader"),
    *("Electra", "Funnel", "LayoutLM", "Lxmert", "MobileBert", "MPNet", "Realm", "RetriBert"),
    "SqueezeBert",
    *("VisualBert", "Basic"),
)
"""Classes, less "Tokenizer" and "TokenizerFast", that read vocab.txt as BERT's does."""


@dataclass(frozen=True)
class Description:
    """A tokenizer, whole."""

    state: dict[str, Any]
    """The content of a tokenizer.json."""
    roles: dict[str, str]
    """The token of each of `ROLES`."""
    notes: tuple[str, ...] = ()
    """What its user should know, one line each."""


@dataclass
class _Beside:
    """What the files beside a vocabulary say."""

    settings: dict[str, bool] = field(default_factory=dict)
    """By the names of `_BERT`."""
    prefix: str = "##"
    roles: dict[str, str] = field(default_factory=dict)
    added: list[dict[str, Any]] = field(default_factory=list)
    """As in a tokenizer.json, without `id` where the file claims none."""
    never_split: list[str] = field(default_factory=list)
    tokenizer_class: str = ""


def read(path: str, asked: dict[str, bool]) -> Description:
    """Returns the tokenizer of a file or folder.

    Args:
        path: a vocab.txt, a tokenizer.json, or a folder that holds one of them.
        asked: do_lower_case and strip_accents, where the user named them.

    Raises:
        UserError: a file is missing, damaged or no WordPiece vocabulary, or two contradict each
            other, or one contradicts `asked`.
    """
    if os.path.isdir(path):
        names = [os.path.join(path, name) for name in (DESCRIPTION, VOCABULARY)]
        found = next(filter(os.path.isfile, names), None)
        if found is None:
            raise UserError(f"{path}: the folder holds neither {DESCRIPTION} nor {VOCABULARY}")
        path = found
    folder = os.path.dirname(path)
    beside = _read_beside(folder)
    config = os.path.join(folder, CONFIG)
    if path.endswith(".json"):
        state = _read_description(path)
        settled = _settle(path, state, beside, config)
        said = normalization(state["normalizer"])
        for name, value in asked.items():
            if said.get(name) != value:
                own = _shown(said[name]) if name in said else "otherwise, by patterns of its own"
                raise UserError(f"{path}: {name} = {_shown(value)}, but its normalizer says {own}")
        return _complete(path, state, beside, settled)
    kind = beside.tokenizer_class.removesuffix("Fast").removesuffix("Tokenizer")
    if kind and kind not in _BERT_LIKE and beside.tokenizer_class not in _OWN_NORMALIZER:
        raise UserError(
            f"{path}: tokenizer_class = {_brief(repr(beside.tokenizer_class))} beside it does not "
            f"part words as BERT does: give its {DESCRIPTION}, if its model is WordPiece"
        )
    for name, value in asked.items():
        if beside.settings.get(name, value) != value:
            raise UserError(
                f"{path}: {name} = {_shown(value)}, but {config} says {_shown(not value)}"
            )
    tokens = _read_vocabulary(path)
    settings = _BERT | beside.settings | asked
    state = bert(tokens, beside.roles.get("unk", "[UNK]"), beside.prefix, **settings)
    cased = sum(token.lower() != token for token in tokens if not token.startswith("["))
    notes: tuple[str, ...] = ()
    if "do_lower_case" not in beside.settings | asked and cased > 0.05 * len(tokens):
        notes = (
            f"{path}: {cased:,} of its {len(tokens):,} tokens have capitals, which lower-cased "
            "text never meets; --no-do-lower-case keeps the text as it is",
        )
    return _complete(path, state, beside, notes)


_FIELDS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
    "clean_text": "clean_text",
}


def _settle(path: str, state: dict[str, Any], beside: _Beside, config: str) -> tuple[str, ...]:
    """Gives tokenizer_config.json its way over the normalizer, as transformers 4 and 5 do.

    Returns what is to be said of it.

    Raises:
        UserError: it contradicts a normalizer that is not BERT's own.
    """
    if beside.tokenizer_class in _OWN_NORMALIZER:
        return ()
    normalizer, notes = state["normalizer"], []
    said = normalization(normalizer)
    for name, value in beside.settings.items():
        if said.get(name, value) == value:
            continue
        if normalizer is None or normalizer["type"] != "BertNormalizer":
            raise UserError(
                f"{config}: {name} = {_shown(value)}, but the normalizer of {path} says "
                f"{_shown(said[name])}: mend one of them"
            )
        notes.append(
            f"{config}: {name} = {_shown(value)} is followed, as transformers does, where "
            f"{os.path.basename(path)} says {_shown(said[name])}"
        )
    for name, value in beside.settings.items() if notes else ():
        if name in _FIELDS:
            normalizer[_FIELDS[name]] = value
    return tuple(notes)


def _brief(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _shown(value: bool) -> str:
    return str(value).lower()


def bert(
    tokens: Iterable[str],
    unk_token: str = "[UNK]",
    prefix: str = "##",
    *,
    do_lower_case: bool | None = True,
    strip_accents: bool | None = None,
    tokenize_chinese_chars: bool | None = True,
    clean_text: bool | None = True,
    do_basic_tokenize: bool | None = True,
) -> dict[str, Any]:
    """Returns the state of a tokenizer of these tokens with BERT's own normalization."""
    return {
        "added_tokens": [],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": clean_text,
            "handle_chinese_chars": tokenize_chinese_chars,
            "strip_accents": strip_accents,
            "lowercase": do_lower_case,
        }
        if do_basic_tokenize
        else None,
        "pre_tokenizer": {"type": "BertPreTokenizer" if do_basic_tokenize else "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordPiece",
            "unk_token": unk_token,
            "continuing_subword_prefix": prefix,
            "max_input_chars_per_word": MAX_WORD,
            "vocab": {token: index for index, token in enumerate(tokens)},
        },
    }


def normalization(normalizer: Any) -> dict[str, bool]:
    """Returns what a normalizer does, by the names of BertTokenizer's settings, where it is sure.

    Args:
        normalizer: that of a tokenizer.json.
    """
    parts = _parts(normalizer)
    said: dict[str, bool] = {"do_lower_case": False, "strip_accents": False}
    for part in parts:
        kind = part.get("type")
        if kind == "BertNormalizer":
            lower, accents = bool(part.get("lowercase")), part.get("strip_accents")
            said["do_lower_case"] |= lower
            said["strip_accents"] |= lower if accents is None else bool(accents)
            said["tokenize_chinese_chars"] = bool(part.get("handle_chinese_chars"))
            said["clean_text"] = bool(part.get("clean_text"))
        said["do_lower_case"] |= kind == "Lowercase"
        said["strip_accents"] |= kind == "StripAccents"
    if any(part.get("type") == "Replace" for part in parts):
        del said["strip_accents"]  # it may be what a pattern does
    return said


def _parts(normalizer: Any) -> list[dict[str, Any]]:
    if not isinstance(normalizer, dict):
        return []
    inner = normalizer.get("normalizers")
    if isinstance(inner, list):
        return [part for child in inner for part in _parts(child)]
    return [normalizer]


def expressible_by_vocabulary(state: dict[str, Any]) -> dict[str, bool | None] | None:
    """Returns the settings with which BertTokenizer makes the same ids from vocab.txt alone.

    None where there are none: another normalizer, word length, prefix, or tokens outside the words.
    """
    normalizer, model = state["normalizer"] or {}, state["model"]
    plain = (
        normalizer.get("type") == "BertNormalizer"
        and normalizer["clean_text"]
        and state["pre_tokenizer"] == {"type": "BertPreTokenizer"}
        and model["continuing_subword_prefix"] == "##"
        and model["max_input_chars_per_word"] == MAX_WORD
        and all(token["special"] and token["id"] in _ids(model) for token in state["added_tokens"])
        and not any(mark in token for token in model["vocab"] for mark in "\r\n")
    )
    if not plain:
        return None
    return {
        "do_lower_case": normalizer["lowercase"],
        "strip_accents": normalizer["strip_accents"],
        "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
    }


def _ids(model: dict[str, Any]) -> range:
    return range(len(model["vocab"]))


# One tokenizer from its files


def _complete(
    path: str, state: dict[str, Any], beside: _Beside, notes: tuple[str, ...]
) -> Description:
    """Joins the tokens that other files add, finds the roles, and sets what BERT fixes.

    A sequence is [CLS] ... [SEP], whatever the file's post-processor does, for so it is trained.
    """
    vocab: dict[str, int] = state["model"]["vocab"]
    known = {token["content"]: token for token in state["added_tokens"]}
    ids = dict(vocab) | {content: token["id"] for content, token in known.items()}
    for token in sorted(beside.added, key=lambda token: token.get("id", 2**32)):
        content = token["content"]
        index = ids.setdefault(content, token.get("id", len(ids)))
        if token.get("id", index) != index:
            raise UserError(
                f"{path}: {_brief(repr(content))} has id {index}, but {token['id']} in a file "
                "beside it"
            )
        known.setdefault(content, {**_FLAGS, **token, "id": index})
    for word in beside.never_split:
        if word not in ids:
            raise UserError(
                f"{path}: never_split in {CONFIG} names {_brief(repr(word))}, which is no token: "
                "add it to the vocabulary, or leave it out"
            )
        known.setdefault(word, {**_FLAGS, "content": word, "id": ids[word], "single_word": True})
    roles = _roles(path, state, beside, ids)
    for name in roles.values():
        usual = {**_FLAGS, "content": name, "id": ids[name]}
        known[name] = {**usual, **known.get(name, {}), "special": True}
    if sorted(ids.values()) != list(range(len(ids))):
        raise UserError(f"{path}: token ids have gaps; they must run from 0 to V - 1, each once")
    prefix = state["model"]["continuing_subword_prefix"]
    complete = {
        **state,
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(known.values(), key=lambda token: token["id"]),
        "post_processor": _template(roles["cls"], roles["sep"], ids),
        "decoder": state["decoder"] or {"type": "WordPiece", "prefix": prefix, "cleanup": True},
    }
    return Description(complete, roles, notes)


def described(state: dict[str, Any], notes: tuple[str, ...] = ()) -> Description:
    """Returns the whole description of a state whose special tokens bear BERT's names."""
    return _complete("tokenizer", state, _Beside(), notes)


def _template(cls: str, sep: str, ids: dict[str, int]) -> dict[str, Any]:
    def special(token: str, segment: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": segment}}

    def text(name: str, segment: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": segment}}

    single = [special(cls, 0), text("A", 0), special(sep, 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, text("B", 1), special(sep, 1)],
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (cls, sep)
        },
    }


def _roles(
    path: str, state: dict[str, Any], beside: _Beside, ids: dict[str, int]
) -> dict[str, str]:
    """The token of each role: as named beside, as BERT names it, or as the file itself uses it."""
    roles: dict[str, str] = {}
    used = _roles_in_use(state) if path.endswith(".json") else {}
    unk = state["model"]["unk_token"]
    for role, usual in zip(ROLES, SPECIAL_TOKENS, strict=True):
        token = beside.roles.get(role) or (usual if usual in ids else used.get(role, usual))
        if role == "unk" and token != unk:
            if "unk" in beside.roles:
                raise UserError(
                    f"{path}: its unknown token is {_brief(repr(unk))}, but a file beside it says "
                    f"{_brief(repr(token))}"
                )
            token = unk
        if token not in ids:
            raise UserError(
                f"{path}: the special token {_brief(token)} is missing; BERT needs it "
                f"({role}_token in {CONFIG} names it where it is called otherwise)"
            )
        if token in roles.values():
            raise UserError(
                f"{path}: {_brief(token)} has two roles; BERT needs five special tokens"
            )
        roles[role] = token
    return roles


def _roles_in_use(state: dict[str, Any]) -> dict[str, str]:
    """What a tokenizer.json itself does with tokens of other names."""
    found: dict[str, Any] = {}
    processor = state.get("post_processor") or {}
    single = processor.get("single")
    if isinstance(single, list) and len(single) > 1:
        for role, part in (("cls", single[0]), ("sep", single[-1])):
            found[role] = (part.get("SpecialToken") or {}).get("id")
    for role in ("cls", "sep"):
        if isinstance(processor.get(role), list):  # BertProcessing: [token, id]
            found[role] = processor[role][0]
    found["pad"] = (state.get("padding") or {}).get("pad_token")
    special = [token["content"] for token in state["added_tokens"] if token["special"]]
    found["mask"] = next((token for token in special if "mask" in token.lower()), None)
    return {role: token for role, token in found.items() if isinstance(token, str)}


# Reading


def built(content: str, name: str) -> Tokenizer:
    """Returns the tokenizer of a tokenizer.json's content, once it has shown that it works.

    Raises:
        UserError: the library refuses the content, or panics over it; `name` is in the message.
    """
    try:
        with _held_stderr():
            tokenizer = Tokenizer.from_str(content)
            tokenizer.encode_batch(list(_PROBES), add_special_tokens=False)
    except BaseException as error:  # a bare Exception, or a panic, which is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise UserError(f"{name}: is not a valid tokenizer: {str(error)[:200]}") from None
    return tokenizer


_PROBES = (
    "The cafe\u0301, 1234 [MASK] \u4e2d\u6587 \U0001f600 unseen",
    "",
    " ",
    "\u0e44\u0e17\u0e22",
)


@contextmanager
def _held_stderr() -> Iterator[None]:
    """Keeps off the terminal what the library prints where it panics."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    with suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _read_text(path: str, what: str) -> str:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
        return text if text.startswith("\ufeff\n") else text.removeprefix("\ufeff")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8; {what}") from None


def _read_vocabulary(path: str) -> list[str]:
    what = "a vocabulary holds one token per line"
    # Lines end at a line feed and nowhere else: Chinese BERT has a token that is a line separator.
    lines = _read_text(path, what).split("\n")
    if all(line.endswith("\r") for line in lines[:-1]):
        lines = [line.removesuffix("\r") for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{path}: is empty; {what}")
    if "\0" in lines[0]:
        raise UserError(f"{path}: is no text; {what}")
    numbers: dict[str, int] = {}
    for number, token in enumerate(lines, start=1):
        if not token:
            raise UserError(f"{path}:{number}: is blank; {what}")
        if token in numbers:
            raise UserError(
                f"{path}:{number}: {_brief(repr(token))} is already on line {numbers[token]}"
            )
        numbers[token] = number
    return lines


def _read_json(path: str) -> Any:
    content = _read_text(path, f"{os.path.basename(path)} is JSON in UTF-8")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        where = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{where}: is not JSON") from None


def _read_description(path: str) -> dict[str, Any]:
    content = _read_text(path, f"a {DESCRIPTION} is JSON in UTF-8")
    try:
        state = json.loads(content)
        kind = state["model"].get("type", "WordPiece")
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: is not a tokenizer of the tokenizers library") from None
    if kind != "WordPiece":
        raise UserError(f"{path}: its model is {_brief(str(kind))}; BERT needs WordPiece")
    if state["model"].get("vocab") == {}:
        raise UserError(f"{path}: its vocabulary is empty")
    state = json.loads(built(content, path).to_str())  # in today's form, every field there
    if state["model"].get("type") != "WordPiece":
        raise UserError(f"{path}: its model is not WordPiece, which BERT needs")
    if not state["model"]["max_input_chars_per_word"]:
        raise UserError(f"{path}: max_input_chars_per_word = 0 makes every word unknown")
    return dict(state)


def _read_beside(folder: str) -> _Beside:
    beside = _Beside()
    path = os.path.join(folder, CONFIG)
    if os.path.isfile(path):
        _read_config(path, beside)
    path = os.path.join(folder, "config.json")
    if not beside.tokenizer_class and os.path.isfile(path):
        model = _read_json(path)
        beside.tokenizer_class = str(
            (isinstance(model, dict) and model.get("tokenizer_class")) or ""
        )
    path = os.path.join(folder, SPECIAL_MAP)
    if os.path.isfile(path):
        _read_special(path, _object(path, _read_json(path)), beside)
    path = os.path.join(folder, ADDED)
    if os.path.isfile(path):
        claimed = {token["content"] for token in beside.added}
        special = {*beside.roles.values()}
        for content, index in _object(path, _read_json(path)).items():
            if content not in claimed:
                # as transformers reads this older file
                flags = {"normalized": content not in special, "special": content in special}
                beside.added.append(_added(path, {"content": content, **flags}, index))
    return beside


def _object(path: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold one JSON object, not {type(content).__name__}")
    return content


def _read_config(path: str, beside: _Beside) -> None:
    config = _object(path, _read_json(path))
    beside.tokenizer_class = str(config.get("tokenizer_class") or "")
    for name in _BERT:
        value = config.get(name)
        if value is None:
            continue
        if not isinstance(value, bool):
            raise UserError(f"{path}: {name} = {_brief(json.dumps(value))} must be true or false")
        beside.settings[name] = value
    for name, usual in (("word_tokenizer_type", "basic"), ("subword_tokenizer_type", "wordpiece")):
        if config.get(name, usual) != usual:
            raise UserError(
                f"{path}: {name} = {_brief(json.dumps(config[name]))} must be {usual!r}"
            )
    prefix = config.get("wordpieces_prefix", "##")
    if not isinstance(prefix, str):
        raise UserError(
            f"{path}: wordpieces_prefix = {_brief(json.dumps(prefix))} must be a string"
        )
    beside.prefix = prefix
    _read_special(path, config, beside)
    decoder = config.get("added_tokens_decoder")
    for index, token in _object(path, decoder if decoder is not None else {}).items():
        beside.added.append(_added(path, token, index))
    words = config.get("never_split")
    if words is not None and not _are_strings(words):
        raise UserError(
            f"{path}: never_split = {_brief(json.dumps(words))} must be a list of words"
        )
    beside.never_split = list(words or [])


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _read_special(path: str, names: dict[str, Any], beside: _Beside) -> None:
    """Takes the special tokens' names, each a string or an object with flags."""
    for role in ROLES:
        token = names.get(f"{role}_token")
        if token is None:
            continue
        content = _added(path, token, None)["content"]
        if beside.roles.setdefault(role, content) != content:
            raise UserError(
                f"{path}: {role}_token = {_brief(repr(content))}, but {CONFIG} beside it says "
                f"{_brief(repr(beside.roles[role]))}: mend one of them"
            )
    for role in ("bos", "eos"):
        if names.get(f"{role}_token") is not None:
            beside.added.append({**_added(path, names[f"{role}_token"], None), "special": True})
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = names.get(name)
        if isinstance(more, dict):  # by a name of its own
            more = list(more.values())
        if more is not None and not isinstance(more, list):
            raise UserError(f"{path}: {name} = {_brief(json.dumps(more))} must be a list of tokens")
        for token in more or []:
            beside.added.append({**_added(path, token, None), "special": True})


def _added(path: str, token: Any, index: Any) -> dict[str, Any]:
    """A token that a file adds, checked."""
    if isinstance(token, str):
        token = {"content": token}
    content = token.get("content") if isinstance(token, dict) else None
    shown = _brief(json.dumps(token))
    if not isinstance(content, str) or not content:
        raise UserError(f"{path}: {shown} must be a token: a string, or an object with its content")
    flags = {name: token[name] for name in _FLAGS if name in token}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise UserError(f"{path}: {shown}: {', '.join(_FLAGS)} must be true or false")
    if index is None:
        return {"content": content, **flags}
    if not (type(index) is int or (isinstance(index, str) and index.isdecimal())):
        raise UserError(
            f"{path}: {_brief(json.dumps(index))} must be the id of {_brief(repr(content))}"
        )
    if not 0 <= int(index) < 2**32:
        raise UserError(
            f"{path}: the id of {_brief(repr(content))}, {_brief(str(index))}, is out of range"
        )
    return {"content": content, **flags, "id": int(index)}
