"""The options of the command `hierarchical-sae`: what each part of it takes, and what the values may be."""

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FunctionType
from typing import Any

from .interop import load_gemma_scope, load_saelens, load_sparsify, save_saelens, save_sparsify
from .modeling_hierarchical_sae import HierarchicalSaeModel
from .sites import HOOK_POINTS


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
  # numbers on held-out text into the card's metadata, the page beside the model, and all of it to the Hub
  hierarchical-sae evaluate sae --model MODEL --text other_book.txt --card
  hierarchical-sae dashboard sae --model MODEL --text book.txt --card
  hf upload user/my-sae sae --exclude "checkpoint-*"
  # other objectives, such as BatchTopK, and the numbers in TensorBoard as well
  hierarchical-sae train states sae --k 64 --selection batch_topk --report_to tensorboard

  # one budget for SAELens and SAEBench, or for sparsify; and back
  hierarchical-sae convert sae sae_lens/32 --to saelens --k 32
  hierarchical-sae convert EleutherAI/sae-pythia-410m-65k sae --from sparsify --subfolder layers.12
  hierarchical-sae convert sae sae_8_by_threshold --k 8 --by_threshold states
  hierarchical-sae convert google/gemma-scope-2b-pt-res sae --from gemma_scope --subfolder layer_20/width_16k/average_l0_71
  # transcoders of all layers for circuit-tracer, with one budget
  hierarchical-sae circuits transcoders/* --output circuits_k32 --k 32
"""

DTYPES = ["float32", "bfloat16", "float16", "auto"]
LOADERS = {
    "hierarchical": HierarchicalSaeModel.from_pretrained,
    "saelens": load_saelens,
    "sparsify": load_sparsify,
    "gemma_scope": load_gemma_scope,
}
SAVERS = {"saelens": save_saelens, "sparsify": save_sparsify}
# What is read of a text, [`ActivationSettings`], and which text it is.
READING = ("text_column", "context_length", "skip_special_tokens", "skip_tokens", "max_norm_ratio", "batch_tokens")
TEXT = ("text", "dataset", "dataset_config", "split", "tokens", *READING, "dtype", "device_map", "quantization")


def make_parser(description: str | None, commands: Iterable[FunctionType]) -> argparse.ArgumentParser:
    """
    Args:
        description (`str`, *optional*): what `--help` says first.
        commands (`Iterable[FunctionType]`): those of `PARTS` by name, in the order of the help; each becomes the default of `run`.
    """
    form: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXAMPLES}
    parser = argparse.ArgumentParser(prog="hierarchical-sae", description=description, **form)
    parts = parser.add_subparsers(required=True, metavar=" | ".join(PARTS))
    for function in commands:
        summary, add_options = PARTS[function.__name__]
        part = parts.add_parser(function.__name__, help=summary, description=summary, **form)
        part.set_defaults(run=function)
        add_options(part)
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
    _option(
        part, "shard_dtype", choices=DTYPES[:3], default="float32", help="of the values on disk (default: float32)"
    )
    _option(
        part, "num_processes", type=_integer(1), help="processes that share the work (default: the launcher's, or 1)"
    )
    _option(part, "process_index", type=_integer(0), help="number of this one, from 0 (default: the launcher's, or 0)")


def _train_options(part: argparse.ArgumentParser) -> None:
    part.add_argument("harvest", type=Path, nargs="?", help="folder that harvest wrote; none with --model")
    part.add_argument("output", help="where to write checkpoints and the result")
    _text_options(part, required=False, tokens=None)
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
    _option(part, "card", action="store_true", help="put the numbers into the model card in the autoencoder's folder")


def _dashboard_options(part: argparse.ArgumentParser) -> None:
    part.add_argument("sae", help="folder or Hub id of the autoencoder")
    _text_options(part, required=True, tokens=100_000, context_length=128)
    _option(part, "layer", type=_integer(), help="decoder layer, if not the one in the autoencoder's config")
    _option(part, "output", type=Path, default=Path("dashboard.html"), help="file to write (default: dashboard.html)")
    _option(part, "latents", type=_integer(0), nargs="+", help="show these only")
    _option(part, "max_megabytes", type=_positive, default=32.0, help="largest size of the page (default: 32)")
    _option(
        part, "card", action="store_true", help="put the page into the autoencoder's folder, and a link into its card"
    )


def _convert_options(part: argparse.ArgumentParser) -> None:
    part.add_argument("source", help="folder or Hub id of the autoencoder")
    part.add_argument("output", help="folder to write")
    _option(part, "from", choices=list(LOADERS), default="hierarchical", help="what the source is (ours)")
    _option(part, "to", choices=["hierarchical", *SAVERS], default="hierarchical", help="what to write (ours)")
    _option(part, "subfolder", default="", help="where in the source it is")
    _option(part, "k", type=_integer(1), help="budget that saelens or sparsify get (default: the trained one)")
    _option(
        part,
        "by_threshold",
        type=Path,
        metavar="HARVEST",
        help="select latents above one threshold instead, k of each token on average over this folder that harvest wrote",
    )
    _option(part, "overwrite", action="store_true", help="write into a folder that holds something")
    _option(part, "push_to_hub", metavar="REPO_ID", help="upload the result to this repository")


def _circuits_options(part: argparse.ArgumentParser) -> None:
    part.add_argument("transcoders", nargs="+", help="folders or Hub ids of one transcoder of each layer")
    _option(part, "output", required=True, help="folder to write")
    _option(part, "k", type=_integer(1), help="latents per token (default: the trained number)")
    _option(part, "overwrite", action="store_true", help="write into a folder that holds something")


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
    _reading_options(parser, tokens, context_length)
    _language_model_options(parser)
    parser.set_defaults(text_defaults={name: parser.get_default(name) for name in TEXT})


def _reading_options(parser: argparse.ArgumentParser, tokens: int | None, context_length: int) -> None:
    """Which of the text's tokens are read, and how many at a time."""
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
    _option(
        parser,
        "max_norm_ratio",
        type=_positive,
        default=5.0,
        help="leave out tokens above so many median norms (default: 5)",
    )
    _option(parser, "batch_tokens", type=_integer(1), default=2048, help="positions per forward pass (default: 2048)")


def _language_model_options(parser: argparse.ArgumentParser) -> None:
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


# What the help says of each command, and its options.
PARTS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "harvest": (
        "write a language model's hidden states to disk; the same command goes on after a stop",
        _harvest_options,
    ),
    "train": (
        "train an autoencoder or a transcoder on what harvest wrote, or with --model straight from text",
        _train_options,
    ),
    "evaluate": ("quality at each budget; with --model, inside the language model as well", _evaluate_options),
    "dashboard": (
        "one self-contained HTML page of the latents, with a slider for the budget",
        _dashboard_options,
    ),
    "convert": ("from and to the formats of SAELens and sparsify, and to a threshold", _convert_options),
    "circuits": ("transcoders of all layers as one set for circuit-tracer", _circuits_options),
}
