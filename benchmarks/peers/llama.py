"""What llama.cpp says of GGUF files: greedy tokens, log-probabilities of the first token, tokenised texts.

Runs in an environment of its own, with llama-cpp-python alone. Reads jobs from a JSON file, writes answers to another,
and log-probabilities beside it as .npy, one file per job.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import Llama

UNSET = {"yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0}
"""As the file says: llama-cpp-python overrides these by default."""


def answer(job: dict[str, Any], logprobs_file: Path) -> dict[str, Any]:
    """Greedy tokens of every prompt, ids of every text, and what the file says of its ends."""
    options = {"n_ctx": job["context"], "logits_all": True, "verbose": False, "n_threads": 1, "n_threads_batch": 1}
    fp32 = {"type_k": 0, "type_v": 0}  # ggml's number of that type, for the cache
    model = Llama(job["model"], lora_path=job.get("lora"), **options, **fp32, **UNSET)
    greedy, first = [], []
    for prompt in job["prompts"]:
        model.reset()
        model.eval(prompt)
        tokens: list[int] = []
        while True:
            logits = model.scores[model.n_tokens - 1].astype(np.float64)
            if not tokens:
                first.append(logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
            tokens.append(int(logits.argmax()))
            if len(tokens) == job["tokens"] or tokens[-1] in job["ends"]:
                break
            model.eval(tokens[-1:])
        greedy.append(tokens)
    np.save(logprobs_file, np.array(first, dtype=np.float32))
    texts = [model.tokenize(text.encode(), add_bos=True, special=True) for text in job["texts"]]
    template = model.metadata.get("tokenizer.chat_template")
    return {"greedy": greedy, "texts": texts, "eos": model.token_eos(), "template": template}


def main(jobs: Path, answers: Path) -> None:
    """Every job in turn; a model that cannot be loaded is answered with the error."""
    results = []
    for i, job in enumerate(json.loads(jobs.read_text())):
        try:
            results.append(answer(job, answers.with_suffix(f".{i}.npy")))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    answers.write_text(json.dumps(results))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
