import transformers
from transformers import AutoConfig

from . import modeling_rebased
from .configuration_rebased import AUTO_CLASSES, RebasedConfig
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
RebasedConfig.register_for_auto_class()
for _auto_class, _name in AUTO_CLASSES.items():
    _model_class = getattr(modeling_rebased, _name)
    getattr(transformers, _auto_class).register(RebasedConfig, _model_class)
    # Saved checkpoints carry the code, so that they load where this package is not installed.
    _model_class.register_for_auto_class(_auto_class)
