"""Questions to a language model behind an OpenAI-compatible endpoint: side by side, and each asked once.

An answer is appended to a journal the moment it comes, by the thread that got it. What is started again asks only what
the journal lacks; a call under way at a kill is the one that can be made twice. An interrupt (Ctrl-C) waits for the
calls under way, so that none is. Waits between tries are drawn from the question's key: a run repeats them.
"""

import hashlib
import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from evaluate.endpoint import API_KEY, BASE_URL, Endpoint, Reply, address, check_settings, said, send
from evaluate.journal import Journal, read_lines
from evaluate.visible import visible
from harvest.files import UserError
from harvest.progress import Progress

MODEL, TIMEOUT = "explain.model", "explain.runtime.timeout_s"  # settings that errors name
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # before the second try, and before any; it doubles
GONE = 10  # questions given up one after another: the endpoint is not there any more
SLOW = 2  # time-outs of the first question: a server may load its model during the first
NAMED = 8  # models of an endpoint that an error names
CHAT = "/chat/completions"
THINKING_ENDS = "</think>"


class Question(NamedTuple):
    """What is asked, and how the answer is drawn."""

    messages: tuple[tuple[str, str], ...]  # (role, content)
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


class Answer(NamedTuple):
    """What came back."""

    text: str
    problem: str = ""  # or what went wrong, in a clause; of an answer that was cut off, the text is what there is
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Asked(NamedTuple):
    answer: Answer
    is_kept: bool = False  # in the journal: an answer, be it a refusal
    is_given_up: bool = False  # after all tries


PROBE = Question((("user", "Say yes."),), max_tokens=1)


def question_key(model: str, question: Question) -> str:
    """What the journal calls a question: sha256 of the model and all that decides the answer."""
    return hashlib.sha256(json.dumps([model, *question]).encode()).hexdigest()


def check_endpoint(endpoint: Endpoint) -> None:
    """Ask for one token, before any work. Raises UserError, with the way out, where that gets no answer."""
    check_settings(endpoint)
    slow = 0
    for attempt in range(endpoint.tries):
        reply = send(endpoint, CHAT, _payload(endpoint, PROBE))
        slow += reply.timed_out
        if reply.status == 200 and _choice(reply.body):
            return
        if slow == SLOW or not reply.is_there or not _is_passing(reply) or attempt + 1 == endpoint.tries:
            raise _refused(endpoint, reply)
        time.sleep(_pause("", attempt, reply))


def ask(
    endpoint: Endpoint, questions: Sequence[Question], journal: Path, progress: Progress | None = None
) -> list[Answer]:
    """The answers in the order of the questions; those in the journal, a JSON Lines file, are not asked for again.

    A question without an answer after all tries has a `problem`, and is asked again at the next start. Raises UserError
    where the endpoint takes no more calls (no key, no credit, no such model, gone), and for a damaged journal.
    """
    keys = [question_key(endpoint.model, question) for question in questions]
    answers = read_journal(journal)
    left = {key: question for key, question in zip(keys, questions, strict=True) if key not in answers}
    if progress:
        progress.advance(sum(key in answers for key in keys))
    if left:
        answers |= _ask_all(endpoint, left, journal, progress)
    return [answers[key] for key in keys]


def read_journal(journal: Path) -> dict[str, Answer]:
    """Answers by key. A last line that a kill cut is passed over. Raises UserError for any other damage."""
    return {
        line["key"]: Answer(**{name: line[name] for name in Answer._fields})
        for line in read_lines(journal, ("key", *Answer._fields), "its question is asked again")
    }


def _ask_all(
    endpoint: Endpoint, left: Mapping[str, Question], journal: Path, progress: Progress | None
) -> dict[str, Answer]:
    waiting, lock, stop = iter(left.items()), threading.Lock(), threading.Event()
    found: SimpleQueue[tuple[str, _Asked] | BaseException] = SimpleQueue()

    def work() -> None:
        try:
            while True:
                with lock:
                    key, question = next(waiting, ("", None))
                if question is None or not (asked := _ask_one(endpoint, key, question, stop)):
                    return
                if asked.is_kept:
                    with lock:
                        kept.add({"key": key, **asked.answer._asdict()})
                found.put((key, asked))
        except BaseException as error:
            found.put(error)

    answers: dict[str, Answer] = {}
    given_up = 0
    with Journal(journal) as kept:
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(endpoint.parallel, len(left)))]
        try:
            for thread in threads:
                thread.start()
            while len(answers) < len(left):
                each = found.get()
                if isinstance(each, BaseException):
                    raise each
                key, asked = each
                answers[key] = asked.answer
                given_up = given_up + 1 if asked.is_given_up else 0
                if given_up == GONE:
                    raise UserError(
                        f"{BASE_URL}: {address(endpoint.base_url)}: {GONE} questions in a row got "
                        f"{asked.answer.problem}; start again when it answers: what was answered is kept"
                    )
                if progress:
                    progress.advance(1)
        finally:
            stop.set()
            for thread in threads:  # calls under way end, and their answers are kept
                if thread.ident is not None:  # an interrupt may come before all are started
                    thread.join()
    return answers


def _ask_one(endpoint: Endpoint, key: str, question: Question, stop: threading.Event) -> _Asked | None:
    """Ask until there is an answer; None where it is to stop. Raises UserError where no question can be answered."""
    reply, problem = Reply(0), ""
    for attempt in range(endpoint.tries):
        if stop.wait(_pause(key, attempt - 1, reply) if attempt else 0):
            return None
        reply = send(endpoint, CHAT, _payload(endpoint, question))
        if reply.status == 200 and (answer := _answer(reply.body)):
            return _Asked(answer, is_kept=True)
        if reply.status in (401, 402, 404):
            raise _refused(endpoint, reply)
        about = said(endpoint, reply)
        if not _is_passing(reply):
            refused = "refused, " if reply.status == 403 or "content_filter" in about else ""  # OpenRouter, Azure
            return _Asked(Answer("", f"{refused}HTTP {reply.status}: {about}"))
        empty = reply.status == 200 and _choice(reply.body)
        problem = reply.problem or ("no text" if empty else f"HTTP {reply.status}: {about}")
    return _Asked(Answer("", f"no answer in {endpoint.tries} tries, at last: {problem}"), is_given_up=True)


def _payload(endpoint: Endpoint, question: Question) -> dict[str, Any]:
    messages = [{"role": role, "content": content} for role, content in question.messages]
    drawn = {"max_tokens": question.max_tokens, "temperature": question.temperature, "seed": question.seed}
    return {"model": endpoint.model, "messages": messages, "stream": False, **drawn}


def _is_passing(reply: Reply) -> bool:
    """Whether another try may end otherwise; 200 without an answer is a proxy's page, or cut short."""
    return reply.status in (0, 200, 408, 425, 429) or reply.status >= 500


def _pause(key: str, attempt: int, reply: Reply) -> float:
    """Seconds before the try after `attempt`, the first being 0."""
    if reply.wait_s is not None:
        return min(reply.wait_s, LONGEST_WAIT_S)
    return min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S) * random.Random(f"{key} {attempt}").uniform(0.5, 1)


def _choice(body: bytes) -> dict[str, Any] | None:
    """The first choice in a reply; None where it does not speak the protocol."""
    try:
        choice = json.loads(body)["choices"][0]
        return choice if isinstance(choice["message"], dict) else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _answer(body: bytes) -> Answer | None:
    """The answer in a reply; None where it has none, which a model that was just started may do once."""
    choice = _choice(body)
    if not choice:
        return None
    message, finish, usage = choice["message"], choice.get("finish_reason"), json.loads(body).get("usage")
    content = message.get("content")
    text = content.rpartition(THINKING_ENDS)[2] if isinstance(content, str) else ""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()  # half a pair cannot be written
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    tokens = [count if isinstance(count, int) else 0 for count in counts]
    if finish == "content_filter" or message.get("refusal"):
        return Answer("", "refused", *tokens)
    if finish == "length":
        return Answer(text, f"cut off after {tokens[1]:,} tokens" if tokens[1] else "cut off", *tokens)
    return Answer(text, "", *tokens) if text else None


def _refused(endpoint: Endpoint, reply: Reply) -> UserError:
    """Why no question is answered, and the way out."""
    url, about = address(endpoint.base_url), said(endpoint, reply)
    place = f"{BASE_URL}: {url}"
    if reply.timed_out:
        return UserError(f"{TIMEOUT}: {endpoint.timeout_s:g}: {url} gave no answer within that time; raise it")
    if reply.status == 0:
        return UserError(f"{place}: does not answer ({reply.problem}); start the server, or give another address")
    if reply.status in (401, 403):
        what = (
            "does not take the key in the environment variable that this names" if endpoint.api_key else "wants a key"
        )
        way = "put another there" if endpoint.api_key else "name an environment variable that holds one"
        return UserError(f"{API_KEY}: {url} {what} (HTTP {reply.status}: {about}); {way}")
    if reply.status == 402:
        return UserError(f"{place}: wants to be paid first (HTTP 402: {about})")
    if 300 <= reply.status < 400:
        return UserError(f"{place}: leads on to {visible(reply.location)!r}; give that address")
    if (names := _models(endpoint)) and endpoint.model not in names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return UserError(
            f"{MODEL}: {endpoint.model!r}: {url} has no such model; it has {', '.join(names[:NAMED])}{more}"
        )
    if reply.status == 429:
        return UserError(f"{place}: takes no calls now (HTTP 429: {about}); start again later")
    if reply.status in (200, 404, 405):
        return UserError(
            f"{place}: does not speak the OpenAI protocol (HTTP {reply.status}: {about}); most addresses end in /v1"
        )
    return UserError(f"{place}: cannot answer (HTTP {reply.status}: {about}); look at what the server logs")


def _models(endpoint: Endpoint) -> list[str]:
    """Names of the models that an endpoint lists; none where it has no list."""
    try:
        return [visible(str(each["id"])) for each in json.loads(send(endpoint, "/models").body)["data"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        return []
