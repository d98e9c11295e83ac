"""What all requests share: the SAEs, the desk where the model is asked, and the model itself, which loads behind."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from transformers import AutoConfig

from evaluate.operations import Operation, check_operations
from evaluate.prompts import position_limit
from harvest.chat_template import has_chat_template
from harvest.files import UserError, enough_memory
from harvest.hub import resolved_commit, where_it_is
from harvest.templates import THINK, THINK_END
from harvest.tokenizer import load_whole_tokenizer
from pipeline.explore.catalog import Shelf
from pipeline.explore.jobs import Desk
from pipeline.explore.reading import LIMIT, Reader
from pipeline.explore.replies import Refused
from pipeline.explore.requests import NEW_TOKENS, OPERATIONS, OperationAsked
from pipeline.explore.steering_command import Origin
from pipeline.stages import Runs

T = TypeVar("T")

NO_MODEL = "the rows of these settings were ingested: there is no model that could read or write text"
THREADS = 2  # that read files; a table takes a second, once


class About(NamedTuple):
    """What is known of the settings' model before it is loaded."""

    name: str
    chat: bool  # whether it has a chat template
    thinking: bool  # whether it has tokens around what it thinks
    positions: int | None  # that it has at most
    tokenizer: Any = None  # as `load_whole_tokenizer` gives it


def about_model(runs: Runs) -> About | None:
    """What tokenizer and configuration say; None where rows were ingested.

    Raises UserError for a model that is not there.
    """
    model = runs.config.model
    if not model:
        return None
    commit, offline = resolved_commit(runs.inputs.model), runs.config.evaluate.runtime.offline
    tokenizer = load_whole_tokenizer(model, commit, offline)
    config = AutoConfig.from_pretrained(model.name, **where_it_is(model, commit, offline))
    # Of a folder the last part: where it lies is nobody's business.
    name = Path(model.name).resolve().name if Path(model.name).exists() else model.name
    thinks = {THINK, THINK_END} <= tokenizer.get_vocab().keys()
    return About(name, has_chat_template(tokenizer), thinks, position_limit(config), tokenizer)


class Explorer:
    """The SAEs that can be looked at, and how their model is asked. Used on one event loop."""

    def __init__(
        self, shelves: Mapping[str, Shelf], about: About | None, load: Callable[[], Reader], origin: Origin
    ) -> None:
        """`load` makes the reader, where there is a model (`about`)."""
        self.shelves, self.about, self.load, self.origin = dict(shelves), about, load, origin
        self.desk = Desk()
        self._threads = ThreadPoolExecutor(THREADS, "explore-files")
        self._loading: asyncio.Task[Reader] | None = None

    def start(self) -> None:
        """Begin to load the model, and what pages of the first SAE need."""
        first = self.shelf(None)

        def look() -> None:
            with suppress(UserError, OSError):  # said to who asks
                first.table.tokens_of("the")  # the table, and the vocabulary by its texts

        def load() -> Reader:
            reader = self.load()
            with suppress(UserError):  # before the model computes: loading changes torch's defaults for all threads
                first.language.unembedding()
            return reader

        if self.about:
            self._loading = asyncio.create_task(self.desk.run(load))
            self._loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._looking = asyncio.ensure_future(self.in_thread(look))

    def close(self) -> None:
        """End whatever is under way."""
        self.desk.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def shelf(self, sae: str | None) -> Shelf:
        """An SAE by its id; the first without. Raises Refused for one that is not known."""
        if sae is None:
            return next(iter(self.shelves.values()))
        if sae not in self.shelves:
            raise Refused(404, f"sae: {sae[:80]!r}: no such SAE; one of {', '.join(list(self.shelves)[:20])}")
        return self.shelves[sae]

    async def reader(self) -> Reader:
        """The model, once it is loaded. Raises UserError where there is none, or it cannot be loaded."""
        if self._loading is None:
            raise UserError(NO_MODEL)
        return await asyncio.shield(self._loading)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """The result of work that does not ask the model. Raises UserError where memory does not suffice."""
        with enough_memory("out of memory; ask again when fewer texts and answers are asked for"):
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def read_files(self, shelf: Shelf, work: Callable[[], T]) -> T:
        """The result of work on what of an SAE is loaded. Raises as `gone` does."""
        with gone(shelf):
            return await self.in_thread(work)

    async def ask_model(self, shelf: Shelf, work: Callable[[Reader], T]) -> T:
        """The result of work with the model. Raises Busy, and as `gone` does."""
        reader = await self.reader()
        with gone(shelf):
            return await self.desk.run(lambda: work(reader))

    async def stream(self, shelf: Shelf, work: Callable[[Reader], Iterator[T]]) -> AsyncGenerator[T, None]:
        """What the model writes, as it comes; closing this ends it. Raises Busy, and as `gone` does."""
        reader = await self.reader()
        with gone(shelf):
            async with aclosing(self.desk.stream(lambda: work(reader))) as found:
                async for each in found:
                    yield each

    def listed(self) -> dict[str, Any]:
        """The SAEs, but those whose runs were deleted, and what can be asked of them."""
        about, why_not = self.about, self._failure() if self.about else NO_MODEL
        of_all = {"model": about.name if about else None, "text": not why_not, "why_no_text": why_not}
        saes = []
        for shelf in self.shelves.values():
            with suppress(UserError, OSError):
                saes.append(shelf.about() | of_all)
        limits = {
            "text_tokens": min(LIMIT, (about and about.positions) or LIMIT),
            "new_tokens": NEW_TOKENS,
            "operations": OPERATIONS,
        }
        return {
            "saes": saes,
            "limits": limits,
            "chat": bool(about and about.chat),
            "thinking": bool(about and about.thinking),
        }

    def _failure(self) -> str:
        """Why the model could not be loaded; empty where it was, or is being loaded."""
        loading = self._loading
        return str(loading.exception() or "") if loading and loading.done() and not loading.cancelled() else ""


@contextmanager
def gone(shelf: Shelf) -> Iterator[None]:
    """Where an SAE's runs were deleted, its errors become one that says so. Raises Refused (410) then."""
    try:
        yield
    except (UserError, OSError):
        try:
            shelf.check()
        except UserError as deleted:
            raise Refused(410, str(deleted)) from None
        raise


def operations_of(asked: Sequence[OperationAsked], shelf: Shelf) -> tuple[Operation, ...]:
    """The operations that are asked for. Raises UserError for those that the SAE cannot do."""
    found = tuple(Operation(each.feature, each.op, each.strength, each.where) for each in asked)
    if len(found) > OPERATIONS:
        raise UserError(f"operations: {len(found)}: {OPERATIONS} at most")
    check_operations(found, shelf.saved.sae.d_sae, "operations")
    return found
