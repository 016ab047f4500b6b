from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_rebased import RebasedConfig
from .modeling_rebased import (
    RebasedCache,
    RebasedForCausalLM,
    RebasedForSequenceClassification,
    RebasedModel,
    RebasedPreTrainedModel,
)
from .rebased_attention_forms import rebased_attention, taylor_attention


__version__ = "0.1.0"

__all__ = [
    "RebasedCache",
    "RebasedConfig",
    "RebasedForCausalLM",
    "RebasedForSequenceClassification",
    "RebasedModel",
    "RebasedPreTrainedModel",
    "rebased_attention",
    "taylor_attention",
]

AutoConfig.register("rebased", RebasedConfig)
AutoModel.register(RebasedConfig, RebasedModel)
AutoModelForCausalLM.register(RebasedConfig, RebasedForCausalLM)
AutoModelForSequenceClassification.register(RebasedConfig, RebasedForSequenceClassification)

# Saved checkpoints carry the code, so that they load where this package is not installed.
RebasedConfig.register_for_auto_class()
RebasedModel.register_for_auto_class("AutoModel")
RebasedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
RebasedForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
