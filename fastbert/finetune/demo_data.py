"""Labelled data that every Python carries: its library's own sources, read and never run.

Each is made by simple rules, so that right and wrong are known; files of the library are held out
whole, without what nearly stands in others, so that no evaluation asks for what was trained on.
"""

import ast
import io
import json
import keyword
import os
import random
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from inspect import cleandoc
from itertools import islice
from pathlib import Path

from fastbert.data.corpus import stdlib_files
from fastbert.errors import UserError

FAMILIES = {
    "async and processes": "asyncio concurrent multiprocessing threading subprocess queue sched "
    "selectors socketserver",
    "files and archives": "os shutil pathlib tempfile zipfile tarfile gzip bz2 lzma glob fnmatch "
    "posixpath ntpath genericpath filecmp fileinput _pyio io mailbox",
    "mail and web": "email http urllib ftplib smtplib imaplib poplib nntplib telnetlib xmlrpc "
    "wsgiref cgi cgitb ssl socket webbrowser ipaddress",
    "numbers and dates": "datetime _pydatetime calendar decimal _pydecimal fractions numbers "
    "statistics random zoneinfo uuid",
    "python itself": "ast dis inspect importlib tokenize typing pickletools symtable traceback "
    "types enum functools contextlib abc runpy pkgutil lib2to3 code codeop",
    "testing and debugging": "unittest doctest pdb bdb trace cProfile profile pstats timeit "
    "tracemalloc logging warnings faulthandler",
    "text and markup": "xml html json csv configparser difflib textwrap string re codecs "
    "encodings locale gettext pprint reprlib shlex optparse argparse plistlib tomllib",
    "windows and drawing": "tkinter turtle turtledemo idlelib curses colorsys",
}
_MOST_WORDS = 64
_MOST_EXAMPLES = {"classify": 4000, "tag": 1500, "answer": 900}
_HELD_OUT = 5  # of so many files one
_ONE_OF = {"tag": 6}  # files: Python's tokenizer takes 9 s for all of them


def write_demo(task: str, folder: Path, seed: int) -> tuple[Path, Path]:
    """Writes a task's data for training and evaluation, and returns both paths.

    Args:
        task: "classify", "tag" or "answer".
        folder: that is there.
        seed: of the order, and of what is left out where there is too much.

    Raises:
        UserError: Python came without its library's sources.
    """
    makers = {"classify": _families, "tag": _tokens, "answer": _definitions}
    root = sysconfig.get_paths()["stdlib"]
    files = [(os.path.relpath(path, root).replace(os.sep, "/"), path) for path in stdlib_files()]
    # By family and size: so the files that are held out are like the others.
    files.sort(key=lambda file: (_family(file[0]) or "", os.path.getsize(file[1]), file[0]))
    files = files[:: _ONE_OF.get(task, 1)]
    parts: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for number, (name, path) in enumerate(files):
        source = _read(path)
        if source is not None:
            part = parts[number % _HELD_OUT == _HELD_OUT // 2]
            for asked, line in makers[task](name, *source):
                part.setdefault(asked, line)
    if not all(parts):
        raise UserError("--demo: this Python came without the sources of its library")
    draw = random.Random(seed)
    train, held_out = (list(part.items()) for part in parts)
    draw.shuffle(train)
    draw.shuffle(held_out)
    most = _MOST_EXAMPLES[task]
    known = [_words(asked) for asked, _ in train[:most]]
    others = (one for one in held_out if one[0] not in parts[0] and _is_new(_words(one[0]), known))
    paths: list[Path] = []
    for part_name, chosen in (("train", train[:most]), ("eval", islice(others, most // 5))):
        paths.append(folder / f"{part_name}.{'conll' if task == 'tag' else 'jsonl'}")
        paths[-1].write_text("".join(f"{line}\n" for _, line in chosen), encoding="utf-8")
    return paths[0], paths[1]


def _words(asked: str) -> frozenset[str]:
    return frozenset(_WORD.findall(asked.lower()))


def _is_new(words: frozenset[str], known: Sequence[frozenset[str]]) -> bool:
    """Whether none of the known has nearly the same words: four fifths of what either has."""
    # Shared words I of A and B: 5 I >= 4 (A + B - I).
    return not any(9 * len(words & one) >= 4 * (len(words) + len(one)) for one in known)


def _family(name: str) -> str | None:
    """Of a file of the library."""
    top = name.partition("/")[0].removesuffix(".py")
    return next((f for f, modules in FAMILIES.items() if top in modules.split()), None)


def _read(path: str) -> tuple[str, ast.Module] | None:
    try:
        with tokenize.open(path) as file:
            text = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in the library's own strings
            return text, ast.parse(text)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None


def _documented(module: ast.Module) -> Iterator[tuple[str, str]]:
    """Names of functions and classes, with the first paragraph of what is said of them."""
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            said = ast.get_docstring(node, clean=False)
            first = " ".join(cleandoc(said or "").partition("\n\n")[0].split())
            if 4 <= len(first.split()) <= _MOST_WORDS:
                yield node.name, first


_Made = Iterator[tuple[str, str]]
"""What an example asks, and its lines: one that asks the same is no other."""


def _families(name: str, text: str, module: ast.Module) -> _Made:
    """Which part of the library a docstring is of."""
    family = _family(name)
    if family is not None:
        for _, said in _documented(module):
            row = {"text": said, "label": family, "source": name}
            yield said, json.dumps(row, ensure_ascii=False)


def _tokens(name: str, text: str, module: ast.Module) -> _Made:
    """Words of source lines, tagged with the kind of token that they are of."""
    lines = {} if name.startswith("encodings/") else _tagged_lines(text)  # tables of characters
    for number in sorted(lines):
        if 5 <= len(lines[number]) <= _MOST_WORDS and number % 7 == 0:
            tagged = "".join(f"{word}\t{tag}\n" for word, tag in lines[number])
            yield " ".join(word for word, _ in lines[number]), tagged


_WORD = re.compile(r"\w+|[^\w\s]")


def _tagged_lines(text: str) -> dict[int, list[tuple[str, str]]]:
    lines: dict[int, list[tuple[str, str]]] = {}
    unclear: set[int] = set()  # from Python 3.12 on, an f-string is many tokens
    before = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if tokenize.tok_name[token.type][1:].startswith("STRING_"):
                unclear.update(range(token.start[0], token.end[0] + 1))
            kind = _kind(token, before)
            if token.start[0] == token.end[0] and token.string.strip():
                words = _WORD.findall(token.string)
                tags = [
                    f"{'I' if place else 'B'}-{kind}" if kind else "O"
                    for place in range(len(words))
                ]
                lines.setdefault(token.start[0], []).extend(zip(words, tags, strict=True))
            if token.string.strip():
                before = token.string
    except (tokenize.TokenError, IndentationError):
        return {}
    return {number: line for number, line in lines.items() if number not in unclear}


def _kind(token: tokenize.TokenInfo, before: str) -> str:
    if token.type == tokenize.COMMENT:
        return "comment"
    if token.type == tokenize.STRING:
        return "string"
    if token.type == tokenize.NUMBER:
        return "number"
    if token.type != tokenize.NAME:
        return ""
    if keyword.iskeyword(token.string):
        return "keyword"
    return {"def": "function", "class": "class", ".": "attribute"}.get(before, "")


_TOGETHER = 6  # definitions in a paragraph


def _definitions(name: str, text: str, module: ast.Module) -> _Made:
    """Where in a page of documentation it says what a function does."""
    said = list(dict(_documented(module)).items())
    for begin in range(0, len(said) - _TOGETHER + 1, _TOGETHER):
        together = said[begin : begin + _TOGETHER]
        context, starts = "", []
        for function, first in together:
            context += f"{function}: "
            starts.append(len(context))
            context += f"{first} "
        for (function, first), start in list(zip(together, starts, strict=True))[::3]:
            question = f"What does {function} do?"
            row = {
                "id": f"{name}:{function}",
                "question": question,
                "context": context.strip(),
                "answers": {"text": [first], "answer_start": [start]},
            }
            yield f"{question} {first}", json.dumps(row, ensure_ascii=False)
