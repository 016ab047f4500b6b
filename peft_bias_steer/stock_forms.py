"""
Stock classes of transformers that can hold a model's weights together with merged biases.

`from_pretrained` and vLLM both drop a bias that the config does not announce, without an error.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from .architectures import BIAS_SWITCHES, LLAMA_COUSINS, WHY_NO_STOCK_FORM
from .merging import vector_dtype


@dataclass
class StockForm:
    """
    A stock class that can hold a model's weights and biases.

    Args:
        model_class (`type[PreTrainedModel]`): The class.
        config (`PreTrainedConfig`): Its config.
        weights (`dict[str, torch.Tensor]`): All its weights; biases that only the class demands are zero.
        switches (`tuple[str, ...]`): Config fields that are on here and off in the model's own config.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    weights: dict[str, torch.Tensor]
    switches: tuple[str, ...] = ()

    def skeleton(self) -> PreTrainedModel:
        with torch.device("meta"):
            return self.model_class(copy.deepcopy(self.config))


def find_stock_form(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> StockForm:
    for form in _candidate_forms(model, weights):
        expected = form.skeleton().state_dict()
        biases = {key for key in form.weights if key.endswith("bias")}
        added = expected.keys() - form.weights.keys()
        if biases <= expected.keys() and all(key.endswith(".bias") for key in added):
            for key in added:
                weight = form.weights[key.removesuffix("bias") + "weight"]
                dtype = vector_dtype(weight.dtype)
                form.weights[key] = torch.zeros(expected[key].shape, dtype=dtype, device=weight.device)
            return form
    raise ValueError(
        f"no stock class computes what {type(model).__name__} with these biases computes: {why_no_stock_form(model)}. "
        "Keep the adapter and load it with PeftModel.from_pretrained(), or use export_control_vector() for llama.cpp"
    )


def why_no_stock_form(model: PreTrainedModel) -> str:
    """Half a sentence on a model that `find_stock_form` refuses."""
    name = type(model).__name__
    lacking = _what_llama_lacks(model) if name in LLAMA_COUSINS else None
    return lacking or WHY_NO_STOCK_FORM.get(name, "its config has no switch for them")


def _candidate_forms(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> Iterator[StockForm]:
    from huggingface_hub.errors import StrictDataclassError

    yield StockForm(type(model), model.config, dict(weights))
    text_config = model.config.get_text_config(decoder=True)
    switches = [name for name in BIAS_SWITCHES if getattr(text_config, name, None) is False]
    for names in [*([name] for name in switches), switches]:
        config = copy.deepcopy(model.config)
        for name in names:
            setattr(config.get_text_config(decoder=True), name, True)
        try:
            config.validate()
        except StrictDataclassError:  # some switches have to be turned together
            continue
        yield StockForm(type(model), config, dict(weights), tuple(names))
    if type(model).__name__ in LLAMA_COUSINS:
        if _what_llama_lacks(model):
            return
        shared = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
        fields = {name: value for name, value in model.config.to_dict().items() if name in shared}
        fields.update(dict.fromkeys(LLAMA_COUSINS[type(model).__name__], True))
        yield StockForm(LlamaForCausalLM, LlamaConfig(**fields), dict(_split_fused(weights, model.config)))


def _what_llama_lacks(model: PreTrainedModel) -> str | None:
    config, rope = model.config, model.config.rope_parameters
    if config.sliding_window is not None and config.sliding_window < config.max_position_embeddings:
        return f"its attention has a sliding window of {config.sliding_window} tokens"
    if rope["rope_type"] == "longrope":
        return "its rotary embedding is of type longrope"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"it rotates only a part ({rope['partial_rotary_factor']}) of each head"
    return None


def _split_fused(weights: dict[str, torch.Tensor], config: PreTrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Phi3's `qkv_proj` and `gate_up_proj` as the modules that Llama has; copies, since files hold no views."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_rows = config.num_key_value_heads * head_dim
    for key, weight in weights.items():
        if "qkv_proj" in key:
            rows = [config.num_attention_heads * head_dim, key_rows, key_rows]
            for name, part in zip(("q_proj", "k_proj", "v_proj"), weight.split(rows)):
                yield key.replace("qkv_proj", name), part.clone()
        elif "gate_up_proj" in key:
            for name, part in zip(("gate_proj", "up_proj"), weight.chunk(2)):
                yield key.replace("gate_up_proj", name), part.clone()
        else:
            yield key, weight
