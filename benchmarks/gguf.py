"""GGUF files that penstock wrote, run by llama.cpp: the same greedy tokens and log-probabilities as here.

    python -m benchmarks gguf --model SmolLM2.gguf

Tiny models of each family and SmolLM2, in f32, f16 and q8_0; adapters; tokenizers of every kind of rules. f16 holds the
tiny models' weights exactly, and there llama.cpp rounds every product's inputs to f16; in f32 it does not, and what
remains is the files. Its cache is fp32. Needs llama-cpp-python in an environment of its own: the python that
PENSTOCK_LLAMA_PYTHON names, or .peers/llama_cpp, which is made where it is missing
(a C++ compiler, half an hour of one core).
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from benchmarks.facts import flags, result_path, write
from benchmarks.peers.run import HERE, environment_of, requirements_of
from penstock.models import pretrained
from penstock.models.chat_template import ChatTemplate
from penstock.models.decoder import Decoder
from penstock.models.families import FAMILIES
from penstock.models.formats import gguf_writer
from penstock.models.formats.gguf_tokenizer import HARD, RULES, SPACE, _split
from penstock.models.lora import adapters_of
from penstock.models.lora_targets import LoraSpec
from penstock.models.surgery import add_adapters
from penstock.models.tokenizer_files import load_tokenizer
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling

TOKENS, CLOSE, SAME = 32, 1e-2, 0.95
SIZES = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
ROTARY = SIZES | {"intermediate_size": 96, "max_position_embeddings": 256, "num_key_value_heads": 2}
GEMMA = ROTARY | {"num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
PHI = {"sliding_window": None, "pad_token_id": 0}
EXPERTS = {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2}
GPT_OSS = {"head_dim": 64, "max_position_embeddings": 131_072, "sliding_window": 8, "rope_parameters": {
    "rope_type": "yarn", "rope_theta": 150_000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "truncate": False, "original_max_position_embeddings": 4096}}  # fmt: skip
"""As published. llama.cpp rounds the ends of yarn's ramp; with them rounded here too, all are equal within 1e-5."""
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")
"""Families whose routers, of random weights, choose other experts where llama.cpp rounds their inputs to f16."""
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"vocab_size": 256, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}),
    "bloom": ("bloom", {"vocab_size": 256, "hidden_size": 64, "n_layer": 3, "n_head": 4}),
    "gpt_neox": ("gpt_neox", {k: v for k, v in ROTARY.items() if k != "num_key_value_heads"}),
    "gpt_neox, sequential": ("gpt_neox", SIZES | {"intermediate_size": 96, "use_parallel_residual": False,
                                                  "rotary_pct": 1.0}),
    "llama": ("llama", ROTARY),
    "llama, tied, biased, wide heads": ("llama", ROTARY | {"tie_word_embeddings": True, "attention_bias": True,
                                                           "head_dim": 32}),
    "llama, llama3 rope": ("llama", ROTARY | {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}}),
    "llama, linear rope": ("llama", ROTARY | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0,
                                                                  "factor": 4.0}}),
    "mistral": ("mistral", ROTARY | {"sliding_window": None}),
    "qwen2": ("qwen2", ROTARY),
    "qwen3": ("qwen3", ROTARY | {"head_dim": 32}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", GEMMA),
    "granite": ("granite", ROTARY | {"embedding_multiplier": 6.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
                                     "attention_multiplier": 0.3}),
    "smollm3": ("smollm3", ROTARY | {"num_hidden_layers": 6}),
    "qwen2, yarn rope": ("qwen2", ROTARY | {"rope_parameters": YARN}),
    "phi3": ("phi3", ROTARY | PHI),
    "phi3, partly rotary": ("phi3", ROTARY | PHI | {"partial_rotary_factor": 0.75}),
    "phi3, longrope": ("phi3", ROTARY | PHI | {"original_max_position_embeddings": 256, "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 256,
                            "short_factor": [1.0 + i / 4 for i in range(8)], "long_factor": [9.0] * 8}}),
    "olmo2": ("olmo2", ROTARY),
    "olmo3, yarn rope": ("olmo3", ROTARY | {"num_hidden_layers": 5, "sliding_window": 8, "rope_parameters": {
        "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}}),
    "ministral": ("ministral", ROTARY | {"sliding_window": 128}),
    "ministral3": ("ministral3", ROTARY | {"head_dim": 32, "rope_parameters": YARN | {
        "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}}),
    "mixtral": ("mixtral", ROTARY | {"num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", ROTARY | EXPERTS | {"moe_intermediate_size": 32, "norm_topk_prob": True}),
    "gpt_oss": ("gpt_oss", ROTARY | EXPERTS | {"sliding_window": 8, "rope_parameters": {
        "rope_type": "default", "rope_theta": 500.0}}),
    "gpt_oss, its own rope": ("gpt_oss", ROTARY | EXPERTS | GPT_OSS),
}  # fmt: skip
"""Small configs that llama.cpp has a place for: model_type, what the config says."""
QUESTIONS = (
    "What is the capital of France?", "Why is the sky blue?", "Name three colours.", "What is 7 plus 5?",
    "Who wrote Hamlet?", "How do I boil an egg?", "Write two lines about rain.", "What do bees make?",
    "Say hello in Spanish.", "What is photosynthesis?", "Which planet is largest?", "Tell me a joke.",
    "List two uses of a hammer.", "What comes after Tuesday?", "Give me a name for a cat.", "What is a spider?",
    "What is gravity?", "Where do penguins live?", "Finish: once upon a time", "What is a noun?",
)  # fmt: skip


def decoder_of(family: str, settings: dict[str, Any]) -> Decoder:
    """Random weights that f16 holds exactly, whose products keep their inputs' size: louder ones make llama.cpp's
    rounding to f16 larger from layer to layer."""
    hf = transformers.AutoConfig.for_model(family, **settings).to_dict()
    decoder = Decoder(FAMILIES[family].config_from_hf(hf), dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            scale = 0.2 if weight.dim() == 1 else 1.0 / weight.shape[-1] ** 0.5
            keep = "norm" in name and name.endswith("weight") and not decoder.config.norm_offset
            weight.mul_(float(keep)).add_(scale * torch.randn(weight.shape, generator=generator))
            weight.copy_(weight.half().float())
    return decoder


def job(model: Path, prompts: Sequence[Sequence[int]], **more: Any) -> dict[str, Any]:
    """One for peers/llama.py."""
    base = {"model": str(model), "prompts": [list(prompt) for prompt in prompts], "texts": [], "ends": []}
    return base | {"tokens": TOKENS, "context": 256} | more


def expected(decoder: Decoder, prompts: Sequence[list[int]], ends: Sequence[int] = ()) -> dict[str, Any]:
    """Our greedy tokens, and the log-probabilities of all words in the place of each."""
    answers = generate(decoder, prompts, Sampling(temperature=0.0, max_new_tokens=TOKENS), eos_ids=ends)
    steps = []
    with torch.no_grad():
        for answer in answers:
            row = torch.tensor([answer.prompt_ids + answer.response_ids[:-1]])
            states = decoder(row)[0, len(answer.prompt_ids) - 1 :]
            steps.append(decoder.logits(states).log_softmax(-1).numpy())
    return {"greedy": [answer.response_ids for answer in answers], "steps": steps}


def tiny_jobs(directory: Path, names: Collection[str]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By name: what llama.cpp is asked, and what we say."""
    jobs = {}
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(256, (n,), generator=generator).tolist() for n in (1, 3, 9, 14, 20, 31) for _ in range(4)]
    for name, (family, settings) in ((name, TINY[name]) for name in names):
        decoder = decoder_of(family, settings)
        ours = expected(decoder, prompts)
        for kind in ("f32", "f16", "q8_0"):
            path = directory / f"{len(jobs)}.gguf"
            gguf_writer.write_model(decoder, path, kind, name=name, tokenizer=None, ends=())  # type: ignore[arg-type]
            jobs[f"{name}, {kind}"] = job(path, prompts), ours
        if name in ("llama", "gpt2", "gpt_neox", "gemma3", "olmo2", "phi3", "mixtral", "qwen3_moe", "gpt_oss"):
            base = Path(jobs[f"{name}, {'f32' if name in MIXTURES else 'f16'}"][0]["model"])
            jobs[f"{name}, adapter"] = adapter_job(decoder, base, directory / f"{len(jobs)}.gguf", prompts)
    return jobs


def adapter_job(decoder: Decoder, base: Path, path: Path, prompts: Sequence[list[int]]) -> Any:
    """A random adapter on every product, of two ranks and scales."""
    products = {target.theirs.rsplit(".", 1)[-1] for target in _targets(decoder)}
    ranks = ((min(products), 2),)
    add_adapters(decoder, LoraSpec(4, 6.0, ranks=ranks, rslora=True))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in adapters_of(decoder):
            adapter.b.copy_(torch.randn(adapter.b.shape, generator=generator) * 0.1)
    gguf_writer.write_adapter(decoder, path, name="adapter")
    return job(base, prompts, lora=str(path)), expected(decoder, prompts)


def _targets(decoder: Decoder) -> list[Any]:
    from penstock.models.lora_targets import lora_targets_of

    return [target for target in lora_targets_of(decoder.config) if not target.table]


def smollm2_jobs(source: Path, directory: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """SmolLM2 as we write it, with its tokenizer, template and end."""
    decoder, tokenizer = pretrained.load(source, dtype=torch.float32)[0], load_tokenizer(str(source))
    template = ChatTemplate(tokenizer)
    texts = [template.render([{"role": "user", "content": question}], answer=True) for question in QUESTIONS]
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    ours = expected(decoder, prompts, decoder.config.eos_ids)
    hard = [HARD, "x", " a  b\n\nc", "<|im_start|>user\nhi<|im_end|>", *QUESTIONS]
    ours |= {"texts": [tokenizer(text).input_ids for text in hard], "template": tokenizer.chat_template, "eos": 2}
    jobs = {}
    for kind in ("f32", "f16", "q8_0"):
        path, ends = directory / f"smollm2-{kind}.gguf", decoder.config.eos_ids
        gguf_writer.write_model(decoder, path, kind, name="SmolLM2", tokenizer=tokenizer, ends=ends)  # type: ignore
        jobs[f"SmolLM2, {kind}"] = job(path, prompts, texts=hard, ends=list(ends)), ours
    return jobs


def tokenizer_jobs(directory: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """A tokenizer of each kind of rules, and SentencePiece's BPE with and without a space in front."""
    made = {name: byte_level(name) for name in RULES}
    made |= {"llama": sentencepiece(spaced=True), "llama, no space in front": sentencepiece(spaced=False)}
    jobs, texts = {}, [HARD, "a", "Hello there", " two  spaces", "1234567", "<s>x</s> y", "tail \n", "\n\nx\ty"]
    for name, backend in made.items():
        wrapped = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
        size = len(wrapped) + 5  # rows of the table without a token
        decoder, path = decoder_of("llama", ROTARY | {"vocab_size": size}), directory / f"tokenizer-{len(jobs)}.gguf"
        gguf_writer.write_model(decoder, path, "f16", name=name, tokenizer=wrapped, ends=(2,))
        ours = {"greedy": [], "steps": [], "texts": [wrapped(text).input_ids for text in texts], "eos": 2}
        jobs[f"tokenizer {name}"] = job(path, [], texts=texts), ours
    return jobs


CORPUS = [HARD, *QUESTIONS, "The cat sat on the mat. There they are: HTTPServer, camelCase and 2024-11-29."] * 4
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(name: str) -> Tokenizer:
    """Byte-level BPE by these rules, of a few hundred words."""
    patterns, whole = RULES[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer, tokenizer.decoder = _split(patterns), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {"vocab_size": 500, "special_tokens": SPECIAL, "show_progress": False}
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(initial_alphabet=alphabet, **options))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def sentencepiece(*, spaced: bool) -> Tokenizer:
    """BPE as SentencePiece writes it, with and without a space in front of a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    start = [normalizers.Prepend(SPACE)] if spaced else []
    tokenizer.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", SPACE)])
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    words = [word for text in CORPUS for word in text.replace(" ", " \n").split("\n")]
    tokenizer.train_from_iterator([word for word in words if word.isascii()], trainer)
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def compare(asked: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any], first: Path) -> dict[str, Any]:
    """The share of prompts with equal greedy tokens, the largest difference of the first token's log-probability and of
    all words' in its place, how near a tie was where texts part, and whether texts, template and end are equal."""
    if "error" in theirs:
        return theirs
    row: dict[str, Any] = {}
    if asked["prompts"]:
        same = [a == b for a, b in zip(ours["greedy"], theirs["greedy"], strict=True)]
        gaps = np.abs(np.load(first) - np.stack([steps[0] for steps in ours["steps"]]))
        own = gaps[np.arange(len(gaps)), [tokens[0] for tokens in ours["greedy"]]]
        row = {
            "same_greedy": sum(same) / len(same),
            "first_logprob": float(own.max()),
            "any_logprob": float(gaps.max()),
        }
        if not all(same):
            answers = zip(ours["greedy"], theirs["greedy"], ours["steps"], strict=True)
            row["tie"] = max(tie(a, b, steps) for a, b, steps in answers if a != b)
    if "texts" in ours:
        row["other_ids"] = [t for t, a, b in zip(asked["texts"], ours["texts"], theirs["texts"], strict=True) if a != b]
    for key in ("template", "eos"):
        if key in ours:
            row[f"same_{key}"] = ours[key] == theirs[key]
    return row


def tie(ours: list[int], theirs: list[int], steps: np.ndarray) -> float:
    """Where two greedy texts part: how much likelier our word is than theirs, by our log-probabilities."""
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    return float("inf") if first is None else float(steps[first, ours[first]] - steps[first, theirs[first]])


def wrong(name: str, row: dict[str, Any]) -> bool:
    """Whether it misses the bar: greedy texts, and the first word's log-probability. q8_0 is shown, not judged. `tie`
    says beside it how near one texts parted: random weights make many words almost equally likely."""
    if "error" in row or row.get("other_ids") or not all(row.get(key, True) for key in ("same_template", "same_eos")):
        return True
    return "q8_0" not in name and (row.get("same_greedy", 1) < SAME or row.get("first_logprob", 0) > CLOSE)


def run(python: Path, directory: Path, jobs: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Asks llama.cpp, and compares."""
    (directory / "jobs.json").write_text(json.dumps([asked for asked, _ in jobs.values()]))
    command = [str(python), str(HERE / "llama.py"), str(directory / "jobs.json"), str(directory / "answers.json")]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, env=variables)
    answers = json.loads((directory / "answers.json").read_text())
    return {
        name: compare(asked, ours, theirs, directory / f"answers.{i}.npy")
        for i, ((name, (asked, ours)), theirs) in enumerate(zip(jobs.items(), answers, strict=True))
    }


def llama_python() -> Path:
    """The python with llama-cpp-python."""
    return Path(os.environ.get("PENSTOCK_LLAMA_PYTHON") or environment_of("llama_cpp"))


def main(arguments: list[str]) -> int:
    """Writes the files, has llama.cpp run them, and prints a row for each."""
    parser = flags(__doc__)
    parser.add_argument("--model", help="SmolLM2's GGUF file (tests/smollm2.py fetches it); default: tiny models only")
    parser.add_argument("--only", nargs="*", help="tiny models, by name; other rows stay as they were measured")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        jobs = tiny_jobs(directory, options.only or TINY)
        jobs |= {} if options.only else tokenizer_jobs(directory)
        if options.model:
            jobs |= smollm2_jobs(Path(options.model), directory)
        rows = run(llama_python(), directory, jobs)
    for name, row in rows.items():
        print(f"{'WRONG ' * wrong(name, row)}{name}: {json.dumps(row)}")
    kept = json.loads(result_path("gguf").read_text())["rows"] if options.only else {}
    write("gguf", {"requirements": requirements_of("llama_cpp"), "rows": kept | rows})
    return int(any(wrong(name, row) for name, row in rows.items()))
