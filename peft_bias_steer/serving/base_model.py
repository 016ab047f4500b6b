"""The base model of a saved adapter, of whichever class it was trained on: text, images, sound, with a head or without."""

import json
import os
from collections.abc import Iterator
from typing import Any, cast

import torch
import transformers
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..config import BiasSteerConfig
from ..saved_keys import VECTOR, host_name


# PEFT's name of a task, and the classes that it may be trained on; the first that fits is taken
TASK_CLASSES = {
    "CAUSAL_LM": ("CausalLM", "ImageTextToText", "MultimodalLM", "SpeechSeq2Seq"),
    "FEATURE_EXTRACTION": ("",),
    "QUESTION_ANS": ("QuestionAnswering",),
    "SEQ_2_SEQ_LM": ("Seq2SeqLM", "SpeechSeq2Seq"),
    "SEQ_CLS": ("SequenceClassification",),
    "TOKEN_CLS": ("TokenClassification",),
}
# what an adapter without a task may be trained on
ANY_CLASS = ("CausalLM", "ImageTextToText", "MultimodalLM", "SpeechSeq2Seq", "Seq2SeqLM", "")


def load_steered_model(adapter: str, base_model: str | None = None) -> PeftModel:
    """
    The base model with a saved adapter on it, in evaluation mode.

    Args:
        adapter (`str`): Folder or Hub id of the adapter.
        base_model (`str`, *optional*): Folder or Hub id of the base model. By default the one the adapter names.

    Raises:
        ValueError: If it is no BiasSteer adapter, does not name its base model, or fits no class of it.
    """
    skeleton, name = find_base_model(adapter, base_model)
    base = cast(Any, type(skeleton)).from_pretrained(name, config=skeleton.config, dtype="auto")
    try:
        return PeftModel.from_pretrained(base, adapter).eval()
    except KeyError as error:  # PEFT looks up what a module that it saves whole must have
        raise ValueError(
            f"expected {error} in the file of {adapter}, which lacks it: copy or save it again"
        ) from error


def load_base_model(name: str) -> PreTrainedModel:
    """
    A base model in the dtype of its checkpoint, of the class that its config names.

    Args:
        name (`str`): Folder or Hub id.

    Raises:
        ValueError: If it is an adapter, of a class outside transformers, or not there.
    """
    if os.path.exists(os.path.join(name, CONFIG_NAME)):
        raise ValueError(
            f"expected a base model, got the adapter in {name}: name the base model that it was trained on"
        )
    config = _read_base_config(name)
    for model_class, _ in _candidates(BiasSteerConfig(), config, {}):
        return cast(Any, model_class).from_pretrained(name, dtype="auto")
    raise ValueError(f"expected a model that transformers has a class for, got {config.model_type} in {name}")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a base model.

    Raises:
        ValueError: If there is none that can be read.
    """
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(name))
    except Exception as error:  # tokenizers raises this very class
        reason = str(error).splitlines()[0]
        raise ValueError(f"expected a tokenizer in {name}, got none that can be read ({reason})") from error


def find_base_model(adapter: str, base_model: str | None = None) -> tuple[PreTrainedModel, str]:
    """
    The base model of a saved adapter on the meta device: of the class whose modules the adapter names; and its name.

    Args:
        adapter (`str`): Folder or Hub id of the adapter.
        base_model (`str`, *optional*): Folder or Hub id of the base model. By default the one the adapter names.

    Raises:
        ValueError: As in [`load_steered_model`].
    """
    peft_config = read_config(adapter)
    name = base_model or peft_config.base_model_name_or_path
    if not name:
        raise ValueError(f"{adapter} does not name its base model: pass it as --base_model")
    shapes = peft_config.saved_shapes or {}
    modules = {_module_of(key) for key in shapes}
    tried = []
    for model_class, config in _candidates(peft_config, _read_base_config(name), shapes):
        with torch.device("meta"):
            skeleton = model_class._from_config(config)
        if modules <= {module for module, _ in skeleton.named_modules()}:
            return skeleton, name
        tried.append(model_class.__name__)
    raise ValueError(
        f"expected a base model with the modules {sorted(modules)[:3]}… that {adapter} was trained on, got {name}, of "
        f"which {', '.join(tried) or 'no class of transformers'} has them not: name the right one as --base_model"
    )


def read_config(adapter: str) -> BiasSteerConfig:
    """
    The config of a saved BiasSteer adapter.

    Raises:
        ValueError: If it is an adapter of another kind, or cannot be read.
    """
    try:
        config = BiasSteerConfig.from_pretrained(adapter)
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"expected adapter_config.json of a BiasSteer adapter in {adapter}, got one that cannot be read "
            f"({type(error).__name__}: {error}): copy or download it again"
        ) from error
    if not isinstance(config, BiasSteerConfig):
        raise ValueError(f"expected a BiasSteer adapter, got one of type {config.peft_type} in {adapter}")
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    if os.path.isdir(adapter) and not any(os.path.exists(os.path.join(adapter, name)) for name in names):
        raise ValueError(f"expected {names[0]} in {adapter}, got a folder without it: copy or save it again")
    return config


def _read_base_config(name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"expected the folder or Hub id of a base model, got {name!r} ({reason})") from error


def trained_modules(config: BiasSteerConfig) -> list[str]:
    """Names of the modules that were trained whole beside the vectors, such as a head."""
    keys = config.saved_shapes or {}
    return sorted({_module_of(key) for key in keys if VECTOR not in key})


def _module_of(key: str) -> str:
    return host_name(key) if VECTOR in key else host_name(key).rpartition(".")[0]


def _candidates(
    peft_config: BiasSteerConfig, config: PreTrainedConfig, shapes: dict[str, list[int]]
) -> Iterator[tuple[type[PreTrainedModel], PreTrainedConfig]]:
    task = peft_config.task_type and str(getattr(peft_config.task_type, "value", peft_config.task_type))
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        heads = [shape for key, shape in shapes.items() if VECTOR not in key and len(shape) == 2]
        if heads:
            config.num_labels = heads[-1][0]
    mapping = peft_config.auto_mapping if isinstance(peft_config.auto_mapping, dict) else {}
    named = [mapping.get("base_model_class"), *(config.architectures or ())]
    by_task = [_auto_class(kind, config) for kind in TASK_CLASSES.get(task or "", ANY_CLASS)]
    by_name = [getattr(transformers, str(name), None) for name in named if name]
    # a checkpoint's own class is that of a language model, whatever a head's adapter was trained on
    own_first = task in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM")
    for model_class in [*by_name, *by_task] if own_first else [*by_task, *by_name]:
        is_model = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
        if is_model and isinstance(config, model_class.config_class or ()):
            yield model_class, config


def _auto_class(kind: str, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    auto = getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel")
    found = auto._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found
