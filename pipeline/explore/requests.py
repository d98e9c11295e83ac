"""Bodies and queries of requests: read strictly, and bounded in depth, lengths and numbers.

What is wrong is one sentence with the field, the value and what is meant. Brackets are counted before anything is read:
Python's reader would follow them as deep as its stack.
"""

import json
import re
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from evaluate.config import LARGEST_STRENGTH, Op, Where
from pipeline.explore.features import FindQuery
from pipeline.explore.replies import Refused

DEPTH = 24  # brackets within brackets
CHARACTERS = 400_000  # of a text; 4,096 tokens are some 20,000
EXAMPLES, MESSAGES, OPERATIONS = 16, 256, 16
NEW_TOKENS = 4096  # of an answer
LARGEST_FEATURE = (1 << 31) - 1
ONE_LINE = 200  # of what is looked for
# A string, also one that does not end, or a bracket. Possessive: its time grows with the text alone.
PART = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
ALTERNATIVE = re.compile(r"(?:constrained-|list\[)")  # in pydantic's places: a type of a union

Asked = TypeVar("Asked", bound=BaseModel)


# pydantic refuses what is half a character (a surrogate alone) where it counts them.
Text = Annotated[str, Field(max_length=CHARACTERS)]
Line = Annotated[str, Field(max_length=ONE_LINE)]
Feature = Annotated[int, Field(ge=0, le=LARGEST_FEATURE)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
NewTokens = Annotated[int, Field(ge=1, le=NEW_TOKENS)]
Temperature = Annotated[float, Field(ge=0, le=100)]
TopP = Annotated[float, Field(ge=0.01, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Body(BaseModel):
    """A body: types as they are, unknown fields refused, nothing changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class OperationAsked(Body):
    """What is done to a feature while the model writes."""

    feature: Feature
    op: Op = "add"
    """add or set strength times the feature's largest activation, ablate it, or scale it by strength"""
    strength: Annotated[float, Field(ge=-LARGEST_STRENGTH, le=LARGEST_STRENGTH)] = 1.0
    where: Where = "all"
    """at all tokens, those of the prompt, those generated, or those between <think> and </think>"""


Operations = Annotated[list[OperationAsked], Field(max_length=OPERATIONS)]


class FeaturesAsked(Body):
    """A text, for the features that are active at its tokens."""

    sae: Line | None = None
    text: Text
    chat: bool = False
    """read it as a user's turn, by the model's chat template"""


class ExamplesAsked(Body):
    """Texts that features should fire on, and texts that they should not."""

    sae: Line | None = None
    yes: Annotated[list[Text], Field(min_length=1, max_length=EXAMPLES)]
    no: Annotated[list[Text], Field(max_length=EXAMPLES)] = []
    limit: Annotated[int, Field(ge=1, le=500)] = 50


class MessageAsked(Body):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


Messages = Annotated[list[MessageAsked], Field(min_length=1, max_length=MESSAGES)]


class SteerAsked(Body):
    """What the model is to answer, as it is and under operations, side by side."""

    sae: Line | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    """a conversation, in place of `prompt`"""
    operations: Operations = []
    max_new_tokens: NewTokens = 64
    temperature: Temperature = 0.0
    """0 takes the likeliest token"""
    top_p: TopP = 1.0
    seed: Seed = 0
    shade: Feature | None = None
    """the feature whose activation each token of the answer gets as `value`"""
    chat: bool | None = None
    """use the model's chat template; null: if it has one"""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give one of prompt and messages")
        return self


def _given(value: Any) -> Any:
    return None if value == "" else value


class FindAsked(BaseModel):
    """What is looked for among all features; what is left out or empty asks for nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    sae: Annotated[Line | None, BeforeValidator(_given)] = None
    q: Line = ""
    """a feature's number, else a part of its label or a token that it fires on"""
    token: Line = ""
    """that it fires on"""
    promotes: Line = ""
    """a token among those that it promotes most"""
    label: Line = ""
    source: Line = ""
    """that it fires in alone"""
    verdict: Line = ""
    """of token injection"""
    min_density: Annotated[Share | None, BeforeValidator(_given)] = None
    max_density: Annotated[Share | None, BeforeValidator(_given)] = None
    min_score: Annotated[float | None, BeforeValidator(_given)] = None
    sort: Line = ""
    order: Literal["", "asc", "desc"] = ""
    offset: Annotated[int, Field(ge=0, le=LARGEST_FEATURE)] = 0
    limit: Annotated[int, Field(ge=1, le=500)] = 50

    @property
    def query(self) -> FindQuery:
        """The same for the table of features."""
        return FindQuery(**self.model_dump(exclude={"sae"}))


def parsed(body: bytes) -> Any:
    """A JSON body. Raises Refused for one that is not UTF-8, no JSON, or too deep."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8 text: byte {error.start}") from None
    depth = 0
    for part in PART.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(part[0], 0)
        if depth > DEPTH:
            raise Refused(400, f"the body is nested more than {DEPTH} deep")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Refused(400, f"the body is no JSON: line {error.lineno}: {error.msg}") from None
    except ValueError:  # Python reads no integer of more than 4,300
        raise Refused(400, "the body has a number of more digits than are read here") from None


def checked(kind: type[Asked], values: Any) -> Asked:
    """What is asked, of a body or of a query's values. Raises Refused with what is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise Refused(400, complaint(error)) from None


def complaint(error: ValidationError) -> str:
    """What is wrong with the first field that is, with its place and value, as one sentence."""
    found = error.errors(include_url=False)
    same = [each for each in found if each["loc"][:1] == found[0]["loc"][:1]]
    # Of a field that may be of several types, what is wrong with the one that was meant.
    first = min(same, key=lambda each: (each["type"].endswith("_type"), -len(each["loc"])))
    place = ".".join(str(part) for part in first["loc"] if not ALTERNATIVE.match(str(part)))
    message = "an object is meant" if first["type"] == "model_type" else first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{place[:80]}: no such field"
    value = "" if first["type"] in ("missing", "value_error") else f"{_shown(first['input'])}: "
    return f"{f'{place[:80]}: ' if place else ''}{value}{message[0].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    return repr(value[:80] if isinstance(value, str) else value)[:80]
