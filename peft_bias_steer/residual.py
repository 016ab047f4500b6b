"""The residual stream of an architecture: its layers, its width, and where it can hold an exact bias."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


LAYER_LISTS = ("layers", "layer", "h", "block", "blocks")

# path of the module whose bias is added, unscaled and unnormalised, to the output of the layer
SITES = {
    "mlp.down_proj": "LlamaDecoderLayer MistralDecoderLayer Qwen2DecoderLayer Qwen3DecoderLayer Phi3DecoderLayer",
    "mlp.c_proj": "GPT2Block",
    "mlp.dense_4h_to_h": "GPTNeoXLayer",
    "mlp.fc2": "PhiDecoderLayer",
}
SITE_OF_LAYER = {name: path for path, names in SITES.items() for name in names.split()}


@dataclass
class MergeSite:
    """
    A bias inside a layer that reaches the layer's output as it is, up to a factor.

    Args:
        module (`nn.Module`): The module that holds the bias.
        attribute (`str`): Its name in that module.
        factor (`float`): What a steering vector has to be multiplied by before it is added to the bias.
    """

    module: nn.Module
    attribute: str = "bias"
    factor: float = 1.0

    @property
    def bias(self) -> nn.Parameter | None:
        return getattr(self.module, self.attribute)

    def write(self, original: nn.Parameter | None, vector: torch.Tensor) -> None:
        """Makes `original + factor * vector`, (..., size), the bias; `original` itself is left untouched."""
        bias = self.factor * vector
        # a quantised weight has no dtype that a bias could share: then it stays in float32
        weight_dtype = self.module.get_parameter("weight").dtype if original is None else original.dtype
        bias = bias if original is None else original.detach() + bias
        dtype = weight_dtype if weight_dtype.is_floating_point else torch.float32
        setattr(self.module, self.attribute, nn.Parameter(bias.to(dtype), requires_grad=False))

    def restore(self, original: nn.Parameter | None) -> None:
        setattr(self.module, self.attribute, original)


def merge_sites(module: nn.Module) -> list[MergeSite]:
    """
    The biases that have to change so that the output of `module` moves by a vector.

    Raises:
        ValueError: If there is no place in `module` where a bias does exactly that.
    """
    if isinstance(module, nn.Linear | Conv1D):
        return [MergeSite(module)]
    path = SITE_OF_LAYER.get(type(module).__name__)
    if path is None:
        raise ValueError(
            f"{type(module).__name__} has no known place for a bias that is added to its output as it is: "
            "keep the adapter unmerged, save it with save_pretrained() and load it with PeftModel.from_pretrained()"
        )
    return [MergeSite(module.get_submodule(path))]


def find_layers(model: PreTrainedModel, layers_pattern: list[str] | str | None = None) -> tuple[str, nn.ModuleList]:
    """
    Finds the decoder layers of a transformers model; of the encoder, if the model has no decoder.

    Args:
        model (`PreTrainedModel`): The base model.
        layers_pattern (`list[str]` or `str`, *optional*): Name of the `nn.ModuleList` that holds the layers.

    Returns:
        The name of the `nn.ModuleList` inside `model`, and the list.

    Raises:
        ValueError: If no such list is found.
    """
    names = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or LAYER_LISTS
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"cannot tell the layers of a {type(model).__name__}: name the modules in target_modules")
    decoder = model.get_decoder()
    found = [
        (name.count("."), name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in names
    ]
    if not found:
        raise ValueError(
            f"no nn.ModuleList named {' or '.join(names)} in {type(decoder).__name__}: name the list of layers in "
            "layers_pattern, or the modules to steer in target_modules"
        )
    # the outermost list: others belong to parts of a layer
    layers = min(found, key=lambda entry: entry[0])[2]
    return next(name for name, module in model.named_modules() if module is layers), layers


def residual_width(model: PreTrainedModel) -> int:
    """Width of the residual stream, from the config: sharded weights do not show their shape."""
    return model.config.get_text_config(decoder=True).hidden_size
