# /// script
# dependencies = ["hf_hierarchical_sae[cpu]", "sae-lens==6.54.0", "dictionary-learning==0.1.0", "eai-sparsify==1.3.3"]
# ///
"""Time, page faults and memory of the loss and of a whole training step on CPU, beside other libraries, one thread.

    python examples/benchmarks/sae_training.py --output_dir outputs/sae_benchmark

Each contestant has a process of its own, in which nothing else runs. They warm up, and then take turns, one at a time: a
number is the median over rounds, of CPU time and of pages that had to be mapped. Memory is the growth of the peak
resident set of that process. A library that is not installed is left out.
"""

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel, hierarchical_topk_loss
from hf_hierarchical_sae.hierarchical_topk import hierarchical_topk_loss_reference
from hf_hierarchical_sae.sparse_latents import topk_of_rows


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from turns import machine, medians_in_turns, take_turns


SIZES = {"A": (512, 64, 16384, 576), "B": (2048, 32, 32768, 576)}
LEARNING_RATE = 1e-3
OURS = "ours, HierarchicalTopK (all budgets)"
OUR_LOSS = "HierarchicalTopK, compiled (numba)"


def size_label(text):
    """A type of argparse: what `size_of` takes."""
    numbers = text.split(",")
    if text not in SIZES and not (len(numbers) == 4 and all(number.isdecimal() and int(number) for number in numbers)):
        raise argparse.ArgumentTypeError(f"expected {', '.join(SIZES)} or batch,k,d_sae,d_in, got {text!r}")
    return text


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = "A, B, or batch,k,d_sae,d_in (default: A B)"
    parser.add_argument("--sizes", type=size_label, nargs="+", default=["A", "B"], help=known)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that the medians are taken over (default: 5)")
    parser.add_argument("--compile", action="store_true", help="also torch.compile the reference (minutes)")
    parser.add_argument("--output_dir", default="outputs/sae_benchmark", help="where the tables are written")
    parser.add_argument(
        "--contestant", help="used by the script itself: take turns as this one, loss:NAME or step:NAME"
    )
    return parser.parse_args()


def size_of(name):
    return SIZES[name] if name in SIZES else tuple(int(number) for number in name.split(","))


def loss_contestants(batch, k, d_sae, d_in, with_compile):
    """Name → a call that runs the loss forward and backward, with a dense gradient of the decoder."""
    indices = torch.rand(batch, d_sae).topk(k, dim=1).indices
    values = torch.rand(batch, k).sort(dim=1, descending=True).values.requires_grad_()
    W_dec = F.normalize(torch.randn(d_sae, d_in), dim=1).requires_grad_()
    b_dec, target = torch.zeros(d_in, requires_grad=True), torch.randn(batch, d_in)

    def run(function, **options):
        def call():
            values.grad = W_dec.grad = b_dec.grad = None
            function(indices, values, W_dec, b_dec, target, **options).backward()

        return call

    def embedding_bag(indices, values, W_dec, b_dec, target):
        reconstruction = F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec
        return F.mse_loss(reconstruction, target)

    def dense(indices, values, W_dec, b_dec, target):
        latents = torch.zeros(batch, d_sae).scatter(1, indices, values)
        return F.mse_loss(latents @ W_dec + b_dec, target)

    contestants = {
        OUR_LOSS: run(hierarchical_topk_loss, backend="numba"),
        "HierarchicalTopK, torch": run(hierarchical_topk_loss, backend="torch"),
        "HierarchicalTopK, reference": run(hierarchical_topk_loss_reference),
        "plain TopK, embedding_bag": run(embedding_bag),
        "plain TopK, dense": run(dense),
    }
    if with_compile:
        compiled = torch.compile(hierarchical_topk_loss_reference, dynamic=False)
        contestants["HierarchicalTopK, torch.compile of the reference"] = run(compiled)
    return contestants


def our_step(batch, k, d_sae, d_in, x, budgets=None, targets=None):
    sites: dict[str, Any] = {} if targets is None else {"hook_point": "mlp.input", "target_hook_point": "mlp.output"}
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=d_in, d_sae=d_sae, k=k, budgets=budgets, **sites)).train()
    sae.initialize_from_activations(x, targets)
    # What stock Trainer does in a step: its default optimizer is the fused one.
    optimizer = torch.optim.AdamW(sae.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step():
        sae(x, targets=targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def sae_lens_step(batch, k, d_sae, d_in, x):
    sae_lens = importlib.import_module("sae_lens")
    step_input = importlib.import_module("sae_lens.saes.sae").TrainStepInput
    sae = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k)).train()
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    given = step_input(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=1, is_logging_step=False)

    def step():
        sae.training_forward_pass(step_input=given).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def dictionary_learning_step(batch, k, d_sae, d_in, x):
    trainer = importlib.import_module("dictionary_learning.trainers.top_k").TopKTrainer(
        steps=1000, activation_dim=d_in, dict_size=d_sae, k=k, layer=0, lm_name="none", lr=LEARNING_RATE,
        warmup_steps=10, device="cpu",
    )  # fmt: skip
    return lambda: trainer.update(1, x)


def sparsify_step(batch, k, d_sae, d_in, x):
    # Its decoder is written in Triton, which needs a GPU, unless it is told otherwise.
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    sparsify = importlib.import_module("sparsify")
    sae = sparsify.SparseCoder(d_in, sparsify.SparseCoderConfig(num_latents=d_sae, k=k))
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)

    def step():
        sae.set_decoder_norm_to_unit_norm()
        sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_contestants():
    """Name → what makes a call that runs one training step: encode, select, loss, backward, optimizer."""
    makers = {
        OURS: our_step,
        "ours, plain TopK": lambda *size: our_step(*size, budgets=[size[1]]),
        "our transcoder (all budgets)": lambda *size: our_step(*size, targets=activations(*size[:4])),
    }
    peers = {
        "sae_lens": ("SAELens 6.54, TopK", sae_lens_step),
        "dictionary_learning": ("dictionary_learning 0.1, TopK", dictionary_learning_step),
        "sparsify": ("sparsify 1.3, TopK", sparsify_step),
    }
    return makers | {name: maker for module, (name, maker) in peers.items() if importlib.util.find_spec(module)}


def activations(batch, k, d_sae, d_in):
    return torch.randn(batch, d_in) @ torch.randn(d_in, d_in) * d_in**-0.5


def stages(batch, k, d_sae, d_in, rounds):
    """Stage of our step → CPU milliseconds, floating point operations, and bytes that it cannot do without."""
    x = activations(batch, k, d_sae, d_in)
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=d_in, d_sae=d_sae, k=k)).train()
    sae.initialize_from_activations(x)
    optimizer = torch.optim.AdamW(sae.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    top_indices, top_values = sae.encode(x)
    values = top_values.detach().requires_grad_()
    sae(x).loss.backward()

    def loss():
        hierarchical_topk_loss(top_indices, values, sae.W_dec, sae.b_dec, x).backward()

    def encoder_backward():
        torch.autograd.grad(top_values.sum(), sae.encoder_weight, retain_graph=True)

    with torch.no_grad():
        ((_, latents),) = sae._chunks(x)
        calls = {
            "matmul": lambda: list(sae._chunks(x)),
            "top-k": lambda: topk_of_rows(latents, k),
            "encoder backward": torch.enable_grad()(encoder_backward),
            "loss": torch.enable_grad()(loss),
            "optimizer": optimizer.step,
        }
        times = medians(calls, rounds)
    dictionary, selected = d_sae * d_in * 4, batch * k * d_in
    return {
        "encoder matmul": (times["matmul"], 2 * batch * d_in * d_sae, dictionary + batch * d_sae * 4),
        "top-k": (times["top-k"], 0, batch * d_sae * 4),
        "loss, forward and backward": (times["loss"], 10 * selected, 16 * selected + dictionary),
        "encoder backward": (times["encoder backward"], 2 * selected, 8 * selected + dictionary),
        "optimizer": (times["optimizer"], 0, 14 * dictionary),
    }


def medians(contestants, rounds):
    """Median CPU milliseconds of each call; they take turns, after one call of each that is not counted."""
    times = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, call in contestants.items():
            start = time.process_time()
            call()
            if turn:
                times[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def contest(kind, names, size, rounds):
    """Name → medians of the contestants, each in a process of its own."""
    command = [sys.executable, __file__, "--sizes", ",".join(map(str, size)), "--contestant"]
    return medians_in_turns({name: [*command, f"{kind}:{name}"] for name in names}, rounds)


def take_part(kind, name, size):
    if kind == "loss":
        # Machine code is compiled at the first call: on a small problem, so that only the problem's own memory counts.
        loss_contestants(4, 2, 8, 16, with_compile=False).get(name, lambda: None)()
        inputs = loss_contestants(*size, with_compile="torch.compile" in name)
        take_turns(lambda: inputs[name], warm_up=2)
    else:
        make, x = step_contestants()[name], activations(4, 2, 64, 16)
        make(4, 2, 64, 16, x)()
        take_turns(lambda: make(*size, activations(*size)), warm_up=3)


def table(title, measured, baseline):
    lines = [f"| {title} | CPU ms | ratio | page faults | peak MiB |", "|---|---:|---:|---:|---:|"]
    for name, row in sorted(measured.items(), key=lambda item: item[1]["cpu_ms"]):
        ratio = row["cpu_ms"] / measured[baseline]["cpu_ms"]
        lines.append(f"| {name} | {row['cpu_ms']:.0f} | {ratio:.2f} | {row['faults']:,.0f} | {row['peak_mib']:.0f} |")
    return "\n".join(lines)


def stage_table(measured, whole):
    lines = [
        "| stage of our step | CPU ms | share | GFLOP/s | least bytes, MB | GB/s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, (milliseconds, operations, least) in measured.items():
        rates = f"{operations / milliseconds / 1e6:.0f} | {least / 1e6:.0f} | {least / milliseconds / 1e6:.1f}"
        lines.append(f"| {name} | {milliseconds:.0f} | {milliseconds / whole:.0%} | {rates} |")
    rest = whole - sum(milliseconds for milliseconds, *_ in measured.values())
    lines.append(
        f"| the rest (unit norm, clipping, new gradients, counters) | {rest:.0f} | {rest / whole:.0%} | | | |"
    )
    return "\n".join(lines)


def main():
    arguments = parse_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if arguments.contestant:
        kind, _, name = arguments.contestant.partition(":")
        take_part(kind, name, size_of(arguments.sizes[0]))
        return
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    text, numbers = [f"Hardware: {machine()}. One thread, float32, torch {torch.__version__}."], {}
    for label in arguments.sizes:
        size = size_of(label)
        losses = contest("loss", loss_contestants(4, 2, 8, 16, arguments.compile), size, arguments.rounds)
        steps = contest("step", step_contestants(), size, arguments.rounds)
        shares = stages(*size, arguments.rounds)
        text += [
            f"### batch {size[0]}, k {size[1]}, d_sae {size[2]}, d_in {size[3]}",
            table("loss, forward and backward", losses, OUR_LOSS),
            table("whole training step", steps, OURS),
            stage_table(shares, steps[OURS]["cpu_ms"]),
        ]
        numbers[label] = {"size": size, "losses": losses, "steps": steps, "stages": shares}
        print("\n\n".join(text[-4:]), flush=True)
    (output / "sae_training.md").write_text("\n\n".join(text) + "\n")
    (output / "sae_training.json").write_text(json.dumps({"machine": machine(), **numbers}, indent=2) + "\n")
    print(f"\nTables and numbers: {output}/sae_training.md, .json")


if __name__ == "__main__":
    main()
