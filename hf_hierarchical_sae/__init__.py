"""Sparse autoencoders for transformers, trained for every sparsity budget at once."""

from transformers import AutoConfig, AutoModel

from .activations import iterate_activations
from .configuration_hierarchical_sae import HierarchicalSaeConfig
from .evaluation import explained_variance
from .hierarchical_topk_loss import hierarchical_topk_loss
from .modeling_hierarchical_sae import HierarchicalSaeModel, HierarchicalSaeOutput


__version__ = "0.1.0"

AutoConfig.register("hierarchical_sae", HierarchicalSaeConfig)
AutoModel.register(HierarchicalSaeConfig, HierarchicalSaeModel)
HierarchicalSaeConfig.register_for_auto_class()
HierarchicalSaeModel.register_for_auto_class("AutoModel")

__all__ = [
    "HierarchicalSaeConfig",
    "HierarchicalSaeModel",
    "HierarchicalSaeOutput",
    "explained_variance",
    "hierarchical_topk_loss",
    "iterate_activations",
]
