"""Sparse autoencoders for transformers, trained for every sparsity budget at once."""

from transformers import AutoConfig, AutoModel

from .activation_shards import ActivationShards, save_shards
from .activations import ActivationDataset, ActivationSettings, ActivationStream, iterate_activations
from .circuits import export_circuit_tracer
from .configuration_hierarchical_sae import HierarchicalSaeConfig
from .dashboard import write_dashboard
from .evaluation import (
    HierarchicalSaeEvaluation,
    evaluate_budgets,
    evaluate_in_model,
    explained_variance,
    plot_evaluations,
)
from .hierarchical_topk import hierarchical_topk_loss
from .interop import load_gemma_scope, load_saelens, load_sparsify, save_saelens, save_sparsify
from .interventions import ablate, record_statistics, splice, steer
from .judge_scores import JudgeScore, detection_scores, explain_latents, fuzzing_scores
from .label_scores import LabelScores, score_labels
from .latent_activations import LatentActivations, read_latents
from .modeling_hierarchical_sae import HierarchicalSaeModel, HierarchicalSaeOutput
from .thresholds import select_by_threshold
from .training_callback import HierarchicalSaeCallback


__version__ = "0.1.0"

AutoConfig.register("hierarchical_sae", HierarchicalSaeConfig)
AutoModel.register(HierarchicalSaeConfig, HierarchicalSaeModel)
HierarchicalSaeConfig.register_for_auto_class()
HierarchicalSaeModel.register_for_auto_class("AutoModel")

__all__ = [
    "ActivationDataset",
    "ActivationSettings",
    "ActivationShards",
    "ActivationStream",
    "HierarchicalSaeCallback",
    "HierarchicalSaeConfig",
    "HierarchicalSaeEvaluation",
    "HierarchicalSaeModel",
    "HierarchicalSaeOutput",
    "JudgeScore",
    "LabelScores",
    "LatentActivations",
    "ablate",
    "detection_scores",
    "evaluate_budgets",
    "evaluate_in_model",
    "explain_latents",
    "explained_variance",
    "export_circuit_tracer",
    "fuzzing_scores",
    "hierarchical_topk_loss",
    "iterate_activations",
    "load_gemma_scope",
    "load_saelens",
    "load_sparsify",
    "plot_evaluations",
    "read_latents",
    "record_statistics",
    "save_saelens",
    "save_shards",
    "save_sparsify",
    "score_labels",
    "select_by_threshold",
    "splice",
    "steer",
    "write_dashboard",
]
