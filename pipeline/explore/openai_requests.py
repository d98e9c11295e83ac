"""Bodies of /v1 in OpenAI's form: what changes nothing is ignored, what would and is not supported is refused by name.

A field that is null counts as left out, as OpenAI's own server has it.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from pipeline.explore.replies import Refused
from pipeline.explore.requests import (
    NEW_TOKENS,
    Body,
    Line,
    Messages,
    Operations,
    Seed,
    Temperature,
    Text,
    TopP,
    checked,
)

ANSWERS = 128  # to one request: prompts times samples
IDS = 1 << 17  # tokens of a prompt that is given as ids
TOP = 20  # likeliest tokens that are listed at a place

# Fields of OpenAI's that have nothing to do with what is answered here.
IGNORED = {
    "metadata",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Fields of OpenAI's that would change the answer, with the values at which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}

Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1, max_length=IDS)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=1, le=ANSWERS)]
Most = Annotated[int, Field(ge=0, le=NEW_TOKENS)]


class StreamOptions(Body):
    """What comes with a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """ignored: nothing here hides how long tokens are"""


class Asked(Body):
    """What both endpoints take."""

    model: Line = ""
    """a model's name, with `@` and an SAE's id where there are several, and operations behind it, as
    smollm2-135m+123:set:2:thinking+45:ablate"""
    operations: Operations = Field([])
    """features that are operated on while the model writes, beside those of the model's name"""
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    n: Count = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=32)] = Field([])
    seed: Seed | None = None
    """the same seed gives the same answer; without one, another each time"""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionAsked(Asked):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=ANSWERS)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=ANSWERS)]
    )
    max_tokens: Most = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None
    best_of: Count | None = None
    """n alone: the best of more are not looked for"""

    @property
    def prompts(self) -> list[Any]:
        """Texts, or ids of tokens."""
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else list(self.prompt)


class ChatAsked(Asked):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: Most | None = None
    """by default as many as the model has positions for"""
    max_completion_tokens: Most | None = None
    """the same"""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=TOP)] = 0


def completion_asked(values: Any) -> CompletionAsked:
    """What is to be completed. Raises Refused for what is wrong or not supported."""
    asked = checked(CompletionAsked, _supported(values, CompletionAsked))
    prompts = len(asked.prompts)
    if asked.n * prompts > ANSWERS:
        raise Refused(400, f"n: {asked.n}: {prompts} prompts have {asked.n * prompts} answers; {ANSWERS} at most")
    if asked.best_of not in (None, asked.n):
        raise Refused(400, f"best_of: {asked.best_of}: not supported but as n")
    return _streamed(asked, asked.logprobs is not None)


def chat_asked(values: Any) -> ChatAsked:
    """A conversation to be answered. Raises Refused for what is wrong or not supported."""
    values = _supported(values, ChatAsked)
    if isinstance(values.get("messages"), list):
        values["messages"] = [_message(each) for each in values["messages"]]
    asked = checked(ChatAsked, values)
    return _streamed(asked, asked.logprobs)


def _streamed(asked: Any, logprobs: bool) -> Any:
    if asked.stream and logprobs:
        raise Refused(400, "logprobs: not supported with stream")
    return asked


def _supported(values: Any, kind: type[Asked]) -> dict[str, Any]:
    """What is given and read here. Raises Refused for what would change the answer."""
    if not isinstance(values, Mapping):
        raise Refused(400, "the body is no JSON object")
    found = {}
    for name, value in values.items():
        if value is None or name in IGNORED or (name not in kind.model_fields and value in NEUTRAL.get(name, ())):
            continue
        if name in NEUTRAL:
            raise Refused(400, f"{name}: not supported, and it would change the answer; leave it out")
        found[name] = value
    return found


def _message(message: Any) -> Any:
    """A turn with its text in one piece; fields that a client sends back as it got them are left out."""
    if not isinstance(message, Mapping):
        return message
    found = {name: value for name, value in message.items() if value not in (None, [], {})}
    content, role = found.get("content", ""), found.get("role")
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        found["content"] = "".join(part.get("text") if isinstance(part.get("text"), str) else "" for part in content)
    elif isinstance(content, list):
        raise Refused(400, "messages: content: only parts of type text are supported")
    found["role"] = "system" if role == "developer" else role
    return {name: value for name, value in found.items() if name != "name"}
