"""`penstock export`: a run's model as a directory that transformers can load, or as a GGUF file."""

import os
import shutil
from pathlib import Path

import torch

from penstock.commands.config import ExportConfig
from penstock.errors import UserError
from penstock.memory.strategy import DTYPES
from penstock.models import pretrained
from penstock.models.adapter_files import dtype_of, is_adapter_directory
from penstock.models.chat_template import ChatTemplate, ends_of
from penstock.models.formats import gguf_writer
from penstock.models.surgery import merge_adapters
from penstock.models.tokenizer_files import load_tokenizer
from penstock.run.directory import RunDirectory, refused, resolve_model


def export(config: ExportConfig) -> None:
    """Copies the model or the adapter of the best, or else the newest verified, checkpoint.

    With --dtype the weights are rounded or widened; with --merge it writes the base with the adapter merged into it.
    """
    RunDirectory.peek(config.run)
    if config.format == "gguf":
        export_gguf(config)
        return
    for flag, value in {"--type": config.type, "--lora-only": config.lora_only}.items():
        if value:
            raise UserError(f"{flag}: shapes a GGUF file; add --format gguf.")
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not empty; choose another directory.")
    source = _source(config)
    adapter = is_adapter_directory(source)
    if config.merge and not adapter:
        raise UserError(f"--merge: {config.run} trained all weights and has no adapter; leave --merge out.")
    unfinished = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        if not config.merge:
            for file in (path for path in source.rglob("*") if path.is_file()):
                (unfinished / file.relative_to(source)).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, unfinished / file.relative_to(source))
        if config.merge or config.dtype is not None:
            dtype = DTYPES[config.dtype] if config.dtype else dtype_of(source)
            decoder, extras = pretrained.load(source, dtype=dtype, device="cpu")
            if config.merge:
                merge_adapters(decoder, keep=False)
            extra_config = {key: value for key, value in decoder.config.hf.items() if key.startswith("penstock_")}
            if "score.bias" in extras:
                raise UserError(f"{config.run}: its score head has a bias, which is not written; keep its own files.")
            pretrained.save(decoder, unfinished, score=extras.get("score.weight"), extra_config=extra_config)
        tokenizer = load_tokenizer(str(source))
        template = None if tokenizer is None else ChatTemplate(tokenizer)
        ends = ends_of(template, pretrained.ends_named(source))
        pretrained.copy_tokenizer(source, unfinished, eos_ids=ends.ids, template=template)
        if ends.note:
            print(f"{out}: {ends.note}")
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    except OSError as error:
        raise refused(f"--out {out}", error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"wrote {out}")


def _source(config: ExportConfig) -> Path:
    source = Path(resolve_model(config.run, config.which))
    if source.name != config.which:
        raise UserError(f"{config.run}: this run has no {config.which}; only ppo runs have a critic.")
    return source


def export_gguf(config: ExportConfig) -> None:
    """Writes the whole model, adapters merged, or the adapter alone, as one GGUF file."""
    out = Path(config.out)
    if out.suffix != ".gguf":
        raise UserError(
            f"--out {out}: a GGUF file's name ends in .gguf; give one, as in model-{config.type or 'f16'}.gguf."
        )
    if out.exists():
        raise UserError(f"--out {out}: exists; choose another name.")
    if config.dtype:
        raise UserError("--dtype: of GGUF weights it is --type f32, f16 or q8_0; leave it out.")
    source = _source(config)
    adapter = is_adapter_directory(source)
    if config.lora_only and (not adapter or config.type or config.merge):
        reason = "goes without --type and --merge" if adapter else f"{config.run} trained all weights, no adapter"
        raise UserError(f"--lora-only: {reason}.")
    device = "cpu" if adapter else "meta"
    decoder, extras = pretrained.load(source, dtype=torch.float32, device=device)
    if extras:
        raise UserError(f"{config.run}: llama.cpp has no score heads; export the reward model as safetensors.")
    tokenizer = load_tokenizer(str(source))
    ends = ends_of(None if tokenizer is None else ChatTemplate(tokenizer), pretrained.ends_named(source)).ids
    unfinished = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if config.lora_only:
            notes = gguf_writer.write_adapter(decoder, unfinished, name=out.stem)
        else:
            merge_adapters(decoder, keep=False)
            kind = config.type or "f16"
            notes = gguf_writer.write_model(decoder, unfinished, kind, name=out.stem, tokenizer=tokenizer, ends=ends)
        unfinished.rename(out)
    except OSError as error:
        raise refused(f"--out {out}", error) from error
    finally:
        unfinished.unlink(missing_ok=True)
    for note in notes:
        print(f"{out}: {note}")
    print(f"wrote {out}")
