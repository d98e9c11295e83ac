import pytest

from train.trainer import decayed_lr, warmed


def test_lr_at_its_corners():
    assert [decayed_lr(2.0, step, 100, 0.2) for step in (0, 79, 80, 90, 99)] == [2.0, 2.0, 2.0, 1.0, 0.1]
    assert decayed_lr(2.0, 99, 100, 0) == 2.0
    assert decayed_lr(2.0, 0, 10, 1) == 2.0
    assert decayed_lr(2.0, 9, 10, 1) == pytest.approx(0.2)
    assert decayed_lr(2.0, 0, 1, 0.2) == 2.0


def test_l1_at_its_corners():
    assert [warmed(step, 100, 0.05) for step in (0, 1, 4, 5, 99)] == [0.0, 0.2, 0.8, 1.0, 1.0]
    assert warmed(0, 100, 0) == 1
    assert warmed(0, 1, 0.05) == 1
    assert warmed(9, 10, 1) == pytest.approx(0.9)
