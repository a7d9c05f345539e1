"""Opens a written checkpoint as the importer does: its quantization read from a config, its tensors as recipes."""

from moec.compiler.frontends.stored.quantization_config import read_quantization
from moec.compiler.frontends.stored.stored import decode_checkpoint
from moec.compiler.weights.sources.checkpoint import open_checkpoint
from safetensors.torch import save_file


class Config:
    """Holds as much of a transformers config as is asked."""

    def __init__(self, quantization, **others):
        self.quantization_config = quantization
        self.__dict__ |= others

    def get_text_config(self, decoder):
        return self


def write_and_decode(folder, tensors, quantization):
    """Write tensors as a checkpoint; return recipes for its weights, the checkpoint, and what its config says of them."""
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    found = read_quantization(Config(quantization), folder) if quantization else None
    return decode_checkpoint(checkpoint, found).recipes, checkpoint, found
