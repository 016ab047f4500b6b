"""Dictionaries of the studies: harvested, trained with stock Trainer, read at a budget, compared over seeds."""

import functools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from interrupts import train_from
from torch.utils.data import Dataset, Subset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hf_hierarchical_sae import (
    ActivationShards,
    HierarchicalSaeConfig,
    HierarchicalSaeModel,
    iterate_activations,
    save_shards,
)
from hf_hierarchical_sae.training import last_checkpoint, training_arguments


@functools.cache
def language_model(name: str, dtype: str) -> tuple[Any, Any]:
    """A language model and its tokenizer, loaded once."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    return model.to(PartialState().device), AutoTokenizer.from_pretrained(name)


def harvested(
    settings: dict, texts: Callable[[], Iterable], folder: Path
) -> tuple[Subset, torch.Tensor, torch.Tensor]:
    """
    Training set, a sample to initialise from, and held-out activations of a language model.

    Args:
        settings (`dict`): `model`, `dtype`, `layer`, `tokens`, `eval_tokens` and `batch_size`.
        texts (`Callable`): gives what is read, and is called if `folder` has no whole harvest.
        folder (`Path`): holds the harvest.
    """
    state = PartialState()
    if not (folder / "complete.json").exists():
        stream = iterate_activations(
            *language_model(settings["model"], settings["dtype"]),
            texts(),
            settings["layer"],
            max_tokens=settings["tokens"] + settings["eval_tokens"],
            show_progress=state.is_main_process,
        )
        save_shards(
            stream,
            folder,
            shard_tokens=16_384,
            dtype=getattr(torch, settings["dtype"]),
            process_index=state.process_index,
            num_processes=state.num_processes,
        )
        state.wait_for_everyone()
    shards = ActivationShards(folder)
    train = len(shards) - settings["eval_tokens"]
    if train < settings["batch_size"]:
        raise SystemExit(
            f"the text gave {len(shards)} tokens: expected more than {settings['eval_tokens']} + one batch"
        )
    sample, held_out = torch.arange(min(train, 8192)), torch.arange(train, len(shards))
    return Subset(shards, range(train)), shards.rows(sample), shards.rows(held_out)


def train(
    options: dict, settings: dict, data: tuple[Dataset, torch.Tensor, torch.Tensor], seed: int, folder: Path
) -> tuple[HierarchicalSaeModel, float | None]:
    """
    A trained autoencoder, from the last checkpoint in `folder` if there is one, and the mean CPU seconds of the steps made
    here: `None` if it had made them all.
    """
    dataset, sample, _ = data
    state = PartialState()
    set_seed(seed)
    config = HierarchicalSaeConfig(
        d_in=sample.shape[1],
        d_sae=settings["d_sae"],
        model_name=settings["model"],
        layer=settings.get("layer"),
        dead_after_tokens=settings["batch_size"] * settings["steps"] // 4,
        **options,
    )
    sae = HierarchicalSaeModel(config)
    sae.initialize_from_activations(sample)
    training = training_arguments(
        folder,
        max_steps=settings["steps"],
        batch_size=settings["batch_size"] // state.num_processes,
        learning_rate=settings["learning_rate"],
        save_steps=max(1, settings["steps"] // 3),
        seed=seed,
    )
    clock = StepClock()
    trainer = Trainer(model=sae, args=training, train_dataset=dataset, callbacks=[clock])
    train_from(trainer, last_checkpoint(folder))
    sae.fold_input_scale()
    return sae, clock.seconds / clock.steps if clock.steps else None


class StepClock(TrainerCallback):
    """CPU seconds from the first step that this process makes, so without what a checkpoint takes to load."""

    def __init__(self):
        self.steps, self.seconds, self.started = 0, 0.0, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.steps:
            self.started = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps, self.seconds = self.steps + 1, time.process_time() - self.started


class AtBudget:
    """What the judges of SAELens and SAEBench ask of an autoencoder, with the k strongest latents of each input."""

    def __init__(self, sae: HierarchicalSaeModel, k: int):
        self.sae, self.k, self.W_dec = sae, k, sae.W_dec.detach()
        self.cfg, self.device, self.dtype = sae.config, sae.device, sae.dtype

    def eval(self) -> None:
        self.sae.eval()

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        top_indices, top_values = self.sae.encode(x, self.k)
        return x.new_zeros(len(x), self.sae.config.d_sae).scatter_(1, top_indices, top_values)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents @ self.W_dec + self.sae.b_dec


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and how far another seed's value is from it at most, 19 times of 20, if values are normal (None of one)."""
    from scipy import stats

    found = torch.tensor(values, dtype=torch.float64)
    if len(found) == 1:
        return found.item(), None
    spread = stats.t.ppf(0.975, len(found) - 1) * (1 + 1 / len(found)) ** 0.5
    return found.mean().item(), (spread * found.std()).item()


def folder_name(name: str) -> str:
    """The name of an objective as that of a folder."""
    return name.replace(", ", "_").replace(" ", "_")
