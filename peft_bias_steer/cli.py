"""
The command `bias-steer`: look into a saved adapter, write it for other software, run software that loads it, or make one
without training.
"""

import argparse
import importlib.util
import json
import os
import pickle
import runpy
import shutil
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging

from .analysis import figure_class, lens_table, logit_lens, plot_statistics, statistics_table, vector_statistics
from .extraction import METHODS, extract_vectors, from_merged
from .layer import as_factor
from .report import (
    SCALES,
    adapter_report,
    add_to_card,
    find_card,
    read_completions,
    read_json_lines,
    write_report,
)
from .serving.base_model import (
    load_base_model,
    load_steered_model,
    load_tokenizer,
    read_config,
    trained_modules,
)
from .serving.check import PROMPTS, check_server
from .serving.gguf import export_control_vector, export_gguf, from_control_vector
from .serving.other_servers import export_easysteer, export_hotwire
from .serving.routes import adapter_routes, routes_table
from .serving.stock_checkpoint import bias_ready_checkpoint, export_stock_checkpoint
from .vectors import from_vectors, load_vectors, set_steering_vectors, steering_vectors, unwrap
from .whole_files import check_empty_folder, check_writable, whole_folder


EXAMPLES = """
examples:
  # norms, rank and similarity of the vectors; reads the adapter alone
  bias-steer inspect outputs/steer
  bias-steer inspect user/steered-llama --plot vectors.png

  # tokens that each layer promotes and suppresses; loads the base model too
  bias-steer lens outputs/steer --reading cosine --top_k 8

  # what it is and does, in one folder: Markdown, plots, JSON; rows are {"prompt": …, "completion": …}, the first file's what it is for
  bias-steer report outputs/steer --data held-out.jsonl other-task.jsonl --output outputs/report --card

  # which servers give its answers exactly, and why the others do not; reads the config of the base model
  bias-steer routes outputs/steer

  # a checkpoint for vLLM or transformers without this package
  bias-steer export outputs/steer --format stock --output steered-model
  # a control vector for llama.cpp (which takes none for layer 0)
  bias-steer export outputs/steer --format control-vector --output steer.gguf --drop_first_layer
  # a llama.cpp model with all vectors, made from one that is quantised already
  bias-steer export outputs/steer --format gguf --gguf_in base.Q4_1.gguf --output steered.gguf
  # a base model with zero biases, on which TRL can train with vLLM
  bias-steer export meta-llama/Llama-3.1-8B --format bias-ready --output llama-bias-ready

  # a file for EasySteer, or for hotwire-vllm; prints what a request to that server holds besides its prompt
  bias-steer export outputs/steer --format easysteer --output steer.gguf
  bias-steer export outputs/steer --format hotwire --output steer.pt

  # does a running server steer? Many drop the vectors without a word; its log-probabilities tell
  bias-steer check outputs/steer --url http://localhost:8000/v1

  # an adapter without training, from lines {"positive": "I am happy ...", "negative": "I am sad ..."}
  bias-steer extract base --pairs pairs.jsonl --output outputs/happy
  bias-steer extract base --pairs pairs.jsonl --method pca_center --scale 5 --output outputs/happy
  # the vectors that were merged into a checkpoint, or those of a file that repeng or llama.cpp wrote
  bias-steer extract base --merged steered-model --output outputs/steer
  bias-steer extract base --control_vector happy.gguf --output outputs/happy

  # any Python program, which then knows this adapter type: a module, a command or a script, with its own arguments
  bias-steer run -m lm_eval --model hf --model_args pretrained=base,peft=outputs/steer --tasks gsm8k
  bias-steer run transformers serve with-adapter --port 8000
"""
# what a user can mend; the text of these errors says how, so no traceback goes before it
MENDABLE = (ImportError, OSError, RuntimeError, SafetensorError, ValueError)
# what torch raises at a file in its older format; these say nothing of the file
DAMAGED = (EOFError, pickle.UnpicklingError, struct.error)
# of `extract`; they go to extract_vectors as they are
PAIR_OPTIONS = ("method", "layers_to_transform", "token", "batch_size")


def inspect(args: argparse.Namespace) -> None:
    trained = trained_modules(read_config(args.adapter))
    statistics = vector_statistics(load_vectors(args.adapter, skip_modules=True))
    _show(args, {**asdict(statistics), "trained_modules": trained}, lambda: statistics_table(statistics))
    if trained and not args.json:
        print(f"trained whole beside the vectors, and not in these numbers: {', '.join(trained)}")
    if args.plot:
        plot_statistics(statistics, args.plot, title=args.adapter)


def lens(args: argparse.Namespace) -> None:
    if args.top_k < 1:
        raise ValueError(f"top_k must be in [1, vocabulary size], got {args.top_k}")
    model = load_steered_model(args.adapter, args.base_model)
    tokenizer = load_tokenizer(unwrap(model).name_or_path or args.adapter)
    lenses = logit_lens(model, tokenizer, top_k=args.top_k)
    _show(args, [asdict(layer) for layer in lenses], lambda: lens_table(lenses, args.reading, shown=args.top_k))


def report(args: argparse.Namespace) -> None:
    data = {Path(file).stem: read_completions(file, args.rows) for file in args.data}
    if len(data) < len(args.data):
        raise ValueError(f"expected files of different names, which name the data sets, got {' '.join(args.data)}")
    check_writable(args.output)
    if args.card:
        check_writable(find_card(args.adapter).parent)
    figure_class()
    other = load_vectors(args.compare_to, skip_modules=True) if args.compare_to else None
    model = load_steered_model(args.adapter, args.base_model)
    tokenizer = load_tokenizer(unwrap(model).name_or_path or args.adapter)
    logging.enable_progress_bar()
    found = adapter_report(
        model,
        tokenizer,
        data,
        group_size=args.group_size,
        scales=tuple(args.scales),
        top_k=args.top_k,
        other=other,
        show_progress=True,
    )
    print(write_report(found, args.output, title=args.adapter))
    if args.card:
        add_to_card(found, args.adapter, args.output)


def export(args: argparse.Namespace) -> None:
    _check_export(args)
    if args.format == "bias-ready":
        bias_ready_checkpoint(load_base_model(args.adapter), args.output)
        return
    model = load_steered_model(args.adapter, args.base_model)
    if args.format == "stock":
        export_stock_checkpoint(model, args.output)
    elif args.format == "gguf":
        export_gguf(model, args.gguf_in, args.output)
    elif args.format == "easysteer":
        print(json.dumps({"steering": export_easysteer(model, args.output)}))
    elif args.format == "hotwire":
        print(json.dumps({"vllm_xargs": {"hotwire": json.dumps(export_hotwire(model, args.output))}}))
    else:
        dropped = export_control_vector(model, args.output, drop_first_layer=args.drop_first_layer)
        if dropped:
            print(f"left out: the vector of layer 0, of norm {dropped:.4g}", file=sys.stderr)


def _check_export(args: argparse.Namespace) -> None:
    """What can be seen to fail before a model is loaded."""
    if (args.format == "gguf") != (args.gguf_in is not None):
        raise ValueError("--format gguf needs --gguf_in, the llama.cpp file to add the vectors to, and no other does")
    if args.drop_first_layer and args.format != "control-vector":
        raise ValueError(f"--drop_first_layer is for --format control-vector, got it with --format {args.format}")
    if args.format == "bias-ready" and args.base_model:
        raise ValueError("--format bias-ready takes the base model in the place of an adapter, and no --base_model")
    if args.gguf_in is not None and not os.path.isfile(args.gguf_in):
        raise ValueError(f"--gguf_in must be a file, got {args.gguf_in}: No such file")
    if args.format in ("stock", "bias-ready"):
        check_empty_folder(args.output)
    elif os.path.isdir(args.output) or not Path(args.output).absolute().parent.is_dir():
        raise ValueError(f"--output must be a file in a folder that exists, got {args.output}")


def routes(args: argparse.Namespace) -> None:
    found = adapter_routes(args.adapter, args.base_model)
    _show(args, [asdict(route) for route in found], lambda: routes_table(found))


def check(args: argparse.Namespace) -> None:
    prompts = [_prompt_of(row, place) for place, row in read_json_lines(args.prompts)] if args.prompts else PROMPTS
    model = load_steered_model(args.adapter, args.base_model)
    tokenizer = load_tokenizer(unwrap(model).name_or_path or args.adapter)
    found = check_server(model, tokenizer, args.url, args.model, prompts=prompts)
    print(json.dumps(asdict(found), indent=2) if args.json else found)
    if found.is_base:
        raise ValueError(
            f"{args.url} answers as the base model does, it has dropped the vectors: bias-steer routes {args.adapter} says "
            "which servers keep them, and how"
        )
    if not found.is_steered:
        raise ValueError(
            f"{args.url} answers neither as the steered model does nor as the base: another scale, vectors that are added "
            "twice, another base model, or one that is quantised so coarsely that it cannot be told?"
        )


def _prompt_of(row: Any, place: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'expected {{"prompt": "a text"}} in {place}, got {str(row)[:60]}')
    return row["prompt"]


def extract(args: argparse.Namespace) -> None:
    check_empty_folder(args.output)
    scale = as_factor(args.scale, "--scale")
    options = {name: value for name, value in vars(args).items() if name in PAIR_OPTIONS}
    if args.pairs is None and options:
        raise ValueError(f"--{next(iter(options))} is for --pairs, got it without: leave it out")
    # once to its end, before a model is loaded
    num_pairs = sum(1 for _ in _read_pairs(args.pairs)) if args.pairs is not None else 0
    base = load_base_model(args.adapter).eval()
    if args.pairs is not None:
        tokenizer = load_tokenizer(args.adapter)
        logging.enable_progress_bar()
        pairs = logging.tqdm(_read_pairs(args.pairs), total=num_pairs, desc="extract", unit="pair")
        model = from_vectors(extract_vectors(base, tokenizer, pairs, **options), base)
    elif args.merged is not None:
        model = from_merged(load_base_model(args.merged), base)
    else:
        model = from_control_vector(args.control_vector, base)
    set_steering_vectors(model, {index: scale * vector for index, vector in steering_vectors(model).items()})
    with whole_folder(args.output) as folder:
        model.save_pretrained(str(folder))


def _read_pairs(path: str) -> Iterator[Any]:
    return (pair for _, pair in read_json_lines(path))


def run(args: argparse.Namespace) -> None:
    """Runs a program in this process, as `python` would, once PEFT knows the adapter type."""
    if args.module:
        path = _module_path(args.target)
    else:
        path = args.target if os.path.isfile(args.target) else shutil.which(args.target)
        if path is None or not (path.endswith(".py") or _is_python(path)):
            raise SystemExit(
                "bias-steer: expected -m and a module, a script, or a command that is written in Python, got "
                f"{args.target}"
            )
    sys.argv = [path, *args.arguments]
    sys.path[0] = "" if args.module else os.path.dirname(os.path.abspath(path))
    if args.module:
        runpy.run_module(args.target, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(path, run_name="__main__")


def _module_path(module: str) -> str:
    sys.path[0] = ""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise SystemExit(f"bias-steer: No module named {module}: expected one that python -m can run after -m")
    return spec.origin or module


def _is_python(path: str) -> bool:
    with open(path, "rb") as file:
        head = file.read(500)
    return head.startswith(b"#!") and b"python" in head


def _show(args: argparse.Namespace, data: Any, make_table: Callable[[], Any]) -> None:
    if args.json:
        print(json.dumps(data, indent=2, ensure_ascii=False))
        return
    table = make_table()
    from rich.console import Console

    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    form: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXAMPLES}
    parser = argparse.ArgumentParser(prog="bias-steer", description=__doc__, **form)
    commands = parser.add_subparsers(
        required=True, metavar="inspect | lens | report | routes | export | check | extract | run"
    )
    summaries = {
        inspect: "norms, rank and similarity of the vectors (reads the adapter alone)",
        lens: "tokens that each layer's vector promotes and suppresses",
        report: "what it is and does: vectors, dose, tokens, gains by scale, layer and data set; Markdown and plots",
        routes: "ways to serve it: which are exact, and why the others are not",
        export: "write the steered model, or the vectors, for other software",
        check: "does a running server answer as the steered model? Asks it for log-probabilities",
        extract: "make an adapter without training: from pairs of prompts, a merged checkpoint, a control vector",
        run: "run a Python program that loads it, without a line of code in that program",
    }
    subparsers = {}
    for function, summary in summaries.items():
        subparser = commands.add_parser(function.__name__, help=summary, description=summary, **form)
        subparser.set_defaults(run=function)
        subparsers[function] = subparser
    for function in (inspect, lens, report, routes, export, check):
        help_text = "folder or Hub id of the adapter (of the base model for bias-ready)"
        subparsers[function].add_argument("adapter", help=help_text)
    for function in (inspect, lens, routes, check):
        subparsers[function].add_argument("--json", action="store_true", help="print JSON instead of a table")
    for function in (lens, report, routes, export, check):
        subparsers[function].add_argument("--base_model", help="base model, if not the one the adapter names")
    subparsers[inspect].add_argument("--plot", metavar="FILE", help="draw the numbers into this image file")
    _add_lens_options(subparsers[lens])
    _add_report_options(subparsers[report])
    _add_export_options(subparsers[export])
    _add_check_options(subparsers[check])
    _add_extract_options(subparsers[extract])
    subparsers[run].add_argument("-m", dest="module", action="store_true", help="the target is a module")
    subparsers[run].add_argument("target", help="module, command or script")
    subparsers[run].add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    return parser


def _add_lens_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--top_k", type=int, default=5, help="tokens per layer and direction (default: 5)")
    parser.add_argument(
        "--reading",
        choices=["raw", "cosine", "normed"],
        default="raw",
        help="rank by what the vector adds to the logits, by cosine, or through the final norm (default: raw)",
    )


def _add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="FILE", help="JSON Lines: prompt and completion, or text"
    )
    parser.add_argument("--output", required=True, help="folder to write into")
    parser.add_argument("--rows", type=int, help="the first so many of each file (default: all)")
    parser.add_argument("--group_size", type=int, default=5, help="layers that are left out together (default: 5)")
    parser.add_argument("--scales", nargs="+", type=float, default=SCALES, help="factors of the vectors")
    parser.add_argument("--top_k", type=int, default=6, help="tokens per layer and direction (default: 6)")
    parser.add_argument("--compare_to", metavar="ADAPTER", help="another adapter, for the cosine of the vectors")
    parser.add_argument("--card", action="store_true", help="put the report into the adapter's README.md too")


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    formats = ["stock", "control-vector", "gguf", "bias-ready", "easysteer", "hotwire"]
    parser.add_argument("--format", choices=formats, required=True, help="see the examples")
    parser.add_argument("--output", required=True, help="file to write, or folder for a checkpoint")
    parser.add_argument("--gguf_in", metavar="FILE", help="llama.cpp model to add the vectors to")
    parser.add_argument(
        "--drop_first_layer", action="store_true", help="control-vector: give up the vector of layer 0"
    )


def _add_check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", required=True, help="of the server's interface, such as http://localhost:8000/v1")
    parser.add_argument("--model", help="name of the model, or of the adapter, there (default: the only one)")
    parser.add_argument(
        "--prompts", metavar="FILE", help='JSON Lines with a "prompt", a text; by default a dozen short ones'
    )


def _add_extract_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="base_model", help="folder or Hub id of the base model")
    parser.add_argument("--output", required=True, help="folder to write: it must be empty or not exist")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all vectors (default: 1)")
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument(
        "--pairs",
        metavar="FILE",
        help='JSON lines with a "positive" and a "negative" prompt: texts, or lists of messages',
    )
    sources.add_argument("--merged", help="folder or Hub id of a checkpoint with merged vectors")
    sources.add_argument("--control_vector", metavar="FILE", help="GGUF file of repeng or llama.cpp")
    group = parser.add_argument_group("with --pairs", argument_default=argparse.SUPPRESS)
    group.add_argument(
        "--method", choices=METHODS, help="of the differences: their mean, or a component (default: mean)"
    )
    group.add_argument("--layers_to_transform", type=int, nargs="+", metavar="LAYER", help="layers (default: all)")
    group.add_argument("--token", type=int, help="position that is read; negative from the end (default: -1)")
    group.add_argument("--batch_size", type=int, help="pairs in a forward pass (default: 8)")


def main(arguments: list[str] | None = None) -> None:
    """Runs `bias-steer` with the given arguments, by default those of the process."""
    args = _parser().parse_args(arguments)
    if args.run is run:  # its errors are those of the program
        return run(args)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers by the old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            args.run(args)
    except MENDABLE as error:
        raise SystemExit(f"bias-steer: {error}") from error
    except DAMAGED as error:
        raise SystemExit(
            f"bias-steer: a .bin file of {args.adapter} or its base model is damaged ({error}): copy or download it again"
        ) from error
    except KeyboardInterrupt:
        print("\nbias-steer: stopped; the same command starts afresh", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
