"""`penstock export`: a run's model as a directory that transformers can load."""

import os
import shutil
from pathlib import Path

from penstock.commands.config import ExportConfig
from penstock.errors import UserError
from penstock.memory.strategy import DTYPES
from penstock.models import pretrained
from penstock.models.adapter_files import dtype_of, is_adapter_directory
from penstock.models.chat_template import ChatTemplate, ends_of
from penstock.models.surgery import merge_adapters
from penstock.models.tokenizer_files import load_tokenizer
from penstock.run.directory import RunDirectory, refused, resolve_model


def export(config: ExportConfig) -> None:
    """Copies the model or the adapter of the best, or else the newest verified, checkpoint.

    With --dtype the weights are rounded or widened; with --merge it writes the base with the adapter merged into it.
    """
    RunDirectory.peek(config.run)
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not empty; choose another directory.")
    source = Path(resolve_model(config.run, config.which))
    if source.name != config.which:
        raise UserError(f"{config.run}: this run has no {config.which}; only ppo runs have a critic.")
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
