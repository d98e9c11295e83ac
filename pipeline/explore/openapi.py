"""The description of the explorer's endpoints (OpenAPI 3.1), made of the models that check its requests."""

from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pipeline.explore.openai_requests import ChatAsked, CompletionAsked
from pipeline.explore.requests import ExamplesAsked, FeaturesAsked, FindAsked, SteerAsked

REFS = "#/components/schemas/{model}"
JSON, EVENTS, ARRAYS = "application/json", "text/event-stream", "application/octet-stream"

FEATURES = """The features of a text, at each token and of all of it. In CSR: token s has features
feature[indptr[s]:indptr[s+1]] with activations value[...], in the SAE's units. A token whose `counts` is false is one
that training leaves out (the first of a text has a norm of a hundred others): its activations mean little. `cut` says
how many tokens there were where a text was longer than is read."""
STEER = """What the model answers as it is and under operations, as events while it writes: `{"side", "id", "text",
"value"}` of a token, `{"side", "end": true, "ended", "tokens", "processed", "changed"}` of a side, `{"error"}`, and at
last `{"done": true, "command"}`, the same as a `pipeline steer` command. Closing the connection ends it."""
FIND = "Features that fit all that is asked for, one page of them."
EXAMPLES = "Features that fire on all of some texts and on none of others come first."

OPERATIONS: tuple[tuple[str, str, str, type[BaseModel] | None, tuple[str, ...]], ...] = (
    ("get", "/api/saes", "The SAEs that can be looked at, and the limits.", None, (JSON,)),
    ("post", "/api/features", FEATURES, FeaturesAsked, (JSON, ARRAYS)),
    ("get", "/api/find", FIND, FindAsked, (JSON,)),
    ("post", "/api/find", EXAMPLES, ExamplesAsked, (JSON,)),
    ("get", "/api/feature/{sae}/{number}", "What is known of one feature, in short.", None, (JSON,)),
    ("post", "/api/steer", STEER, SteerAsked, (EVENTS,)),
    ("get", "/v1/models", "As OpenAI's: the model, once for each SAE.", None, (JSON,)),
    ("get", "/v1/models/{name}", "As OpenAI's: a model by its name, operations included.", None, (JSON,)),
    ("post", "/v1/completions", "As OpenAI's, with operations.", CompletionAsked, (JSON, EVENTS)),
    ("post", "/v1/chat/completions", "As OpenAI's, with operations.", ChatAsked, (JSON, EVENTS)),
)
REFUSALS = {
    "400": "what was asked for cannot be done; the sentence says why",
    "404": "there is no such SAE or feature",
    "410": "the runs of this SAE were deleted",
    "429": "too many wait; Retry-After says for how many seconds",
}


@cache
def description() -> dict[str, Any]:
    """The document."""
    kinds = [kind for *_, kind, _ in OPERATIONS if kind]
    _, schemas = models_json_schema([(kind, "validation") for kind in kinds], ref_template=REFS)
    paths: dict[str, dict[str, Any]] = {}
    for method, path, text, kind, types in OPERATIONS:
        paths.setdefault(path, {})[method] = _operation(method, path, " ".join(text.split()), kind, types)
    return {
        "openapi": "3.1.0",
        "info": {"title": "reasoning-sae explorer", "version": "1", "description": "Text in, features out."},
        "paths": paths,
        "components": {
            "schemas": {**schemas["$defs"], "Error": _error()},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],  # none on this machine's own address
    }


def _operation(
    method: str, path: str, text: str, kind: type[BaseModel] | None, types: tuple[str, ...]
) -> dict[str, Any]:
    found: dict[str, Any] = {"summary": text.split(". ")[0].split(": ")[0].rstrip("."), "description": text}
    places = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    kinds = {"sae": "string", "number": "integer", "name": "string"}
    parameters = [{"name": n, "in": "path", "required": True, "schema": {"type": kinds[n]}} for n in places]
    if kind and method == "get":
        properties = kind.model_json_schema()["properties"]
        parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in properties.items()]
    elif kind:
        schema = {"$ref": REFS.format(model=kind.__name__)}
        found["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    error = {JSON: {"schema": {"$ref": REFS.format(model="Error")}}}
    refusals = {status: {"description": said, "content": error} for status, said in REFUSALS.items()}
    answer = {"description": "the answer", "content": {each: {} for each in types}}
    return found | ({"parameters": parameters} if parameters else {}) | {"responses": {"200": answer, **refusals}}


def _error() -> dict[str, Any]:
    return {
        "description": "One sentence; below /v1 an object with it as its `message`.",
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": ["string", "object"]}},
    }
