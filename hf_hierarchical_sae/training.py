"""Training with stock `Trainer`: the settings that suit an autoencoder, going on after a stop, and what comes at the end."""

import fnmatch
import json
import math
import re
import shutil
import zipfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, logging

from .activations import ActivationDataset
from .configuration_hierarchical_sae import HierarchicalSaeConfig
from .interventions import record_statistics
from .modeling_hierarchical_sae import HierarchicalSaeModel
from .training_callback import HierarchicalSaeCallback
from .whole_files import whole_file


logger = logging.get_logger(__name__)

# What a folder's training was started with.
RECORD = "training.json"
# Those of the arguments that have to be the same for a training to go on.
SETTINGS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "data_seed",
    "bf16",
)
# Tokens, and sums of each one's activations, that tell one set of activations from another, and how far they may differ
# between machines.
PROBES, SUMS, TOLERANCE = 8, 4, 0.03


def training_arguments(
    output_dir: str | Path, *, max_steps: int, batch_size: int, learning_rate: float, **others: Any
) -> TrainingArguments:
    """
    Arguments of `Trainer` that suit an autoencoder: linear decay after a short warm-up, no weight decay, which would
    pull on the bias, and one checkpoint kept.

    Args:
        output_dir (`str` or `Path`): for checkpoints and the result.
        max_steps (`int`): optimizer steps.
        batch_size (`int`): tokens per step and process.
        learning_rate (`float`): the peak.
        others (*optional*): further ones of `TrainingArguments`, such as `save_steps`.

    Returns:
        `TrainingArguments`
    """
    settings: dict[str, Any] = {
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, max_steps // 20),
        "weight_decay": 0.0,
        "logging_steps": max(1, max_steps // 10),
        "save_total_limit": 1,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Without it, processes that torchrun starts on CPUs would each train an autoencoder of their own.
        "use_cpu": not torch.accelerator.is_available(),
        "report_to": "none",
    }
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        **{**settings, **others},
    )


def train_sae(
    sae: HierarchicalSaeModel,
    dataset: Dataset,
    sample: Any,
    arguments: TrainingArguments,
    *,
    resume: bool | str = False,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """
    Train with stock `Trainer`. At the last step, and not if a callback stops it before, the autoencoder is made ready
    for use and saved in `arguments.output_dir`, by the first process: `input_scale` folded, statistics recorded.

    Args:
        sae ([`HierarchicalSaeModel`]): a new one, after `initialize_from_activations`.
        dataset (`Dataset`): of `{"hidden_states": (d_in,)}`, and `"targets": (d_out,)` for a transcoder, such as
            [`ActivationShards`]; or [`ActivationDataset`], of which each process reads its own rows of text.
        sample (`torch.Tensor`): (tokens, d_in), some of it, which statistics are recorded of; for a transcoder, a pair of
            that and (tokens, d_out).
        arguments (`TrainingArguments`): such as [`training_arguments`] gives.
        resume (`bool` or `str`, defaults to `False`): as in [`starting_point`]. More steps than before are allowed, with
            another warm-up or more epochs; everything else has to be as it was.
        overwrite (`bool`, defaults to `False`): as in [`starting_point`].
        callbacks (`Sequence[TrainerCallback]`, *optional*): besides [`HierarchicalSaeCallback`].

    Returns:
        `Trainer`: after training.

    Raises:
        `ValueError`: If [`starting_point`] raises it, there is less than one batch, the folder's training was
            started with other settings or data, or `sae.config.selection` is for use only.
    """
    sae._check_trainable()
    stream = dataset if isinstance(dataset, ActivationDataset) else None
    if stream is None and len(dataset) < arguments.train_batch_size:  # ty: ignore[invalid-argument-type]
        raise ValueError(
            f"expected at least one batch of {arguments.train_batch_size} tokens, got {len(dataset)}"  # ty: ignore[invalid-argument-type]
        )
    folder, record = Path(str(arguments.output_dir)), _record(sae, dataset, sample, arguments)
    with arguments.main_process_first(local=False):
        checkpoint = starting_point(folder, resume=resume, overwrite=overwrite)
        # The sample of another process may be of other text.
        if checkpoint is not None and arguments.process_index == 0:
            _check_same(folder, record)
            _check_steps(checkpoint, arguments.max_steps)
        elif arguments.process_index == 0:
            _start(folder, record)
    callbacks = [HierarchicalSaeCallback(), *callbacks]
    if stream is None:
        trainer = Trainer(model=sae, args=arguments, train_dataset=dataset, callbacks=callbacks)
    else:
        arguments.ignore_data_skip = True
        if checkpoint is not None:
            _continue_stream(stream, Path(checkpoint), arguments)
        callbacks.append(_StreamState(stream))
        trainer = _StreamTrainer(model=sae, args=arguments, train_dataset=stream, callbacks=callbacks)
    _train_from(trainer, checkpoint)
    # Those of the arguments, or of their epochs.
    if trainer.state.global_step >= trainer.state.max_steps and trainer.is_world_process_zero():
        sae.eval()
        sae.fold_input_scale()
        record_statistics(sae, sample)
        sae.save_pretrained(folder)
    return trainer


def _train_from(trainer: Trainer, checkpoint: str | None) -> None:
    """`Trainer.train`, which by itself makes one step more where the checkpoint has made them all."""
    if checkpoint is not None:
        steps, plan = _steps_made(checkpoint), trainer.set_initial_training_values

        def none_after_the_last(*args: Any, **kwargs: Any) -> tuple:
            num_train_epochs, *others, max_steps = plan(*args, **kwargs)
            return (0 if steps >= max_steps else num_train_epochs, *others, max_steps)

        trainer.set_initial_training_values = none_after_the_last
    trainer.train(resume_from_checkpoint=checkpoint)


class _StreamTrainer(Trainer):
    """Each process reads its own text: Accelerate would have one read for all, or all read everything."""

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, self.args.train_batch_size, collate_fn=self.data_collator)  # ty: ignore[invalid-argument-type]


class _StreamState(TrainerCallback):
    """Keeps where each process is in its text in every checkpoint."""

    def __init__(self, dataset: ActivationDataset):
        self.dataset = dataset

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        path = _stream_path(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", args.process_index)
        with whole_file(path) as unfinished:
            torch.save(self.dataset.state_dict(), unfinished)


def _stream_path(checkpoint: Path, process_index: int) -> Path:
    return checkpoint / f"stream_{process_index}.pt"


def _continue_stream(dataset: ActivationDataset, checkpoint: Path, arguments: TrainingArguments) -> None:
    path = _stream_path(checkpoint, arguments.process_index)
    if path.exists():
        dataset.load_state_dict(torch.load(path, weights_only=True))
        return
    # Killed between the checkpoint and its last file.
    steps = _steps_made(checkpoint)
    logger.warning(f"{path} is missing: the text of the first {steps} steps is read again")
    given = steps * arguments.train_batch_size * arguments.gradient_accumulation_steps
    for _ in islice(dataset, given):
        pass


def starting_point(output_dir: str | Path, *, resume: bool | str = False, overwrite: bool = False) -> str | None:
    """
    The checkpoint that training goes on from, if it does; nothing is changed.

    Args:
        output_dir (`str` or `Path`): of the training.
        resume (`bool` or `str`, defaults to `False`): go on from its newest whole checkpoint, or from this one.
        overwrite (`bool`, defaults to `False`): start afresh, whatever is there.

    Raises:
        `ValueError`: If there is no whole checkpoint to resume from, or a training is there and neither is asked for.
    """
    folder = Path(output_dir)
    if resume:
        found = last_checkpoint(folder) if resume is True else resume
        if found is None or not _is_whole(Path(found)):
            begun = _checkpoints(folder) or (folder / SAFE_WEIGHTS_NAME).exists()
            advice = "give overwrite (--overwrite) to start afresh" if begun else "leave it out to start"
            raise ValueError(
                f"resume goes on from a whole checkpoint in {folder}, which has none: {advice}"
                if found is None
                else f"resume goes on from a whole checkpoint, got {found}, which is none"
            )
        return found
    if not overwrite and _model_type(folder) not in (None, HierarchicalSaeConfig.model_type):
        raise ValueError(f"{folder} holds a model of type {_model_type(folder)}, no autoencoder: give another folder")
    if not overwrite and ((folder / SAFE_WEIGHTS_NAME).exists() or _checkpoints(folder)):
        state = "a finished autoencoder" if (folder / SAFE_WEIGHTS_NAME).exists() else "an unfinished training"
        resume_it = "resume (--resume) to go on, " if last_checkpoint(folder) else ""
        raise ValueError(
            f"{folder} holds {state}: give {resume_it}overwrite (--overwrite) to start afresh, or another folder"
        )
    return None


def _model_type(folder: Path) -> str | None:
    """Of the model that is saved in a folder, if its config says so."""
    try:
        return json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of `Trainer` in a folder that was written to its end; the folder need not exist."""
    return next((str(path) for path in reversed(_checkpoints(Path(output_dir))) if _is_whole(path)), None)


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _steps_made(checkpoint: str | Path) -> int:
    return json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text())["global_step"]


def _is_whole(checkpoint: Path) -> bool:
    """Whether all that training goes on with is there, the file that `Trainer` writes last too, and none is cut short."""
    try:
        for file in checkpoint.glob("*.json"):
            json.loads(file.read_text())
        _steps_made(checkpoint)
        for weights in checkpoint.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):
                pass
    except (OSError, ValueError, LookupError, TypeError, SafetensorError):
        return False
    # The model's code lies there as well.
    names = [path.name for path in checkpoint.iterdir() if path.suffix != ".py"]
    parts = ("*model[._-]*", "optimizer*", "scheduler*", "rng_state*")
    has_parts = all(fnmatch.filter(names, part) for part in parts)
    return has_parts and all(
        zipfile.is_zipfile(path) for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth")
    )


def _record(sae: HierarchicalSaeModel, dataset: Any, sample: Any, arguments: TrainingArguments) -> dict:
    """What has to be the same for a training to go on, ready for JSON."""
    config = {name: getattr(sae.config, name) for name in HierarchicalSaeConfig.__annotations__}
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    sums = []
    for part in sample if sae.config.is_transcoder else [sample]:
        probes = part[:: max(1, len(part) // PROBES)][:PROBES].cpu().double()
        # Waves of several lengths: behind a norm without weights the lengths of all tokens are alike.
        waves = torch.outer(torch.arange(part.shape[1]), torch.arange(1, SUMS + 1)).double().cos()
        sums += (probes @ waves).tolist()
    is_stream = isinstance(dataset, ActivationDataset)
    data = dataset.stream.description() if is_stream else {"tokens": len(dataset)}
    processes = {"num_processes": arguments.world_size}
    return json.loads(json.dumps({**config, **settings, **processes, **data, "sums": sums}))


def _check_same(folder: Path, record: dict) -> None:
    try:
        started = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / RECORD} has to say what a training was started with: {error}") from error
    if not isinstance(started, dict) or started.keys() != record.keys():
        raise ValueError(f"{folder / RECORD} does not say what a training was started with: start afresh")
    differing = [name for name in record if name != "sums" and started[name] != record[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{folder} holds a training with {name}={started[name]!r}, got {name}={record[name]!r}: give what it was "
            "started with to go on, or another folder"
        )
    sums = zip(started["sums"], record["sums"], strict=True)
    if not all(math.dist(one, other) <= TOLERANCE * math.hypot(*one) for one, other in sums):
        raise ValueError(f"{folder} holds a training on other activations: give those to go on, or another folder")


def _check_steps(checkpoint: str, max_steps: int) -> None:
    done = _steps_made(checkpoint)
    if 0 < max_steps < done:
        raise ValueError(f"{checkpoint} has made {done} steps already, got {max_steps} in all: give at least as many")


def _start(folder: Path, record: dict) -> None:
    """Leaves nothing of an earlier training that this one could be taken for."""
    for checkpoint in _checkpoints(folder):
        shutil.rmtree(checkpoint)
    (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
    with whole_file(folder / RECORD) as file:
        file.write_text(json.dumps(record, indent=2) + "\n")


__all__ = ["last_checkpoint", "starting_point", "train_sae", "training_arguments"]
