"""The tokenizer in a GGUF file's metadata, as tokenizer.json, and back.

llama.cpp names how text is split before byte-level BPE (tokenizer.ggml.pre) and has the rules in its code, which
tokenizer.json holds. The names here are those whose rules we know (src/llama-vocab.cpp); on the way out the name is
that which splits a text of hard cases as the model's own tokenizer does. SentencePiece's BPE has scores there, merges
here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.errors import UserError

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + (r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(END)|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*(END)|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = WORDS.replace("(END)", "") + r"\p{N}" + REST
O200K = WORDS.replace("(END)", CONTRACTIONS + "?") + r"\p{N}{1,3}" + REST
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
RULES: dict[str, tuple[tuple[str, ...], bool]] = {
    # tokenizer.ggml.pre: what text is split by, one after the other; whether a word that is a token needs no merges
    "gpt-2": ((GPT2,), False),
    "llama-bpe": ((LLAMA3,), True),
    "qwen2": ((QWEN2,), False),
    "smollm": ((r"\p{N}", GPT2), False),
    "dbrx": ((LLAMA3,), False),
    "tekken": ((TEKKEN,), True),
    "gpt-4o": ((O200K,), False),
    "bloom": ((BLOOM,), False),
    "falcon": ((PUNCTUATION.replace("|]", "|`]"), GPT2, r"[0-9][0-9][0-9]"), False),
    "default": ((PUNCTUATION, GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"), False),
    "glm4": ((LLAMA3,), True),
}
SAME = {
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "mellum", "modern-bert", "gigachat"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "qwen2": ("deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "solar-open"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "dbrx": ("smaug-bpe", "chatglm-bpe"),
    "gpt-4o": ("llama4", "kanana2"),
    "bloom": ("poro-chat", "gpt3-finnish"),
}
"""Other names of the same rules."""
ELSEWHERE = {"tekken", "gpt-4o"}
"""Whose words of mixed letters and scripts llama.cpp cuts elsewhere than the rules say (benchmarks/gguf)."""
STARTS_WITH_BOS = {"llama-bpe", "tekken"}
"""Whose texts begin with BOS where the file does not say."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
HARD = (
    "I'll WE'LL it's\tO'Neil'S 1234567 3.14 x2y  two   three \n\n\n four\r\n \r\nfive!!! ...\n(a_b)->{c}//\n\n "
    "camelCase HTTPServer iPhone \u00e9cole \u00c9COLE Stra\u00dfe \u4f60\u597d\uff0c\u4e16\u754c\u3002"
    "\u3053\u3093 \ud55c\uad6d \u0440\u0443\u0441 \u0939\u093f\u0928\u094d \u0627\u0644\u0639 \u0661\u0662\u0663 "
    "\u2167 \u00bd \U0001f642\U0001f642 $5 a+b<=c|d^e~f`g` \u00a0nbsp\u2003em end  "
)
"""Text that the rules split in different ways."""
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""transformers' names of special tokens: those in tokenizer.ggml.*_token_id."""
SPACE = "\u2581"
"""SentencePiece's."""


def rules_of(pre: str) -> tuple[str, tuple[tuple[str, ...], bool]] | None:
    """The first name of the same rules, and they."""
    name = next((first for first, others in SAME.items() if pre in others), pre)
    return (name, RULES[name]) if name in RULES else None


def _split(patterns: tuple[str, ...]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# --- reading ----------------------------------------------------------------------------------------------------------


def save_tokenizer(meta: Mapping[str, Any], directory: Path, where: str) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat templates, if the file has a tokenizer.

    Raises UserError for kinds and rules that are not known here.
    """
    from tokenizers import AddedToken, processors

    kind = meta.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{where}: tokenizer.ggml.model: {kind!r} is not read here; gpt2 and llama are.")
    tokens = list(meta["tokenizer.ggml.tokens"])
    types = list(meta.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens))
    while types and types[-1] == UNUSED and tokens[-1] == f"[PAD{len(tokens) - 1}]":
        tokens.pop(), types.pop()  # rows of the table that have no token
    named = {ours: meta.get(f"tokenizer.ggml.{key}_token_id") for ours, key in NAMED.items()}
    named = {ours: tokens[token] for ours, token in named.items() if token is not None and token < len(tokens)}
    make = _byte_level if kind == "gpt2" else _sentencepiece
    tokenizer, starts = make(meta, tokens, types, where)
    for token, kind_of in zip(tokens, types, strict=True):
        special = kind_of == CONTROL or (kind_of == UNKNOWN and kind == "llama")
        if special or kind_of == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    starts = bool(meta.get("tokenizer.ggml.add_bos_token", starts)) and "bos" in named
    ends = bool(meta.get("tokenizer.ggml.add_eos_token", False)) and "eos" in named
    around = [(named["bos"], "{} ")] if starts else []
    single = f"{named['bos']} $A" if starts else "$A"
    single += f" {named['eos']}" if ends else ""
    if starts or ends:
        ids = [(named[ours], tokens.index(named[ours])) for ours in ("bos", "eos") if ours in named]
        template = processors.TemplateProcessing(single=single, special_tokens=ids)
        tokenizer.post_processor = processors.Sequence([template]) if around else template
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {f"{ours}_token": token for ours, token in named.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for key, template in meta.items():
        if key == "tokenizer.chat_template":
            (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        elif key.startswith("tokenizer.chat_template."):
            path = directory / "additional_chat_templates" / f"{Path(key.split('.', 2)[2]).name}.jinja"
            path.parent.mkdir(exist_ok=True)
            path.write_text(template, encoding="utf-8")


def _byte_level(meta: Mapping[str, Any], tokens: list[str], types: list[int], where: str) -> tuple[Any, bool]:
    from tokenizers import Tokenizer, decoders, models

    pre = meta.get("tokenizer.ggml.pre", "default")
    known = rules_of(pre)
    if known is None:
        raise UserError(
            f"{where}: tokenizer.ggml.pre: {pre!r} names rules that are not known here; known are "
            f"{', '.join(sorted({*RULES, *(name for names in SAME.values() for name in names)}))}."
        )
    name, (patterns, whole_words) = known
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole_words))
    tokenizer.pre_tokenizer = _split(patterns)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, name in STARTS_WITH_BOS


def _sentencepiece(meta: Mapping[str, Any], tokens: list[str], types: list[int], where: str) -> tuple[Any, bool]:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    scores = meta["tokenizer.ggml.scores"]
    merges = []
    for i, token in enumerate(tokens):
        if types[i] in (NORMAL, USER_DEFINED):
            halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            merges += [(-scores[i], i, *pair) for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    pairs = [(first, second) for _, _, first, second in sorted(merges)]
    model = models.BPE(vocab=vocabulary, merges=pairs, byte_fallback=True, fuse_unk=True, unk_token=unknown)
    tokenizer = Tokenizer(model)
    spaced = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
    start = [normalizers.Prepend(SPACE)] if spaced else []
    tokenizer.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if spaced else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True


# --- writing ----------------------------------------------------------------------------------------------------------


def metadata_of(tokenizer: Any, size: int, ends: tuple[int, ...]) -> tuple[dict[str, Any], list[str]]:
    """tokenizer.* of a file, and lines for the user. `size`: rows of the token table; `ends`: ids that end an answer.

    Raises UserError for a tokenizer that llama.cpp has no rules for.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(f"{type(tokenizer).__name__}: only tokenizers of the tokenizers package become GGUF.")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    words, added = {token: word for word, token in tokenizer.get_vocab().items()}, tokenizer.added_tokens_decoder
    tokens = [words.get(i, f"[PAD{i}]") for i in range(size)]
    types = [NORMAL if i in words else UNUSED for i in range(size)]
    for i, entry in added.items():
        types[i] = CONTROL if entry.special else USER_DEFINED
    merges = parts["model"].get("merges") or ()
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    notes: list[str] = []
    meta: dict[str, Any]
    if parts["model"]["type"] == "BPE" and "ByteLevel" in json.dumps(parts["pre_tokenizer"]):
        name = _name_of_rules(tokenizer, bool(parts["model"].get("ignore_merges")))
        meta = {"model": "gpt2", "pre": name, "merges": [" ".join(merge) for merge in merges]}
        if name in ELSEWHERE:
            notes.append(
                f"llama.cpp's own form of the rules {name!r} cuts some words elsewhere than this tokenizer does"
            )
        if parts["normalizer"] is not None:
            notes.append("llama.cpp does not normalise text (composed letters of Unicode) as this tokenizer does")
    elif parts["model"]["type"] == "BPE" and parts["model"].get("byte_fallback"):
        meta = _of_sentencepiece(tokenizer, tokens, types, merges)
    else:
        kind = parts["model"]["type"]
        raise UserError(f"the tokenizer is {kind}; llama.cpp takes byte-level BPE and SentencePiece's BPE from here.")
    meta |= {"tokens": tokens, "token_type": types} | _special(tokenizer, ends)
    if len(ends) > 3:
        notes.append(f"a GGUF file names three ends of an answer, and {len(ends) - 3} more are left out")
    meta = {f"tokenizer.ggml.{key}": value for key, value in meta.items()}
    templates = tokenizer.chat_template or {}
    templates = {"default": templates} if isinstance(templates, str) else templates
    for name, template in templates.items():
        meta["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = template
    return meta, notes


def _of_sentencepiece(tokenizer: Any, tokens: list[str], types: list[int], merges: list[list[str]]) -> dict[str, Any]:
    """The rank of the merge that makes a token is its score. Marks `tokens` and `types` as SentencePiece does."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    for i, word in enumerate(tokens):
        if types[i] == NORMAL and len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            types[i] = BYTE
        elif types[i] == USER_DEFINED:
            tokens[i] = word.replace(SPACE, " ")
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = UNKNOWN
    spaced = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith(SPACE)
    scores = [-float(ranks.get(word, len(merges) + i)) for i, word in enumerate(tokens)]
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": spaced}


def _special(tokenizer: Any, ends: tuple[int, ...]) -> dict[str, Any]:
    """The ids of special tokens, and which of them stand around a text."""
    ids = {ours: getattr(tokenizer, f"{ours}_token_id") for ours in NAMED}
    ids["eos"] = ids["eos"] if ids["eos"] is not None else (ends[0] if ends else None)
    others = [token for token in ends if token != ids["eos"]]
    encoded = tokenizer("a").input_ids
    return {
        **{f"{NAMED[ours]}_token_id": token for ours, token in ids.items() if token is not None},
        **dict(zip(("eot_token_id", "eom_token_id"), others, strict=False)),
        "add_bos_token": encoded[0] == ids["bos"],
        "add_eos_token": len(encoded) > 1 and encoded[-1] == ids["eos"],
    }


def _name_of_rules(tokenizer: Any, whole_words: bool) -> str:
    """The name of the rules that split HARD as the tokenizer does."""
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(HARD)
    for name, (patterns, whole) in RULES.items():
        if whole == whole_words and _split(patterns).pre_tokenize_str(HARD) == pieces:
            return name
    raise UserError(
        "the tokenizer splits text by rules that are none of llama.cpp's known here "
        f"({', '.join(RULES)}); convert the exported model with llama.cpp's convert_hf_to_gguf.py."
    )
