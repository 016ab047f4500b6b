"""
The model card of an adapter. Without

- `complete_card`: the card that PEFT writes is an empty form, loads the adapter without this package, which fails, and names
  a base model in a folder, for which the Hub refuses the upload (https://github.com/huggingface/transformers/issues/33922);
- `push_adapter`: `PeftModel.push_to_hub` uploads a bare card over it.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

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
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

from .guards import saved_shapes
from .saved_keys import VECTOR, host_name
from .whole_files import whole_file


ABOUT = """# Steering vectors for {base}

{vectors} All other weights are the base model's.

The adapter type is that of `peft_bias_steer`, after [arXiv 2505.18706](https://arxiv.org/abs/2505.18706), where one such
vector for each layer is trained by reinforcement learning.

"""
SHOWN_MODULES = 4
USAGE = """## {heading}

```python
import peft_bias_steer  # teaches PEFT this adapter type
from peft import {peft_class}

model = {peft_class}.from_pretrained({place})  # this folder, or its repository id on the Hub
```
"""
HERE = re.compile(r'"\."(.*)  # this folder, or its repository id on the Hub')
BASE_TAG = "base_model:adapter:"


def complete_card(folder: str | os.PathLike, task_type: str | None, base_model: str | None) -> None:
    """
    Says in the place of PEFT's form what the adapter is, if nobody has filled the form in; appends how to load it, if the
    card does not say so; and takes a base model that is a folder out of the metadata. Without a card nothing is done.

    Args:
        folder (`str` or `os.PathLike`):
            Where PEFT has saved the adapter. If it has a name of its own, the card is that of the folder above.
        task_type (`str`, *optional*): Of the adapter's config.
        base_model (`str`, *optional*): `base_model_name_or_path` of the config. Named in the card if it is an id.
    """
    folder = Path(folder).absolute()
    card, name = folder / "README.md", None
    # PEFT writes the vectors before the config; a config alone is no adapter of the folder above
    if not card.exists() and any(folder.glob("adapter_model.*")):
        card, name = folder.parent / "README.md", folder.name
    if not card.exists():
        return
    # a card in another encoding keeps its bytes
    old = card.read_text(encoding="utf-8", errors="surrogateescape")
    if name and "library_name: peft" not in old:  # of something else
        return
    text = _with_base_on_the_hub(_without_form(old, None if name else folder, base_model), base_model)
    if not _says_how_to_load(text, name):
        text = f"{text.rstrip()}\n\n{_usage(name, task_type)}"
    if text != old:
        with whole_file(card) as unfinished:
            unfinished.write_text(text, encoding="utf-8", errors="surrogateescape")


def _without_form(text: str, folder: Path | None, base_model: str | None) -> str:
    """The card with what the adapter in `folder` is, or those in folders of their own, where PEFT has put an empty form."""
    form = ModelCard.from_template(ModelCardData()).text.strip()
    if form not in text:
        return text
    is_id = base_model is not None and _is_repo_id(base_model)
    base = f"[{base_model}](https://huggingface.co/{base_model})" if is_id else "a language model"
    shapes = saved_shapes(str(folder), None, {}) if folder else None
    where = "." if folder else ", in folders of their own."
    vectors = _counted(shapes) if shapes else f"Vectors that are added to the outputs of layers{where}"
    before, _, after = text.partition(form)
    return before + ABOUT.format(base=base, vectors=vectors) + after.lstrip("\n")


def _counted(shapes: dict[str, list[int]]) -> str:
    sizes = {host_name(key): shape[0] for key, shape in shapes.items() if VECTOR in key}
    wholes = {host_name(key).rpartition(".")[0] for key in shapes if VECTOR not in key}
    counts = " or ".join(f"{size:,}" for size in sorted({*sizes.values()}))
    found = f"{sum(sizes.values()):,} numbers: a vector of {counts}, added at every token to the output of {_named(sizes)}."
    return f"{found} Trained whole beside it: {_named(wholes)}." if wholes else found


def _named(modules: Iterable[str]) -> str:
    """Layer 10 comes after layer 9."""
    names = sorted(modules, key=lambda name: [int(part) if part.isdecimal() else -1 for part in name.split(".")])
    if len(names) <= SHOWN_MODULES:
        return ", ".join(f"`{name}`" for name in names)
    return f"each of {len(names)} modules, `{names[0]}` to `{names[-1]}`"


def _subfolder(name: str) -> str:
    return f"subfolder={json.dumps(name, ensure_ascii=False)}"


def _says_how_to_load(text: str, name: str | None) -> bool:
    snippets = [after.partition("```")[0] for after in text.split("import peft_bias_steer")[1:]]
    return any(_subfolder(name) in snippet if name else "subfolder=" not in snippet for snippet in snippets)


def _usage(name: str | None, task_type: str | None) -> str:
    if name:  # PEFT's auto classes look for the base model in that subfolder too
        return USAGE.format(
            heading=f"Usage of {name}", peft_class="PeftModel", place=f'base_model, ".", {_subfolder(name)}'
        )
    peft_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task_type, PeftModel)
    return USAGE.format(heading="Usage", peft_class=f"Auto{peft_class.__name__}", place='"."')


def _with_base_on_the_hub(text: str, base_model: str | None) -> str:
    is_utf8 = not any("\udc80" <= character <= "\udcff" for character in text)
    if "base_model:" not in text or not is_utf8:
        return text
    card, base = ModelCard(text), base_model if base_model and _is_repo_id(base_model) else None
    if card.data.get("base_model") in (None, base):
        return text
    card.data["base_model"] = base
    tags = [tag for tag in card.data.get("tags", []) if not tag.startswith(BASE_TAG)]
    card.data["tags"] = sorted([*tags, f"{BASE_TAG}{base}"] if base else tags)
    return str(card)


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.isdir(name)


def push_adapter(
    model: PeftModel,
    repo_id: str,
    *,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: list[str] | None = None,
    metrics: Sequence[EvalResult] = (),
) -> CommitInfo:
    """
    What `push_to_hub` of a model with a BiasSteer adapter does: one commit with the files of `save_pretrained`, its card among
    them. A card that is in the repository already keeps its text, and gets what it lacks.

    Args:
        model (`PeftModel`): The model.
        repo_id (`str`): Where to; the repository is made if it is not there.
        commit_message (`str`, *optional*, defaults to `"Upload model"`): Title of the commit.
        commit_description (`str`, *optional*): Its text.
        private (`bool`, *optional*): Of a repository that is made.
        token (`bool` or `str`, *optional*): By default the one of `hf auth login`.
        revision (`str`, *optional*): Branch, which is made if it is not there.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead.
        max_shard_size (`int` or `str`, *optional*): Not used: the adapter is one file.
        tags (`list[str]`, *optional*): Added to the card.
        metrics (`Sequence[EvalResult]`): What was measured; into the card's metadata, in the place of earlier values.

    Returns:
        `CommitInfo`: The commit, whose string is its URL.
    """
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if file_exists(repo_id, "README.md", revision=revision, token=token):
            hf_hub_download(repo_id, "README.md", revision=revision, token=token, local_dir=folder)
        model.save_pretrained(folder)
        path = Path(folder, "README.md")
        path.write_text(HERE.sub(rf'"{repo_id}"\1', path.read_text(encoding="utf-8")), encoding="utf-8")
        card = ModelCard.load(path)
        card.data["tags"] = sorted({*card.data.get("tags", []), *(tags or [])})
        set_metrics(card, metrics, repo_id)
        card.save(path)
        return upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=[".cache/*"],
        )


def set_metrics(card: ModelCard, metrics: Sequence[EvalResult], name: str) -> None:
    """
    Puts what was measured into the metadata of a card, as `model-index`, in the place of earlier values of the same.

    Args:
        card (`ModelCard`): Changed in place.
        metrics (`Sequence[EvalResult]`): The values, each with its data set.
        name (`str`): Of the model, if the card says none. Of a repository id or a path the last part is taken.
    """
    if metrics:
        earlier = [
            old for old in card.data.get("eval_results", []) if not any(map(old.is_equal_except_value, metrics))
        ]
        card.data["model_name"] = card.data.get("model_name", Path(name).name)
        card.data["eval_results"] = [*earlier, *metrics]
