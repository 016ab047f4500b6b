"""The command `hierarchical-sae`: from text to an autoencoder, its numbers, a page of its latents, and other formats."""

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, create_repo, upload_folder
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations

from .activation_shards import ActivationShards, save_shards
from .activations import ActivationDataset, iterate_activations
from .circuits import export_circuit_tracer
from .cli_options import LOADERS, READING, SAVERS, make_parser
from .configuration_hierarchical_sae import HierarchicalSaeConfig
from .dashboard import write_dashboard
from .evaluation import check_plot, evaluate_budgets, evaluate_in_model, plot_evaluations
from .interventions import record_statistics
from .language_model import input_device
from .model_card_hierarchical_sae import card_on_hub, set_metrics
from .modeling_hierarchical_sae import HierarchicalSaeModel
from .sites import HOOK_POINTS
from .texts import read_dataset, read_files
from .thresholds import select_by_threshold
from .training import starting_point, train_sae, training_arguments
from .whole_files import check_writable


# Tokens that typical activations and the starting point of training are measured on.
SAMPLE_TOKENS = 65_536
# Options of `train` that the config has under the same name.
OBJECTIVE = (
    "d_sae",
    "k",
    "budgets",
    "selection",
    "budget_weights",
    "matryoshka_prefixes",
    "aux_loss_coefficient",
    "aux_k",
    "dead_after_tokens",
    "encoder_chunk_size",
)


def harvest(args: argparse.Namespace) -> None:
    texts = read_texts(args)
    model, tokenizer = load_language_model(args)
    stream = iterate_activations(
        model,
        tokenizer,
        texts,
        args.layer,
        hook_point=args.hook_point,
        **text_settings(args),
    )
    process_index, num_processes = _share(args)
    tokens = save_shards(
        stream,
        args.folder,
        shard_tokens=args.shard_tokens,
        dtype=getattr(torch, args.shard_dtype),
        process_index=process_index,
        num_processes=num_processes,
    )
    if tokens is None:
        print(f"{stream.counts['tokens']} tokens written to {args.folder}, where other processes have still to write")
    else:
        command = ["hierarchical-sae", "train", str(args.folder), "sae"]
        # several layers or sites were harvested: an autoencoder is of one
        command += ["--layer", str(args.layer[0])] if len(args.layer or []) > 1 else []
        command += ["--hook_point", args.hook_point[0]] if len(args.hook_point) > 1 else []
        print(f"{tokens} tokens in {args.folder}: train with `{shlex.join(command)}`")


def train(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    if (args.harvest is None) == (args.model is None):
        raise ValueError("give either a folder that harvest wrote, or --model with --text or --dataset")
    arguments = training_arguments(
        args.output,
        max_steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        bf16=args.bf16,
        save_steps=args.save_steps,
        seed=args.seed,
        report_to=check_reporters(args.report_to),
    )
    starting_point(args.output, resume=args.resume, overwrite=args.overwrite)
    dataset, sample, source = _activations_to_train_on(args, arguments)
    sae = _sae_to_train(args, source)
    if args.push_to_hub:
        # What would fail after hours of training fails here.
        with expecting(f"to upload to {args.push_to_hub}"):
            card_on_hub(create_repo(args.push_to_hub, exist_ok=True).repo_id)
    first = [part[:8192] for part in (sample if sae.config.is_transcoder else [sample])]
    sae.initialize_from_activations(*first, keep_weights=args.init_from is not None)
    going_on = {"resume": args.resume, "overwrite": args.overwrite}
    trainer = train_sae(sae, dataset, sample, arguments, callbacks=[ProgressLine()], **going_on)
    if not trainer.is_world_process_zero():
        return
    evaluation = evaluate_budgets(sae, sample)
    print(f"{evaluation}\non training data; saved in {args.output}")
    if args.push_to_hub:
        metrics = evaluation.metrics(sae.config.dataset_name or "unnamed text", "train")
        print(f"uploaded: {sae.push_to_hub(args.push_to_hub, metrics=metrics)}")


def _activations_to_train_on(args: argparse.Namespace, arguments: TrainingArguments) -> tuple[Any, Any, dict]:
    """A dataset for `Trainer`, a sample of it, and what the autoencoder's config says of it."""
    if args.harvest is not None:
        _refuse_text(args)
        shards = ActivationShards(args.harvest, args.layer, args.hook_point, args.target_hook_point)
        sample = shards.rows(torch.randperm(len(shards))[:SAMPLE_TOKENS])
        source = {"model_name": shards.description["model_name"], "layer": shards.layer}
        sites = {"hook_point": shards.hook_point, "target_hook_point": shards.target_hook_point}
        return shards, sample, {**source, **sites, "d_in": shards.widths[0], "d_out": shards.widths[1]}
    texts = read_texts(args)
    model, tokenizer = load_language_model(args)
    stream = iterate_activations(
        model,
        tokenizer,
        texts,
        args.layer,
        hook_point=args.hook_point or "output",
        target_hook_point=args.target_hook_point,
        **text_settings(args),
        shuffle_tokens=max(args.shuffle_tokens, args.batch_tokens),
        seed=args.seed,
        show_progress=False,
    )
    stream.take_part(arguments.process_index, arguments.world_size)
    site, target = stream.sites[0], stream.sites[-1]
    source = {"model_name": model.config.name_or_path, "layer": site.layer, "hook_point": site.hook_point}
    source |= {"target_hook_point": args.target_hook_point, "d_in": site.width, "d_out": target.width}
    sample = stream.sample(SAMPLE_TOKENS)
    # Where the autoencoder is before `Trainer` moves it, while the language model may be on a GPU.
    sample = tuple(part.cpu() for part in sample) if isinstance(sample, tuple) else sample.cpu()
    return ActivationDataset(stream), sample, source


def _sae_to_train(args: argparse.Namespace, source: dict) -> HierarchicalSaeModel:
    """A new autoencoder for what is read at `source`, or a trained one to go on with."""
    given: dict[str, Any] = {name: value for name in OBJECTIVE if (value := getattr(args, name)) is not None}
    given |= {"normalize_decoder": False} if args.no_normalize_decoder else {}
    given |= {"skip_connection": True} if args.skip_connection else {}
    dataset_name = args.dataset_name or args.dataset
    if args.init_from is not None:
        return _saved_sae(args.init_from, given, source, dataset_name)
    settings: dict[str, Any] = {"d_sae": 8 * source["d_in"], **_with_one_budget(given), **source}
    config = HierarchicalSaeConfig(**settings, dataset_name=dataset_name)
    with expecting(f"memory for {config.d_sae} latents of size {config.d_in}"):
        return HierarchicalSaeModel(config)


def _saved_sae(name: str, given: dict, source: dict, dataset_name: str | None) -> HierarchicalSaeModel:
    """The autoencoder in a folder or a repository, with the settings that are given, for what is read at `source`."""
    with expecting(f"an autoencoder in {_place(name)}"):
        settings = _with_one_budget(given, HierarchicalSaeConfig.from_pretrained(name))
        sae = HierarchicalSaeModel.from_pretrained(name, dtype=torch.float32, **settings)
    sae.config.validate_architecture()
    for key, value in source.items():
        trained = getattr(sae.config, key)
        if key != "model_name" and trained not in (None, value):
            raise ValueError(
                f"{name} has {key}={trained!r}, the activations to train on have {key}={value!r}: give those that it "
                "was trained on"
            )
    for key, value in {**source, "dataset_name": dataset_name or sae.config.dataset_name}.items():
        setattr(sae.config, key, value)
    return sae


def _with_one_budget(given: dict, saved: Any = HierarchicalSaeConfig) -> dict:
    """These settings, with the one budget of batch_topk, where others are those of a saved config, or the default ones."""
    k, selection = (given.get(name, getattr(saved, name)) for name in ("k", "selection"))
    return {"budgets": [k], **given} if selection == "batch_topk" else given


class ProgressLine(TrainerCallback):
    """A line at each log, above the progress bar, with the explained variance at the largest budget."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        found = [value for name, value in kwargs["logs"].items() if name.startswith("explained_variance_")]
        if found and state.is_world_process_zero:
            budget = kwargs["model"].config.trained_budgets[-1]
            done = f"step {state.global_step} of {state.max_steps}"
            tqdm.write(f"{done}: explained variance {found[-1]:.3f} with {budget} latents per token", file=sys.stderr)


def evaluate(args: argparse.Namespace) -> None:
    check_card(args)
    if args.plot:
        check_plot(args.plot)
    sae = load_autoencoder(args)
    if (args.harvest is None) == (args.model is None):
        raise ValueError("give either --harvest, or --model with --text or --dataset")
    if args.harvest is not None:
        _refuse_text(args)
        if args.layer not in (None, sae.config.layer):
            raise ValueError(
                f"--harvest is read where {args.sae} belongs, layer {sae.config.layer}, got --layer {args.layer}"
            )
        evaluation = evaluate_budgets(sae, shards_for(sae, args.harvest), args.budgets)
    else:
        texts = read_texts(args)
        model, tokenizer = load_language_model(args)
        sae.to(input_device(model))
        stream = iterate_activations(
            model,
            tokenizer,
            texts,
            trained_layer(args, sae),
            hook_point=sae.config.hook_point or "output",
            target_hook_point=sae.config.target_hook_point,
            **text_settings(args),
        )
        evaluation = evaluate_in_model(sae, stream, args.budgets)
    print(json.dumps(evaluation.to_dict(), indent=2) if args.json else evaluation)
    if args.card:
        card = read_card(sae, args.sae)
        set_metrics(card, evaluation.metrics(*_text_name(args, sae)), args.sae)
        card.save(Path(args.sae, "README.md"))
    if args.plot:
        plot_evaluations({str(args.sae): evaluation}, args.plot)


def _text_name(args: argparse.Namespace, sae: HierarchicalSaeModel) -> tuple[str, str | None]:
    """What was evaluated on, as the card names it, and its split."""
    if args.harvest is not None:
        return sae.config.dataset_name or args.harvest.name, None
    if args.dataset is not None:
        return args.dataset, args.split
    return ", ".join(file.name for file in args.text), None


def dashboard(args: argparse.Namespace) -> None:
    check_card(args)
    check_writable(args.output)
    sae = load_autoencoder(args)
    texts = read_texts(args)
    model, tokenizer = load_language_model(args)
    found = write_dashboard(
        sae.to(input_device(model)),
        model,
        tokenizer,
        texts,
        path=args.output,
        layer=trained_layer(args, sae),
        **text_settings(args),
        latents=args.latents,
        max_megabytes=args.max_megabytes,
    )
    print(
        f"{args.output}: {found['latents']} of {found['live_latents']} latents that fire on {found['tokens']} tokens, "
        f"{found['bytes'] / 1e6:.1f} MB"
    )
    if args.card:
        beside = Path(args.sae, "dashboard.html")
        if not beside.exists() or not beside.samefile(args.output):
            shutil.copyfile(args.output, beside)
        card = read_card(sae, args.sae)
        if f"]({beside.name})" not in card.text:
            card.text = (
                f"{card.text.rstrip()}\n\n[{beside.name}]({beside.name}) shows its latents: save it and open it.\n"
            )
        card.save(Path(args.sae, "README.md"))


def check_card(args: argparse.Namespace) -> None:
    """Raises an error if `--card` is given and there is no folder to write to, or a card that cannot be read."""
    if not args.card:
        return
    if not Path(args.sae).is_dir():
        raise ValueError(
            f"--card writes to the folder of an autoencoder, got {args.sae}: download it to a folder first"
        )
    path = Path(args.sae, "README.md")
    check_writable(path)
    if path.exists():
        with expecting(f"a model card in UTF-8 with metadata in YAML in {path}; mend or remove it"):
            ModelCard.load(path)


def read_card(sae: HierarchicalSaeModel, folder: str) -> ModelCard:
    """The model card in a folder, or a new one."""
    path = Path(folder, "README.md")
    return ModelCard.load(path) if path.exists() else sae.model_card(Path(folder).resolve().name)


def convert(args: argparse.Namespace) -> None:
    source, target = getattr(args, "from"), args.to
    if args.by_threshold is None and args.k is not None and target == "hierarchical":
        raise ValueError(
            "--k is the budget that a file of saelens or sparsify is written for, or the mean of --by_threshold; --to is "
            "hierarchical"
        )
    check_output(args, Path(args.source), Path(args.source, args.subfolder), args.by_threshold)
    with expecting(f"an autoencoder of {source} in {_place(args.source)}"):
        sae = LOADERS[source](args.source, subfolder=args.subfolder)
    k = args.k
    if args.by_threshold is not None:
        shards = shards_for(sae, args.by_threshold)
        sae, k = select_by_threshold(sae, shards, sae.config.k if k is None else k), None
        record_statistics(sae, shards)
    if target == "hierarchical":
        sae.save_pretrained(args.output)
    else:
        SAVERS[target](sae, args.output, k)
    kept = f"k = {k or sae.config.k}" if sae.config.is_trainable else "as many as are active"
    print(f"{args.output}: {sae.config.d_sae} latents, {kept}, for {target}")
    if args.push_to_hub and target == "hierarchical":
        print(f"uploaded: {sae.push_to_hub(args.push_to_hub)}")
    elif args.push_to_hub:
        repo_id = create_repo(args.push_to_hub, exist_ok=True).repo_id
        print(f"uploaded: {upload_folder(repo_id=repo_id, folder_path=args.output)}")


def circuits(args: argparse.Namespace) -> None:
    check_output(args, *map(Path, args.transcoders))
    export_circuit_tracer(args.transcoders, args.output, args.k)
    print(f"{args.output}: {len(args.transcoders)} layers for circuit-tracer")


def check_output(args: argparse.Namespace, *sources: Path | None) -> None:
    """Raises a `ValueError` if the folder to write is one of the sources, or holds something that nobody gave up."""
    output = Path(args.output)
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"expected a folder to write, got the file {output}")
    if any(source is not None and source.resolve() == output.resolve() for source in sources):
        raise ValueError(f"expected a folder to write other than those that are read, got {output}")
    if not args.overwrite and any(output.iterdir()):
        raise ValueError(f"{output} holds something: give --overwrite to write into it, or another folder")


def load_language_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The language model that `--model` names, in evaluation mode, where `--device_map` puts it, and its tokenizer."""
    remote = {"trust_remote_code": args.trust_remote_code}
    with expecting(f"a language model with its tokenizer in {_place(args.model)}"):
        model: Any = AutoModelForCausalLM.from_pretrained(
            args.model,
            dtype=args.dtype,
            device_map=args.device_map or _own_gpu(),
            quantization_config=_quantization(args),
            **remote,
        )
        return model.eval(), AutoTokenizer.from_pretrained(args.model, **remote)


def _own_gpu() -> str | None:
    """The GPU of this process among those that a launcher started, if there are GPUs."""
    if not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def _quantization(args: argparse.Namespace) -> BitsAndBytesConfig | None:
    """What transformers is to do for `--quantization`."""
    if args.quantization is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("--quantization needs one more package: pip install bitsandbytes")
    if args.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    computed = None if args.dtype == "auto" else args.dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed)


def _share(args: argparse.Namespace) -> tuple[int, int]:
    """`--process_index` and `--num_processes`, by default those of `torchrun` or `accelerate launch`."""
    launched = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    given = args.process_index, args.num_processes
    first, second = (there if own is None else own for own, there in zip(given, launched))
    return first, second


def load_autoencoder(args: argparse.Namespace) -> HierarchicalSaeModel:
    """The autoencoder that the first argument names."""
    with expecting(f"an autoencoder in {_place(args.sae)}"):
        return HierarchicalSaeModel.from_pretrained(args.sae)


def shards_for(sae: HierarchicalSaeModel, folder: Path) -> ActivationShards:
    """What a harvest has of the sites that an autoencoder reads."""
    return ActivationShards(folder, sae.config.layer, sae.config.hook_point, sae.config.target_hook_point)


def _place(name: str) -> str:
    """Where something is looked for, for errors: a folder that is not there is taken for an id on the Hub."""
    return name if Path(name).exists() else f"{name}, of which there is no folder here"


@contextmanager
def expecting(expected: str) -> Generator[None, None, None]:
    """Inside, whatever a library raises is a sentence: some raise types of their own, some plain `Exception`."""
    try:
        yield
    except (ImportError, StrictDataclassError):
        raise
    except Exception as error:
        raise ValueError(f"expected {expected}, got: {error}") from error


def check_reporters(names: list[str]) -> list[str]:
    """The names of `--report_to`; raises a `ValueError` for one that is not installed."""
    known = ["none", "all", *get_available_reporting_integrations()]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--report_to takes {', '.join(known)} or what else you install, got {', '.join(unknown)}")
    return names


def read_texts(args: argparse.Namespace) -> Any:
    """What `--text` or `--dataset` names: passages of files or rows, as a stream."""
    if (args.text is None) == (args.dataset is None):
        raise ValueError("give either --text with files, or --dataset with the id of a dataset")
    if args.text is not None:
        return read_files(args.text)
    return read_dataset(args.dataset, args.dataset_config, args.split)


def _refuse_text(args: argparse.Namespace) -> None:
    given = [name for name, default in args.text_defaults.items() if getattr(args, name) != default]
    if given:
        raise ValueError(f"a harvest holds activations of its own text: give no --{' or --'.join(given)} with it")


def text_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the options of the text say of [`ActivationSettings`]."""
    return {"max_tokens": args.tokens, **{name: getattr(args, name) for name in READING}}


def trained_layer(args: argparse.Namespace, sae: HierarchicalSaeModel) -> int | None:
    """`--layer`, by default the one in the autoencoder's config, which a module's path within the model does without."""
    layer = sae.config.layer if args.layer is None else args.layer
    if layer is None and (sae.config.hook_point or "output") in HOOK_POINTS:
        raise ValueError(f"{args.sae} does not say which layer it was trained on: give --layer")
    return layer


COMMANDS = (harvest, train, evaluate, dashboard, convert, circuits)
# What to do after Ctrl-C where something is kept.
GOES_ON = {harvest: "the same command goes on", train: "the same command with --resume goes on"}


def main(arguments: list[str] | None = None) -> None:
    """Runs `hierarchical-sae` with the given arguments, by default those of the process."""
    args = make_parser(__doc__, COMMANDS).parse_args(arguments)
    try:
        args.run(args)
    except (ImportError, OSError, SafetensorError, StrictDataclassError, ValueError) as error:
        # A config's own check arrives wrapped.
        reason = error.__cause__ if isinstance(error, StrictDataclassError) else error
        raise SystemExit(f"hierarchical-sae: {reason}") from error
    except KeyboardInterrupt:
        left = GOES_ON.get(args.run, "the same command starts afresh")
        print(f"\nhierarchical-sae: stopped; {left}", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
