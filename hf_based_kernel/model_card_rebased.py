"""The model card of a ReBased model, and its way to the Hub: in one commit with the weights."""

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
from transformers import GenerationMixin, PreTrainedModel

from .configuration_rebased import LAYER_TYPES


# Where a model's weights can lie, whole or in pieces: of two that lie side by side transformers loads the whole one.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")


def rebased_card(model: PreTrainedModel, repo_id: str, metrics: Sequence[EvalResult]) -> ModelCard:
    """The facts of the config, a usage snippet, and what was measured as metadata."""
    config = model.config
    data = ModelCardData(library_name="transformers", tags=["rebased", *(model.model_tags or [])])
    generates = isinstance(model, GenerationMixin)
    auto_class = "AutoModelForCausalLM" if generates else model._auto_class or "AutoModel"
    use = "tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0])" if generates else "model(**inputs)"
    counts = ", ".join(f"{config.layer_types.count(kind)} {kind}" for kind in LAYER_TYPES)
    card = ModelCard(f"""---
{data.to_yaml()}
---

# {repo_id.rpartition("/")[2]}

{type(model).__name__} with {model.num_parameters():,} parameters and the layers {counts}; attention kernel
`{config.kernel}` ([ReBased, arXiv 2402.10644](https://arxiv.org/abs/2402.10644)). In all layers but full_attention,
training and prefill are linear in the sequence length, and the state for decoding has a constant size.

```python
from transformers import AutoTokenizer, {auto_class}

tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
model = {auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print({use})
```
""")
    set_metrics(card, metrics, repo_id)
    return card


def set_metrics(card: ModelCard, metrics: Sequence[EvalResult], name: str) -> None:
    """Puts what was measured into the metadata of a card, in the place of earlier values of the same."""
    if metrics:
        earlier = [
            old for old in card.data.get("eval_results", []) if not any(map(old.is_equal_except_value, metrics))
        ]
        card.data["model_name"] = card.data.get("model_name", name.rpartition("/")[2])
        card.data["eval_results"] = [*earlier, *metrics]


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
    if file_exists(repo_id, "README.md", revision=revision, token=token):
        card = ModelCard.load(hf_hub_download(repo_id, "README.md", revision=revision, token=token))
        set_metrics(card, metrics, repo_id)
    else:
        card = model.model_card(repo_id, metrics=metrics)
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
