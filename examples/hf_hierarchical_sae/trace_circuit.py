# /// script
# dependencies = ["circuit-tracer==0.5.0", "nnsight==0.7.0"]
# ///
"""
An attribution graph of a prompt, by circuit-tracer, with transcoders of all layers at one budget. It runs where
circuit-tracer is installed, which asks for an older transformers than hf_hierarchical_sae does:

    hierarchical-sae circuits transcoders/* --output circuits_k16 --k 16
    python -m venv circuits && circuits/bin/pip install circuit-tracer==0.5.0 nnsight==0.7.0
    circuits/bin/python examples/hf_hierarchical_sae/trace_circuit.py circuits_k16 --prompt "The capital of France is"

`circuit-tracer start-server --graph_file_dir graphs` shows the graphs in a browser.
"""

import argparse
import time
from pathlib import Path
from typing import Any


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("transcoders", type=Path, help="folder that `hierarchical-sae circuits` wrote")
    parser.add_argument("--prompt", required=True, help="text whose next token is explained")
    parser.add_argument("--model", help="language model, if not the one that the transcoders were trained on")
    parser.add_argument(
        "--backend",
        choices=["nnsight", "transformerlens"],
        default="nnsight",
        help="how circuit-tracer runs the model: transformerlens knows some models by name (default: nnsight)",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("graphs"), help="where to write (default: graphs)")
    parser.add_argument("--slug", default="graph", help="name of the graph there (default: graph)")
    parser.add_argument(
        "--max_feature_nodes",
        type=int,
        default=2000,
        help="latents in the graph, the most influential (default: 2000)",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="nodes per backward pass (default: 64)")
    return parser.parse_args()


def load_transcoders(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The set and its settings. Release 0.5.0 does not read the activation function from them."""
    from circuit_tracer.transcoder.activation_functions import TopK
    from circuit_tracer.utils.hf_utils import load_transcoder_from_hub

    if not (folder / "config.yaml").is_file():
        raise SystemExit(
            f"expected the folder that `hierarchical-sae circuits` wrote, with its config.yaml, got {folder}"
        )
    # an absolute path is a folder, any other an id on the Hub
    transcoders, config = load_transcoder_from_hub(str(folder.resolve()))
    if config["activation"] == "topk":
        for transcoder in transcoders:
            transcoder.activation_function = TopK(config["k"])
    return transcoders, config


def main() -> None:
    arguments = parse_arguments()
    try:
        from circuit_tracer import ReplacementModel, attribute
        from circuit_tracer.graph import compute_graph_scores
    except ImportError as error:
        raise SystemExit(
            f"{error}: pip install circuit-tracer==0.5.0 nnsight==0.7.0, in an environment of its own"
        ) from error
    from circuit_tracer.utils.create_graph_files import create_graph_files

    transcoders, config = load_transcoders(arguments.transcoders)
    name = arguments.model or config["model_name"]
    model = ReplacementModel.from_pretrained_and_transcoders(name, transcoders, backend=arguments.backend)
    start = time.perf_counter()
    graph = attribute(
        arguments.prompt, model, batch_size=arguments.batch_size, max_feature_nodes=arguments.max_feature_nodes
    )
    seconds = time.perf_counter() - start
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    graph.to_pt(str(arguments.output_dir / f"{arguments.slug}.pt"))
    create_graph_files(graph, arguments.slug, str(arguments.output_dir))
    replaced, complete = compute_graph_scores(graph)
    tokens = ", ".join(f"{target.token_str!r}" for target in graph.logit_targets[:3])
    print(f"{graph.input_string!r} goes on with {tokens}")
    print(f"{len(graph.active_features)} active latents, {len(graph.adjacency_matrix)} nodes, {seconds:.1f} s")
    print(f"replacement score {replaced:.3f}, completeness score {complete:.3f}: {arguments.output_dir}")


if __name__ == "__main__":
    main()
