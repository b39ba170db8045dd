"""The weights of a model directory, full and by Hugging Face's names, whatever they are kept in."""

from pathlib import Path

from penstock.errors import UserError
from penstock.models import weight_files
from penstock.models.families import multimodal
from penstock.models.formats import bitsandbytes, gguf_file
from penstock.models.moe import mxfp4
from penstock.models.weight_files import Weights, packed_by, read_json


def open_weights(directory: Path, allow_pickle: bool) -> Weights:
    """Those of the text model. Raises UserError for files that are missing, damaged or contradict each other."""
    if (directory / gguf_file.STAMP).exists():
        return gguf_file.open_weights(directory)
    hf = read_json(directory / "config.json")
    weights = mxfp4.unpacked(bitsandbytes.unpacked(weight_files.open_weights(directory, allow_pickle)))
    if packed_by(hf) == "bitsandbytes" and not weights.packed:
        raise UserError(
            f"{directory / 'config.json'}: quantization_config says that bitsandbytes packed the weights, and they are "
            "full; delete the key, and give --lora 16 --base-dtype nf4 to pack them."
        )
    return multimodal.text_weights(weights, hf)
