"""The command `bias-steer`: look into a saved adapter and write it for other software."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from .analysis import lens_table, logit_lens, plot_statistics, statistics_table, vector_statistics
from .serving.gguf import export_control_vector, export_gguf
from .serving.routes import adapter_routes, routes_table
from .serving.stock_checkpoint import bias_ready_checkpoint, export_stock_checkpoint
from .vectors import load_vectors


EXAMPLES = """
examples:
  # norms, rank and similarity of the vectors; reads the adapter alone
  bias-steer inspect outputs/steer
  bias-steer inspect user/steered-llama --plot vectors.png

  # tokens that each layer promotes and suppresses; loads the base model too
  bias-steer lens outputs/steer --reading cosine --top_k 8

  # which servers give its answers exactly, and why the others do not; reads the config of the base model
  bias-steer routes outputs/steer

  # a checkpoint for vLLM, SGLang or transformers without this package
  bias-steer export outputs/steer --format stock --output steered-model
  # a control vector for llama.cpp (which takes none for layer 0)
  bias-steer export outputs/steer --format control-vector --output steer.gguf --drop_first_layer
  # a llama.cpp model with all vectors, made from one that is quantised already
  bias-steer export outputs/steer --format gguf --gguf_in base.Q4_1.gguf --output steered.gguf
  # a base model with zero biases, on which TRL can train with vLLM
  bias-steer export meta-llama/Llama-3.1-8B --format bias-ready --output llama-bias-ready
"""


def _load_steered_model(adapter: str, base_model: str | None) -> tuple[PeftModel, Any]:
    """
    The base model with a saved adapter on it, in evaluation mode, and its tokenizer.

    Args:
        adapter (`str`): Folder or Hub id of the adapter.
        base_model (`str`, *optional*): Folder or Hub id of the base model. By default the one the adapter names.
    """
    name = base_model or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not name:
        raise ValueError(f"{adapter} does not name its base model: pass it as --base_model")
    base = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    return PeftModel.from_pretrained(base, adapter).eval(), AutoTokenizer.from_pretrained(name)


def inspect(args: argparse.Namespace) -> None:
    statistics = vector_statistics(load_vectors(args.adapter))
    if args.plot:
        plot_statistics(statistics, args.plot, title=args.adapter)
    _show(args, asdict(statistics), statistics_table(statistics))


def lens(args: argparse.Namespace) -> None:
    model, tokenizer = _load_steered_model(args.adapter, args.base_model)
    lenses = logit_lens(model, tokenizer, top_k=args.top_k)
    _show(args, [asdict(layer) for layer in lenses], lens_table(lenses, args.reading, shown=args.top_k))


def export(args: argparse.Namespace) -> None:
    if args.format == "bias-ready":
        bias_ready_checkpoint(AutoModelForCausalLM.from_pretrained(args.adapter, dtype="auto"), args.output)
        return
    if (args.format == "gguf") != (args.gguf_in is not None):
        raise ValueError("--format gguf needs --gguf_in, the llama.cpp file to add the vectors to, and no other does")
    model, tokenizer = _load_steered_model(args.adapter, args.base_model)
    if args.format == "stock":
        export_stock_checkpoint(model, args.output, tokenizer=tokenizer)
    elif args.format == "gguf":
        export_gguf(model, args.gguf_in, args.output)
    else:
        dropped = export_control_vector(model, args.output, drop_first_layer=args.drop_first_layer)
        if dropped:
            print(f"left out: the vector of layer 0, of norm {dropped:.4g}", file=sys.stderr)


def routes(args: argparse.Namespace) -> None:
    found = adapter_routes(args.adapter, args.base_model)
    _show(args, [asdict(route) for route in found], routes_table(found))


def _show(args: argparse.Namespace, data: Any, table: Any) -> None:
    if args.json:
        print(json.dumps(data, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    form: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXAMPLES}
    parser = argparse.ArgumentParser(prog="bias-steer", description=__doc__, **form)
    commands = parser.add_subparsers(required=True, metavar="inspect | lens | routes | export")
    summaries = {
        inspect: "norms, rank and similarity of the vectors (reads the adapter alone)",
        lens: "tokens that each layer's vector promotes and suppresses",
        routes: "ways to serve it: which are exact, and why the others are not",
        export: "write the steered model, or the vectors, for other software",
    }
    subparsers = {}
    for function, summary in summaries.items():
        subparser = commands.add_parser(function.__name__, help=summary, description=summary, **form)
        subparser.set_defaults(run=function)
        subparser.add_argument("adapter", help="folder or Hub id of the adapter (of the base model for bias-ready)")
        subparsers[function] = subparser
    for function in (inspect, lens, routes):
        subparsers[function].add_argument("--json", action="store_true", help="print JSON instead of a table")
    for function in (lens, routes, export):
        subparsers[function].add_argument("--base_model", help="base model, if not the one the adapter names")
    subparsers[inspect].add_argument("--plot", metavar="FILE", help="draw the numbers into this image file")
    subparsers[lens].add_argument("--top_k", type=int, default=5, help="tokens per layer and direction (default: 5)")
    subparsers[lens].add_argument(
        "--reading",
        choices=["raw", "cosine", "normed"],
        default="raw",
        help="rank by what the vector adds to the logits, by cosine, or through the final norm (default: raw)",
    )
    subparsers[export].add_argument(
        "--format", choices=["stock", "control-vector", "gguf", "bias-ready"], required=True, help="see the examples"
    )
    subparsers[export].add_argument("--output", required=True, help="file to write, or folder for a checkpoint")
    subparsers[export].add_argument("--gguf_in", metavar="FILE", help="llama.cpp model to add the vectors to")
    subparsers[export].add_argument(
        "--drop_first_layer", action="store_true", help="control-vector: give up the vector of layer 0"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs `bias-steer` with the given arguments, by default those of the process."""
    args = _parser().parse_args(arguments)
    logging.disable_progress_bar()
    try:
        args.run(args)
    except (ImportError, OSError, SafetensorError, ValueError) as error:
        raise SystemExit(f"bias-steer: {error}") from error


if __name__ == "__main__":
    main()
