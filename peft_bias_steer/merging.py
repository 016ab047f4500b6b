"""Where a layer can hold an exact bias: a vector that is added to its output, as a weight of the model."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import has_offloaded_params
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from .architectures import FACTORS, MERGE_SITES


# attribute of a module with merged biases: by their name, the bias before, and what each owner added to it
SHARES = "bias_steer_shares"


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

    def merged(self, original: torch.Tensor | None, vector: torch.Tensor) -> torch.Tensor:
        """The bias `original + factor * vector`, (..., size), in the module's dtype."""
        return self._sum(original, self.factor * vector)

    def write(self, original: nn.Parameter | None, vector: torch.Tensor) -> None:
        """Makes the [`merged`] bias that of the module; `original` itself is left untouched."""
        self._set(self.merged(original, vector))

    def restore(self, original: nn.Parameter | None) -> None:
        """Puts a bias back that was there before."""
        setattr(self.module, self.attribute, self._fitting(original))

    def _fitting(self, original: nn.Parameter | None) -> nn.Parameter | None:
        """A bias that was there before, or a copy that fits a model that was moved or cast meanwhile."""
        present = self.bias
        if original is None or present is None:
            return original
        moved = original.detach().to(present)
        if moved.dtype == original.dtype and moved.device == original.device:
            return original
        return nn.Parameter(moved, requires_grad=original.requires_grad)

    def shared(self, owner: nn.Module, vector: torch.Tensor) -> torch.Tensor:
        """The bias that [`share`] would write."""
        original, shares = self._shares(owner, vector)
        return self._sum(self._fitting(original), self._total(shares))

    def share(self, owner: nn.Module, vector: torch.Tensor | None) -> None:
        """
        Merges the vector of an owner, or takes it out if it is None. A layer and a module in it may own parts of one bias;
        when the last part has gone, the bias is the very one that was there before the first.
        """
        original, shares = self._shares(owner, vector)
        known = vars(self.module).setdefault(SHARES, {})
        if shares:
            known[self.attribute] = original, shares
            self._set(self._sum(self._fitting(original), self._total(shares)))
        elif known.pop(self.attribute, None) is not None:
            self.restore(original)

    def _shares(
        self, owner: nn.Module, vector: torch.Tensor | None
    ) -> tuple[nn.Parameter | None, dict[nn.Module, torch.Tensor]]:
        original, shares = vars(self.module).get(SHARES, {}).get(self.attribute, (self.bias, {}))
        shares = {other: share for other, share in shares.items() if other is not owner}
        return original, shares if vector is None else {**shares, owner: self.factor * vector}

    def _total(self, shares: dict[nn.Module, torch.Tensor]) -> torch.Tensor:
        device = self.module.get_parameter("weight").device if self.bias is None else self.bias.device
        return torch.stack([share.to(device) for share in shares.values()]).sum(0)

    def _sum(self, original: torch.Tensor | None, addend: torch.Tensor) -> torch.Tensor:
        weight_dtype = self.module.get_parameter("weight").dtype if original is None else original.dtype
        addend = addend if original is None else original.detach() + addend
        return addend.to(vector_dtype(weight_dtype))

    def _set(self, bias: torch.Tensor) -> None:
        setattr(self.module, self.attribute, nn.Parameter(bias, requires_grad=False))


def vector_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a vector, or a bias, beside a weight of this one; float32 beside integers and floats of one byte."""
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32


def merge_sites(module: nn.Module) -> list[MergeSite]:
    """
    The biases that have to change so that the output of `module` moves by a vector.

    Raises:
        ValueError: If there is no place in `module` where a bias does exactly that, or accelerate offloads it, or another
            adapter wraps it.
    """
    sites = _sites(module)
    for site in sites:
        refuse_offloaded(site.module)
        if isinstance(site.module, AuxiliaryTrainingWrapper | BaseTunerLayer):
            raise ValueError(
                f"a bias has no place in the {type(site.module).__name__} that PEFT has put around a module of this "
                f"{type(module).__name__}: keep the adapter unmerged, or leave that module out of modules_to_save, or unload "
                "the other tuner first"
            )
    return sites


def refuse_offloaded(module: nn.Module) -> None:
    """
    Refuses a module whose weights accelerate fetches for each pass: it would not fetch another bias.

    Raises:
        ValueError: If it is one.
    """
    if has_offloaded_params(module):
        raise ValueError(
            f"a {type(module).__name__} that accelerate offloads cannot take a bias or give it back: merge and unmerge "
            "where the layer is loaded whole, before cpu_offload(), disk_offload() or dispatch_model()"
        )


def _sites(module: nn.Module) -> list[MergeSite]:
    if isinstance(module, nn.Linear | Conv1D):
        return [MergeSite(module)]
    # FSDP2 puts a class of its own in front of the layer's
    layer_class = next(c for c in type(module).__mro__ if not c.__module__.startswith("torch."))
    known = layer_class.__module__.startswith("transformers.models.")
    for path, names in MERGE_SITES.items() if known else ():
        if layer_class.__name__ in names and (site := _site_at(module, path)) is not None:
            return [site]
    raise ValueError(
        f"{layer_class.__name__} has no known place for a bias that is added to its output as it is: keep the adapter "
        "unmerged, save it with save_pretrained() and load it with PeftModel.from_pretrained()"
    )


def _site_at(layer: nn.Module, path: str) -> MergeSite | None:
    if getattr(layer, "do_layer_norm_before", True) is False:  # OPT-350m normalises after the MLP
        path = "final_layer_norm"
    parent, _, attribute = path.rpartition(".")
    if not attribute.endswith("bias"):
        parent, attribute = path, "bias"
    try:
        module = layer.get_submodule(parent)
    except AttributeError:
        return None
    factor = next((getattr(layer, name) for name in FACTORS if hasattr(layer, name)), 1.0)
    return MergeSite(module, attribute, 1 / factor)


def why_no_merge_site(layer: nn.Module) -> str:
    """Half a sentence on a layer that `merge_sites` refuses."""
    parts = {name.rpartition(".")[2] for name, _ in layer.named_modules()}
    if parts & {"experts", "router"}:
        return "a router weighs the outputs of its experts, and any bias in them"
    if any(name.startswith(("post_feedforward", "post_mlp")) for name in parts):
        return "a norm after the MLP rescales any bias in it"
    return "no bias in it reaches its output unchanged"


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Generator[None]:
    """Puts every module in evaluation mode, and back into its own: one may be in training mode around others that are not."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def coarsest_rounding(model: nn.Module, output: torch.Tensor) -> float:
    """The spacing of numbers near 1 in the least exact dtype that a model computes this output in."""
    # types of one byte are storage: quantised models compute in two bytes or more
    dtypes = {output.dtype, *(vector_dtype(parameter.dtype) for parameter in model.parameters())}
    return max(torch.finfo(dtype).eps for dtype in dtypes)
