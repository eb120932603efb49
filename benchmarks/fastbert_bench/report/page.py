"""A page that needs nothing beside itself: its style is in it, its pictures are in it."""

import base64
import itertools
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from fastbert_bench.report.figures import Picture

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #20242b; --dim: #5b6472; --line: #d9dde3;
  --stripe: #f5f7f9; --link: #1a62bf; --faster: #006b4e; --slower: #b04400; }
@media (prefers-color-scheme: dark) { :root { --paper: #16191e; --ink: #e4e7ec; --dim: #a3adbb;
  --line: #3a414c; --stripe: #1e2229; --link: #7db4ff; --faster: #3ed3a6; --slower: #ff9c5b; } }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
a { color: var(--link); }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { margin-top: 2rem; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 4px; }
figcaption, .dim { color: var(--dim); font-size: 0.85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; white-space: nowrap; }
th:first-child, td:first-child, .words { text-align: left; }
td.words:not(:first-child) { white-space: normal; min-width: 7rem; }
tbody tr:nth-child(even) { background: var(--stripe); }
.faster { color: var(--faster); font-weight: 600; }
.slower { color: var(--slower); font-weight: 600; }
"""

_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]\d+)?[%x]?$|not available$|$")


@dataclass
class Page:
    """Collects sections in order; `pictures` lie beside the page as PNG files."""

    title: str
    parts: list[str] = field(default_factory=list)
    contents: list[tuple[int, str, str]] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)

    def heading(self, level: int, text: str) -> None:
        anchor = _unused(slug(text), [known for _, known, _ in self.contents])
        self.contents.append((level, anchor, text))
        self.parts.append(f'<h{level} id="{anchor}">{escape(text)}</h{level}>')

    def text(self, words: str, *, dim: bool = False) -> None:
        opened = '<p class="dim">' if dim else "<p>"
        self.parts.append(f"{opened}{escape(words)}</p>")

    def bullets(self, lines: Iterable[str]) -> None:
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        if items:
            self.parts.append(f"<ul>{items}</ul>")

    def table(self, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Columns of words stand to the left, of numbers to the right; the first names the row."""
        texts = [[str(cell) for cell in row] for row in rows]
        kinds = [
            "" if all(_NUMBER.match(row[place]) for row in texts) else "words"
            for place in range(len(head))
        ]

        def line(tag: str, row: Sequence[str]) -> str:
            cells = []
            for text, kind in zip(row, kinds, strict=True):
                kind = f"{kind} {text}" if text in ("faster", "slower") else kind
                opened = f'<{tag} class="{kind}">' if kind else f"<{tag}>"
                cells.append(f"{opened}{escape(text)}</{tag}>")
            return f"<tr>{''.join(cells)}</tr>"

        body = "".join(line("td", row) for row in texts)
        self.parts.append(
            f'<div class="scroll"><table><thead>{line("th", head)}</thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def picture(self, picture: Picture, conditions: str) -> None:
        name = _unused(slug(picture.name), self.pictures)
        light, dark = picture.png("light"), picture.png("dark")
        self.pictures |= {name: light, f"{name}-dark": dark}
        alt = escape(f"{picture.title}. {picture.alt}")
        self.parts.append(
            f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_uri(dark)}">'
            f'<img src="{_uri(light)}" alt="{alt}"></picture>'
            f"<figcaption>{escape(conditions)}</figcaption></figure>"
        )

    def html(self) -> str:
        items = "".join(
            f'<li style="margin-left: {level - 2}rem"><a href="#{anchor}">{escape(text)}</a></li>'
            for level, anchor, text in self.contents
        )
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head><body>"
            f"<h1>{escape(self.title)}</h1>"
            f'<nav aria-label="Contents"><ul>{items}</ul></nav>'
            f"<main>{''.join(self.parts)}</main></body></html>\n"
        )

    def write(self, folder: Path) -> Path:
        """Writes report.html and the PNG files; returns the page's path."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, png in self.pictures.items():
            (folder / f"{name}.png").write_bytes(png)
        path = folder / "report.html"
        path.write_text(self.html(), encoding="utf-8")
        return path


def _unused(name: str, taken: Container[str]) -> str:
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(one for one in names if one not in taken)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def number(value: Any) -> str:
    """A figure as a reader wants it: at most four digits, thousands apart."""
    if value is None:
        return "not available"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a row: what is a list or a mapping is left out."""
    return {key: value for key, value in row.items() if not isinstance(value, list | dict)}
