"""Nothing trains on the wrong thing in silence: broken and dangerous inputs, each refused with its exit code, or warned
of, in the line that names it. Written from the issue that reported them, not from the code that refuses them."""

import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.models import pretrained
from penstock.models.decoder import Decoder
from penstock.models.lora_targets import LoraSpec
from penstock.models.roles import Actor
from tests.conftest import CHATML, TINY, cli, comparisons, demonstrations, save_tiny, save_tokenizer, write_jsonl

Make = Callable[[Path], list[Any]]
"""Makes the input in an empty directory; returns the command line that meets it."""
LLAMA = {"family": "llama", "position": "rotary", "rotary_dim": 8, "norm": "rms", "gated": True, "activation": "silu",
         "qkv_bias": False, "out_bias": False, "mlp_bias": False, "tied": False}  # fmt: skip
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
LONG = [{"prompt_ids": [1, 3, 4, 5, 6, 7 + i]} for i in range(6)]
GRADED = [{"prompt_ids": [1, 3 + i], "answer": "4"} for i in range(4)]
GRADED[1] |= {"mood": "good"}
GRADED[2] |= {"answer": None}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
DEEP = json.loads("[" * 900 + "]" * 900)
NO_PROMPT = CHATML.partition("{% if add_generation_prompt %}")[0]


# --- commands ---------------------------------------------------------------------------------------------------------
def train(path: Path, model: Any = None, rows: list[dict[str, Any]] | str | None = None, *flags: Any) -> list[Any]:
    """`penstock sft` for a step, on token ids of its own unless rows are given."""
    data = path / "data.jsonl"
    if isinstance(rows, str):
        data.write_text(rows)
    else:
        write_jsonl(data, demonstrations(6) if rows is None else rows)
    model = save_tiny(path / "model") if model is None else model
    return ["sft", "--model", model, "--data", data, "--out", path / "run", "--steps", 1, "--batch-size", 2,
            "--samples", 0, "--heldout", 0, *flags]  # fmt: skip


def rank(path: Path, rows: list[dict[str, Any]] | None = None, *flags: Any, model: str | None = None) -> list[Any]:
    """`penstock reward` for a step."""
    data = write_jsonl(path / "pairs.jsonl", comparisons(8) if rows is None else rows)
    model = model or save_tiny(path / "model")
    return ["reward", "--model", model, "--data", data, "--out", path / "reward", "--steps", 1, "--batch-size", 2,
            "--heldout", 0, *flags]  # fmt: skip


def improve(path: Path, *flags: Any, rows: list[dict[str, Any]] | None = None, actor: str | None = None) -> list[Any]:
    """`penstock ppo` for a step."""
    data = write_jsonl(path / "prompts.jsonl", rows or [{"prompt_ids": [1, 3 + i]} for i in range(6)])
    actor = actor or save_tiny(path / "model")
    return ["ppo", "--actor", actor, "--data", data, "--out", path / "ppo", "--steps", 1, "--batch-size", 4,
            "--max-new-tokens", 4, "--samples", 0, *flags]  # fmt: skip


def judge(path: Path, labels: list[Any], *flags: Any, **more: Any) -> list[Any]:
    """`penstock kto` for a step, on votes with these labels."""
    rows = [{"prompt_ids": [1, 3 + i], "response_ids": [4], "label": label} | more for i, label in enumerate(labels)]
    data = write_jsonl(path / "votes.jsonl", rows)
    model = save_tiny(path / "model")
    return ["kto", "--model", model, "--data", data, "--out", path / "kto", "--steps", 1, "--batch-size", 4,
            "--heldout", 0, *flags]  # fmt: skip


def score_with(path: Path, body: str, *flags: Any) -> list[Any]:
    """PPO against a --reward-fn with this body."""
    (path / "fn.py").write_text(f"def score(prompts, responses, **_):\n    {body}\n")
    return improve(path, "--reward-fn", f"{path}/fn.py:score", *flags)


# --- inputs -----------------------------------------------------------------------------------------------------------
def config(family: dict[str, Any] | None = None, **changes: Any) -> Make:
    """A model whose config.json says something else."""

    def make(path: Path) -> list[Any]:
        model = Path(save_tiny(path / "model", **(family or {})))
        content = json.loads((model / "config.json").read_text()) | changes
        (model / "config.json").write_text(
            json.dumps({key: value for key, value in content.items() if value is not ...})
        )
        return train(path, model)

    return make


def weights(change: Callable[[dict[str, torch.Tensor]], Any], *flags: Any, **settings: Any) -> Make:
    """A model whose file of weights was changed in place by a function."""

    def make(path: Path) -> list[Any]:
        model = Path(save_tiny(path / "model", **settings))
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors")
        return train(path, model, None, *flags)

    return make


def files(change: Callable[[Path], Any], shard: int = 5_000_000) -> Make:
    """A model directory whose files were changed by a function, in shards if a size is given."""

    def make(path: Path) -> list[Any]:
        decoder = Decoder(TINY, generator=torch.Generator().manual_seed(0))
        pretrained.save(decoder, path / "model", max_shard_bytes=shard)
        change(path / "model")
        return train(path, path / "model")

    return make


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def adapter(change: Callable[[Path], Any] | None = None, base: dict[str, Any] | None = None, **keys: Any) -> Make:
    """An adapter whose adapter_config.json says something else, or whose files were changed; goes on learning."""

    def make(path: Path) -> list[Any]:
        model = save_tiny(path / "model")
        actor = Actor.from_pretrained(model, lora=LoraSpec(2, targets=("c_attn",)))
        actor.save_pretrained(path / "adapter")
        edit_json(path / "adapter" / "adapter_config.json", **keys)
        if change is not None:
            change(path / "adapter")
        other = model if base is None else save_tiny(path / "other", **base)
        return train(path, other, None, "--adapter", path / "adapter")

    return make


def adapter_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def in_place(path: Path) -> None:
        tensors = load_file(path / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, path / "adapter_model.safetensors")

    return in_place


def as_pickle(path: Path) -> None:
    torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()


def chat_model(path: Path, vocab_size: int = 400, **tokenizer: Any) -> str:
    """A tiny model beside a tokenizer."""
    save_tokenizer(path / "model", **tokenizer)
    return save_tiny(path / "model", vocab_size=vocab_size, max_length=256, hf={})


def text(rows: list[dict[str, Any]] | str, *flags: Any, vocab_size: int = 400, **tokenizer: Any) -> Make:
    """SFT on text, with a tokenizer."""
    settings = {"eos_token": "<|im_end|>"} | tokenizer
    return lambda path: train(path, chat_model(path, vocab_size, **settings), rows, *flags)


def reward_model(path: Path, name: str = "judge", **changes: Any) -> str:
    """A directory of a reward model."""
    decoder = Decoder(dataclasses.replace(TINY, **changes), generator=torch.Generator().manual_seed(0))
    pretrained.save(decoder, path / name, score=torch.ones(1, decoder.config.d_model))
    return str(path / name)


def two_labels(path: Path) -> list[Any]:
    judge = Path(reward_model(path))
    tensors = load_file(judge / "model.safetensors")
    tensors["score.weight"] = torch.ones(2, 16)
    save_file(tensors, judge / "model.safetensors")
    return improve(path, "--reward", judge)


def broken_tokenizer(path: Path) -> list[Any]:
    model = chat_model(path)
    (path / "model" / "tokenizer.json").write_text("{")
    return train(path, model, [{"prompt": "Q", "response": "A"}])


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def length_of(path: Path) -> str:
    (path / "fn.py").write_text(
        "def score(prompts, responses, *, response_ids=None, **_):\n    return [sum(ids) for ids in response_ids]\n"
    )
    return f"{path}/fn.py:score"


def put(**new: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name.replace("__", "."): tensor for name, tensor in new.items()})


def cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


FC, NOISE = "transformer.h.1.mlp.c_fc.weight", torch.Generator().manual_seed(3)
GATE = {"base_model.model.transformer.h.0.mlp.c_fc.weight": torch.zeros(16, 32)}
LORA_A = "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"
MIXTRAL = LLAMA | {"family": "mixtral", "num_experts": 2, "experts_per_token": 1, "expert_ff": 8}
QWEN = LLAMA | {"family": "qwen2", "qkv_bias": True}
DEMO = {"prompt": "Q", "response": "A"}

BROKEN: list[tuple[str, Make, int, str]] = [
    # config.json
    ("a family that is none", config(model_type="mambo"), 2, "no causal language model of that type; native"),
    ("an activation that is none", config(activation_function="mish"), 2, "activation_function: 'mish'"),
    ("attention without its scale", config(scale_attn_weights=False), 2, "scale_attn_weights: False is not supported"),
    ("a model that sees the future", config(is_causal=False), 2, "is_causal: False is not supported"),
    ("no number of layers", config(n_layer=None), 2, "n_layer: None is not supported"),
    ("half a token", config(vocab_size=16.5), 2, "vocab_size: 16.5 is not supported"),
    ("a rope of nobody's", config(LLAMA, rope_parameters={"rope_type": "spiral", "factor": 4.0}), 2, "'spiral' is not"),
    ("a scaling without its factor", config(LLAMA, rope_scaling={"type": "linear"}), 2, "'linear' has {}; .* factor"),
    ("a factor without its scaling", config(LLAMA, rope_scaling={"factor": 4.0}), 2, "'default' has {'factor': 4.0}"),
    ("heads that share nothing",
     config(LLAMA, num_attention_heads=4, num_key_value_heads=3), 2, "4 heads cannot share 3"),
    ("a window of nothing", config(LLAMA | {"family": "mistral"}, sliding_window=-1), 2, "sliding_window: -1"),
    ("layers of another kind", config(QWEN, layer_types=["chunked_attention"] * 2), 2, "layer_types: .*chunked"),
    ("a config of another model", config(n_embd=32), 2, "has shape .* and config.json says"),
    ("config.json is brackets", files(lambda d: (d / "config.json").write_text("[" * 100_000)), 2, "not valid JSON"),
    ("config.json is a well", config(depths=DEEP), 2, "more than 50 deep"),
    ("an adapter's config.json is a well", adapter(base_model_name_or_path=DEEP), 2, "more than 50 deep"),
    ("more layers than anybody has", config(n_layer=2**31), 2, "n_layer: 2147483648 is not supported; .* 1 to 10,000"),
    ("more experts than anybody has", config(MIXTRAL, num_experts=2**20), 2, "experts: 1048576 is not supported"),
    ("a width that no tensor can have", config(n_inner=10**30), 2, "d_ff: 10{30} is not supported"),
    ("config.json is a list", files(lambda d: (d / "config.json").write_text("[]")), 2, "holds no JSON object"),
    # packed weights
    ("bitsandbytes",
     config(quantization_config={"quant_method": "bitsandbytes"}), 2, "and they are full; delete the key"),
    ("fp8", config(quantization_config={"quant_method": "fp8"}), 2, "FineGrainedFP8Config.*--base-dtype nf4"),
    ("gptq",
     config(quantization_config={"quant_method": "gptq"}), 2, "packed .gptq.*take the model that it was made from"),
    ("fp8 without a word", weights(cast(FC, torch.float8_e4m3fn)), 2, "1 weights are stored as F8_E4M3"),
    ("int8 without a word", weights(cast(FC, torch.int8)), 2, "1 weights are stored as I8"),
    # files of weights
    ("a weight is missing", weights(drop(FC)), 2, f"1 weights are missing: {FC}"),
    ("a weight too many", weights(put(transformer__h__7__ln_1__bias=torch.ones(16))), 2, "1 weights belong to no gpt2"),
    ("a value head in a language model", weights(put(v_head__summary__weight=torch.ones(1, 16))), 2, "v_head"),
    ("cut short", files(lambda d: (d / "model.safetensors").write_bytes(b"\x10" * 99)), 2, "damaged or cut short"),
    ("a shard is missing", files(lambda d: next(d.glob("model-00002*")).unlink(), 5_000), 2, "it is missing"),
    ("a head of its own beside a tie", weights(put(lm_head__weight=torch.randn(16, 16, generator=NOISE))), 0,
     "head of its own is used"),
    ("masks of old checkpoints", weights(put(transformer__h__0__attn__bias=torch.ones(1, 1, 32, 32))), 0,
     "1 entries are not used"),
    ("weights that are not finite", weights(lambda t: t[FC].fill_(torch.nan)), 2, "1 weights hold NaN"),
    ("weights that are too large", weights(lambda t: t[FC].fill_(1e30), "--steps", 3, "--warmup", 0), 3,
     "updates in a row were not finite"),
    # adapters
    ("PiSSA", adapter(init_lora_weights="pissa"), 2, "init_lora_weights = 'pissa' is not read.*merge_and_unload"),
    ("OLoRA", adapter(init_lora_weights="olora"), 2, "init_lora_weights = 'olora'"),
    ("LoftQ", adapter(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), 2, "init_lora_weights = 'loftq'"),
    ("an activated adapter", adapter(alora_invocation_tokens=[3, 4]), 2, r"alora_invocation_tokens = \[3, 4\]"),
    ("DoRA", adapter(use_dora=True), 2, "use_dora = True"),
    ("a key of next year", adapter(use_mystery=True), 2, "use_mystery = True is not read here"),
    ("replicated layers", adapter(layer_replication=[[0, 2], [0, 2]]), 2, "layer_replication"),
    ("another method", adapter(peft_type="IA3"), 2, "peft_type 'IA3' is not read here"),
    ("a rank that the file has not", adapter(rank_pattern={"c_attn": 1}), 2, "has shape"),
    ("targets that the file has not", adapter(target_modules=["c_attn", "c_fc"]), 2, "4 adapter weights are missing"),
    ("targets that are not named", adapter(target_modules=None), 2, "target_modules is empty"),
    ("a layer that the config leaves out", adapter(layers_to_transform=[0]), 2, "2 weights belong nowhere"),
    ("a revision of the base", adapter(revision="v2"), 2, "revision = 'v2'"),
    ("half an adapter", adapter(adapter_weights(drop(LORA_A))), 2, f"1 adapter weights are missing: {LORA_A}"),
    ("a whole product in an adapter", adapter(adapter_weights(lambda t: t.update(GATE))), 2, "has a whole weight in"),
    ("an adapter in a pickle", adapter(as_pickle), 2, "adapter_model.bin"),
    ("an adapter of another base", adapter(base={"seed": 9}), 2, "was trained on another base"),
    ("an adapter of another shape",
     adapter(lambda d: (d / "penstock.json").unlink(), {"d_model": 32, "head_dim": 16}), 2, "belongs to another base"),
    # tokenizers and templates
    ("a tokenizer of another model", text([DEMO], vocab_size=100), 2, "belong to different models"),
    ("a tokenizer that is damaged", broken_tokenizer, 2, "its tokenizer cannot be read"),
    ("text without a tokenizer", lambda d: train(d, None, [DEMO]), 4, "the model has no tokenizer"),
    ("ids of another tokenizer", lambda d: train(d, None, [{"prompt_ids": [99], "response_ids": [3]}]), 4,
     "outside the model's vocabulary"),
    ("nothing ends an answer", text([DEMO], eos_token=None), 2, "--eos"),
    ("a template that leaves answers out",
     text([{"messages": [USER, {"role": "assistant", "content": "A"}]}],
          template=CHATML.replace("m.content", "m.content if m.role == 'user' else ''")), 4, "template"),
    ("a template's argument that is none", text([DEMO], "--template-args", "thinking"), 2, "--template-args"),
    # rewards
    ("a reward model of two labels", two_labels, 2, r"score.weight has shape \(2, 16\)"),
    ("a language model as the judge", lambda d: improve(d, "--reward", save_tiny(d / "lm")), 2, "is no reward model"),
    ("a judge as the actor", lambda d: improve(d, "--reward", reward_model(d), actor=reward_model(d, "actor")), 2,
     "is a reward model, and a language model is needed"),
    ("a judge with fewer positions",
     lambda d: improve(d, "--reward", reward_model(d, max_length=8), rows=LONG), 2, "holds rows of 8 tokens"),
    ("a judge with fewer tokens",
     lambda d: improve(d, "--reward", reward_model(d, vocab_size=8)), 2, "does not read the actor's tokens"),
    ("a score that is no number",
     lambda d: score_with(d, "return ['good'] * len(responses)"), 2, "could not convert string to float: 'good'"),
    ("a score that is not finite", lambda d: score_with(d, "return [float('nan')] * len(responses)"), 2, "nan"),
    ("too few scores", lambda d: score_with(d, "return [1.0] * (len(responses) // 2)"), 2, r"gave 2 scores for 4"),
    ("a score that fails", lambda d: score_with(d, "return 1 / 0"), 2, r"ZeroDivisionError.*prompts.jsonl:\d"),
    ("a score of nothing", lambda d: score_with(d, "return [None] * len(responses)"), 2, "none gives a score"),
    ("no list of scores", lambda d: score_with(d, "return 0.5"), 2, "gave a float and no list of scores"),
    ("a function that hangs",
     lambda d: score_with(d, "__import__('time').sleep(600)", "--reward-timeout", 0.5), 2,
     r"fn.py:score: gave no scores within 0.5 seconds .*; 4 answers, the first is the answer to .*prompts.jsonl:\d"),
    ("a worker that dies", lambda d: score_with(d, "__import__('os')._exit(3)", "--reward-workers", 2), 2,
     r"fn.py:score: its process died \(exit code 3\)"),
    ("a field that no record has", lambda d: improve(d, "--reward-fn", "number"), 2,
     "number: requires a field answer, and no record has it; they have no others"),
    ("a field that a record has not", lambda d: improve(d, "--reward-fn", "number", rows=GRADED), 4,
     "prompts.jsonl:3: answer: is missing"),
    ("a field that a record has not, left out",
     lambda d: improve(d, "--reward-fn", "number", "--skip-bad", rows=GRADED), 0, "left out 1 of 4 prompts"),
    ("a field that the function does not read", lambda d: improve(d, "--reward-fn", "number", rows=GRADED[:2]), 0,
     r"ignored fields: mood \(1\)"),
    ("a verifier that is none", lambda d: improve(d, "--reward-fn", "numbers"), 2, "or one of exact_match, number"),
    ("more weights than rewards", lambda d: improve(d, "--reward-fn", "number", "--reward-weights", 1, 2), 2,
     "2 for 1 rewards"),
    ("a time-out of no function", lambda d: improve(d, "--reward", reward_model(d), "--reward-timeout", 5), 2,
     "are for functions, and there is no --reward-fn"),
    ("a reward's weight that is not finite",
     lambda d: improve(d, "--reward-fn", "number", "--reward-weights", "nan"), 2, "finite"),
    ("a score without spread",
     lambda d: score_with(d, "return [1.0] * len(responses)", "--missing-eos-penalty", "none"), 0,
     "WARNING: no spread"),
    ("pairs of equal answers",
     lambda d: rank(d, [{"prompt_ids": [1], "response_ids": [[4], [4]], "ranking": [[0], [1]]}] * 4), 4,
     "0 and 1 are the same"),
    ("pairs that are equal where they are cut",
     lambda d: rank(d, [{"prompt_ids": [1], "response_ids": [[4, 5, 6], [4, 5, 7]], "ranking": [[0], [1]]}] * 4,
                    "--max-length", 3, "--truncate", "right"), 4, "equal|same"),
    ("answers that never end",
     lambda d: improve(d, "--max-new-tokens", 1, "--reward-fn", length_of(d)), 0, "WARNING: missing EOS: 100%"),
    ("a judge that reads no file", lambda d: improve(d, "--reward-fn", d / "nowhere.py:score"), 2, "nowhere.py"),
    ("no judge", improve, 2, "--reward"),
    # data
    ("an answer that somebody disliked",
     text([DEMO | {"label": False}] * 4 + [DEMO]), 0, "4 with label false left out"),
    ("half a weight", text([DEMO | {"weight": 0.5}]), 4, "weight"),
    ("a field twice", text('{"prompt": "Q", "response": "A", "response": "B"}\n'), 4, "response: stands there twice"),
    ("nothing at all", text(""), 4, "empty"),
    ("a field that nobody reads", text([DEMO | {"mood": "good"}] * 3), 0, r"ignored fields: mood \(3\)"),
    ("an id twice", text([DEMO | {"id": 7}] * 3), 0, "2 records repeat an earlier one's id"),
    ("answers longer than the limit",
     text([{"prompt": "Q", "response": "A " * 300}, DEMO, DEMO]), 0, "1 .*--max-length"),
    ("a turn of nobody",
     text([{"messages": [USER, {"role": "wizard", "content": "A"}]}], template=CHATML), 4, "wizard"),
    ("thoughts that the template leaves out",
     text([{"messages": [USER, ASSISTANT | {"reasoning_content": "Hm."}]}], template=CHATML), 4, "reasoning_content"),
    ("tools that the template leaves out",
     text([{"messages": [USER, ASSISTANT], "tools": [TOOL]}], template=CHATML), 4, "tools"),
    ("a system beside a plain prompt", text([DEMO | {"system": "Be kind."}]), 0, "prompt/response as a chat"),
    ("a plain prompt for a chat model", text([DEMO] * 3, template=CHATML), 0, "--apply-chat-template"),
    ("a quoted special token",
     text([{"prompt": "Q", "response": "Say <|im_end|> now"}] * 3), 0, "3 words in texts spell ends or tokens"),
    ("a template without a generation prompt",
     text([{"messages": [USER, ASSISTANT]}] * 3, template=NO_PROMPT), 0, "no branch for add_generation_prompt"),
    ("a conversation that the assistant opens",
     text([{"messages": [ASSISTANT, USER, ASSISTANT]}] * 3, template=CHATML), 0,
     "3 conversations begin with the assistant"),
    ("an answer of nothing", text([{"prompt": "Q", "response": ""}] * 3), 4, "response"),
    ("a line that is no JSON", text('{"prompt": "Q",\n'), 4, "data.jsonl:1"),
    ("a ranking of answers that are not there",
     lambda d: rank(d, [{"prompt_ids": [1], "response_ids": [[4], [5]], "ranking": [[0], [2]]}]), 4, "ranking"),
    ("a prompt that leaves no room",
     lambda d: improve(d, "--reward-fn", length_of(d), rows=[{"prompt_ids": [1] * 40}]), 4, "1:.*prompt.*tokens"),
    # votes
    ("a vote that is a number", lambda d: judge(d, [True, False, 1]), 4, "votes.jsonl:3: label: 1; give true"),
    ("a vote that is a word", lambda d: judge(d, [True, "bad"]), 4, "votes.jsonl:2: label: 'bad'; give true"),
    ("a vote on nothing", lambda d: judge(d, [True, None]), 4, "votes.jsonl:2: label: None; give true"),
    ("a vote without an answer", lambda d: judge(d, [True], response_ids=[]), 4, "response_ids: is empty"),
    ("a vote beside an image", lambda d: judge(d, [True, False], image="a.png"), 4, "image: would change what"),
    ("votes that are all up", lambda d: judge(d, [True] * 4), 0, "WARNING: votes of one kind: all answers were liked"),
    ("votes that are all down", lambda d: judge(d, [False] * 4), 0, "WARNING: votes of one kind: .* disliked"),
    ("comparisons as votes", lambda d: [*judge(d, [True])[:4], write_jsonl(d / "pairs.jsonl", comparisons(4)),
                                        *judge(d, [True])[5:]], 4, "it looks like comparisons.; votes need"),
    ("votes longer than the limit", lambda d: judge(d, [True, False], "--max-length", 2), 4, "no record is left"),
    ("a batch of one vote", lambda d: judge(d, [True, False], "--batch-size", 1), 2, "--batch-size 1: KTO pairs"),
    ("a weight of nothing", lambda d: judge(d, [True], "--desirable-weight", 0), 2, "--desirable-weight 0.*above 0"),
    # flags that shape nothing
    ("an adapter of no rank", lambda d: train(d, None, None, "--lora", 0), 2, "--lora"),
    ("an adapter of no module", lambda d: train(d, None, None, "--lora", 2, "--lora-targets", "q_proj"), 2, "c_attn"),
    ("an alpha of no adapter", lambda d: train(d, None, None, "--lora-alpha", 8), 2, "give its rank too"),
    ("a packed model that learns", lambda d: train(d, None, None, "--base-dtype", "int8"), 2, "cannot learn"),
    ("a model as an adapter", lambda d: train(d, None, None, "--adapter", save_tiny(d / "model")), 2, "is no adapter"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "code", "words"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_input_is_refused_or_warned_of_in_the_line_that_names_it(make, code, words, tmp_path, capfd):
    command = make(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = cli(*command)
    output = capfd.readouterr()
    lines = [*output.err.splitlines(), *output.out.splitlines(), *(str(warning.message) for warning in caught)]
    assert got == code, output.err[-1500:]
    assert any(re.search(words, line) for line in lines), "\n".join(lines)[-3000:]
    if code:
        assert "internal error" not in output.err


def test_there_are_sixty_of_them():
    assert len({name for name, *_ in BROKEN}) == len(BROKEN) >= 60
