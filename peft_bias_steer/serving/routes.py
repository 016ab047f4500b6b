"""Which servers give a steered model's answers exactly, and why the others do not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from ..analysis import new_table
from ..architectures import (
    CONTROL_VECTOR_TYPES,
    GGUF_BIAS_TYPES,
    LLAMA_CPP_WINDOW_TYPES,
    VLLM_DROPS_BIASES,
    VLLM_PLUGIN_CLASSES,
    VLLM_STOCK_CLASSES,
    WHY_NOT_IN_VLLM,
)
from ..merging import merge_sites, why_no_merge_site
from ..residual import find_layers, seq_first_type
from ..stock_forms import StockForm, find_stock_form, why_no_stock_form
from ..vectors import vectors_by_path
from .base_model import find_base_model, read_config, trained_modules
from .stock_checkpoint import zero_biased_weights


if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Route", "adapter_routes", "serving_routes"]
VLLM_STOCK = "vLLM, stock checkpoint"
VLLM_PLUGIN = "vLLM, plugin"


@dataclass(frozen=True)
class Route:
    """
    A way to serve a steered model.

    Args:
        name (`str`): What serves it, and in which form.
        exact (`bool`): Whether it computes what the steered model computes.
        reason (`str`): How it is done, or why it cannot be.
    """

    name: str
    exact: bool
    reason: str


def serving_routes(
    base: PreTrainedModel, *, first_layer_norm: float = 1.0, trained_modules: Sequence[str] = ()
) -> list[Route]:
    """
    Tells for every known way to serve the steered model whether its answers are exact.

    Args:
        base (`PreTrainedModel`): The base model; its weights are not looked at, so it may be on the meta device.
        first_layer_norm (`float`, *optional*, defaults to 1.0):
            Norm of the vector of layer 0, which a control vector cannot hold.
        trained_modules (`Sequence[str]`, *optional*): Modules that were trained whole beside the vectors.

    Returns:
        `list[Route]`: The same routes in the same order for every model.

    Raises:
        ValueError: If the architecture cannot be steered.
    """
    find_layers(base)
    form, why_not = _stock_form(base)
    call = "model.generate" if base.can_generate() else "model"
    vectors_alone = [_vllm_plugin(base), _control_vector(base, first_layer_norm), _gguf_biases(base)]
    if trained_modules:
        reason = f"it takes vectors alone, and {', '.join(trained_modules)} was trained too"
        vectors_alone = [Route(route.name, False, reason) for route in vectors_alone]
    return [
        Route("transformers, adapter", True, "PeftModel.from_pretrained(base, adapter)"),
        _one_adapter_per_row(base, call),
        Route("transformers, merged checkpoint", form is not None, "export --format stock" if form else why_not),
        _vllm_stock(form, why_not),
        *vectors_alone,
    ]


def adapter_routes(adapter: str, base_model: str | None = None) -> list[Route]:
    """
    [`serving_routes`] of a saved adapter; reads the config of its base model, but no weights.

    Args:
        adapter (`str`): Folder or Hub id of the adapter.
        base_model (`str`, *optional*): Folder or Hub id of the base model. By default the one the adapter names.

    Raises:
        ValueError: If the adapter does not name its base model, does not fit it, steers other layers than its
            decoder's, or cannot be read.
    """
    config = read_config(adapter)
    base, _ = find_base_model(adapter, base_model)
    decoder, layers = find_layers(base, config.layers_pattern)
    path, vectors = vectors_by_path(adapter, skip_modules=True, num_layers=len(layers))
    if path != decoder:
        raise ValueError(
            f"expected vectors on the layers of the decoder, {decoder}, got some on {path} in {adapter}: of these "
            "routes only transformers takes them, with PeftModel.from_pretrained(base, adapter)"
        )
    first_layer_norm = vectors[0].norm().item() if 0 in vectors else 0.0
    return serving_routes(base, first_layer_norm=first_layer_norm, trained_modules=trained_modules(config))


def routes_table(routes: list[Route]) -> "Table":
    """The routes as a table for the terminal."""
    table = new_table("route", "exact", "how, or why not")
    for route in routes:
        table.add_row(route.name, "yes" if route.exact else "no", route.reason)
    return table


def _one_adapter_per_row(base: PreTrainedModel, call: str) -> Route:
    name = "transformers, one adapter per row"
    if seq_first_type(base):
        return Route(name, False, "its layers return (seq, batch, hidden_size), where rows are not told from tokens")
    return Route(name, True, f"{call}(**inputs, adapter_names=[...])")


def _stock_form(base: PreTrainedModel) -> tuple[StockForm | None, str]:
    if getattr(base.config, "quantization_config", None) is not None:
        return None, "the base model is quantised: export from its full-precision form"
    for layer in find_layers(base)[1]:
        try:
            merge_sites(layer)
        except ValueError:
            return None, why_no_merge_site(layer)
    try:
        return find_stock_form(base, zero_biased_weights(base)), ""
    except ValueError:
        return None, why_no_stock_form(base)


def _vllm_stock(form: StockForm | None, why_not: str) -> Route:
    if form is None:
        return Route(VLLM_STOCK, False, why_not)
    architecture = form.model_class.__name__
    if architecture in VLLM_DROPS_BIASES:
        return Route(VLLM_STOCK, False, f"vLLM does not apply the biases of a {architecture}, and raises no error")
    if architecture not in VLLM_STOCK_CLASSES:
        return Route(VLLM_STOCK, False, _why_not_in_vllm(architecture))
    return Route(VLLM_STOCK, True, f"export --format stock, which writes a {architecture}")


def _why_not_in_vllm(architecture: str) -> str:
    reasons = (reason for reason, classes in WHY_NOT_IN_VLLM.items() if architecture in classes)
    return next(reasons, "not verified with vLLM")


def _vllm_plugin(base: PreTrainedModel) -> Route:
    architecture = type(base).__name__
    if architecture not in VLLM_PLUGIN_CLASSES:
        return Route(VLLM_PLUGIN, False, _why_not_in_vllm(architecture))
    return Route(VLLM_PLUGIN, True, "hf_overrides=vllm_overrides({name: adapter})")


def _control_vector(base: PreTrainedModel, first_layer_norm: float) -> Route:
    name = "llama.cpp, control vector"
    if base.config.model_type not in CONTROL_VECTOR_TYPES:
        return Route(name, False, "not verified with llama.cpp")
    if ignored := _ignored_window(base):
        return Route(name, False, ignored)
    if first_layer_norm:
        return Route(name, False, "all but layer 0, which llama.cpp refuses: export with --drop_first_layer")
    return Route(name, True, "export --format control-vector")


def _gguf_biases(base: PreTrainedModel) -> Route:
    name = "llama.cpp, biases in the GGUF file"
    if base.config.model_type not in GGUF_BIAS_TYPES:
        return Route(name, False, "export_gguf writes biases into GGUF files of architecture llama alone")
    if ignored := _ignored_window(base):
        return Route(name, False, ignored)
    return Route(name, True, "export --format gguf --gguf_in FILE")


def _ignored_window(base: PreTrainedModel) -> str | None:
    config = base.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings or config.model_type in LLAMA_CPP_WINDOW_TYPES:
        return None
    return f"llama.cpp ignores its sliding window of {window} tokens: exact for texts that are no longer"
