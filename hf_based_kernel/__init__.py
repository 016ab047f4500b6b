from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_rebased import RebasedConfig
from .modeling_rebased import (
    RebasedCache,
    RebasedForCausalLM,
    RebasedForQuestionAnswering,
    RebasedForSequenceClassification,
    RebasedForTokenClassification,
    RebasedModel,
    RebasedPreTrainedModel,
)
from .rebased_attention_forms import rebased_attention, taylor_attention


__version__ = "0.1.0"

__all__ = [
    "RebasedCache",
    "RebasedConfig",
    "RebasedForCausalLM",
    "RebasedForQuestionAnswering",
    "RebasedForSequenceClassification",
    "RebasedForTokenClassification",
    "RebasedModel",
    "RebasedPreTrainedModel",
    "rebased_attention",
    "taylor_attention",
]

AutoConfig.register("rebased", RebasedConfig)
AutoModel.register(RebasedConfig, RebasedModel)
AutoModelForCausalLM.register(RebasedConfig, RebasedForCausalLM)
AutoModelForQuestionAnswering.register(RebasedConfig, RebasedForQuestionAnswering)
AutoModelForSequenceClassification.register(RebasedConfig, RebasedForSequenceClassification)
AutoModelForTokenClassification.register(RebasedConfig, RebasedForTokenClassification)

# Saved checkpoints carry the code, so that they load where this package is not installed.
RebasedConfig.register_for_auto_class()
RebasedModel.register_for_auto_class("AutoModel")
RebasedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
RebasedForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
RebasedForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
RebasedForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
