"""
What train_methods.py trains and compare_methods.py compares: each method's name, adapter and learning rates; and the
prompts that do without training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import (
    BeftConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TinyLoraConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from torch.nn.utils import parametrize

from peft_bias_steer import BiasSteerConfig


# as options of train_methods.py
PROMPTS: dict[str, list[str]] = {
    "question": [],
    "answer alone": ["--system_prompt", "Reply with the answer and nothing else."],
    "2 examples": ["--few_shot", "2"],
    "4 examples": ["--few_shot", "4"],
    "8 examples": ["--few_shot", "8"],
}
# with room for the steps
STEP_BY_STEP = {"step by step": ["--system_prompt", "Think step by step. End with 'Answer:' and the answer."]}
RANK = 4


@dataclass
class Method:
    """
    One way to train a model.

    Args:
        label (`str`): Its name in tables.
        rates (`list[float]`): Learning rates for AdamW, in rising order, to choose from; the second is the default.
        config (`Callable[[int], PeftConfig]`, *optional*): The adapter for a model of so many layers; all weights if unset.
        tie (`Callable[[list[nn.Module]], None]`, *optional*): Makes the modules whose `weight` is a vector share parameters.
    """

    label: str
    rates: list[float]
    config: Callable[[int], PeftConfig] | None = None
    tie: Callable[[list[nn.Module]], None] | None = None

    @property
    def can_leave_layers_out(self) -> bool:
        return self.config is not None and hasattr(self.config(1), "layers_to_transform")


def use_one_vector(vectors: list[nn.Module]) -> None:
    for vector in vectors[1:]:
        vector.weight = vectors[0].weight


class Combination(nn.Module):
    """A vector as a combination of others, which are shared: (rank,) to (size,)."""

    def __init__(self, shared: nn.Parameter):
        super().__init__()
        self.shared = shared

    def forward(self, coefficients: torch.Tensor) -> torch.Tensor:
        return coefficients @ self.shared


def use_a_low_rank(vectors: list[nn.Module]) -> None:
    """The (layers, size) matrix of all vectors as a product U V of rank `RANK`: U is random at first, V is 0."""
    weight: Any = vectors[0].weight
    shared = nn.Parameter(weight.new_zeros(RANK, len(weight)))
    for vector in vectors:
        vector.weight = nn.Parameter(torch.randn(RANK, device=weight.device))
        # unsafe: the shape changes
        parametrize.register_parametrization(vector, "weight", Combination(shared), unsafe=True)


def one_layer(share: float) -> Callable[[int], PeftConfig]:
    return lambda layers: BiasSteerConfig(layers_to_transform=[int(share * layers)])


METHODS = {
    "bias": Method("bias vectors", [3e-3, 1e-2, 3e-2], lambda layers: BiasSteerConfig()),
    "bias_early": Method("one vector, a sixth of the way up", [3e-2, 1e-1, 3e-1], one_layer(1 / 6)),
    "bias_middle": Method("one vector, half of the way up", [3e-2, 1e-1, 3e-1], one_layer(1 / 2)),
    "bias_late": Method("one vector, five sixths of the way up", [3e-2, 1e-1, 3e-1, 1.0], one_layer(5 / 6)),
    "bias_shared": Method(
        "one vector for all layers", [3e-3, 1e-2, 3e-2], lambda layers: BiasSteerConfig(), use_one_vector
    ),
    "bias_low_rank": Method(
        f"vectors of rank {RANK}", [3e-3, 1e-2, 3e-2], lambda layers: BiasSteerConfig(), use_a_low_rank
    ),
    "tinylora": Method(
        "TinyLoRA, 13 numbers",
        [3e-3, 1e-2, 3e-2],
        lambda layers: TinyLoraConfig(u=13, weight_tying=1.0, save_projection=False, target_modules="all-linear"),
    ),
    "lora": Method(
        "LoRA r=4, down_proj",
        [3e-4, 1e-3, 3e-3],
        lambda layers: LoraConfig(r=4, lora_alpha=8, target_modules=["down_proj"]),
    ),
    "lora_1": Method(
        "LoRA r=1", [3e-4, 1e-3, 3e-3], lambda layers: LoraConfig(r=1, lora_alpha=2, target_modules="all-linear")
    ),
    "lora_8": Method(
        "LoRA r=8", [1e-4, 3e-4, 1e-3], lambda layers: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    ),
    "vera": Method("VeRA", [3e-3, 1e-2, 3e-2, 1e-1], lambda layers: VeraConfig()),
    "ia3": Method("IA3", [1e-3, 3e-3, 1e-2, 3e-2], lambda layers: IA3Config()),
    "beft": Method("BEFT", [1e-3, 3e-3, 1e-2, 3e-2], lambda layers: BeftConfig(target_modules=["down_proj"])),
    "layernorm": Method("LayerNorm tuning", [3e-4, 1e-3, 3e-3, 1e-2], lambda layers: LNTuningConfig()),
    "full": Method("full fine-tuning", [3e-6, 1e-5, 3e-5, 1e-4]),
}
LEARNING_RATES = {name: method.rates[1] for name, method in METHODS.items()}


def adapt(model: Any, name: str, layers: list[int] | None) -> Any:
    """The model with the method's parameters as the only ones to train, in these layers or in all."""
    method = METHODS[name]
    if method.config is None:
        return model
    config: Any = method.config(model.config.num_hidden_layers)
    config.task_type = "CAUSAL_LM"
    if layers is not None:
        config.layers_to_transform = layers
    model = get_peft_model(model, config)
    if method.tie:
        method.tie(vectors_of(model))
    return model


def untie(model: PeftModel) -> None:
    """Gives each layer of an adapter whose vectors share parameters one of its own again, to save it."""
    for vector in vectors_of(model):
        if parametrize.is_parametrized(vector, "weight"):
            parametrize.remove_parametrizations(vector, "weight")
        vector.weight = nn.Parameter(vector.weight.detach().clone())


def vectors_of(model: Any) -> list[Any]:
    """The modules that hold the vectors of an adapter, by layer."""
    return [module for name, module in model.named_modules() if name.endswith("bias_steer_vector.default")]
