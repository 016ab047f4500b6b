# /// script
# dependencies = ["peft_bias_steer", "scipy"]
# ///
"""
What one bias vector per layer costs, beside LoRA, IA3, BEFT and full fine-tuning, on one CPU thread:

    python examples/benchmarks/bias_steer_cpu.py --output docs/bias_steer_overhead.md

Each method runs in a process of its own, one at a time and in turns, several rounds over. Times are medians of CPU times, the
ratios are those of the medians. Two processes of one method may differ by some percent, as their memory lies otherwise: with
`--step_starts`, training steps are timed in as many processes of each method, and their ratios are means with 95 % intervals.
A training step is forward, backward and AdamW. Memory is how far the process has grown while it loaded the model and made
training steps (for the base and the merged model: forward passes).
"""

import argparse
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import BeftConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_bias_steer import BiasSteerConfig


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from intervals import mean_interval
from turns import machine, medians_in_turns, take_turns


MERGED = "BiasSteer, merged"
ADAPTERS: dict[str, Callable] = {
    "BiasSteer": BiasSteerConfig,
    MERGED: BiasSteerConfig,
    "LoRA r=8": lambda: LoraConfig(r=8, target_modules="all-linear"),
    "LoRA r=32": lambda: LoraConfig(r=32, target_modules="all-linear"),
    "IA3": lambda: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "BEFT down_proj": lambda: BeftConfig(target_modules=["down_proj"]),
}
METHODS = ["base", *ADAPTERS, "full fine-tuning"]
# neither trains: their memory is that of a forward pass
INFERENCE_ONLY = ["base", MERGED]
PROMPT_TOKENS, NEW_TOKENS = 32, 32


def build(method: str, path: str) -> Any:
    """A fresh model under one method, in training mode."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if method in ADAPTERS:
        model = get_peft_model(model, ADAPTERS[method]())
    if method == MERGED:
        model.merge_adapter()
    return model.train()


def forward(model: nn.Module, input_ids: torch.Tensor) -> None:
    with torch.no_grad():
        model(input_ids=input_ids, use_cache=False)


def train_step(model: nn.Module, input_ids: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def generate(model: Any, input_ids: torch.Tensor) -> None:
    prompt = input_ids[:, :PROMPT_TOKENS]
    mask = torch.ones_like(prompt)
    model.generate(
        input_ids=prompt, attention_mask=mask, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS
    )


def make_call(kind: str, method: str, args: argparse.Namespace) -> Callable[[], None]:
    """What a contestant does in its turn."""
    model = build(method, args.model)
    input_ids = make_batch(args, model.config.vocab_size)
    if kind == "step":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        return partial(train_step, model, input_ids, optimizer)
    return partial({"forward": forward, "generate": generate}[kind], model.eval(), input_ids)


def contest(kind: str, methods: list[str], rounds: int, starts: int = 1) -> list[dict[str, dict[str, float]]]:
    """Of each start, method → medians over the rounds; who is first changes from start to start."""
    command = [sys.executable, __file__, *sys.argv[1:], "--contestant"]
    orders = [methods[:: -1 if start % 2 else 1] for start in range(starts if rounds else 0)]
    return [medians_in_turns({each: [*command, f"{kind}:{each}"] for each in order}, rounds) for order in orders]


def make_batch(args: argparse.Namespace, vocab_size: int) -> torch.Tensor:
    """input_ids: (batch_size, sequence_length), random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (args.batch_size, args.sequence_length), generator=generator)


def file_size(model: nn.Module) -> int:
    """Bytes of the saved adapter, or of the weights that full fine-tuning has to save."""
    if not isinstance(model, PeftModel):
        return sum(p.nbytes for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return Path(folder, "adapter_model.safetensors").stat().st_size


def median(found: list[dict[str, dict[str, float]]], method: str, measured: str) -> float | None:
    """Over the starts; `None` if it did not take part."""
    values = [start[method][measured] for start in found if method in start]
    return statistics.median(values) if values else None


def cell(found: list[dict[str, dict[str, float]]], method: str, reference: str) -> str:
    milliseconds = median(found, method, "cpu_ms")
    if milliseconds is None:
        return "–"
    ratios = [start[method]["cpu_ms"] / start[reference]["cpu_ms"] for start in found]
    interval = f" ± {mean_interval(ratios):.3f}" if len(ratios) > 1 and method != reference else ""
    return f"{milliseconds / 1000:.3f} ({statistics.mean(ratios):.3f}{interval}×)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/SmolLM2-135M-Instruct", help="Hub id or path (see `make model`)")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences per batch")
    parser.add_argument("--sequence_length", type=int, default=256, help="tokens per sequence")
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed rounds of forward pass and generation, 0 for neither"
    )
    parser.add_argument("--step_rounds", type=int, default=5, help="timed rounds of the training step")
    parser.add_argument(
        "--step_starts", type=int, default=1, help="processes for each method's step, one after another"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all of them")
    parser.add_argument("--hardware", default=machine(), help="what to call this machine in the output (%(default)s)")
    parser.add_argument("--output", type=Path, help="Markdown file to write; it is printed in any case")
    parser.add_argument("--contestant", help="take part as this one, a turn for each line on stdin")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.contestant:
        kind, _, method = args.contestant.partition(":")
        return take_turns(lambda: make_call(kind, method, args), warm_up=1)
    if not {"base", "BiasSteer"} <= {*args.methods}:
        parser.error(f"--methods must name base and BiasSteer, which the ratios refer to, got {args.methods}")

    methods = [method for method in METHODS if method in args.methods]
    inference = [method for method in methods if method != "full fine-tuning"]
    forwards = contest("forward", inference, args.rounds)
    generates = contest("generate", inference, args.rounds)
    trained = [method for method in methods if method not in INFERENCE_ONLY]
    steps = contest("step", trained, args.step_rounds, args.step_starts)

    lines = [
        "| method | trainable | file | forward, s | generate, s | tokens/s | training step, s | peak memory, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        model, adapts = build(method, args.model), method not in INFERENCE_ONLY
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        milliseconds = median(generates, method, "cpu_ms")
        peak = median(steps if adapts else forwards, method, "peak_mib")
        row = [
            method,
            f"{trainable:,}" if adapts else "–",
            f"{file_size(model):,}" if adapts else "–",
            cell(forwards, method, "base"),
            cell(generates, method, "base"),
            f"{1000 * args.batch_size * NEW_TOKENS / milliseconds:.1f}" if milliseconds else "–",
            cell(steps, method, "BiasSteer"),
            "–" if peak is None else f"{peak:,.0f}{'' if adapts else ' (forward)'}",
        ]
        lines.append(f"| {' | '.join(row)} |")
    table = "\n".join(lines)
    print(table)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["python", *sys.argv])
        args.output.write_text(PAGE.format(table=table, command=command, **vars(args), new_tokens=NEW_TOKENS))


PAGE = """# Overhead of one bias vector per layer

`{model}` in float32, batches of {batch_size} × {sequence_length} tokens; generation of {new_tokens} tokens after 32, greedy, batch {batch_size}.
{hardware}; one thread, CPU time, each method in a process of its own, {rounds} rounds in turns ({step_rounds} of the training step, in {step_starts} processes of each).

{table}

Times are medians; in brackets their ratio to the base model's (training steps: to BiasSteer's). The file is what has to be
saved, in bytes. Peak memory is how far a process grows that loads the model and makes nothing but training steps (forward
passes where it says so). Without an adapter nothing is trained (–), and full fine-tuning runs the base model's forward pass.

```bash
{command}
```
"""


if __name__ == "__main__":
    main()
