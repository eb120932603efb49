"""What requests and answers look like: checked as they come, and told in the OpenAPI document."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    create_model,
    model_validator,
)

from fastbert.finetune.tasks.classify import SCORE, SEVERAL
from fastbert.serve.config import ServeConfig
from fastbert.serve.models import Served

# What Python's str.isspace says, written out, because other languages' \s is another set.
_SPACE = r"\t-\r\x1c- \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_READABLE = rf"^[^\x00]*[^\x00{_SPACE}][^\x00]*$"
MOST_GUESSES = 1000
_MOST_FIELDS = 64  # of an object


class Strict(BaseModel):
    """Refuses what it does not know, and numbers in place of texts."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, fields: Any) -> Any:
        # Each unknown one makes an error: those of 1 MB took 1.2 s, in which nobody was answered.
        if isinstance(fields, dict) and len(fields) > _MOST_FIELDS:
            raise ValueError(f"has {len(fields)} fields")
        return fields


def _readable(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character")
    if not text.strip():
        raise ValueError("is empty")
    return text


Text = Annotated[
    str, AfterValidator(_readable), Field(json_schema_extra={"minLength": 1, "pattern": _READABLE})
]


# Of requests


class PairOfTexts(Strict):
    """A text, or two that belong together."""

    text: Text
    text_pair: Text | None = None


class TextOfWords(Strict):
    """A text."""

    text: Text


class Words(Strict):
    """A text as its words, each of which gets its tag."""

    tokens: Annotated[list[Text], Field(min_length=1, fail_fast=True)]


class Question(Strict):
    """A question, and the text that may answer it."""

    question: Text
    context: Text


_ABSENT: Any = Field(None, validate_default=False)  # so that null is no text


class Choice(Strict):
    """Answers to choose from; the question, the context or both say what for."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["question"]}, {"required": ["context"]}]}
    )

    question: Text = _ABSENT
    context: Text = _ABSENT
    choices: Annotated[list[Text], Field(min_length=2, fail_fast=True)]

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if not {"question", "context"} & self.model_fields_set:
            raise ValueError("has neither question nor context")
        return self


_ITEMS: dict[str, Any] = {
    "classify": Text | PairOfTexts,
    "tag": Text | TextOfWords | Words,
    "answer": Question,
    "choose": Choice,
}


# Of answers


class Usage(BaseModel):
    """What every answer tells beside itself."""

    tokens: int = Field(description="of all inputs, special ones included")
    truncated: int = Field(description="inputs that were cut")


class OneLabel(BaseModel):
    label: str
    score: float
    probabilities: dict[str, float]


class SeveralLabels(BaseModel):
    labels: list[str]
    probabilities: dict[str, float]


class Score(BaseModel):
    score: float


class Entity(BaseModel):
    """Offsets count Unicode code points."""

    type: str
    text: str
    start: int
    end: int
    score: float


class Entities(BaseModel):
    entities: list[Entity]
    tags: list[str] | None = Field(None, description="of each word, where words were given")


class Span(BaseModel):
    """Offsets count Unicode code points of the context."""

    answer: str
    start: int
    end: int
    score: float
    no_answer: float


class Chosen(BaseModel):
    choice: int = Field(description="its place, from 0")
    score: float
    probabilities: list[float]


class Guess(BaseModel):
    token_str: str
    token: int
    score: float


class Filled(BaseModel):
    masks: list[list[Guess]] = Field(description="of each mask, the best first")


class Embeddings(Usage):
    embeddings: list[list[float]]


class OpenAIEmbedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class OpenAIUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class OpenAIEmbeddings(BaseModel):
    object: Literal["list"] = "list"
    data: list[OpenAIEmbedding]
    model: str
    usage: OpenAIUsage


class OpenAIModel(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class OpenAIModels(BaseModel):
    object: Literal["list"] = "list"
    data: list[OpenAIModel]


class Info(BaseModel):
    """What is served."""

    model: str
    version: str
    task: str = Field(description='of /predict; "" where there is none')
    endpoints: list[str]
    labels: list[str]
    mask_token: str
    max_seq_length: int
    hidden_size: int
    device: str
    dtype: str
    max_batch_tokens: int
    max_texts: int
    max_body_kb: int
    truncate: bool


class Problem(BaseModel):
    """What was wrong."""

    type: str
    message: str
    param: str | None = Field(description="the field that is wrong, where it is one")
    code: None = Field(description="is there for clients of OpenAI's API")


class Refusal(BaseModel):
    error: Problem


class Requests:
    """Requests as what is served takes them, with its limits; and the answers to `/predict`."""

    def __init__(self, served: Served, config: ServeConfig) -> None:
        several: dict[str, Any] = {"min_length": 1, "max_length": config.max_texts}
        # The first error is enough: those of 1 MB took 2.4 s, in which nobody was answered.
        several["fail_fast"] = True
        token = _whole(ge=0, lt=served.vocab_size)
        tokens = Annotated[list[token], Field(min_length=1, fail_fast=True)]  # type: ignore[valid-type]

        def request(name: str, item: Any, **more: Any) -> Any:
            inputs = item | Annotated[list[item], Field(**several)]
            return create_model(name, __base__=Strict, inputs=(inputs, ...), **more)

        best = min(MOST_GUESSES, served.vocab_size)
        guesses = (_whole(ge=1, le=best) | None, None)
        has_chances = served.task == "classify" and served.problem != SCORE
        more = {"top_k": guesses} if has_chances else {}
        self.predict = request("PredictRequest", _ITEMS.get(served.task, Text), **more)
        self.fill_mask = request("FillMaskRequest", _masked(served.mask_token), top_k=guesses)
        self.embed = request("EmbedRequest", Text, normalize=(bool | None, None))
        width = served.hidden_size
        formats: Any = Literal["float", "base64"] | None
        self.openai_embed = create_model(
            "OpenAIEmbeddingsRequest",
            __base__=Strict,
            input=(
                Text
                | Annotated[list[Text], Field(**several)]
                | tokens
                | Annotated[list[tokens], Field(**several)],
                ...,
            ),
            model=(str, ...),
            encoding_format=(formats, None),
            dimensions=(_whole(ge=width, le=width) | None, None),
            user=(str | None, None),
        )
        kinds: dict[str, Any] = {
            "classify": {SEVERAL: SeveralLabels, SCORE: Score}.get(served.problem, OneLabel),
            "tag": Entities,
            "answer": Span,
            "choose": Chosen,
        }
        one = kinds.get(served.task, OneLabel)
        self.predictions = create_model(
            "Predictions",
            __base__=Usage,
            predictions=(list[one], ...),  # type: ignore[valid-type]
        )


class Fillings(Usage):
    predictions: list[Filled]


def _whole(**bounds: Any) -> Any:
    def of_json(number: Any) -> Any:  # to which 3.0 is an integer, but 3.5, "3" and true are none
        return int(number) if isinstance(number, float) and number.is_integer() else number

    return Annotated[int, Field(**bounds), BeforeValidator(of_json)]


def _masked(mask: str) -> Any:
    def holds(text: str) -> str:
        if "\0" in text:
            raise ValueError("holds a NUL character")
        if mask not in text:
            raise ValueError(f"holds no {mask}")
        return text

    pattern = rf"^[^\x00]*{re.escape(mask)}[^\x00]*$"
    return Annotated[str, AfterValidator(holds), Field(json_schema_extra={"pattern": pattern})]


def listed(inputs: Any) -> list[Any]:
    """The inputs of a request as the task takes them."""
    several = inputs if isinstance(inputs, list) else [inputs]
    return [
        one.model_dump(exclude_none=True) if isinstance(one, BaseModel) else one for one in several
    ]
