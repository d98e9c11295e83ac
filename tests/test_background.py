import threading

import pytest

from train.background import BackgroundWriter


def test_writes_go_on_beside_and_in_order():
    done, go = [], threading.Event()

    def slow() -> None:
        assert go.wait(10)
        done.append(1)

    writer = BackgroundWriter()
    writer.submit(slow)
    writer.wait(only_if_done=True)
    assert done == []
    go.set()
    writer.submit(lambda: done.append(2))
    writer.close()
    assert done == [1, 2]


def test_a_failure_comes_out_at_the_next_call():
    def fail() -> None:
        raise OSError(28, "No space left on device")

    writer = BackgroundWriter()
    writer.submit(fail)
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    with pytest.raises(RuntimeError):  # closed
        writer.submit(fail)
