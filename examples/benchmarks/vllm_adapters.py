# /// script
# dependencies = ["peft_bias_steer[vllm]"]
# ///
"""
What adapters for each request cost a server: tokens per second of vLLM without the plugin, and with it when no adapter
is used, one is, 64 are mixed in a batch, and 1,000 are loaded.

    make test-serving                # the environment of vLLM, once
    .venv-serving-vllm/bin/python examples/benchmarks/vllm_adapters.py --output docs/bias_steer_serving.md

The two engines live in processes of their own and take turns, several rounds over; in each round all answer the same
new prompts, greedily. Each ratio is the median over the rounds of (engine without the plugin / this one) in the same
round, of CPU time on a CPU, which a busy machine disturbs less, and of wall time on a GPU. Loading is timed while
requests run.
"""

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm


CASES = ["base engine", "plugin, no adapter used", "plugin, one adapter", "plugin, 64 mixed", "plugin, 1,000 loaded"]
LOADED = 1000


def start(args: argparse.Namespace, with_plugin: bool) -> Any:
    import vllm

    options: dict[str, Any] = {}
    if with_plugin:
        from peft_bias_steer import vllm_overrides

        options["hf_overrides"] = vllm_overrides(max_adapters=LOADED)
    return vllm.LLM(
        args.model,
        dtype=args.dtype,
        max_model_len=512,
        max_num_seqs=args.requests,
        enforce_eager=args.eager,
        enable_prefix_caching=False,  # the base engine would find the prompts of other requests in it
        disable_log_stats=True,
        **options,
    )


def vectors(llm: Any, seed: int) -> dict[int, Any]:
    import torch

    config, generator = llm.llm_engine.vllm_config.model_config, torch.Generator().manual_seed(seed)
    width = config.get_hidden_size()
    return {
        index: 0.01 * torch.randn(width, generator=generator) for index in range(config.get_total_num_hidden_layers())
    }


def load(llm: Any, count: int) -> None:
    from peft_bias_steer.serving.vllm import list_adapters, load_adapter

    for index in range(len(list_adapters(llm)), count):
        load_adapter(llm, f"adapter {index}", vectors(llm, index))


def answer(llm: Any, args: argparse.Namespace, case: str, round_: int) -> dict[str, float]:
    """Seconds of CPU and of the clock for one batch of requests."""
    import torch
    import vllm

    adapters = {CASES[2]: 1, CASES[3]: 64, CASES[4]: LOADED}.get(case, 0)
    if adapters:
        load(llm, adapters)
    generator = random.Random(round_)
    prompts = [
        {"prompt_token_ids": [generator.randrange(1000, 40000) for _ in range(args.prompt_tokens)]}
        for _ in range(args.requests)
    ]
    names = [f"adapter {generator.randrange(adapters)}" if adapters else None for _ in prompts]
    params = [
        vllm.SamplingParams(
            temperature=0,
            max_tokens=args.new_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=name and {"bias_steer": name},
        )
        for name in names
    ]
    before = time.process_time(), time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"cpu": time.process_time() - before[0], "wall": time.perf_counter() - before[1]}


def time_loading(llm: Any, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds to load an adapter between two steps of running requests, and bytes of one in the tables."""
    import vllm

    from peft_bias_steer.serving.vllm import load_adapter, remove_adapter

    load(llm, LOADED)
    engine, times = llm.llm_engine, []
    for index in range(args.requests):
        params = vllm.SamplingParams(max_tokens=args.new_tokens, ignore_eos=True, detokenize=False)
        engine.add_request(f"loading {index}", {"prompt_token_ids": [1000 + index] * args.prompt_tokens}, params)
    while engine.has_unfinished_requests():
        engine.step()
        remove_adapter(llm, "adapter 0")
        new = vectors(llm, 0)
        before = time.perf_counter()
        load_adapter(llm, "adapter 0", new)
        times.append(1000 * (time.perf_counter() - before))
    config = engine.vllm_config.model_config
    tables = engine.collective_rpc(table_bytes)
    return {
        "load_ms": statistics.median(times),
        "row_bytes": tables[0] / (LOADED + 2),
        "vector_bytes": 4 * config.get_total_num_hidden_layers() * config.get_hidden_size(),
    }


def table_bytes(worker: Any) -> int:
    return sum(layer.steering_table.nbytes for layer in worker.bias_steer.layers.values())


def serve(args: argparse.Namespace) -> None:
    """A contestant: starts its engine, then answers one case for each line that it reads."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM prints, too
    llm = start(args, with_plugin=args.contestant == "plugin")
    print(json.dumps({}), file=results)
    for line in sys.stdin:
        case, round_ = json.loads(line)
        result = time_loading(llm, args) if case == "loading" else answer(llm, args, case, round_)
        print(json.dumps(result), file=results)


class Contestant:
    """An engine in a process of its own."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, *sys.argv, "--contestant", name]
        self.process: Any = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *question: Any) -> dict[str, float]:
        if question:
            print(json.dumps(question), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"an engine ended with code {self.process.wait()}")
        return json.loads(line)


def hardware() -> tuple[str, str]:
    import torch

    if torch.cuda.is_available():
        return "wall", torch.cuda.get_device_name()
    kind = "AVX-512" if "avx512f" in Path("/proc/cpuinfo").read_text() else "without AVX-512"
    return "cpu", f"{os.cpu_count()} cores, x86-64, {kind}, no GPU"


def measure(args: argparse.Namespace) -> tuple[dict[str, list[dict[str, float]]], dict[str, float]]:
    engines = {name: Contestant(name) for name in ("base", "plugin")}
    for engine in engines.values():
        engine.ask()
    of = {case: engines["base" if case == CASES[0] else "plugin"] for case in CASES}
    for case in CASES[:2]:
        of[case].ask(case, -1)  # the first batch warms up
    times: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    # one kind after the other, each beside the base engine: what is loaded stays
    progress = tqdm(total=args.rounds * len(CASES[1:]), desc="rounds")
    for number, case in enumerate(CASES[1:]):
        for index in range(args.rounds):
            round_ = number * args.rounds + index
            pair = [(CASES[0], of[CASES[0]]), (case, of[case])]
            for name, engine in pair if round_ % 2 else pair[::-1]:
                times[name].append(engine.ask(name, round_))
            progress.update()
    return times, engines["plugin"].ask("loading", 0)


def table(times: dict[str, list[dict[str, float]]], args: argparse.Namespace, clock: str) -> str:
    tokens = args.requests * args.new_tokens
    lines = ["| engine | tokens/s | of the base engine | lowest and highest round |", "|---|---|---|---|"]
    base = [entry[clock] for entry in times[CASES[0]]]
    for number, case in enumerate(CASES):
        own = [entry[clock] for entry in times[case]]
        beside = base[(number - 1) * args.rounds : number * args.rounds] if number else base
        ratios = sorted(other / time_ for other, time_ in zip(beside, own, strict=True))
        spread = "–" if case == CASES[0] else f"{ratios[0]:.3f}–{ratios[-1]:.3f}"
        speed = tokens / statistics.median(own)
        lines.append(f"| {case} | {speed:,.0f} | {statistics.median(ratios):.3f} | {spread} |")
    return "\n".join(lines)


PAGE = """# What an adapter for each request costs a server

{model} in {dtype}{eager}, {requests} requests at once, {prompt_tokens} tokens of prompt and {new_tokens} new ones; {hardware}.
{clock_text}, {rounds} rounds for each row, each beside the base engine.

{table}

Loading an adapter while {requests} requests run: {load_ms:.2f} ms (median). An adapter takes {row_bytes:,.0f} bytes in the tables, and
layers × hidden_size × 4 are {vector_bytes:,.0f}.

```bash
{command}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/SmolLM2-135M-Instruct", help="Hub id or path (see `make model`)")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and activations (%(default)s)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, which vLLM uses by default")
    parser.add_argument("--requests", type=int, default=64, help="requests in a batch (%(default)s)")
    parser.add_argument("--prompt_tokens", type=int, default=32, help="tokens of each prompt (%(default)s)")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens that each request generates (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="timed batches for each row (%(default)s)")
    parser.add_argument("--output", type=Path, help="Markdown file to write; it is printed in any case")
    parser.add_argument("--contestant", choices=["base", "plugin"], help="only be this engine, for the command itself")
    args = parser.parse_args()
    if args.contestant:
        return serve(args)
    times, loading = measure(args)
    clock, machine = hardware()
    page = PAGE.format(
        **vars(args) | {"eager": ", eager" if args.eager else ", compiled"},
        **loading,
        table=table(times, args, clock),
        hardware=machine,
        clock_text="CPU time" if clock == "cpu" else "Wall time",
        command=shlex.join(["python", *sys.argv]),
    )
    print(page)
    if args.output:
        args.output.write_text(page)


if __name__ == "__main__":
    main()
