"""Which device and precision a stage computes with, and the record of what can change last bits."""

import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from harvest.files import UserError

ALL_THREADS = torch.get_num_threads()  # before a stage sets its own: stages of one process follow one another


def resolve_device(setting: str) -> torch.device:
    """The device of a `runtime.device` setting.

    Raises UserError when a GPU is asked for and there is none.
    """
    if setting == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device: 'cuda': torch sees no GPU; set it to auto or cpu")
    if setting == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # float32 is float32: an environment variable of NVIDIA's containers allows TF32 in products, torch in convolutions.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", torch.cuda.current_device())


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process among those that a launcher started on this machine (LOCAL_RANK), made the current one.

    Raises UserError when the machine has fewer GPUs than processes.
    """
    rank = local_rank() if device.type == "cuda" else None
    if rank is None:
        return device
    if rank >= torch.cuda.device_count():
        raise UserError(
            f"runtime.device: {torch.cuda.device_count()} GPUs for rank {rank} (counted from 0) of this "
            "machine; start no more processes than GPUs, or set it to cpu"
        )
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def local_rank() -> int | None:
    """LOCAL_RANK, this process among those of its machine, as launchers set it; None where it is not set.

    Raises UserError for a value that cannot be.
    """
    rank = os.environ.get("LOCAL_RANK")
    if rank is not None and not rank.isdecimal():
        raise UserError(f"LOCAL_RANK={rank}: it counts the processes of this machine from 0; set it so, or unset it")
    return None if rank is None else int(rank)


def resolve_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The precision of a `compute_dtype` setting.

    auto is bfloat16, except on GPUs before Ampere and on CPUs without bfloat16 instructions: torch emulates its
    products there, on a CPU at a sixth of the float32 rate. A language model is spared that (`harvest/products.py`),
    but float32 is faster still.
    """
    if setting != "auto":
        return torch.bfloat16 if setting == "bfloat16" else torch.float32
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 itself: a GPU from Ampere on, or a CPU with such instructions."""
    if device.type == "cuda":
        return is_ampere(device)
    capabilities = torch.cpu.get_capabilities()
    return device.type != "cpu" or any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def is_ampere(device: torch.device) -> bool:
    """Whether the device is a GPU of compute capability 8.0 or more: bfloat16 products, and kernels that use them."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def device_name(device: torch.device) -> str:
    """Model name of the GPU or CPU; a CPU's with the widest instructions that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "CPU")
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def numerics(device: torch.device, dtype: torch.dtype, **more: Any) -> dict[str, Any]:
    """What can change the last bits of a result though no setting does; a resume must find it unchanged."""
    if device.type == "cuda":
        more |= {"float32_products": torch.get_float32_matmul_precision()}
    if is_ampere(device):
        with suppress(PackageNotFoundError):
            more |= {"triton": version("triton")}
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "compute_dtype": str(dtype).removeprefix("torch."),
        **more,
    }


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def check_threads(setting: str, threads: int, device: torch.device) -> None:
    """Raise UserError for more threads than cores where their number enters a result; two are always allowed."""
    if device.type == "cpu" and threads > max(2, cores()):
        raise UserError(
            f"{setting}: {threads:,}: this machine has {cores()} cores; lower it (it is part of the settings' "
            "fingerprint, as it changes last bits)"
        )


def set_threads(threads: int, device: torch.device, hashed: str = "") -> int:
    """Set torch's CPU threads (0: all cores), no more than there are cores, and return how many are used.

    Raises UserError as `check_threads` does for the number of a setting that is hashed.
    """
    if hashed:
        check_threads(hashed, threads, device)
    if device.type == "cpu":
        most = max(2, cores())
        if threads > most:
            print(
                f"runtime.threads: {threads:,}: this machine has {cores()} cores; {most} threads are used", flush=True
            )
        torch.set_num_threads(min(threads, most) or ALL_THREADS)
    return torch.get_num_threads()
