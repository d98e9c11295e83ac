"""Streams, events and memory of the GPU that tests/pretended_gpu.py pretends: who may use what when."""

import atexit
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.cuda._sanitizer import StreamSynchronizations


class RaceError(RuntimeError):
    """Two streams, or a stream and the host, use the same memory in no order."""


class Copy(NamedTuple):
    """A copy that the host did not wait for."""

    stream: int
    number: int  # of the launch
    host: Tensor
    value: Tensor  # what the host's tensor is to get, or what it had and must still have
    to_host: bool


class Memory:
    """What a tensor and its views share. It goes back to the stream that it was made on, as with torch's allocator."""

    def __init__(self, size: int) -> None:
        self.stream, self.recorded, self.size = current().number, set[int](), size
        self.write: tuple[int, int] | None = None  # stream and number of the launch
        self.reads: dict[int, int] = {}  # the last of each stream since then
        gpu.allocated += size
        gpu.most_allocated = max(gpu.most_allocated, gpu.allocated)

    def is_in_use(self, stream: int, even_by_readers: bool) -> bool:
        """Whether a stream may still be at an earlier access when this one comes."""
        earlier = [*([self.write] if self.write else []), *(self.reads.items() if even_by_readers else [])]
        return any(
            other != stream and other in gpu.alive and not gpu.clocks.is_ordered_after(stream, number, other)
            for other, number in earlier
        )

    def __del__(self) -> None:
        if not gpu:  # Python ends
            return
        gpu.allocated -= self.size
        users = {*self.reads, *([self.write[0]] if self.write else [])} - self.recorded - {self.stream}
        if users and self.is_in_use(self.stream, True):
            gpu.errors.append(f"memory of stream {self.stream} was given back while streams {users} may use it")


class Gpu:
    """Streams, launches and copies so far."""

    def __init__(self) -> None:
        self.lock, self.clocks = threading.RLock(), StreamSynchronizations()
        self.alive = {0}  # streams
        self.launches = 0
        self.copies: list[Copy] = []
        self.errors: list[str] = []
        self.pinned: set[int] = set()
        self.allocated = self.most_allocated = 0

    def launch(self, what: Any, read: set[Memory], written: set[Memory]) -> int:
        """Note an operation of the current stream; its number."""
        stream = current().number
        with self.lock:
            if self.errors:
                raise RaceError(self.errors.pop())
            self.launches += 1
            self.clocks.update_seq_num(stream, self.launches)
            for memory in read | written:
                if memory.is_in_use(stream, memory in written):
                    raise RaceError(f"{what}: stream {stream} uses memory that another stream may still use")
                if memory in written:
                    memory.write, memory.reads = (stream, self.launches), {}
                else:
                    memory.reads[stream] = self.launches
            return self.launches

    def copy(self, number: int, host: Tensor, value: Tensor, to_host: bool) -> None:
        """Note a copy that the host does not wait for."""
        with self.lock:
            self.copies.append(Copy(current().number, number, host, value, to_host))

    def host_waited(self) -> None:
        """Settle the copies that the host knows to be done."""
        done, settled, left = self.clocks.host_sync_state, [], []
        with self.lock:
            for copy in self.copies:
                is_done = copy.stream not in self.alive or done.get(copy.stream, -1) >= copy.number
                (settled if is_done else left).append(copy)
            self.copies = left
        for copy in settled:
            if copy.to_host:
                copy.host.copy_(copy.value)
            elif not torch.equal(bits(copy.host), bits(copy.value)):
                raise RaceError(f"pinned memory {tuple(copy.host.shape)} was changed before the copy from it was done")

    def host_waits_for(self, stream: int) -> None:
        """All that a stream has to do is done."""
        with self.lock:
            self.clocks.all_streams_wait_for_stream(stream)
        self.host_waited()

    def synchronize(self, _device: Any = None) -> None:
        """All that any stream has to do is done."""
        with self.lock:
            self.clocks.sync_all_streams()
        self.host_waited()


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, _device: Any = None, number: int | None = None) -> None:
        with gpu.lock:
            self.number = next(numbers) if number is None else number
            gpu.clocks.create_stream(self.number)
            gpu.alive.add(self.number)

    def __del__(self) -> None:  # else each wait would look at all streams that ever were
        if gpu:
            with gpu.lock:
                gpu.alive.discard(self.number)
                of_streams, of_events = gpu.clocks.current_sync_states, gpu.clocks.recorded_sync_states
                of_streams.pop(self.number, None)
                for state in [gpu.clocks.host_sync_state, *of_streams.values(), *of_events.values()]:
                    state.pop(self.number, None)

    def wait_stream(self, stream: "Stream") -> None:
        event = Event()
        event.record(stream)
        with gpu.lock:
            gpu.clocks.stream_wait_for_event(self.number, id(event))

    def synchronize(self) -> None:
        gpu.host_waits_for(self.number)


class Event:
    """torch.cuda.Event."""

    def __init__(self) -> None:
        with gpu.lock:
            gpu.clocks.create_event(id(self))

    def __del__(self) -> None:
        if gpu:
            with gpu.lock:
                gpu.clocks.delete_event(id(self))

    def record(self, stream: Stream | None = None) -> None:
        with gpu.lock:
            gpu.clocks.record_state(id(self), (stream or current()).number)

    def synchronize(self) -> None:
        with gpu.lock:
            gpu.clocks.all_streams_wait_for_event(id(self))
        gpu.host_waited()


def current(_device: Any = None) -> Stream:
    """torch.cuda.current_stream."""
    return getattr(of_thread, "stream", default)


@contextmanager
def on_stream(chosen: Stream) -> Iterator[None]:
    """torch.cuda.stream."""
    before = current()
    of_thread.stream = chosen
    try:
        yield
    finally:
        of_thread.stream = before


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


of_thread, numbers = threading.local(), count(1)
gpu: Any = Gpu()
default = Stream(number=0)
atexit.register(lambda: globals().update(gpu=None))
