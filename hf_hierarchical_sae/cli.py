"""The command `hierarchical-sae`: from text to an autoencoder, its numbers, a page of its latents, and other formats."""

import argparse
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from huggingface_hub import create_repo, upload_folder
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
from .configuration_hierarchical_sae import HierarchicalSaeConfig
from .dashboard import write_dashboard
from .evaluation import evaluate_budgets, evaluate_in_model, plot_evaluations
from .interop import load_gemma_scope, load_saelens, load_sparsify, save_saelens, save_sparsify
from .language_model import input_device
from .modeling_hierarchical_sae import HierarchicalSaeModel
from .sites import HOOK_POINTS
from .texts import read_dataset, read_files
from .training import starting_point, train_sae, training_arguments


EXAMPLES = """
examples:
  # from text to a page of latents
  hierarchical-sae harvest states --model HuggingFaceTB/SmolLM2-135M-Instruct --layer 15 --text book.txt
  hierarchical-sae train states sae --k 64
  hierarchical-sae evaluate sae --model HuggingFaceTB/SmolLM2-135M-Instruct --text other_book.txt
  hierarchical-sae dashboard sae --model HuggingFaceTB/SmolLM2-135M-Instruct --text book.txt --output sae.html

  # a dataset of the Hub as a stream; two machines that each write half of it
  hierarchical-sae harvest states --model MODEL --layer 15 --dataset HuggingFaceFW/fineweb --tokens 100000000 \\
      --num_processes 2 --process_index 0
  # chats, through the chat template and without what it puts around messages; files of your own
  hierarchical-sae harvest states --model MODEL --layer 15 --dataset HuggingFaceTB/smoltalk --dataset_config all \\
      --skip_special_tokens
  hierarchical-sae harvest states --model MODEL --layer 15 --text chats.jsonl more.jsonl.gz --text_column conversation
  # what the MLPs of two layers add to the residual stream, and one of them
  hierarchical-sae harvest states --model MODEL --layer 8 15 --hook_point mlp.output --text book.txt
  hierarchical-sae train states sae --layer 15
  # a transcoder: what an MLP gives from what it takes
  hierarchical-sae harvest states --model MODEL --layer 15 --hook_point mlp.input mlp.output --text book.txt
  hierarchical-sae train states transcoder --hook_point mlp.input --target_hook_point mlp.output --skip_connection
  # an interrupted harvest goes on with the same command, training with --resume
  hierarchical-sae train states sae --k 64 --resume
  # budgets that are trained for, and an upload with a model card
  hierarchical-sae train states sae --k 64 --budgets 1 2 4 8 16 32 64 --push-to-hub user/my-sae
  # other objectives, such as BatchTopK, and the numbers in TensorBoard as well
  hierarchical-sae train states sae --k 64 --selection batch_topk --report_to tensorboard

  # one budget for SAELens and SAEBench, or for sparsify; and back
  hierarchical-sae convert sae sae_lens/32 --to saelens --k 32
  hierarchical-sae convert EleutherAI/sae-pythia-410m-65k sae --from sparsify --subfolder layers.12
  hierarchical-sae convert google/gemma-scope-2b-pt-res sae --from gemma_scope --subfolder layer_20/width_16k/average_l0_71
  # transcoders of all layers for circuit-tracer, with one budget
  hierarchical-sae circuits transcoders/* --output circuits_k32 --k 32
"""

# Tokens that typical activations and the starting point of training are measured on.
SAMPLE_TOKENS = 65_536
DTYPES = ["float32", "bfloat16", "float16", "auto"]
LOADERS = {
    "hierarchical": HierarchicalSaeModel.from_pretrained,
    "saelens": load_saelens,
    "sparsify": load_sparsify,
    "gemma_scope": load_gemma_scope,
}
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
SAVERS = {"saelens": save_saelens, "sparsify": save_sparsify}


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
        max_norm_ratio=args.max_norm_ratio,
        batch_tokens=args.batch_tokens,
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
        print(f"{tokens} tokens in {args.folder}: train with `hierarchical-sae train {args.folder} sae`")


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
            create_repo(args.push_to_hub, exist_ok=True)
    first = [part[:8192] for part in (sample if sae.config.is_transcoder else [sample])]
    sae.initialize_from_activations(*first, keep_weights=args.init_from is not None)
    going_on = {"resume": args.resume, "overwrite": args.overwrite}
    trainer = train_sae(sae, dataset, sample, arguments, callbacks=[ProgressLine()], **going_on)
    if not trainer.is_world_process_zero():
        return
    print(f"{evaluate_budgets(sae, sample)}\non training data; saved in {args.output}")
    if args.push_to_hub:
        print(f"uploaded: {sae.push_to_hub(args.push_to_hub)}")


def _activations_to_train_on(args: argparse.Namespace, arguments: TrainingArguments) -> tuple[Any, Any, dict]:
    """A dataset for `Trainer`, a sample of it, and what the autoencoder's config says of it."""
    if args.harvest is not None:
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
        max_norm_ratio=args.max_norm_ratio,
        batch_tokens=args.batch_tokens,
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
        k = HierarchicalSaeConfig.from_pretrained(name).k
        sae = HierarchicalSaeModel.from_pretrained(name, dtype=torch.float32, **_with_one_budget(given, k))
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


def _with_one_budget(given: dict, k: int = HierarchicalSaeConfig.k) -> dict:
    """These settings, with the one budget of batch_topk, which by default is `k`."""
    return {"budgets": [given.get("k", k)], **given} if given.get("selection") == "batch_topk" else given


class ProgressLine(TrainerCallback):
    """A line at each log, above the progress bar, with the explained variance at the largest budget."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        found = [value for name, value in kwargs["logs"].items() if name.startswith("explained_variance_")]
        if found and state.is_world_process_zero:
            budget = kwargs["model"].config.trained_budgets[-1]
            done = f"step {state.global_step} of {state.max_steps}"
            tqdm.write(f"{done}: explained variance {found[-1]:.3f} with {budget} latents per token", file=sys.stderr)


def evaluate(args: argparse.Namespace) -> None:
    sae = load_autoencoder(args)
    if (args.harvest is None) == (args.model is None):
        raise ValueError("give either --harvest, or --model with --text or --dataset")
    if args.harvest is not None:
        config = sae.config
        shards = ActivationShards(args.harvest, config.layer, config.hook_point, config.target_hook_point)
        evaluation = evaluate_budgets(sae, shards, args.budgets)
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
    if args.plot:
        plot_evaluations({str(args.sae): evaluation}, args.plot)
    print(json.dumps(evaluation.to_dict(), indent=2) if args.json else evaluation)


def dashboard(args: argparse.Namespace) -> None:
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


def convert(args: argparse.Namespace) -> None:
    source, target = getattr(args, "from"), args.to
    if args.k is not None and target == "hierarchical":
        raise ValueError("--k is the budget that a file of saelens or sparsify is written for, --to is hierarchical")
    with expecting(f"an autoencoder of {source} in {_place(args.source)}"):
        sae = LOADERS[source](args.source, subfolder=args.subfolder)
    if target == "hierarchical":
        sae.save_pretrained(args.output)
    else:
        SAVERS[target](sae, args.output, args.k)
    kept = f"k = {args.k or sae.config.k}" if sae.config.is_trainable else "as many as are active"
    print(f"{args.output}: {sae.config.d_sae} latents, {kept}, for {target}")
    if args.push_to_hub and target == "hierarchical":
        print(f"uploaded: {sae.push_to_hub(args.push_to_hub)}")
    elif args.push_to_hub:
        repo_id = create_repo(args.push_to_hub, exist_ok=True).repo_id
        print(f"uploaded: {upload_folder(repo_id=repo_id, folder_path=args.output)}")


def circuits(args: argparse.Namespace) -> None:
    export_circuit_tracer(args.transcoders, args.output, args.k)
    print(f"{args.output}: {len(args.transcoders)} layers for circuit-tracer")


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


def text_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the options of the text say of [`ActivationSettings`]."""
    names = ("text_column", "context_length", "skip_special_tokens", "skip_tokens")
    return {"max_tokens": args.tokens, **{name: getattr(args, name) for name in names}}


def trained_layer(args: argparse.Namespace, sae: HierarchicalSaeModel) -> int | None:
    """`--layer`, by default the one in the autoencoder's config, which a module's path within the model does without."""
    layer = sae.config.layer if args.layer is None else args.layer
    if layer is None and (sae.config.hook_point or "output") in HOOK_POINTS:
        raise ValueError(f"{args.sae} does not say which layer it was trained on: give --layer")
    return layer


def _parser() -> argparse.ArgumentParser:
    form: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXAMPLES}
    parser = argparse.ArgumentParser(prog="hierarchical-sae", description=__doc__, **form)
    commands = parser.add_subparsers(
        required=True, metavar="harvest | train | evaluate | dashboard | convert | circuits"
    )

    def command(function: FunctionType, summary: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(function.__name__, help=summary, description=summary, **form)
        subparser.set_defaults(run=function)
        return subparser

    _harvest_options(
        command(harvest, "write a language model's hidden states to disk; the same command goes on after a stop")
    )
    _train_options(
        command(
            train, "train an autoencoder or a transcoder on what harvest wrote, or with --model straight from text"
        )
    )
    _evaluate_options(command(evaluate, "quality at each budget; with --model, inside the language model as well"))
    _dashboard_options(command(dashboard, "one self-contained HTML page of the latents, with a slider for the budget"))
    _convert_options(command(convert, "from and to the formats of SAELens and sparsify"))
    _circuits_options(command(circuits, "transcoders of all layers as one set for circuit-tracer"))
    return parser


def _harvest_options(part: argparse.ArgumentParser) -> None:
    part.add_argument("folder", type=Path, help="where to write")
    _text_options(part, required=True, tokens=None)
    _option(part, "layer", type=_integer(), nargs="+", help="decoder layers, counted from 0")
    _option(
        part,
        "hook_point",
        nargs="+",
        default=["output"],
        help=f"sites of each layer: {', '.join(HOOK_POINTS)}, or a module's path (default: output)",
    )
    _option(part, "shard_tokens", type=_integer(1), default=65_536, help="tokens per file (default: 65536)")
    _stream_options(part)
    _option(
        part, "shard_dtype", choices=DTYPES[:3], default="float32", help="of the values on disk (default: float32)"
    )
    _option(
        part, "num_processes", type=_integer(1), help="processes that share the work (default: the launcher's, or 1)"
    )
    _option(part, "process_index", type=_integer(0), help="number of this one, from 0 (default: the launcher's, or 0)")


def _stream_options(part: argparse.ArgumentParser) -> None:
    """How a language model reads its text, where its activations are trained on."""
    _option(
        part,
        "max_norm_ratio",
        type=_positive,
        default=5.0,
        help="leave out tokens above so many median norms (default: 5)",
    )
    _option(part, "batch_tokens", type=_integer(1), default=2048, help="positions per forward pass (default: 2048)")


def _train_options(part: argparse.ArgumentParser) -> None:
    part.add_argument("harvest", type=Path, nargs="?", help="folder that harvest wrote; none with --model")
    part.add_argument("output", help="where to write checkpoints and the result")
    _text_options(part, required=False, tokens=None)
    _stream_options(part)
    _option(
        part,
        "shuffle_tokens",
        type=_integer(1),
        default=32_768,
        help="with --model, size of the buffer that tokens are drawn from at random (default: 32768)",
    )
    _option(
        part,
        "init_from",
        metavar="SAE",
        help="folder or Hub id of an autoencoder to go on with; its settings stay, unless others are given",
    )
    _option(part, "layer", type=_integer(), help="decoder layer to read; of a harvest, which one if it has several")
    _option(part, "hook_point", help="site of it, or a module's path (default: output, or what was harvested)")
    _option(part, "target_hook_point", help="train a transcoder, which computes this site from that at --hook_point")
    _option(part, "skip_connection", action="store_true", help="a transcoder that adds a linear map of its input")
    _option(part, "d_sae", type=_integer(1), help="number of latents (default: 8 times the hidden size)")
    _option(part, "k", type=_integer(1), help="largest number of latents per token (default: 64)")
    _option(
        part,
        "budgets",
        type=_integer(1),
        nargs="+",
        help="budgets to train for (default: every one up to k; of batch_topk, k)",
    )
    _objective_options(part)
    _option(part, "steps", type=_integer(1), default=1000, help="optimizer steps (default: 1000)")
    _option(part, "batch_size", type=_integer(1), default=1024, help="tokens per step and process (default: 1024)")
    _option(part, "learning_rate", type=_positive, default=3e-3, help="peak learning rate (default: 3e-3)")
    _option(part, "bf16", action="store_true", help="bfloat16 autocast; weights and moments stay float32")
    _option(part, "save_steps", type=_integer(1), default=200, help="steps between checkpoints (default: 200)")
    _option(part, "seed", type=_integer(0, 2**32 - 1), default=0, help="seed of the weights and batches (default: 0)")
    _option(part, "dataset_name", help="name of the text, for the model card")
    _option(part, "report_to", nargs="+", default=["none"], help="where to log: tensorboard, wandb, … (default: none)")
    _option(part, "resume", action="store_true", help="go on from the last whole checkpoint in the output folder")
    _option(part, "overwrite", action="store_true", help="start afresh in a folder that holds a training")
    _option(part, "push_to_hub", metavar="REPO_ID", help="upload the result, with a model card, to this repository")


def _objective_options(part: argparse.ArgumentParser) -> None:
    _option(part, "budget_weights", type=_not_negative, nargs="+", help="weight of each budget (default: equal)")
    _option(
        part,
        "selection",
        choices=["topk", "batch_topk"],
        help="k latents of each token, or batch × k of a batch, with one budget, k (default: topk)",
    )
    _option(
        part,
        "matryoshka_prefixes",
        type=_integer(1),
        nargs="+",
        help="train for budgets of the first so many latents too, the last of these being d_sae",
    )
    _option(part, "no_normalize_decoder", action="store_true", help="leave rows of W_dec at any norm")
    _option(
        part,
        "aux_loss_coefficient",
        type=_not_negative,
        help="weight of the loss that dead latents get (default: 0, none)",
    )
    _option(part, "aux_k", type=_integer(1), help="dead latents per token in it (default: half the hidden size)")
    _option(
        part,
        "dead_after_tokens",
        type=_integer(1),
        help="a latent that did not fire for so many is dead (default: 1000000)",
    )
    _option(
        part,
        "encoder_chunk_size",
        type=_integer(1),
        help="latents that are computed at a time, for less memory (default: all)",
    )


def _evaluate_options(part: argparse.ArgumentParser) -> None:
    part.add_argument("sae", help="folder or Hub id of the autoencoder")
    _option(part, "harvest", type=Path, help="folder that harvest wrote, instead of --model")
    _text_options(part, required=False, tokens=8192)
    _option(part, "layer", type=_integer(), help="decoder layer, if not the one in the autoencoder's config")
    _option(
        part,
        "budgets",
        type=_integer(1),
        nargs="+",
        help="numbers of latents per token (default: powers of two and k)",
    )
    _option(part, "plot", type=Path, metavar="FILE", help="draw quality against budget into this image file")
    _option(part, "json", action="store_true", help="print JSON instead of a table")


def _dashboard_options(part: argparse.ArgumentParser) -> None:
    part.add_argument("sae", help="folder or Hub id of the autoencoder")
    _text_options(part, required=True, tokens=100_000, context_length=128)
    _option(part, "layer", type=_integer(), help="decoder layer, if not the one in the autoencoder's config")
    _option(part, "output", type=Path, default=Path("dashboard.html"), help="file to write (default: dashboard.html)")
    _option(part, "latents", type=_integer(0), nargs="+", help="show these only")
    _option(part, "max_megabytes", type=_positive, default=32.0, help="largest size of the page (default: 32)")


def _convert_options(part: argparse.ArgumentParser) -> None:
    part.add_argument("source", help="folder or Hub id of the autoencoder")
    part.add_argument("output", help="folder to write")
    _option(part, "from", choices=list(LOADERS), default="hierarchical", help="what the source is (ours)")
    _option(part, "to", choices=["hierarchical", *SAVERS], default="hierarchical", help="what to write (ours)")
    _option(part, "subfolder", default="", help="where in the source it is")
    _option(part, "k", type=_integer(1), help="budget that saelens or sparsify get (default: the trained one)")
    _option(part, "push_to_hub", metavar="REPO_ID", help="upload the result to this repository")


def _circuits_options(part: argparse.ArgumentParser) -> None:
    part.add_argument("transcoders", nargs="+", help="folders or Hub ids of one transcoder of each layer")
    _option(part, "output", required=True, help="folder to write")
    _option(part, "k", type=_integer(1), help="latents per token (default: the trained number)")


def _integer(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """A type of argparse: an integer in [least, most]."""
    bounds = [] if least is None else [f"of at least {least}"]
    bounds += [] if most is None else [f"at most {most}"]

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or (least is not None and number < least) or (most is not None and number > most):
            raise argparse.ArgumentTypeError(
                f"expected an integer {' and '.join(bounds)}".rstrip() + f", got {text!r}"
            )
        return number

    return parse


def _positive(text: str) -> float:
    """A type of argparse: a positive and finite number."""
    return _number(text, math.ulp(0.0), "a positive number")


def _not_negative(text: str) -> float:
    """A type of argparse: a finite number, 0 or more."""
    return _number(text, 0.0, "a number of at least 0")


def _number(text: str, least: float, expected: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return number


def _option(parser: argparse.ArgumentParser, name: str, **settings: Any) -> None:
    """`--two_words` and `--two-words`, as transformers' own scripts have it."""
    parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), **settings)


def _text_options(
    parser: argparse.ArgumentParser, *, required: bool, tokens: int | None, context_length: int = 256
) -> None:
    _option(parser, "model", required=required, help="folder or Hub id of the language model")
    _option(
        parser,
        "text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="files of plain text, or of rows: jsonl, json, parquet, csv, packed with gzip too",
    )
    _option(parser, "dataset", help="Hub id or folder of a dataset, read as a stream, instead of --text")
    _option(parser, "dataset_config", metavar="NAME", help="which configuration of the dataset, if it has several")
    _option(parser, "split", default="train", help="which split of the dataset (default: train)")
    _option(
        parser,
        "text_column",
        default="text",
        help="column of rows with texts, messages of chats or token ids (default: text, messages, prompt with "
        "completion, or input_ids, the first that a row has)",
    )
    _option(
        parser,
        "tokens",
        type=_integer(1),
        default=tokens,
        help=f"read exactly so many (default: {tokens or 'all of them'})",
    )
    _option(
        parser,
        "context_length",
        type=_integer(2),
        default=context_length,
        help=f"longest piece of text in tokens (default: {context_length})",
    )
    _option(
        parser,
        "skip_special_tokens",
        action="store_true",
        help="read special tokens, as around messages of chats, and leave their positions out",
    )
    _option(
        parser,
        "skip_tokens",
        nargs="+",
        metavar="TOKEN",
        help="likewise, entries of the vocabulary or texts of one token each",
    )
    _option(parser, "dtype", choices=DTYPES, default="float32", help="of the language model (default: float32)")
    _option(
        parser,
        "device_map",
        help="where the language model goes: auto, over all GPUs and main memory, or a device (default: this process's "
        "GPU, or the CPU)",
    )
    _option(parser, "quantization", choices=["4bit", "8bit"], help="load the language model so, with bitsandbytes")
    _option(
        parser,
        "trust_remote_code",
        action="store_true",
        help="run code that comes with the language model: read it before",
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs `hierarchical-sae` with the given arguments, by default those of the process."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except (ImportError, OSError, SafetensorError, StrictDataclassError, ValueError) as error:
        # A config's own check arrives wrapped.
        reason = error.__cause__ if isinstance(error, StrictDataclassError) else error
        raise SystemExit(f"hierarchical-sae: {reason}") from error
    except KeyboardInterrupt:
        print("\nhierarchical-sae: stopped; the same command goes on (train: with --resume)", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
