"""What a file of a corpus is, told by its first bytes whatever its name: text, JSON, or foreign."""

import codecs
import json
import re
from contextlib import suppress
from dataclasses import dataclass

HEAD = 2**16
"""Bytes that decide."""
MAX_CONTROL = 0.05
"""Share of control bytes beyond which a file is binary: of compressed bytes they are 0.1."""
MAX_LIKE_JSON = 0.8
"""Share of a head in lines that look like JSON beyond which it is no text: manuals stay below."""

TEXT, JSON_LINES, JSON = "text", "JSON lines", "JSON"
_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class Format:
    """How to read a file.

    Attributes:
        kind: `TEXT`, `JSON_LINES` (a record a line), `JSON` (an array, or records over several
            lines), or "" for what is not to be read.
        encoding: of the text; other than UTF-8 only with a byte order mark.
        mark: bytes of the byte order mark.
        looks_like: what it is, if it is not to be read.
        remedy: what to do then.
    """

    kind: str
    encoding: str = "utf-8"
    mark: int = 0
    looks_like: str = ""
    remedy: str = ""


_UNPACK = "unpack it first, e.g. with {}"
_INSTEAD = "give text instead"
_CONVERT = "write its text to a .txt or .jsonl file first"
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip", _UNPACK.format("gunzip")),
    (b"\x1f\x9d", "a file of compress (.Z)", _UNPACK.format("gunzip")),
    (b"\x28\xb5\x2f\xfd", "zstd", _UNPACK.format("zstd -d")),
    (b"\xfd7zXZ\0", "xz", _UNPACK.format("xz -d")),
    (b"\x04\x22\x4d\x18", "lz4", _UNPACK.format("lz4 -d")),
    (b"LZIP", "lzip", _UNPACK.format("lzip -d")),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK.format("7z x")),
    (b"Rar!\x1a\x07", "a rar archive", _UNPACK.format("unrar x")),
    (b"PK\x03\x04", "zip (so are .docx, .epub and PyTorch's files)", _UNPACK.format("unzip")),
    (b"PK\x05\x06", "an empty zip archive", _UNPACK.format("unzip")),
    (b"PAR1", "Parquet", _CONVERT),
    (b"PARE", "encrypted Parquet", _CONVERT),
    (b"ARROW1", "Arrow", _CONVERT),
    (b"\xff\xff\xff\xff", "an Arrow stream", _CONVERT),
    (b"FEA1", "Feather", _CONVERT),
    (b"ORC", "ORC", _CONVERT),
    (b"Obj\x01", "Avro", _CONVERT),
    (b"%PDF-", "PDF", _UNPACK.replace("unpack", "convert").format("pdftotext")),
    (b"%!PS", "PostScript", _CONVERT),
    (b"{\\rtf", "RTF", _CONVERT),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", _CONVERT),
    (b"SQLite format 3\0", "an SQLite database", _CONVERT),
    (b"\x89HDF\r\n\x1a\n", "HDF5", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"GGUF", "GGUF weights", _INSTEAD),
    (b"\x7fELF", "a program (ELF)", _INSTEAD),
    (b"\xfe\xed\xfa", "a program (Mach-O)", _INSTEAD),
    (b"\xcf\xfa\xed\xfe", "a program (Mach-O)", _INSTEAD),
    (b"\xca\xfe\xba\xbe", "a Java class", _INSTEAD),
    (b"\0asm", "WebAssembly", _INSTEAD),
    (b"\x89PNG", "a PNG image", _INSTEAD),
    (b"\xff\xd8\xff", "a JPEG image", _INSTEAD),
    (b"GIF87a", "a GIF image", _INSTEAD),
    (b"GIF89a", "a GIF image", _INSTEAD),
    (b"II*\0", "a TIFF image", _INSTEAD),
    (b"MM\0*", "a TIFF image", _INSTEAD),
    (b"OggS", "Ogg sound", _INSTEAD),
    (b"fLaC", "FLAC sound", _INSTEAD),
    (b"\x1aE\xdf\xa3", "Matroska video", _INSTEAD),
    (b"version https://git-lfs.github.com/", "a Git LFS pointer", "fetch it with git lfs pull"),
)
_PATTERNS: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    (
        re.compile(rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)"),
        "bzip2",
        _UNPACK.format("bunzip2"),
    ),
    (re.compile(rb"(?s).{257}ustar"), "a tar archive", _UNPACK.format("tar -x")),
    (re.compile(rb"(?s)\0.{3}ftyp"), "MP4 video", _INSTEAD),
    (
        re.compile(rb"(?s)RIFF.{4}(?:WAVE|WEBP|AVI )"),
        "sound or an image (RIFF)",
        _INSTEAD,
    ),
    (re.compile(rb"ID3[\x02-\x04]|\xff[\xfb\xf3\xf2]"), "MP3 sound", _INSTEAD),
    (re.compile(rb"(?s)BM.{4}\0\0\0\0"), "a BMP image", _INSTEAD),
    (re.compile(rb"(?s)MZ.{0,254}\0"), "a program (Windows)", _INSTEAD),
    (re.compile(rb"(?s)\x80[\x02-\x05](?:\x95|[\]}(ckXq])"), "a Python pickle", _CONVERT),
    (re.compile(rb"\(?[ld]p[0-9]+\n|[\]}]q\0\("), "an old Python pickle", _CONVERT),
    (re.compile(rb'(?s).{3}\0\0\0\0\0\{\s*+"'), "safetensors weights", _INSTEAD),
    (
        re.compile(rb"(?i)\s*+<(?:!doctype\s|\?xml\s|(?:html|mediawiki|rss|feed|svg|tei)[\s>])"),
        "HTML or XML",
        "extract its text first",
    ),
    (
        re.compile(
            rb"""\s*+(?:[\[(]?\s*+\{\s*+'(?:[^'\\\n]|\\.)*+'\s*+:|\[\s*+'(?:[^'\\\n]|\\.)*+'[,\]])"""
        ),
        "Python's notation, not JSON",
        "write each as a line of JSON with json.dumps",
    ),
)
_MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CONTROL = bytes(code for code in [*range(32), 127] if code not in b"\t\n\v\f\r\x1a\x1b")


def sniff(head: bytes, name: str) -> Format:
    """Returns what a file is.

    Args:
        head: its first `HEAD` bytes, or all of them.
        name: of the file; tells only JSON that is broken at its beginning from text.
    """
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            text = head[len(mark) :].decode(encoding, "replace")
            found = _foreign(text.encode("utf-8", "replace"))
            return found or _readable(text, len(head) < HEAD, name, encoding, len(mark))
    found = _foreign(head)
    return found or _readable(head.decode("utf-8", "replace"), len(head) < HEAD, name, "utf-8", 0)


def _readable(head: str, whole: bool, name: str, encoding: str, mark: int) -> Format:
    kind = _kind(head, whole, name)
    if kind == TEXT:
        like_json = sum(
            len(line)
            for line in head.split("\n")
            if _LIKE_JSON.fullmatch(line) or _ARRAY.match(line)
        )
        if like_json > MAX_LIKE_JSON * len(head):
            looks_like = "JSON that does not begin as it should"
            return Format("", looks_like=looks_like, remedy="mend its beginning")
    return Format(kind, encoding, mark)


def _foreign(head: bytes) -> Format | None:
    for magic, looks_like, remedy in _MAGIC:
        # letters alone could begin a text: ORCHARDS, PARENTS
        if head.startswith(magic) and (not magic.isalnum() or _controls(head[:256])):
            return Format("", looks_like=looks_like, remedy=remedy)
    for pattern, looks_like, remedy in _PATTERNS:
        if pattern.match(head):
            return Format("", looks_like=looks_like, remedy=remedy)
    if len(head) < 64:
        return None  # too little to tell: its lines decide
    for encoding, bytes_of_ascii in (
        ("UTF-32LE", (0, 1, 1, 1)),
        ("UTF-32BE", (1, 1, 1, 0)),
        ("UTF-16LE", (0, 1, 0, 1)),
        ("UTF-16BE", (1, 0, 1, 0)),
    ):
        shares = [head[place::4].count(0) * 4 / len(head) for place in range(4)]
        if all(
            share > 0.6 if is_nul else share < 0.1
            for share, is_nul in zip(shares, bytes_of_ascii, strict=True)
        ):
            return _unmarked(encoding)
    if _controls(head) > MAX_CONTROL * len(head):
        for encoding in ("UTF-16LE", "UTF-16BE"):  # of other scripts than Latin
            with suppress(UnicodeDecodeError):
                text = head[: len(head) // 4 * 4].decode(encoding)
                odd = sum(not (char.isprintable() or char.isspace()) for char in text)
                if odd < len(text) / 100 and " " in text.replace("\n", " "):
                    return _unmarked(encoding)
        return Format("", looks_like="binary data", remedy=_INSTEAD)
    return None


def _controls(head: bytes) -> int:
    return len(head) - len(head.translate(None, _CONTROL))


def _unmarked(encoding: str) -> Format:
    remedy = f"convert it, e.g. with iconv -f {encoding} -t UTF-8"
    return Format("", looks_like=f"{encoding} without a byte order mark", remedy=remedy)


_STRING = r'"(?:[^"\\\n]|\\.)*+'
_OBJECT = re.compile(rf'\{{\s*+(?:{_STRING}"\s*+:|\}}\s*+(?:\n|$))')
_ARRAY = re.compile(
    rf'\[\s*+(?:\[\s*+)?(?:\{{\s*+(?:{_STRING}"\s*+:|\}})|{_STRING}(?:"\s*+[,\]]|\\?$))|\[\s*+\]\s*+$'
)
_LIKE_JSON = re.compile(rf'\s*+(?:[\[\]{{}}]+,?|{_STRING}"\s*+:.*|\{{\s*+{_STRING}"\s*+:.*)\s*+')
"""A line of a record that is written over several, or a record."""
_NUMBERS = re.compile(r"[\[\]\d\s,.eE+\-]+")


def _kind(head: str, whole: bool, name: str) -> str:
    start = head.lstrip()
    first = start[:1]
    if first == "[":
        complete = whole and _is_json(start)
        if complete or _ARRAY.match(start) or (not whole and _NUMBERS.fullmatch(start)):
            return JSON
    lines = [line for line in start.splitlines() if line.strip()]
    if not whole:
        lines = lines[:-1]
    objects = sum(_is_json(line, dict, list) for line in lines[:20])
    if first == "{":
        if lines and lines[0].rstrip().endswith(",") and _is_json(lines[0].rstrip()[:-1], dict):
            return JSON  # an array without its brackets
        if objects:
            return JSON_LINES
        if _OBJECT.match(start):  # a line that is longer than the head, or a record over several
            return JSON if lines else JSON_LINES
        if start.rstrip() == "{":
            return JSON
    if objects > len(lines[:20]) / 2:  # the first is broken
        return JSON_LINES
    if first == '"' and len(lines) > 1 and all(_is_json(line, str) for line in lines[:20]):
        return JSON_LINES
    like_json = first in ("{", "[", '"') or (bool(lines) and _is_json(lines[0]))
    return JSON_LINES if like_json and name.lower().endswith(_JSON_SUFFIXES) else TEXT


def _is_json(text: str, *kinds: type) -> bool:
    try:
        return isinstance(json.loads(text), kinds or object)
    except (ValueError, RecursionError):
        return False
