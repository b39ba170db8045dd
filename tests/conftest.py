"""Tiny models and data that every test can make in milliseconds."""

import dataclasses
import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from penstock.algorithms.config import (
    DistillConfig,
    DistillFlags,
    DPOConfig,
    DPOFlags,
    GRPOConfig,
    GRPOFlags,
    KTOConfig,
    KTOFlags,
)
from penstock.cli import main
from penstock.config import DataFlags, OptimFlags, PPOConfig, PPOFlags, RewardConfig, RunFlags, SFTConfig
from penstock.kernels import compile as compiler
from penstock.memory.placement import NAMES, PYTORCH
from penstock.models import pretrained
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.run import report
from tests.zygote import stand_ins, zygotic

PATIENCE = 600
"""Seconds that a test waits for another process or thread at most. No test fails because the machine is busy."""
# A commit passes or fails, never by luck: not that of the random numbers, nor that of the clock.
UNHURRIED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("penstock", derandomize=True, deadline=None, suppress_health_check=UNHURRIED)
settings.load_profile("penstock")
torch.set_num_threads(1)  # tiny models: threads only wait for each other
DRAWN, report._picture = report._picture, lambda *_: "data:image/png;base64,"
"""A report's pictures take longer than the run of a tiny model: the fixture `drawn` has them."""

TINY = DecoderConfig(
    family="gpt2", vocab_size=16, d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=32,
    max_length=32, hf={"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
)  # fmt: skip
EOS = 2


def save_tiny(path: Path, seed: int = 0, **changes: Any) -> str:
    """Saves a tiny GPT-2 with random weights."""
    decoder = Decoder(dataclasses.replace(TINY, **changes), generator=torch.Generator().manual_seed(seed))
    pretrained.save(decoder, path)
    return str(path)


@pytest.fixture
def tiny_model(tmp_path: Path) -> Callable[..., str]:
    """Makes a model directory: tiny_model(name="model", seed=0, **changes to the config)."""
    return lambda name="model", seed=0, **changes: save_tiny(tmp_path / name, seed, **changes)


LONG = ("planner/test_planning.py", "memory/test_fsdp.py", "test_docs.py", "memory/test_two_ranks.py",
        "models/test_config_keys.py", "algorithms/test_ranks.py", "planner/test_budgets.py")  # fmt: skip
"""Files that take longest: they begin first, so that no worker has one of them alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    long = {tests / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: long.get(item.path, len(long)))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_picture", DRAWN)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "compiled", lambda *_: "no compiler")


@pytest.fixture(params=["compiled", "by torch"])
def both_ways(request: pytest.FixtureRequest) -> None:
    """In C where there is a compiler, and by torch."""
    if request.param == "by torch":
        request.getfixturevalue("no_compiler")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = ["Hello there, how are you?", "I am fine. Human: Assistant: system user assistant", "See you\n\nsoon\n"] * 3


def save_tokenizer(directory: Path, *, bos: bool = False, template: Any = None, **names: Any) -> Path:
    """Saves a byte-level BPE of 320 words as a model directory would hold it: <bos> is 0, <eos> 1, <|im_end|> 3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast  # seconds, and few tests need it

    special = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    names = {"bos_token": "<bos>", "eos_token": "<eos>"} | names
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = template
    fast.save_pretrained(directory)
    return directory


@pytest.fixture
def make_tokenizer(tmp_path: Path) -> Callable[..., Path]:
    """make_tokenizer(name="model", bos=False, template=None, **names of tokens): the directory of a tokenizer."""
    return lambda name="model", **changes: save_tokenizer(tmp_path / name, **changes)


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


def votes(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Ragged token-id votes, every second one that of a liked answer."""
    return [row | {"label": i % 2 == 0} for i, row in enumerate(demonstrations(count, seed))]


def ppo_config(**flags: Any) -> PPOConfig:
    """PPOConfig from flat names, as on the command line."""
    group = {field.name: flags.pop(field.name) for field in dataclasses.fields(PPOFlags) if field.name in flags}
    return PPOConfig(**flags, ppo=PPOFlags(**group))


REWARD_FN = """
import random
def score(prompts, responses, *, response_ids=None, **_):
    return [ids.count(5) + random.random() for ids in response_ids]  # draws from the global generator on purpose
"""


def stage_config(directory: Path, stage: str, out: str, *, steps: int = 8, checkpoint_every: int = 3) -> Any:
    """A run of a stage that takes a second, with every kind of state in it: `directory`/`out` is its run directory."""
    model = save_tiny(directory / "model")
    epochs = 2 if stage in ("ppo", "grpo") else 1
    optim = OptimFlags(lr=1e-2, batch_size=8, micro_batch_size=4, epochs=epochs, steps=steps)
    run = RunFlags(out=str(directory / out), checkpoint_every=checkpoint_every)
    if stage == "ppo":
        (directory / "fn.py").write_text(REWARD_FN)
        data = write_jsonl(directory / "prompts.jsonl", [{"prompt_ids": [1, 3 + i]} for i in range(12)])
        return ppo_config(
            actor=model, reward_fn=f"{directory}/fn.py:score", data=DataFlags(data=(data,), max_length=32), run=run,
            optim=optim, max_new_tokens=6, kl_target=2.0, mini_batch_size=4, value_warmup=False, samples=2,
        )  # fmt: skip
    if stage == "grpo":
        (directory / "fn.py").write_text(REWARD_FN)
        data = write_jsonl(directory / "prompts.jsonl", [{"prompt_ids": [1, 3 + i]} for i in range(12)])
        flags = GRPOFlags(group_size=4, max_new_tokens=6, dynamic_sampling=True)
        return GRPOConfig(
            model=model,
            reward_fn=f"{directory}/fn.py:score",
            data=DataFlags(data=(data,), max_length=32),
            run=run,
            optim=optim,
            grpo=flags,
            mini_batch_size=4,
            samples=2,
        )
    if stage == "sft":
        data = write_jsonl(directory / "sft.jsonl", demonstrations(30))
        files = DataFlags(data=(data,), max_length=32)
        return SFTConfig(model=model, data=files, run=run, optim=optim, eval_every=2, samples=2)
    if stage == "distill":
        teacher = save_tiny(directory / "teacher", seed=1, num_layers=3)
        files = DataFlags(data=(write_jsonl(directory / "sft.jsonl", demonstrations(30)),), max_length=32)
        distill = DistillFlags(on_policy=0.5, max_new_tokens=6, loss="jsd", teacher_top_k=5, sft_coef=0.1)
        return DistillConfig(
            model=model, teacher=teacher, data=files, run=run, optim=optim, distill=distill, eval_every=2, samples=2
        )
    if stage == "kto":
        files = DataFlags(data=(write_jsonl(directory / "votes.jsonl", votes(30)),), max_length=20)
        return KTOConfig(model=model, data=files, run=run, optim=optim, kto=KTOFlags(beta=0.5), eval_every=4)
    files = DataFlags(data=(write_jsonl(directory / "rankings.jsonl", comparisons(30)),), max_length=32)
    if stage == "dpo":
        flags = DPOFlags(sft_coef=0.1)
        return DPOConfig(model=model, data=files, run=run, optim=optim, dpo=flags, eval_every=4)
    return RewardConfig(model=model, data=files, run=run, optim=optim, eval_every=4)


ROWS = tuple(name for name in NAMES if name not in PYTORCH)
"""Strategies that differ on one rank: there PyTorch's rows are `gemini`."""


def cli(*arguments: Any) -> Any:
    """Runs the command line; returns its exit code."""
    try:
        main([*map(str, arguments)])
    except SystemExit as error:
        return error.code
    return 0


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environments(size: int, **changes: str) -> list[dict[str, str]]:
    """Environments of `size` processes of one group, without a launcher that would end them."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    shared = {**os.environ, **address, "OMP_NUM_THREADS": "1", **changes}
    return [{**shared, "RANK": str(rank)} for rank in range(size)]


def torchrun(*command: Any, ranks: int = 2, **environment: str) -> str:
    """What a script, or `-m` and a module, prints on so many ranks. It succeeds."""
    launch = zygotic("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *command)
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": str(stand_ins() / "python"), **environment}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=PATIENCE, env=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def last_model(run: str | Path) -> Path:
    """The model directory in the latest checkpoint of a run."""
    checkpoints = Path(run) / "checkpoints"
    return checkpoints / (checkpoints / "latest").read_text().strip() / "model"


def assert_same_metrics(run: str | Path, other_run: str | Path) -> None:
    for row, other_row in zip(metrics(run), metrics(other_run), strict=True):
        assert row == pytest.approx(other_row, abs=1e-5)


def metrics(run: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
