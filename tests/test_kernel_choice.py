import json

import torch

from train.config import SaeConfig, TrainConfig
from train.kernel_choice import LAG, KernelChoice
from train.standard import Standard


def choice(kernel: str = "auto") -> KernelChoice:
    config = TrainConfig(sae=SaeConfig(d_sae=100), epochs=1, kernel=kernel, sparse_below=0.1)
    return KernelChoice(config, 100, Standard.kernels)


def choices(l0s: list[float], made: KernelChoice) -> list[bool]:
    out = []
    for l0 in l0s:
        out.append(made.name == "sparse")
        made.note(torch.tensor(l0))
    return out


def test_goes_sparse_late_and_back_only_above_twice():
    l0s = [50.0] * 3 + [9.0] + [15.0] * 5 + [21.0] + [15.0] * 30
    expected = [False] * len(l0s)
    for step in range(3 + LAG + 1, 9 + LAG + 1):  # from the 9 to the 21, LAG steps later; 15 changes nothing
        expected[step] = True
    assert choices(l0s, choice()) == expected


def test_fixed_kernels_stay():
    l0s = [50.0, 1.0] * 20
    assert set(choices(l0s, choice("dense"))) == {False}
    assert set(choices(l0s, choice("sparse"))) == {True}


def test_a_resume_at_every_step_chooses_alike():
    l0s = [50.0] * 5 + [5.0] * 7 + [30.0] * 9 + [5.5] * 20
    whole = choices(l0s, choice())
    assert True in whole
    for at in range(len(l0s)):
        first = choice()
        choices(l0s[:at], first)
        second = choice()
        second.restore(json.loads(json.dumps(first.state())))
        assert choices(l0s[at:], second) == whole[at:]
