"""The model card of an autoencoder, and its way to the Hub: in one commit with the weights."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    EvalResult,
    ModelCard,
    ModelCardData,
    create_branch,
    create_repo,
    file_exists,
    hf_hub_download,
    upload_folder,
)

from .configuration_hierarchical_sae import place_name


# Where a model's weights can lie, whole or in pieces: of two that lie side by side transformers loads the whole one.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")


def sae_card(
    config: Any, repo_id: str, *, tags: list[str], picture: str | None, metrics: Sequence[EvalResult]
) -> ModelCard:
    """
    The facts of an autoencoder's config, which budgets it was trained for among them, and a usage snippet that runs as it
    stands.

    Args:
        config ([`HierarchicalSaeConfig`]): its config.
        repo_id (`str`): where the model will be found, used in the snippet.
        tags (`list[str]`): of the model.
        picture (`str`, *optional*): file name, in the repository, of a plot of quality against budget.
        metrics (`Sequence[EvalResult]`): what was measured, for the metadata.
    """
    data = ModelCardData(library_name="transformers", tags=tags)
    named = f"`{config.model_name}`" if config.model_name else "a model"
    is_known = config.layer is not None or config.hook_point is not None
    read = f"{place_name(config.layer, config.hook_point or 'output')} of {named}" if is_known else named
    what = f"for activations of size {config.d_in} from {read}"
    if config.is_transcoder:
        what = f"that computes {place_name(config.layer, config.target_hook_point)} from {read}"
    also = ", activations" if config.skip_connection else ""
    several = config.has_budgets and len(config.trained_budgets) > 1
    chosen = f", k={config.trained_budgets[len(config.trained_budgets) // 2]}" if several else ""
    plot = f"\n![Explained variance at every number of latents]({picture})\n" if picture else ""
    card = ModelCard(f"""---
{data.to_yaml()}
---

# {repo_id.rpartition("/")[2]}

Sparse {config.kind} with {config.d_sae} latents {what}, trained on
{config.dataset_name or "unnamed text"}. {_objective(config)}
{plot}
```python
import torch
from transformers import AutoModel

sae = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)
activations = torch.randn(4, sae.config.d_in)
top_indices, top_values = sae.encode(activations{chosen})
reconstruction = sae.decode(top_indices, top_values{also})
```
""")
    set_metrics(card, metrics, repo_id)
    return card


def set_metrics(card: ModelCard, metrics: Sequence[EvalResult], name: str) -> None:
    """
    Puts what was measured into the metadata of a card, as `model-index`, in the place of earlier values of the same.

    Args:
        card (`ModelCard`): changed in place.
        metrics (`Sequence[EvalResult]`): the values, each with its data set.
        name (`str`): of the model, if the card says none; of a repository id or a path the last part is taken.
    """
    if metrics:
        earlier = [
            old for old in card.data.get("eval_results", []) if not any(map(old.is_equal_except_value, metrics))
        ]
        card.data["model_name"] = card.data.get("model_name", Path(name).name)
        card.data["eval_results"] = [*earlier, *metrics]


def card_on_hub(repo_id: str, *, revision: str | None = None, token: bool | str | None = None) -> ModelCard | None:
    """The card that a repository has; None if there is none."""
    if not file_exists(repo_id, "README.md", revision=revision, token=token):
        return None
    return ModelCard.load(hf_hub_download(repo_id, "README.md", revision=revision, token=token))


def push_with_card(
    model: Any,
    repo_id: str,
    metrics: Sequence[EvalResult],
    *,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: Sequence[str] = (),
) -> CommitInfo:
    """One commit with the files of `save_pretrained` and the card: the one that is there, or a new one."""
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    card = card_on_hub(repo_id, revision=revision, token=token)
    if card is None:
        card = model.model_card(repo_id, metrics=metrics)
    else:
        set_metrics(card, metrics, repo_id)
    card.data["tags"] = list(dict.fromkeys([*card.data.get("tags", []), *(model.model_tags or ()), *(tags or ())]))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        card.save(Path(folder, "README.md"))
        return upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=list(WEIGHT_FILES),
        )


def _objective(config: Any) -> str:
    """What an autoencoder was trained for, as its model card says it."""
    prefixes = config.matryoshka_prefixes
    if prefixes is not None:
        nested = (
            f"Its first {', '.join(map(str, prefixes))} latents are dictionaries of their own (Matryoshka, {{}}). "
        )
        nested = nested.format("[arXiv 2503.17547](https://arxiv.org/abs/2503.17547)")
    else:
        nested = ""
    if not config.is_trainable:
        kept = "every latent that is active (ReLU)"
        if config.selection == "jumprelu":
            kept = (
                "every latent above its own threshold (JumpReLU, [arXiv 2407.14435](https://arxiv.org/abs/2407.14435))"
            )
        return nested + f"It keeps {kept},\nany number per input: it has no budget."
    if not config.has_budgets:
        return nested + (
            f"A threshold selects its latents, {config.k} per input on average (BatchTopK,\n"
            "[arXiv 2412.06410](https://arxiv.org/abs/2412.06410)): it has no other budget."
        )
    if len(config.trained_budgets) == 1:
        return nested + f"It is a TopK autoencoder for one budget, the {config.k} strongest latents of each input."
    budgets = f"budgets {list(config.budgets)}" if config.budgets else f"every number of latents from 1 to {config.k}"
    return nested + (
        f"One dictionary was trained for {budgets} at once, with the HierarchicalTopK\n"
        "loss ([arXiv 2505.24473](https://arxiv.org/abs/2505.24473))."
    )
