"""Tiny models and data that every test can make in milliseconds."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.models.decoder import Decoder, DecoderConfig

torch.set_num_threads(1)  # tiny models: threads only wait for each other

TINY = DecoderConfig(
    family="gpt2", vocab_size=16, d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=32,
    max_length=32, hf={"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
)  # fmt: skip
EOS = 2


@pytest.fixture
def tiny_model(tmp_path: Path) -> Callable[..., str]:
    """Makes a model directory: tiny_model(name="model", seed=0, **changes to the config)."""

    def make(name: str = "model", seed: int = 0, **changes: Any) -> str:
        config = dataclasses.replace(TINY, **changes)
        decoder = Decoder(config, generator=torch.Generator().manual_seed(seed))
        decoder.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes rows to a JSON-lines file: jsonl(rows, name="data.jsonl") -> path."""
    return lambda rows, name="data.jsonl": write_jsonl(tmp_path / name, rows)


def demonstrations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Ragged token-id demonstrations; prompts are distinct."""
    rng = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=rng))
        return torch.randint(3, 16, (length,), generator=rng).tolist()

    return [{"prompt_ids": [1, 3 + i % 13, 3 + i // 13, *ids(0, 5)], "response_ids": ids(1, 8)} for i in range(count)]


def comparisons(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Token-id rankings of 2 to 4 responses; more of token 5 is better; equal counts are ties."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        k = int(torch.randint(2, 5, (1,), generator=rng))
        many = [
            torch.randint(3, 8, (int(torch.randint(2, 7, (1,), generator=rng)),), generator=rng).tolist()
            for _ in range(k)
        ]
        counts = [ids.count(5) for ids in many]
        ranking = [[j for j in range(k) if counts[j] == level] for level in sorted(set(counts), reverse=True)]
        rows.append({"prompt_ids": [1, 3 + i % 13, 3 + i // 13], "response_ids": many, "ranking": ranking})
    return rows
