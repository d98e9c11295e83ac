"""Wheels for a GPU machine without network, in .whl/, which git ignores and a copy of the clone can carry.

    .venv/bin/python -m benchmarks.gpu.wheels                       # here: packs, and prints the size
    . benchmarks/gpu/use_wheels.sh && python3 -m benchmarks.gpu     # there: unpacks beside the machine's own packages

The list is benchmarks/gpu/wheels.txt, at the versions of constraints.txt, for Python 3.12 on x86-64. Nothing that these
packages need is fetched along: wheels.txt names all that such a machine lacks, and what it is taken to have.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.check import ROOT

FOLDER = ROOT / ".whl"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MOST_BYTES = 48 << 20


def requirements() -> list[str]:
    """The listed packages as name==version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    versions = {line.split("==")[0].lower().replace("_", "-"): line for line in lines if "==" in line}
    names = (line.strip() for line in (ROOT / "benchmarks" / "gpu" / "wheels.txt").read_text().splitlines())
    return [versions[name.lower().replace("_", "-")] for name in names if name and not name.startswith("#")]


def pack(folder: Path, python: str) -> int:
    """Fetch the wheels into a folder, anew; their bytes."""
    for old in folder.glob("*.whl"):
        old.unlink()
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    interpreter = ["--python-version", python, "--implementation", "cp"]
    subprocess.run([*command, *interpreter, *platforms, *requirements()], check=True)
    return sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="of the GPU machine")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    size = pack(options.folder, options.python)
    print(f"{options.folder}: {len(list(options.folder.glob('*.whl')))} wheels, {size / 2**20:.1f} MiB")
    if size > MOST_BYTES:
        sys.exit(f"more than {MOST_BYTES >> 20} MiB")


if __name__ == "__main__":
    main()
