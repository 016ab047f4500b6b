# /// script
# dependencies = ["hf_hierarchical_sae[cpu]"]
# ///
"""Memory of training and evaluating a large dictionary, beside that of its weights and its optimizer, one CPU thread.

    python examples/benchmarks/sae_scale.py --d_sae 262144 --output outputs/sae_scale.md

Adam holds twice what the weights take, so both together are three times the weights; gradients take as much as the weights
once more. Numbers are of the resident set of this process, beyond what it held before the dictionary was made.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel, evaluate_budgets


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from turns import machine, resident_mebibytes


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d_in", type=int, default=576, help="size of an activation (default: 576)")
    parser.add_argument("--d_sae", type=int, default=2**18, help="number of latents (default: 262144)")
    parser.add_argument("--encoder_chunk_size", type=int, default=2**15, help="latents at a time (default: 32768)")
    parser.add_argument("--k", type=int, default=64, help="largest number of latents per token (default: 64)")
    parser.add_argument("--tokens", type=int, default=1024, help="in a batch (default: 1024)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (default: 3)")
    parser.add_argument("--output", default="outputs/sae_scale.md", help="where the table is written")
    return parser.parse_args()


def train(sae, x, steps):
    optimizer = torch.optim.AdamW(sae.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    for _ in range(steps):
        sae(x).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def main():
    arguments = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(arguments.tokens, arguments.d_in)
    # Machine code is loaded with the first step.
    small = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=16, d_sae=64, k=4)).train()
    train(small, x[:8, :16], 1)
    before, rows, kept = resident_mebibytes("VmRSS"), [], []
    Path("/proc/self/clear_refs").write_text("5")
    config = HierarchicalSaeConfig(
        d_in=arguments.d_in,
        d_sae=arguments.d_sae,
        k=arguments.k,
        encoder_chunk_size=arguments.encoder_chunk_size,
    )
    sae = HierarchicalSaeModel(config).train()
    held = 3 * sum(parameter.nbytes for parameter in sae.parameters()) / 2**20
    sae.initialize_from_activations(x)
    for name, call in {
        f"{arguments.steps} steps": lambda: train(sae, x, arguments.steps),
        "evaluate_budgets": lambda: evaluate_budgets(sae, x),
    }.items():
        start = time.process_time()
        # The optimizer stays, as it does in a training that is evaluated.
        kept.append(call())
        rows.append((name, time.process_time() - start, resident_mebibytes("VmHWM") - before))
    lines = [
        f"Hardware: {machine()}. One thread, float32, torch {torch.__version__}; d_in {arguments.d_in}, d_sae "
        f"{arguments.d_sae}, chunks of {arguments.encoder_chunk_size} latents, {arguments.tokens} tokens.",
        "",
        "| after | CPU s | peak MiB | weights and optimizer, MiB | ratio |",
        "|---|---:|---:|---:|---:|",
        *(f"| {name} | {seconds:.1f} | {peak:.0f} | {held:.0f} | {peak / held:.2f} |" for name, seconds, peak in rows),
    ]
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
