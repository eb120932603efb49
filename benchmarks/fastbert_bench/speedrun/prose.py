"""English sentences out of a package's manuals and docstrings.

A document is a file. Of a manual its paragraphs and list items count, of a source file those of its
docstrings and of comments that are longer than a line. Markup goes; what is no prose (code, tables,
lists of parameters, headings) is left out.
"""

import re
from collections.abc import Iterator

MANUALS = (".rst", ".txt", ".md", ".inc")
SOURCES = (".py", ".pyx")
LEAST_WORDS = 8
LEAST_LETTERS = 0.84
"""Share of letters and spaces; prose with version numbers and names of files has 0.9."""
LEAST_COMMON = 0.15
"""Share of the words below; English prose has about 0.4, lists of names next to none."""
COMMON = frozenset(
    ("the", "a", "an", "of", "to", "in", "is", "are", "be", "and", "or", "for", "with", "that",
     "this", "it", "on", "as", "by", "from", "can", "you", "not", "if", "will")
)  # fmt: skip
LONGEST_WORD = 60

_NO_TEXT = re.compile(
    r"(^|/)(tests?|testing|testdata|locale|licen[sc]es?|copying|vendor(ed)?|_vendor|thirdparty"
    r"|third_party|node_modules|[^/]*\.egg-info|po|subprojects|authors|contributors|thanks"
    r"|requirements[^/]*|cmakelists)(/|\.|$)",
    re.IGNORECASE,
)
_DOCSTRING = re.compile(r'"""(.*?)"""|\'\'\'(.*?)\'\'\'', re.DOTALL)
_COMMENT = re.compile(r"(?:^[ \t]*#[^\n]*\n){2,}", re.MULTILINE)
_ITEM = re.compile(r"(?:[-*+•]|\d+[.)]|#\.)\s+")
_MARKUP = (
    (re.compile(r":[\w:+.-]+:`[~!]?(?:([^`<]*?)\s*<[^>`]*>|([^`]*))`"), r"\1\2"),  # roles
    (re.compile(r"`([^`<]*?)\s*<[^>`]*>`_{0,2}"), r"\1"),  # links of reStructuredText
    (re.compile(r"!?\[([^\]]*)\]\([^)]*\)"), r"\1"),  # and of Markdown
    (re.compile(r"`+_{0,2}|\*\*|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)|\|"), ""),
    (re.compile(r"\s+"), " "),
)
_NO_PROSE = (".. ", ":", ">>>", "$", "#", "|", "+", "<", "@", "=", "-", "%")
_RULER = re.compile(r"[-=~^*#_.]{4,}")


def holds_text(path: str) -> bool:
    """Whether a package's file is worth reading, by its path in the package."""
    return path.lower().endswith(MANUALS + SOURCES) and not _NO_TEXT.search(path)


def paragraphs(path: str, text: str) -> list[str]:
    """The paragraphs of prose in a file, each without a line break.

    Args:
        path: of the file; its suffix says where prose is looked for.
        text: the file's content.
    """
    if path.lower().endswith(SOURCES):
        strings = (double or single for double, single in _DOCSTRING.findall(text))
        comments = (re.sub(r"(?m)^[ \t]*#+:?", "", one) for one in _COMMENT.findall(text))
        text = "\n\n".join((*strings, *comments))
    cleaned = (_clean(raw) for raw in _pieces(text.replace("\r\n", "\n")))
    return [one for one in cleaned if is_prose(one)]


def _pieces(text: str) -> Iterator[str]:
    """Paragraphs, with list items apart."""
    for block in re.split(r"\n\s*\n", text):
        lines: list[str] = []
        for line in map(str.strip, block.split("\n")):
            item = _ITEM.match(line)
            if (item or line.startswith(".. ")) and lines:
                yield " ".join(lines)
                lines = []
            if line:
                lines.append(line[item.end() :] if item else line)
        if lines:
            yield " ".join(lines)


def _clean(paragraph: str) -> str:
    if paragraph.startswith(_NO_PROSE):
        return ""
    for pattern, instead in _MARKUP:
        paragraph = pattern.sub(instead, paragraph)
    return re.sub("::$", ":", paragraph.strip())


def is_prose(paragraph: str) -> bool:
    """Whether it reads like English sentences."""
    words = paragraph.split()
    if len(words) < LEAST_WORDS or max(map(len, words)) > LONGEST_WORD:
        return False
    if not paragraph[0].isalnum() or paragraph[-1] not in ".:?!)" or _RULER.search(paragraph):
        return False
    letters = sum(one.isalpha() or one == " " for one in paragraph)
    common = sum(word.lower().strip(".,") in COMMON for word in words)
    named = sum(word.endswith(":") for word in words)  # of parameters and fields
    return (
        letters >= LEAST_LETTERS * len(paragraph)
        and common >= LEAST_COMMON * len(words)
        and named <= max(1, len(words) // 15)
    )
