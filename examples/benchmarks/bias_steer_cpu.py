# /// script
# dependencies = ["peft_bias_steer"]
# ///
"""
What one bias vector per layer costs, beside LoRA, IA3, BEFT and full fine-tuning, on one CPU thread:

    python examples/benchmarks/bias_steer_cpu.py --output docs/bias_steer_overhead.md

All methods run in turn, several rounds over, so that a busy machine slows all of them alike. Times are CPU times of
the process; each ratio is the median over the rounds of (method / base model) in the same round. A training step is
forward, backward and AdamW. Memory is measured in a process of its own for each method: the highest resident size in
a training step (for the base and the merged model: in a forward pass) after a small batch to warm up.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import BeftConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_bias_steer import BiasSteerConfig


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


def share_base_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Points the frozen parameters of `model` at one copy of the base model in memory."""
    for name, parameter in model.named_parameters():
        key = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if not parameter.requires_grad and key in weights:
            parameter.data = weights[key]


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


def training_task(model: nn.Module) -> Callable[[torch.Tensor], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    return partial(train_step, model.train(), optimizer=optimizer)


def time_rounds(
    tasks: dict[str, Callable[[torch.Tensor], None]], *, input_ids: torch.Tensor, rounds: int
) -> dict[str, list[float]]:
    """CPU seconds of the tasks, round by round, after a small batch that is not timed."""
    for task in tasks.values():
        task(input_ids[:1, :PROMPT_TOKENS])
    seconds = {method: [] for method in tasks}
    for number in range(rounds):
        # there and back, so that a machine that slows down in the course of a round favours no method
        for method, task in list(tasks.items())[:: -1 if number % 2 else 1]:
            start = time.process_time()
            task(input_ids)
            seconds[method].append(time.process_time() - start)
    return seconds


def peak_memory(method: str, args: argparse.Namespace) -> None:
    """Runs in a process of its own and prints the highest resident size of one step, in MiB."""
    model, input_ids = build(method, args.model), make_batch(args)
    task = partial(forward, model) if method in INFERENCE_ONLY else training_task(model)
    task(input_ids[:1, :PROMPT_TOKENS])
    # sets the kernel's record of the highest resident size back to the present size
    Path("/proc/self/clear_refs").write_text("5")
    task(input_ids)
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) // 1024)


def peak_memory_in_subprocess(method: str, args: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--memory_of", method, "--model", args.model]
    command += ["--batch_size", str(args.batch_size), "--sequence_length", str(args.sequence_length)]
    # freed tensors go back to the system at once, so that the size is that of the live ones
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def make_batch(args: argparse.Namespace) -> torch.Tensor:
    """input_ids: (batch_size, sequence_length), random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1000, 40000, (args.batch_size, args.sequence_length), generator=generator)


def file_size(model: nn.Module) -> int:
    """Bytes of the saved adapter, or of the weights that full fine-tuning has to save."""
    if not isinstance(model, PeftModel):
        return sum(p.nbytes for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return Path(folder, "adapter_model.safetensors").stat().st_size


def cell(seconds: dict[str, list[float]], method: str, reference: str, text: Callable[[float], str]) -> str:
    if method not in seconds:
        return "–"
    median = statistics.median(seconds[method])
    ratio = statistics.median(a / b for a, b in zip(seconds[method], seconds[reference]))
    return f"{text(median)} ({ratio:.3f}×)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/SmolLM2-135M-Instruct", help="Hub id or path (see `make model`)")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences per batch")
    parser.add_argument("--sequence_length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of forward pass and generation")
    parser.add_argument("--step_rounds", type=int, default=3, help="timed rounds of the training step")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all of them")
    parser.add_argument("--hardware", default="", help="what to call this machine in the output")
    parser.add_argument("--output", type=Path, help="Markdown file to write; it is printed in any case")
    parser.add_argument("--memory_of", choices=METHODS, help="only measure the memory of this method, and print it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        return peak_memory(args.memory_of, args)
    if not {"base", "BiasSteer"} <= {*args.methods}:
        parser.error(f"--methods must name base and BiasSteer, which the ratios refer to, got {args.methods}")

    methods = [method for method in METHODS if method in args.methods]
    memory = {method: peak_memory_in_subprocess(method, args) for method in methods}
    input_ids = make_batch(args)
    models = {method: build(method, args.model) for method in methods}
    trainable = {m: sum(p.numel() for p in models[m].parameters() if p.requires_grad) for m in methods}
    for method in ADAPTERS.keys() & models.keys():
        share_base_weights(models[method], dict(models["base"].named_parameters()))
    inference = {method: model.eval() for method, model in models.items() if method != "full fine-tuning"}
    timing = {"input_ids": input_ids, "rounds": args.rounds}
    forwards = time_rounds({method: partial(forward, model) for method, model in inference.items()}, **timing)
    generates = time_rounds({method: partial(generate, model) for method, model in inference.items()}, **timing)
    trained = {method: training_task(models[method]) for method in methods if method not in INFERENCE_ONLY}
    steps = time_rounds(trained, input_ids=input_ids, rounds=args.step_rounds)

    new_tokens = args.batch_size * NEW_TOKENS
    lines = [
        "| method | trainable | file | forward, s | generate, s | tokens/s | training step, s | peak memory, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        adapts = method not in INFERENCE_ONLY
        tokens = f"{new_tokens / statistics.median(generates[method]):.1f}" if method in generates else "–"
        row = [
            method,
            f"{trainable[method]:,}" if adapts else "–",
            f"{file_size(models[method]):,}" if adapts else "–",
            cell(forwards, method, "base", "{:.3f}".format),
            cell(generates, method, "base", "{:.3f}".format),
            tokens,
            cell(steps, method, "BiasSteer", "{:.3f}".format),
            f"{memory[method]:,}{'' if adapts else ' (forward)'}",
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
{hardware}; one thread, CPU time, {rounds} interleaved rounds ({step_rounds} of the training step).

{table}

Times are medians; in brackets the median over the rounds of the ratio to the base model in the same round (training
steps: to BiasSteer). The file is what has to be saved, in bytes. Peak memory is the highest resident size of a process
that runs nothing but training steps (forward passes where it says so). Without an adapter nothing is trained (–), and
full fine-tuning runs the base model's forward pass.

```bash
{command}
```
"""


if __name__ == "__main__":
    main()
