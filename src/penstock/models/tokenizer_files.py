"""The tokenizer beside a model, as transformers reads it; and what other programs read of how its answers end."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penstock.errors import UserError, one_line
from penstock.models.adapter_files import base_of
from penstock.models.formats.gguf_file import local_directory

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

ENDS_FILES = ("config.json", "generation_config.json")


def load_tokenizer(source: str) -> Any:
    """The tokenizer beside a model, or None when it has no tokenizer files. Never runs remote code.

    An adapter without one has its base's.
    """
    path = local_directory(source)
    if path.is_dir() and not any((path / name).exists() for name in TOKENIZER_FILES):
        path = local_directory(base_of(source))
    if path.is_dir() and not any((path / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error).rstrip('.')}"
        raise UserError(
            f"{source}: its tokenizer cannot be read ({reason}); put the model's own tokenizer files beside it."
        ) from error


def check_fit(tokenizer: Any, vocab_size: int, source: str) -> None:
    """Raises UserError when the tokenizer can write ids that the model has no embedding for."""
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= vocab_size:
        raise UserError(
            f"{source}: the tokenizer writes ids up to {highest} and the model has {vocab_size} embeddings; they "
            "belong to different models. Put the model's own tokenizer files beside it."
        )


def read_ends(directory: Path) -> tuple[int, ...]:
    """The ids that end an answer by config.json and generation_config.json, of those that are there."""
    ids: list[int] = []
    for name in ENDS_FILES:
        content = _read(directory / name)
        named = content.get("eos_token_id")
        if named is None:  # of the whole model, if this is the text model of one that also sees or hears
            named = (content.get("text_config") or {}).get("eos_token_id")
        ids += [token for token in (named if isinstance(named, list) else [named]) if token is not None]
    return tuple(dict.fromkeys(ids))


def write_ends(directory: Path, ids: Sequence[int], tokenizer: Any = None) -> None:
    """Names the ids in config.json and generation_config.json, so that other programs end answers where we do.

    An adapter's directory has no config.json and gets none. A tokenizer without an EOS gets the first id as its own.
    """
    if not ids:
        return
    model = _read(directory / ENDS_FILES[0])
    kept = {name: model[name] for name in ("bos_token_id", "pad_token_id") if model.get(name) is not None}
    named = {"eos_token_id": ids[0] if len(ids) == 1 else list(ids)}
    reads_last = "penstock_score_mean" in model
    if reads_last:
        named["pad_token_id"] = pad_of(model, ids, tokenizer)
    if model:
        _write(directory / ENDS_FILES[0], model | named)
    _write(directory / ENDS_FILES[1], (_read(directory / ENDS_FILES[1]) or kept) | named)
    path = directory / "tokenizer_config.json"
    if tokenizer is not None and tokenizer.eos_token is None and path.exists():
        _write(path, _read(path) | {"eos_token": tokenizer.convert_ids_to_tokens(ids[0])})
    if reads_last and tokenizer is not None and tokenizer.pad_token_id != named["pad_token_id"] and path.exists():
        _write(path, _read(path) | {"pad_token": tokenizer.convert_ids_to_tokens(named["pad_token_id"])})


def pad_of(config: dict[str, Any], ends: Sequence[int], tokenizer: Any = None) -> int:
    """What pads the rows of a reward model in transformers, which reads a score at the last token that is no pad: so
    none that ends an answer. Without a token for it, the last of the vocabulary, which hardly ends a cut row."""
    named = [config.get("pad_token_id"), config.get("bos_token_id")]
    if tokenizer is not None:
        named[1:1] = [tokenizer.pad_token_id]
        named.append(tokenizer.unk_token_id)
    size = len(tokenizer) if tokenizer is not None else config["vocab_size"]
    return next(token for token in [*named, *range(size - 1, -1, -1)] if token is not None and token not in ends)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {one_line(error).rstrip('.')}.") from error
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
