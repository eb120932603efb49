"""Explanations as one page that needs nothing beside itself.

The attention of a text is in it as base64 of deflated bytes, one a value: the square root in 256
levels, which errs by at most 0.4 percentage points, and by least where attention is least; fewer
levels of a long text. A script draws it; integrated gradients and rollout are there without one.
"""

import base64
import json
import logging
import os
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.errors import RunError
from fastbert.finetune.explain import TOLERANCE, Explanation, Word

logger = logging.getLogger("fastbert")

MOST = 10_000_000
"""Bytes of a text's attention, as far as `LEVELS` can do it."""
LEVELS = (256, 128, 64, 32)
MOST_OF_ALL = 100_000_000
"""Bytes of a page, after which texts come without their maps: browsers end at five times that."""
_FEW = 24  # words, whose table is open from the start
_STRONGEST = 0.6  # opacity of the strongest colour behind text: ink stays readable


def write_page(
    path: str | os.PathLike[str], explanations: Iterable[Explanation], title: str = "Explained"
) -> int:
    """Writes the page, whole or not at all, and returns its size in bytes.

    Args:
        path: of the page; its folder is there.
        explanations: of one or several texts, each drawn as it comes.
        title: what the page is called.

    Raises:
        RunError: it cannot be written.
    """
    sections: list[str] = []
    size = without = 0
    for number, one in enumerate(explanations, 1):
        without += size >= MOST_OF_ALL
        sections.append(_section(number, one, size < MOST_OF_ALL))
        size += len(sections[-1])
    path = Path(path)
    if without:
        logger.warning(
            "%s: is full: the maps of attention of the last %d texts were left out", path, without
        )
    # Names of labels, or of a folder, may be none of Unicode.
    content = _page(sections, title).encode("utf-8", "replace")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return len(content)


def quantised(shares: np.ndarray, levels: int = LEVELS[0]) -> np.ndarray:
    """Shares from 0 to 1 as bytes: the square root, rounded to so many levels."""
    return np.rint((levels - 1) * np.sqrt(shares.clip(0, 1))).astype(np.uint8)


def _packed(one: Explanation) -> tuple[str, int]:
    """All matrices, the rollout last, and the most of `LEVELS` that `MOST` has room for."""
    matrices = (*one.attentions.reshape(-1, *one.rollout.shape), one.rollout)
    for levels in LEVELS:
        values = [quantised(matrix, levels) for matrix in matrices]
        if sum(map(_entropy, values)) <= MOST * 6 or levels == LEVELS[-1]:
            break
    deflated = zlib.compress(b"".join(one.tobytes() for one in values))
    return base64.b64encode(deflated).decode(), levels


def _entropy(values: np.ndarray) -> float:
    """Bits, which deflating them comes near; base64 makes 8 of 6."""
    counts = np.bincount(values.ravel())
    counts = counts[counts > 0]
    return float(counts @ np.log2(values.size / counts))


def _page(sections: Sequence[str], title: str) -> str:
    several = len(sections) > 1
    links = "".join(
        f'<li><a href="#text-{number}">Text {number}</a></li>'
        for number in range(1, len(sections) + 1)
    )
    nav = f'<nav aria-label="Texts"><ul>{links}</ul></nav>' if several else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{nav}<main>{''.join(sections)}</main>"
        f"<footer>{_HOW}</footer><script>{_SCRIPT}</script></body></html>\n"
    )


def _section(number: int, one: Explanation, with_maps: bool) -> str:
    parts = [f'<section id="text-{number}" aria-label="Text {number}"><h2>Text {number}</h2>']
    if one.prediction:
        parts.append(_prediction(one.prediction))
    if one.cut:
        tokens = "token" if one.cut == 1 else "tokens"
        parts.append(
            f'<p class="care">{one.cut:,} {tokens} at the end did not fit into the '
            f"{len(one.tokens)} that were read, and are not explained.</p>"
        )
    parts += [_gradients(one), _rollout(one), _table(one), "<h3>Attention</h3>"]
    full = '<p class="care">Left out: the page is full. Explain this text by itself.</p>'
    parts += [_attention(number, one) if with_maps else full, "</section>"]
    return "".join(parts)


def _prediction(prediction: dict[str, Any]) -> str:
    """The best first, in the largest letters."""
    chances: list[tuple[str, float | None]]
    if "guesses" in prediction:
        chances = [(guess["token_str"], guess["score"]) for guess in prediction["guesses"]]
    elif "tag" in prediction:
        chances = [(f"{prediction['word']}: {prediction['tag']}", prediction["score"])]
    elif "answer" in prediction:
        chances = [(prediction["answer"] or "no answer", prediction["score"])]
        if prediction["answer"] and prediction["no_answer"]:
            chances.append(("no answer", prediction["no_answer"]))
    elif "probabilities" in prediction:
        ranked = sorted(prediction["probabilities"].items(), key=lambda pair: -pair[1])
        chances = ranked[:5]
    else:
        chances = [(f"{prediction['score']:.3f}", None)]
    rows = "".join(
        f"<li><bdi>{escape(what.strip())}</bdi>" + ("" if chance is None else f" {chance:.1%}")
        for what, chance in chances
    )
    return f'<ul class="said" aria-label="Prediction">{rows}</ul>'


def _gradients(one: Explanation) -> str:
    title = "<h3>Integrated gradients</h3>"
    found, values = one.gradients, one.attributions
    if found is None or values is None:
        return f"{title}<p>None: {escape(one.note)}.</p>"
    most = float(np.abs(values).max())
    text = (
        f"Of the {escape(one.target)}: <b class='for'>blue</b> words raise it, "
        f"<b class='against'>orange</b> ones lower it, by {most:.3g} at most. It is "
        f"{found.output:.4g}, and {found.baseline:.4g} with [PAD] in place of every word; the "
        f"words sum to {values.sum():.4g}. "
    )
    if found.error < TOLERANCE:
        close = f"That is within {found.error:.2%} of the difference, after {found.steps} steps."
        text = f"<p>{text}{close}</p>"
    else:
        text = (
            f'<p>{text}</p><p class="care">That misses the difference by {found.error:.1%} after '
            f"{found.steps} steps, more than {TOLERANCE:.0%}: these figures are rough.</p>"
        )
    kinds = ["for" if value >= 0 else "against" for value in values]
    shares = np.abs(values) / (most or 1)
    return title + text + _coloured(one, shares, kinds, [f"{value:+.3g}" for value in values])


def _rollout(one: Explanation) -> str:
    values = one.per_word(one.flow)
    reader = "the mean of all tokens" if one.token is None else _named(one, one.token)
    shares = values / (float(values.max()) or 1)
    return (
        "<h3>Attention rollout</h3>"
        f"<p>What reaches <bdi>{escape(reader)}</bdi> through all layers, half of each left to the "
        f"residual connection: {values.max():.1%} of one word at most. Special tokens have "
        f"{max(0.0, 1 - float(values.sum())):.1%}.</p>"
        + _coloured(one, shares, ["look"] * len(values), [f"{value:.1%}" for value in values])
    )


def _named(one: Explanation, token: int) -> str:
    """A token as a reader knows it: by its word, or by its own name."""
    words = (word.text for word in one.words if word.tokens[0] <= token < word.tokens[1])
    return next((f'"{word}"' for word in words), one.tokens[token])


def _coloured(
    one: Explanation, shares: np.ndarray, kinds: Sequence[str], said: Sequence[str]
) -> str:
    """The texts as they were given, each word with its colour."""
    parts: list[str] = []
    for part, text in enumerate(one.texts):
        at = 0
        parts.append('<p class="marked" dir="auto">')
        for word, share, kind, title in zip(one.words, shares, kinds, said, strict=True):
            if word.part != part or word.start < at:
                continue
            parts.append(
                f'{escape(text[at : word.start])}<span class="{kind}" title="{title}" '
                f'style="--a:{share * _STRONGEST:.3f}">{escape(text[word.start : word.end])}</span>'
            )
            at = word.end
        rest = escape(text[at:])
        parts.append(f'<span class="rest">{rest}</span></p>' if one.cut else f"{rest}</p>")
    return "".join(parts)


def _table(one: Explanation) -> str:
    gradients = one.attributions
    flows = one.per_word(one.flow)
    tags = one.prediction.get("tags")
    head = ["#", "Word", *(["Tag"] if tags else [])]
    head += ["Gradients"] if gradients is not None else []
    head += ["Rollout", "Characters", "Tokens"]
    rows = []
    for index, word in enumerate(one.words):
        cells = [str(index + 1), f"<bdi>{escape(word.text)}</bdi>"]
        cells += [escape(tags[index])] if tags else []
        cells += [f"{gradients[index]:+.4f}"] if gradients is not None else []
        cells += [f"{flows[index]:.2%}", _characters(one, word)]
        cells.append(str(word.tokens[1] - word.tokens[0]))
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    names = "".join(f'<th scope="col">{name}</th>' for name in head)
    opened = " open" if len(one.words) <= _FEW else ""
    return (
        f"<details{opened}><summary>{len(one.words)} words in a table</summary>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Words"><table>'
        f"<thead><tr>{names}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _characters(one: Explanation, word: Word) -> str:
    which = f"{word.part + 1}: " if len(one.texts) > 1 else ""
    return f"{which}{word.start}\u2013{word.end}"


def _attention(number: int, one: Explanation) -> str:
    values, levels = _packed(one)
    data = {
        "layers": one.attentions.shape[0],
        "heads": one.attentions.shape[1],
        "tokens": one.tokens,
        "words": _units(one),
        "token": one.token,
        "top": levels - 1,
        "values": values,
    }
    written = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return (
        "<noscript><p>The maps of attention are drawn by a script, which this browser does not "
        f'run.</p></noscript><div class="attention" data-name="Text {number}">'
        f'<script type="application/json">{written}</script></div>'
        f"<p>The maps hold the square root of attention in {levels} levels, which errs by at most "
        f"{100 / (levels - 1):.1f} percentage points.</p>"
    )


def _units(one: Explanation) -> list[tuple[str, int, int]]:
    """Words and special tokens in order: (name, first token, the one after the last)."""
    begins = {word.tokens[0]: word for word in one.words}
    inside = {place for word in one.words for place in range(*word.tokens)}
    found: list[tuple[str, int, int]] = []
    for place, token in enumerate(one.tokens):
        if place in begins:
            found.append((begins[place].text, *begins[place].tokens))
        elif place not in inside:
            found.append((token, place, place + 1))
    return found


_HOW = """<h2>How to read this</h2>
<p>Integrated gradients (Sundararajan, Taly and Yan 2017) share the difference between two outputs
among the words: that for the text, and that for the same number of [PAD] with [CLS], [SEP] and
[MASK] left in their places. Another baseline would share it otherwise.</p>
<p>Attention tells where a model takes from, not why it decides. Rollout (Abnar and Zuidema 2020)
multiplies it through the layers, its mean over the heads and the identity in equal parts.</p>
<p>The colours of the maps follow the cube root of attention: little is seen too. A word takes from
another the sum over its tokens, the mean over those of its own.</p>"""

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #20242b; --dim: #5b6472; --line: #d0d5dd;
  --stripe: #f5f7f9; --link: #1a62bf; --for: 26 98 191; --against: 214 96 0; --look: 0 128 96;
  --care: #9a3b00; }
@media (prefers-color-scheme: dark) { :root { --paper: #16191e; --ink: #e4e7ec; --dim: #a3adbb;
  --line: #3a414c; --stripe: #1e2229; --link: #7db4ff; --for: 64 136 240; --against: 218 104 24;
  --look: 46 190 148; --care: #ff9c5b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
p { max-width: 46rem; }
a { color: var(--link); }
h2 { margin: 2.5rem 0 1rem; border-bottom: 1px solid var(--line); }
h3 { margin: 2rem 0 0.5rem; }
nav ul, .said { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; padding: 0; list-style: none; }
.said { align-items: baseline; color: var(--dim); }
.said li:first-child { font-size: 1.5rem; font-weight: 600; color: var(--ink); }
.care { color: var(--care); font-weight: 600; }
.marked { max-width: none; padding: 0.8rem 1rem; border: 1px solid var(--line);
  border-radius: 6px; font-size: 1.1rem; line-height: 1.9; white-space: pre-wrap; }
.marked span { border-radius: 4px; padding: 0.15em 0; }
.marked .rest { color: var(--dim); }
.for { background: rgb(var(--for) / var(--a, 0.3)); }
.against { background: rgb(var(--against) / var(--a, 0.3)); }
.look { background: rgb(var(--look) / var(--a, 0.3)); }
b.for, b.against { padding: 0 0.25em; border-radius: 4px; font-weight: inherit; }
summary { cursor: pointer; }
.scroll { overflow: auto; max-height: 50rem; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.8rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
@media (max-width: 30rem) { th, td { padding: 0.2rem 0.4rem; } .grid { font-size: 0.65rem; } }
th:nth-child(2), td:nth-child(2) { text-align: left; }
tbody tr:nth-child(even) { background: var(--stripe); }
footer { color: var(--dim); font-size: 0.9rem; }
.attention > p, .attention + p { color: var(--dim); margin: 0.3rem 0; }
.views { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 1.5rem; }
@media (max-width: 60rem) { .views { grid-template-columns: minmax(0, 1fr); } }
.views h4 { margin: 1rem 0 0.3rem; }
.views output { display: block; min-height: 1.5em; }
.grid { display: grid; gap: 3px; overflow-x: auto; padding: 3px; align-items: center;
  justify-content: start; font-size: 0.75rem; color: var(--dim); }
.grid span { text-align: center; overflow-wrap: normal; }
button { font: inherit; color: inherit; background: none; border: 1px solid var(--line);
  border-radius: 4px; padding: 0; cursor: pointer; }
button.plain { padding: 0.2rem 0.8rem; }
button[aria-pressed="true"] { outline: 2px solid var(--link); border-color: var(--link); }
button:focus-visible, canvas:focus-visible, .scroll:focus-visible {
  outline: 3px solid var(--ink); outline-offset: 1px; }
.grid button { aspect-ratio: 1; min-width: 0; overflow: hidden; }
.grid canvas { display: block; width: 100%; height: 100%; image-rendering: pixelated; }
.map { display: block; width: 100%; touch-action: pan-y; cursor: crosshair; }
.pairs { display: grid; grid-template-columns: minmax(0, 2fr) minmax(2rem, 1fr) minmax(0, 2fr);
  max-height: 40rem; overflow-y: auto; padding: 3px; }
.pairs div { display: flex; flex-direction: column; }
.pairs button, .pairs span { height: 1.7rem; line-height: 1.6rem; padding: 0 0.4rem; margin: 0;
  overflow: hidden; white-space: nowrap; text-overflow: ellipsis; border-radius: 4px;
  flex: none; }
.pairs button { text-align: right; border-color: transparent; }
.pairs button[aria-pressed="true"] { border-color: var(--link); outline-offset: -2px; }
.pairs span { display: flex; gap: 0.6rem; justify-content: space-between; }
.pairs bdi { overflow: hidden; text-overflow: ellipsis; }
.pairs svg { width: 100%; }
.pairs line { stroke: rgb(var(--look)); stroke-width: 2; vector-effect: non-scaling-stroke; }
"""

_SCRIPT = r"""
'use strict';
const SMALL = 48;
function make(tag, inside, more) {
  const one = Object.assign(document.createElement(tag), more);
  inside.append(one);
  return one;
}
function look() {
  return getComputedStyle(document.documentElement).getPropertyValue('--look').trim().split(' ');
}
async function unpack(text) {
  const packed = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
/* The largest of each block of cells, so that no thin line of a small map is lost. */
function smaller(weights, S) {
  const n = Math.min(S, SMALL), out = new Float32Array(n * n);
  for (let r = 0; r < S; r++) for (let c = 0; c < S; c++) {
    const at = Math.floor(r * n / S) * n + Math.floor(c * n / S);
    out[at] = Math.max(out[at], weights[r * S + c]);
  }
  return out;
}
function paint(canvas, weights) {
  const n = canvas.width = canvas.height = Math.sqrt(weights.length);
  const context = canvas.getContext('2d'), image = context.createImageData(n, n);
  const [r, g, b] = look();
  weights.forEach((weight, at) => image.data.set([r, g, b, 255 * Math.cbrt(weight)], 4 * at));
  context.putImageData(image, 0, 0);
}
function percent(weight) { return (100 * weight).toFixed(1) + '%'; }
/* One stop of Tab for many buttons: arrows go from one to the next. */
function rove(buttons, columns) {
  buttons.forEach((button, at) => {
    button.tabIndex = at ? -1 : 0;
    button.addEventListener('keydown', event => {
      const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns}[event.key];
      const next = buttons[at + step];
      if (!next || (columns === 1 && /Left|Right/.test(event.key))) return;
      event.preventDefault();
      next.focus();
    });
    button.addEventListener('focus', () => {
      buttons.forEach(other => { other.tabIndex = other === button ? 0 : -1; });
    });
  });
}
async function draw(box) {
  const data = JSON.parse(box.querySelector('script').textContent);
  const {layers: L, heads: A, tokens, words} = data, S = tokens.length, W = words.length;
  const bytes = await unpack(data.values);
  function weights(layer, head) { /* layer L is the rollout; head -1 the mean of a layer's */
    const out = new Float32Array(S * S), heads = head < 0 ? A : 1;
    for (let one = 0; one < heads; one++) {
      const from = (layer * A + Math.max(head, 0) + one) * S * S;
      for (let at = 0; at < S * S; at++) out[at] += (bytes[from + at] / data.top) ** 2 / heads;
    }
    return out;
  }
  make('p', box, {textContent: 'Rows take from columns. Choose a head, the mean of a layer, or ' +
    'the rollout; arrow keys go from one to the next.'});
  const whole = make('button', box, {className: 'plain', type: 'button', textContent: 'Rollout'});
  const grid = make('div', box, {className: 'grid'});
  grid.setAttribute('role', 'group');
  grid.setAttribute('aria-label', box.dataset.name + ': heads');
  grid.style.gridTemplateColumns = `auto repeat(${A + 1}, minmax(26px, 58px))`;
  make('span', grid, {textContent: 'layer'});
  make('span', grid, {textContent: 'mean'});
  for (let head = 1; head <= A; head++) make('span', grid, {textContent: head});
  const choices = [];
  for (let layer = 0; layer < L; layer++) {
    make('span', grid, {textContent: layer + 1});
    for (let head = -1; head < A; head++) {
      const name = `Layer ${layer + 1}, ` + (head < 0 ? 'mean of its heads' : `head ${head + 1}`);
      const button = make('button', grid, {type: 'button', title: name});
      button.setAttribute('aria-label', name);
      choices.push({button, name, layer, head, canvas: make('canvas', button)});
    }
  }
  rove(choices.map(choice => choice.button), A + 1);
  choices.push({button: whole, name: 'Rollout', layer: L, head: 0});
  const views = make('div', box, {className: 'views'});
  const left = make('div', views), right = make('div', views);
  const title = make('h4', left), map = make('canvas', left, {className: 'map', tabIndex: 0});
  const said = make('output', left);
  map.setAttribute('role', 'application');
  make('h4', right, {textContent: 'Word to word'});
  const pairs = make('div', right, {className: 'pairs'}), froms = make('div', pairs);
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  pairs.append(svg);
  svg.setAttribute('viewBox', `0 0 1 ${W}`);
  svg.setAttribute('preserveAspectRatio', 'none');
  svg.setAttribute('aria-hidden', 'true');
  svg.style.height = `${1.7 * W}rem`;
  const tos = make('div', pairs), told = make('output', right);
  let now, chosen = data.token === null ? -1 :
    words.findIndex(word => word[1] <= data.token && data.token < word[2]);
  const plain = document.createElement('canvas');
  let cell = [0, 0], shape;
  const buttons = words.map(([text], at) => {
    const button = make('button', froms, {type: 'button', textContent: text, dir: 'auto'});
    button.onclick = () => { chosen = chosen === at ? -1 : at; connect(); };
    return button;
  });
  rove(buttons, 1);
  const ends = words.map(([text]) => {
    const end = make('span', tos, {title: text});
    make('bdi', end, {textContent: text});
    return {end, share: make('small', end)};
  });
  function between(from, to) {
    let sum = 0;
    for (let r = from[1]; r < from[2]; r++) {
      for (let c = to[1]; c < to[2]; c++) sum += now[r * S + c];
    }
    return sum / (from[2] - from[1]);
  }
  function connect() {
    svg.replaceChildren();
    words.forEach((from, row) => {
      buttons[row].setAttribute('aria-pressed', row === chosen);
      if (chosen >= 0 && row !== chosen) return;
      words.forEach((to, column) => {
        const weight = between(from, to);
        if (weight < (chosen < 0 ? 0.05 : 0.002)) return;
        const line = document.createElementNS('http://www.w3.org/2000/svg', 'line');
        const ends = {x1: 0, y1: row + 0.5, x2: 1, y2: column + 0.5};
        for (const [name, value] of Object.entries(ends)) line.setAttribute(name, value);
        line.setAttribute('stroke-opacity', Math.cbrt(weight));
        svg.append(line);
      });
    });
    const to = words.map(word => chosen < 0 ? 0 : between(words[chosen], word));
    ends.forEach(({end, share}, at) => {
      share.textContent = to[at] >= 0.005 ? percent(to[at]) : '';
      end.style.background = `rgb(var(--look) / ${0.6 * Math.cbrt(to[at])})`;
    });
    const most = to.indexOf(Math.max(...to));
    told.textContent = chosen < 0 ? 'Lines: 5% and more. Choose a word for its own.' :
      `${words[chosen][0]} takes most from ${words[most][0]}: ${percent(to[most])}`;
  }
  function enlarge() {
    const ratio = devicePixelRatio || 1, width = map.clientWidth, context = map.getContext('2d');
    const style = getComputedStyle(document.body);
    context.font = `12px ${style.fontFamily}`;
    const longest = Math.max(...tokens.map(token => context.measureText(token).width));
    let margin = Math.min(longest + 8, 96, width / 4), size = (width - margin) / S;
    const labelled = size >= 9;
    if (!labelled) [margin, size] = [1, (width - 2) / S];
    size = Math.min(size, 34);
    shape = {margin, size};
    const height = margin + S * size + 1;
    [map.width, map.height] = [width * ratio, height * ratio];
    map.style.height = `${height}px`;
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = false;
    context.drawImage(plain, margin, margin, S * size, S * size);
    context.strokeStyle = style.getPropertyValue('--line');
    context.strokeRect(margin, margin, S * size, S * size);
    context.strokeStyle = style.getPropertyValue('--ink');
    context.lineWidth = 1.5;
    context.strokeRect(margin + cell[1] * size, margin + cell[0] * size, size, size);
    if (!labelled) return;
    context.font = `${Math.min(12, size)}px ${style.fontFamily}`;
    context.textBaseline = 'middle';
    context.direction = 'ltr';
    tokens.forEach((token, at) => {
      const middle = margin + (at + 0.5) * size;
      context.fillStyle = style.getPropertyValue(at === cell[0] ? '--ink' : '--dim');
      context.textAlign = 'right';
      context.fillText(token, margin - 4, middle, margin - 4);
      context.save();
      context.translate(middle, margin - 4);
      context.rotate(-Math.PI / 2);
      context.textAlign = 'left';
      context.fillStyle = style.getPropertyValue(at === cell[1] ? '--ink' : '--dim');
      context.fillText(token, 0, 0, margin - 4);
      context.restore();
    });
  }
  function point(row, column) {
    cell = [row, column].map(place => Math.max(0, Math.min(S - 1, place)));
    said.textContent = `${tokens[cell[0]]} (${cell[0] + 1}) takes ` +
      `${percent(now[cell[0] * S + cell[1]])} from ${tokens[cell[1]]} (${cell[1] + 1})`;
    enlarge();
  }
  function choose(choice) {
    now = weights(choice.layer, choice.head);
    choices.forEach(one => one.button.setAttribute('aria-pressed', one === choice));
    title.textContent = choice.name;
    map.setAttribute('aria-label', `${choice.name}, ${S} by ${S} tokens: arrows read its cells`);
    paint(plain, now);
    point(...cell);
    connect();
  }
  function follow(event) {
    const at = map.getBoundingClientRect(), {margin, size} = shape;
    const places = [event.clientY - at.top, event.clientX - at.left];
    const [row, column] = places.map(place => Math.floor((place - margin) / size));
    if (Math.min(row, column) >= 0 && Math.max(row, column) < S) point(row, column);
  }
  map.addEventListener('pointermove', follow);
  map.addEventListener('pointerdown', follow);
  map.addEventListener('keydown', event => {
    const steps = {ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0]};
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    point(cell[0] + step[0], cell[1] + step[1]);
  });
  choices.forEach(choice => { choice.button.onclick = () => choose(choice); });
  function repaint() {
    for (const {canvas, layer, head} of choices) {
      if (canvas) paint(canvas, smaller(weights(layer, head), S));
    }
  }
  repaint();
  cell = [data.token || 0, data.token || 0];
  choose(choices[(L - 1) * (A + 1)]);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
    repaint();
    paint(plain, now);
    enlarge();
  });
  let width = map.clientWidth;
  new ResizeObserver(() => {
    if (map.clientWidth !== width) { width = map.clientWidth; enlarge(); }
  }).observe(left);
}
/* A text is unpacked only when it comes near the window. */
const near = new IntersectionObserver(entries => entries.forEach(({isIntersecting, target}) => {
  if (!isIntersecting) return;
  near.unobserve(target);
  draw(target).catch(error => {
    make('p', target, {textContent: `This browser cannot draw the attention (${error.message}).`});
  });
}), {rootMargin: '400px'});
document.querySelectorAll('.attention').forEach(box => near.observe(box));
"""
