"""The model card: what it claims, and that its snippet runs."""

import re

import pytest

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel


def make_sae(**options):
    return HierarchicalSaeModel(HierarchicalSaeConfig(**{"d_in": 16, "d_sae": 64, "k": 8, **options})).eval()


CLAIMS = {
    "hierarchical": ({}, ["for every number of latents from 1 to 8", "2505.24473"], ["TopK autoencoder for", "2412"]),
    "subset": ({"budgets": [1, 4, 8]}, ["for budgets [1, 4, 8]", "2505.24473", "k=4)"], ["every number"]),
    "topk": (
        {"budgets": [8]},
        ["one budget, the 8 strongest"],
        ["every", "2505.24473", "HierarchicalTopK loss", "k="],
    ),
    "batch_topk": (
        {"budgets": [8], "selection": "batch_topk"},
        ["8 per input on average", "no other budget", "2412.06410"],
        ["every", "2505.24473", "k="],
    ),
    "relu": (
        {"budgets": [64], "k": 64, "selection": "relu"},
        ["every latent that is active", "any number per input", "no budget"],
        ["every number", "2505.24473", "k=", "64 per input"],
    ),
    "jumprelu": (
        {"budgets": [64], "k": 64, "selection": "jumprelu"},
        ["every latent above its own threshold", "any number per input", "no budget", "2407.14435"],
        ["every number", "2505.24473", "k=", "64 per input"],
    ),
    "matryoshka": (
        {"budgets": [8], "matryoshka_prefixes": [8, 24, 64]},
        ["first 8, 24, 64 latents", "2503.17547", "one budget, the 8 strongest"],
        ["every", "2505.24473", "k="],
    ),
    "layer": (
        {"layer": 3, "model_name": "a/b"},
        ["for activations of size 16 from layer 3 of `a/b`, trained"],
        ["None"],
    ),
    "module": (
        {"hook_point": "model.layers.3.mlp", "model_name": "a/b"},
        ["for activations of size 16 from the module model.layers.3.mlp of `a/b`, trained"],
        ["None", "layer None"],
    ),
    "nowhere": ({"model_name": "a/b"}, ["for activations of size 16 from `a/b`, trained"], ["None", "the module"]),
    "transcoder": (
        {"d_out": 10, "hook_point": "mlp.input", "target_hook_point": "mlp.output", "layer": 3, "model_name": "a/b"},
        ["Sparse transcoder", "computes mlp.output of layer 3 from mlp.input of layer 3 of `a/b`", "2505.24473"],
        ["autoencoder with", "activations)"],
    ),
    "skip": (
        {"hook_point": "mlp.input", "target_hook_point": "mlp.output", "layer": 3, "skip_connection": True},
        ["Sparse transcoder", "decode(top_indices, top_values, activations)"],
        ["autoencoder with"],
    ),
    "both": (
        {"matryoshka_prefixes": [8, 24, 64]},
        ["first 8, 24, 64 latents", "2503.17547", "for every number of latents from 1 to 8", "2505.24473"],
        ["TopK autoencoder for"],
    ),
}


@pytest.mark.parametrize("claimed", CLAIMS)
def test_a_model_card_claims_the_budgets_that_there_are_and_its_snippet_runs(tmp_path, claimed):
    config, said, unsaid = CLAIMS[claimed]
    make_sae(**config).save_pretrained(tmp_path)
    text = str(make_sae(**config).model_card(str(tmp_path)).text)
    words = " ".join(text.split())

    assert all(part in words for part in said) and not any(part in words for part in unsaid)
    found = {}
    exec(re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1], found)
    assert found["reconstruction"].shape == (4, found["sae"].config.d_out)
