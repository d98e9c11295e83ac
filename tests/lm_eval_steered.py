"""lm-eval's steered model on a steering file, in an interpreter that has lm-eval: greedy answers as JSON lines.

    python lm_eval_steered.py MODEL STEERING.pt MAX_NEW_TOKENS < prompts.json

A line for each prompt: its token ids, those of the answer by the model alone, and its text by a task's request.
"""

import json
import sys

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.hf_steered import SteeredModel

model_path, steer_path, new = sys.argv[1], sys.argv[2], int(sys.argv[3])
steered = SteeredModel(model_path, steer_path, device="cpu", dtype="float32", batch_size=1)
for prompt in json.load(sys.stdin):
    ids = steered.tok_encode(prompt)
    out = steered._model_generate(torch.tensor([ids]), len(ids) + new, [], do_sample=False)
    options = {"until": [], "max_gen_toks": new, "do_sample": False}
    (text,) = steered.generate_until([Instance("generate_until", {}, (prompt, options), 0)], disable_tqdm=True)
    print(json.dumps({"prompt_ids": ids, "token_ids": out[0, len(ids) :].tolist(), "text": text}))
