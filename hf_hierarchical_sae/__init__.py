"""Sparse autoencoders for transformers, trained for every sparsity budget at once."""

from transformers import AutoConfig, AutoModel

from .activations import ActivationShards, ActivationStream, iterate_activations
from .configuration_hierarchical_sae import HierarchicalSaeConfig
from .dashboard import write_dashboard
from .evaluation import HierarchicalSaeEvaluation, evaluate_budgets, explained_variance, plot_evaluations
from .hierarchical_topk_loss import hierarchical_topk_loss
from .interventions import ablate, record_statistics, splice, steer
from .latent_activations import LatentActivations, latent_activations
from .modeling_hierarchical_sae import HierarchicalSaeModel, HierarchicalSaeOutput
from .training_callback import HierarchicalSaeCallback


__version__ = "0.1.0"

AutoConfig.register("hierarchical_sae", HierarchicalSaeConfig)
AutoModel.register(HierarchicalSaeConfig, HierarchicalSaeModel)
HierarchicalSaeConfig.register_for_auto_class()
HierarchicalSaeModel.register_for_auto_class("AutoModel")

__all__ = [
    "ActivationShards",
    "ActivationStream",
    "HierarchicalSaeCallback",
    "HierarchicalSaeConfig",
    "HierarchicalSaeEvaluation",
    "HierarchicalSaeModel",
    "HierarchicalSaeOutput",
    "LatentActivations",
    "ablate",
    "evaluate_budgets",
    "explained_variance",
    "hierarchical_topk_loss",
    "iterate_activations",
    "latent_activations",
    "plot_evaluations",
    "record_statistics",
    "splice",
    "steer",
    "write_dashboard",
]
