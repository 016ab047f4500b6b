# /// script
# dependencies = ["peft_bias_steer", "matplotlib"]
# ///
"""
What one bias vector per layer costs on a GPU, beside LoRA, BEFT and full fine-tuning:

    python examples/benchmarks/bias_steer_gpu.py --output_dir outputs/gpu

The model has the shape of a real one and random bfloat16 weights; nothing is downloaded. Methods run in turn, several
rounds over; times are CUDA events, ratios are to the base model in the same round, each a median with its quartiles.
Adapters are float32 as PEFT makes them and trained under bfloat16 autocast, as `Trainer(bf16=True)` does; for forward
passes and generation LoRA and BEFT are cast to bfloat16, bias vectors only where it says so. A training step is
forward, backward and fused AdamW without gradient checkpointing; the base's is forward and backward down to the
embeddings. Memory is that of one method alone. A floor is what the operations take at the rate of a large bfloat16
product, or the weights at the rate of a large copy. What is compiled comes last and within `--compile_seconds`.
bias_steer.md and .json are written again after every measurement, bias_steer.png at the end. `--dry_run` runs every
line of this at a tiny shape on a CPU.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from peft import BeftConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_bias_steer import BiasSteerConfig


matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


FIELDS = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
FIELDS += ["num_key_value_heads", "tie_word_embeddings"]
SHAPES: dict[str, tuple[Any, ...]] = {
    "Llama-3.2-1B": (128256, 2048, 8192, 16, 32, 8, True),
    "SmolLM2-135M": (49152, 576, 1536, 30, 9, 3, True),
    "Llama-3.1-8B": (128256, 4096, 14336, 32, 32, 8, False),
    "tiny": (64, 32, 48, 2, 4, 2, True),
}
STEERED, STEERED_BFLOAT16, MERGED, FULL = "BiasSteer", "BiasSteer, bfloat16 vectors", "BiasSteer, merged", "full"
ADAPTERS: dict[str, Callable] = {
    STEERED: BiasSteerConfig,
    "BEFT down_proj": lambda: BeftConfig(target_modules=["down_proj"]),
    "LoRA r=1": lambda: LoraConfig(r=1, target_modules="all-linear"),
    "LoRA r=8": lambda: LoraConfig(r=8, target_modules="all-linear"),
}
INFERENCE = ["base", STEERED, STEERED_BFLOAT16, MERGED, *list(ADAPTERS)[1:]]
PARTS = ["training", "forward", "generate", "compiled"]
BATCH_SIZE, LENGTH, PROMPT_TOKENS, NEW_TOKENS = 8, 512, 32, 64


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Llama-3.2-1B", help="of the model (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of forward pass and step (%(default)s)")
    parser.add_argument("--generate_rounds", type=int, default=3, help="timed rounds of generation (%(default)s)")
    parser.add_argument("--compile_seconds", type=float, default=60, help="start no compilation after these (60)")
    parser.add_argument("--dry_run", action="store_true", help="a tiny shape, on a CPU if there is no GPU")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu"), help="(%(default)s)")
    args = parser.parse_args()
    if args.dry_run:
        args.shape, args.rounds, args.generate_rounds = "tiny", 3, 3
    elif not torch.cuda.is_available():
        parser.error("this needs a CUDA GPU: run it on a machine with one, or give --dry_run to see every line run")
    return args


def random_model(shape: str, device: str) -> Any:
    config = LlamaConfig(**dict(zip(FIELDS, SHAPES[shape])))
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # random weights: nothing may end a text early
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def build(method: str, shape: str, base: Any) -> Any:
    """A model under one method, whose frozen weights are those of `base`."""
    model = random_model(shape, base.device.type)
    if method == FULL:
        return model.train()
    model = get_peft_model(model, ADAPTERS.get(method, BiasSteerConfig)())
    weights = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            parameter.data = weights[name.removeprefix("base_model.model.").replace(".base_layer", "")]
        elif "bias_steer" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def for_inference(method: str, model: Any) -> Any:
    if method == MERGED:
        model.merge_adapter()
    elif method not in ("base", STEERED):
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    return model.requires_grad_(False).eval()


@torch.no_grad()
def forward(model: nn.Module, input_ids: torch.Tensor) -> None:
    torch.compiler.cudagraph_mark_step_begin()
    model(input_ids=input_ids, use_cache=False)


def generate(model: Any, input_ids: torch.Tensor, **options: Any) -> None:
    mask = torch.ones_like(input_ids)
    model.generate(input_ids=input_ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, **options)


def train_step(model: Any, input_ids: torch.Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    inputs = {"input_ids": input_ids}
    if optimizer is None:
        inputs = {"inputs_embeds": model.get_input_embeddings()(input_ids).detach().requires_grad_()}
    with torch.autocast(input_ids.device.type, torch.bfloat16):
        loss = model(**inputs, labels=input_ids, use_cache=False).loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def milliseconds(function: Callable[[], Any]) -> float:
    """Of one call: on the GPU's clock, or the wall's where there is no GPU."""
    if not torch.cuda.is_available():
        begun = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - begun)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure_rates(device: str) -> tuple[float, float]:
    """Bytes per second of a large copy (read and written), operations per second of a large bfloat16 product."""
    size = 8192 if device == "cuda" else 64
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = statistics.median(milliseconds(lambda: a @ b) for _ in range(20))
    source = torch.empty(2**24 * (64 if device == "cuda" else 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(milliseconds(lambda: target.copy_(source)) for _ in range(20))
    return 2 * source.numel() / copy * 1e3, 2 * size**3 / product * 1e3


def file_size(model: Any) -> int:
    """Bytes of the saved adapter, or of the weights that full fine-tuning has to save."""
    if not isinstance(model, PeftModel):
        return sum(p.nbytes for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        return Path(folder, "adapter_model.safetensors").stat().st_size


def write(report: dict[str, Any], folder: Path) -> None:
    (folder / "bias_steer.json").write_text(json.dumps(report, indent=1) + "\n")
    page = ["# Bias vectors on a GPU", "; ".join(f"{key}: {value}" for key, value in report["head"].items())]
    for rows in filter(None, (report["times"], report["costs"])):
        lines = [list(rows[0]), ["---"] * len(rows[0]), *([text(v) for v in row.values()] for row in rows)]
        page.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    (folder / "bias_steer.md").write_text("\n\n".join(page) + "\n")


def text(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(text, value))
    if isinstance(value, float):
        return f"{value:.3f}" if value < 10 else f"{value:.1f}"
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def time_in_turn(
    workload: str, tasks: Mapping[str, Callable[[], None]], *, rounds: int, warmup: int, floors: dict[str, float]
) -> list[dict]:
    """One row for each task. `floors`: seconds by method, under "base" for those that are not in it."""
    print(workload, flush=True)
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for method, task in tasks.items():
        try:
            for _ in range(warmup):
                task()
            times[method] = []
        except RuntimeError as error:  # the row says what happened; the others are still measured
            failed[method] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    for number in range(rounds):
        # there and back, so that a card that slows down in the course of a round favours no method
        for method in list(times)[:: -1 if number % 2 else 1]:
            times[method].append(milliseconds(tasks[method]))
    rows = []
    for method in tasks:
        row: dict[str, Any] = {"workload": workload, "method": method, "ms": failed.get(method), "quartiles": None}
        row |= {"ratio to base": None, "ratio quartiles": None}
        if method in times:
            low, row["ms"], high = statistics.quantiles(times[method], n=4)
            row["quartiles"] = [low, high]
        if method in times and "base" in times:
            ratios = [a / b for a, b in zip(times[method], times["base"])]
            low, row["ratio to base"], high = statistics.quantiles(ratios, n=4)
            row["ratio quartiles"] = [low, high]
        rows.append(row | {"floor, ms": 1e3 * floors.get(method, floors["base"])})
    return rows


def plot(times: list[dict], path: Path) -> None:
    workloads = list(dict.fromkeys(row["workload"] for row in times))
    figure, axes = pyplot.subplots(
        len(workloads), squeeze=False, figsize=(7, 1.9 * len(workloads)), layout="constrained"
    )
    for axis, workload in zip(axes[:, 0], workloads):
        rows = [row for row in times if row["workload"] == workload and row["ratio to base"]][::-1]
        axis.barh([row["method"] for row in rows], [row["ratio to base"] for row in rows], color="C0")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{workload}: time, base model = 1", fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def measure_cost(method: str, base: Any, shape: str, ids: torch.Tensor) -> tuple[dict, Any, Callable[[], None]]:
    """What a method takes in a training step; the model under it; the step. Raises `OutOfMemoryError`."""
    cuda = base.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    model, optimizer, states = base, None, []
    row: dict[str, Any] = {"method": method, "trainable": 0, "file, bytes": 0}
    if method != "base":
        model = build(method, shape, base)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        row |= {"trainable": sum(p.numel() for p in trained), "file, bytes": file_size(model)}
        states = optimizer.state.values()
    step = partial(train_step, model, ids, optimizer)
    step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step()
    memory = torch.cuda.max_memory_allocated() - before if cuda else 0
    memory += 0 if method == FULL else sum(p.nbytes for p in base.parameters())
    row["optimizer, bytes"] = sum(t.nbytes for s in states for t in s.values() if isinstance(t, torch.Tensor))
    return row | {"peak memory of a training step, bytes": memory}, model, step


def main() -> None:
    args = parse_arguments()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    copy_rate, product_rate = measure_rates(device)
    head: dict[str, Any] = {
        "card": torch.cuda.get_device_name() if device == "cuda" else "none: a dry run, not a measurement"
    }
    head |= {"copy, TB/s": f"{copy_rate / 1e12:.3g}", "bfloat16 product, TFLOP/s": f"{product_rate / 1e12:.3g}"}
    head |= {"torch": torch.__version__, "transformers": transformers.__version__, "shape": args.shape}
    head |= {"batch": f"{BATCH_SIZE} × {LENGTH}", "generated": f"{NEW_TOKENS} tokens after {PROMPT_TOKENS}"}
    report: dict[str, Any] = {"head": head, "times": [], "costs": []}

    def measure(workload: str, tasks: Mapping[str, Callable[[], None]], **options: Any) -> None:
        report["times"] += time_in_turn(workload, tasks, **options)
        write(report, args.output_dir)

    base = random_model(args.shape, device).requires_grad_(False).eval()
    tokens = partial(torch.randint, 3, base.config.vocab_size, device=device)
    ids = tokens((BATCH_SIZE, LENGTH))
    matrices = sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear))
    # causal: every token attends to half of the sequence on average
    attention = base.config.num_hidden_layers * base.config.hidden_size * LENGTH
    one_pass = 2 * ids.numel() * (matrices + attention) / product_rate

    models: dict[str, Any] = {}
    steps: dict[str, Callable[[], None]] = {}
    for method in ("base", *ADAPTERS, FULL):
        try:
            row, models[method], steps[method] = measure_cost(method, base, args.shape, ids)
        except torch.OutOfMemoryError:
            row = {"method": method, "peak memory of a training step, bytes": "does not fit"}
        report["costs"].append(dict.fromkeys(report["costs"][0] if report["costs"] else row, None) | row)
        write(report, args.output_dir)
    # a frozen matrix takes part in a forward and a backward product, a trained one in two backward products
    floors = {"base": 2 * one_pass, FULL: 3 * one_pass}
    if "training" in args.parts:
        measure("training step", steps, rounds=args.rounds, warmup=2, floors=floors)

    steps.clear()
    models.pop(FULL, None)
    models |= {method: build(method, args.shape, base) for method in (STEERED_BFLOAT16, MERGED)}
    models = {method: for_inference(method, models[method]) for method in INFERENCE}
    passes: dict[str, Any] = {"rounds": args.rounds, "floors": {"base": one_pass}}
    if "forward" in args.parts:
        measure("forward", {m: partial(forward, model, ids) for m, model in models.items()}, warmup=2, **passes)
    # the weights are read once for every token
    reading = NEW_TOKENS * 2 * matrices / copy_rate
    generation: dict[str, Any] = {"rounds": args.generate_rounds, "floors": {"base": reading}}
    for batch_size in (1, 32) if "generate" in args.parts else ():
        prompt = tokens((batch_size, PROMPT_TOKENS))
        tasks = {method: partial(generate, model, prompt) for method, model in models.items()}
        measure(f"generate, batch {batch_size}, dynamic cache, eager", tasks, warmup=1, **generation)

    if "compiled" in args.parts:
        begun = time.monotonic()
        few = {method: models[method] for method in ("base", STEERED)}
        compilation: dict[str, Any] = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "eager"}
        tasks = {
            m: partial(forward, torch.compile(model, dynamic=False, **compilation), ids) for m, model in few.items()
        }
        measure("forward, compiled, CUDA graphs", tasks, warmup=3, **passes)
        # generate() compiles its decoding step by itself for a static cache on a GPU, with CUDA graphs
        static = partial(generate, input_ids=tokens((1, PROMPT_TOKENS)), cache_implementation="static")
        tasks = {method: partial(static, model) for method, model in few.items()}
        if time.monotonic() - begun < args.compile_seconds:
            measure("generate, batch 1, static cache, compiled, CUDA graphs", tasks, warmup=3, **generation)
    plot(report["times"], args.output_dir / "bias_steer.png")
    print((args.output_dir / "bias_steer.md").read_text())


if __name__ == "__main__":
    main()
