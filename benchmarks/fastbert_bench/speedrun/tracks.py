"""The tracks: what everybody who runs one has in common, and the loss that is to be reached.

Standard library only, so that mistakes are told at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastbert.config import PretrainConfig
from fastbert.errors import UserError, did_you_mean
from fastbert.recipes import CLASSIC, RECIPES, read_recipe
from fastbert.settings import settings

_OF_TRACK = (
    "model", "init_from", "data", "sentence_splitter", "tokenizer", "vocab_size", "add_tokens",
    "do_lower_case", "strip_accents", "max_seq_length", "validation_fraction",
)  # fmt: skip


@dataclass(frozen=True)
class Track:
    """A race.

    Attributes:
        name: of it.
        what: it is, in a few words.
        fixed: settings of `fastbert pretrain` that nobody changes.
        device: to run on where nothing is said.
        tokens: the budget: of a batch times optimizer steps, at most.
        classic: what tuning made of the classic recipe, or all that is known before it is tuned.
        tuned: whether it was.
        steps: optimizer steps of a recipe that is known to need fewer than the budget allows.
        targets: MLM loss to reach on the reported masks, nats, by corpus: the mean of tuned classic
            over three seeds at the budget. None where it has not been measured.
    """

    name: str
    what: str
    fixed: Mapping[str, Any]
    device: str
    tokens: int
    classic: Mapping[str, Any]
    tuned: bool = False
    steps: Mapping[str, int] = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=dict)

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All settings of a run but its seed, data and folder: the track's, then what is given.

        Raises:
            UserError: what is given is fixed, belongs to the speedrun itself, or is more than the
                budget.
        """
        for name in given:
            if name in self.fixed or name in _OF_TRACK:
                value = self.fixed.get(name)
                why = "is the track's" if value is None else f"is the track's: {value}"
                raise UserError(f"{name} {why}; nobody changes it")
            if name not in _free():
                raise UserError(f"{name} is set by the speedrun itself: leave it out")
        name = given.get("recipe", CLASSIC)
        recipe = read_recipe(PretrainConfig, name)
        ours = {"device": self.device, "tokens_per_batch": self.batch}
        ours |= self.classic if name == CLASSIC else {}
        if name not in RECIPES:
            ours = {one: value for one, value in ours.items() if one not in recipe}
        texts = {one.name: one.default for one in settings(PretrainConfig) if one.name in _OF_TRACK}
        asked = {**ours, **texts, **self.fixed, **given}
        whole = {"gradient_accumulation_steps": 1, **recipe, **asked}
        of_step = whole["tokens_per_batch"] * whole["gradient_accumulation_steps"]
        most = self.tokens // of_step
        of_recipe = recipe.get("max_steps", most) if name not in RECIPES else most
        asked.setdefault("max_steps", min(most, self.steps.get(name, of_recipe)))
        if asked["max_steps"] > most:
            raise UserError(
                f"max_steps = {asked['max_steps']} of {of_step:,} tokens are more than the budget "
                f"of {self.name}, {self.tokens:,} tokens: {most} at most"
            )
        return asked

    @property
    def batch(self) -> int:
        """Tokens of a batch where nothing is said."""
        return int(self.classic.get("tokens_per_batch", 2048))


def _free() -> set[str]:
    """Settings that a recipe may hold or that say what a run computes on."""
    logged = {one.name for one in settings(PretrainConfig) if one.group.name == "logs"}
    ours = {"seed", "resume", "stop_at_step", *_OF_TRACK, *logged}
    every = {one.name for one in settings(PretrainConfig)}
    return every - ours


def track(name: str) -> Track:
    """The track of that name.

    Raises:
        UserError: there is none.
    """
    if name not in TRACKS:
        known = ", ".join(TRACKS)
        raise UserError(f"no track {name!r}{did_you_mean(name, TRACKS)} (tracks: {known})")
    return TRACKS[name]


_UNTUNED = {"initializer_range": "auto"}

TRACKS = {
    one.name: one
    for one in (
        Track(
            "cpu-tiny",
            "2 layers of 128 on 2 CPU cores: three seeds in an hour",
            {"model": "tiny", "vocab_size": 4096, "max_seq_length": 128},
            device="cpu",
            tokens=4000 * 2048,
            classic={"base_learning_rate": 1e-3, "initializer_range": "auto"},
            tuned=True,
            steps={"fast": 500},
            targets={"manuals": 5.958, "addresses": 5.904},
        ),
        Track(
            "cpu-mini",
            "4 layers of 256 on a few CPU cores, overnight",
            {"model": "mini", "vocab_size": 8192, "max_seq_length": 128},
            device="cpu",
            tokens=10_000 * 4096,
            classic={**_UNTUNED, "tokens_per_batch": 4096},
        ),
        Track(
            "h100-base",
            "BERT-base on one H100, sequences of 128, then of 512: 30 minutes",
            {"model": "base", "vocab_size": 30522, "max_seq_length": 512},
            device="cuda",
            tokens=12_000 * 65_536,
            classic={"tokens_per_batch": 65_536, "curriculum": "128:0.9", "warmup_steps": 0.1},
        ),
        Track(
            "h100-large",
            "BERT-large on one H100, sequences of 128, then of 512",
            {"model": "large", "vocab_size": 30522, "max_seq_length": 512},
            device="cuda",
            tokens=12_000 * 65_536,
            classic={"tokens_per_batch": 65_536, "curriculum": "128:0.9", "warmup_steps": 0.1},
        ),
    )
}
