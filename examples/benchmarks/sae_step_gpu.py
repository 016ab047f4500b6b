# /// script
# dependencies = ["hf_hierarchical_sae", "triton", "sae-lens==6.54.0", "eai-sparsify==1.3.3"]
# ///
"""
A whole training step of a sparse autoencoder on a GPU, beside other libraries, and its stages, as Markdown tables:

    python examples/benchmarks/sae_step_gpu.py --output outputs/gpu/sae_step.md

A step encodes, selects, computes the loss and all gradients, clips them, updates the weights (ours by the fused AdamW
that is Trainer's default, the others by their own trainer's Adam) and clears the gradients. Each library runs in a
process of its own; times are medians of CUDA events over `--rounds` steps that are queued without a pause, memory is
the peak of all that is allocated. The floor is the encoder's operations at the rate of a large matrix product here,
plus the bytes a step cannot do without at the rate of a copy. The tables are written again after every row, and the
kernels of one step beside them. A library that cannot be imported gets a row that says so. `--dry_run` runs all of it
at tiny sizes on a CPU, kernels interpreted.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import types
from pathlib import Path


# Triton decides at its first import whether kernels are interpreted.
if "--dry_run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel  # noqa: E402
from hf_hierarchical_sae.sparse_latents import topk_of_rows  # noqa: E402


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEARNING_RATE = 1e-3
PRECISIONS = ("bfloat16 autocast", "float32, TF32", "float32")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", default=["4096,64,65536,2304", "4096,32,16384,768"], help="batch,k,d_sae,d_in of each"
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed steps (default: 20)")
    parser.add_argument("--seconds", type=float, default=100, help="after these a library's process is ended (100)")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="libraries (default: all)")
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes on a CPU, kernels interpreted")
    parser.add_argument("--output", type=Path, help="file for the tables, which are printed too")
    parser.add_argument("--family", choices=FAMILIES, help="used by the script itself: measure this one, print JSON")
    arguments = parser.parse_args()
    if arguments.dry_run:
        arguments.sizes, arguments.rounds = ["8,2,64,16", "6,2,32,12"], 2
    return arguments


def our_step(x: torch.Tensor, k: int, d_sae: int, budgets: list | None):
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=x.shape[1], d_sae=d_sae, k=k, budgets=budgets))
    sae = sae.to(DEVICE).train()
    sae.initialize_from_activations(x)
    optimizer = torch.optim.AdamW(sae.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(autocast):
        with autocast():
            loss = sae(x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, sae, optimizer


def sae_lens_step(x: torch.Tensor, k: int, d_sae: int):
    if importlib.util.find_spec("wandb") is None:
        # SAELens imports it to log, which a step does not.
        sys.modules["wandb"] = types.ModuleType("wandb")
        sys.modules["wandb"].__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    sae_lens = importlib.import_module("sae_lens")
    step_input = importlib.import_module("sae_lens.saes.sae").TrainStepInput
    config = sae_lens.TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=d_sae, k=k, device=DEVICE)
    sae = sae_lens.TopKTrainingSAE(config).train()
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    given = step_input(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=1, is_logging_step=False)

    def step(autocast):
        with autocast():
            loss = sae.training_forward_pass(step_input=given).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def sparsify_step(x: torch.Tensor, k: int, d_sae: int, *, triton: bool):
    os.environ["SPARSIFY_DISABLE_TRITON"] = str(int(not triton))
    with contextlib.redirect_stdout(sys.stderr):
        sparsify = importlib.import_module("sparsify")
    sae = sparsify.SparseCoder(x.shape[1], sparsify.SparseCoderConfig(num_latents=d_sae, k=k), device=DEVICE)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)

    def step(autocast):
        sae.set_decoder_norm_to_unit_norm()
        loss = sae(x).fvu
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def ours(size: tuple, emit, arguments: argparse.Namespace, *, plain: bool) -> None:
    batch, k, d_sae, d_in = size
    budgets = [k] if plain else None
    x = activations(batch, d_in)
    for precision in PRECISIONS:
        step, sae, optimizer = our_step(x, k, d_sae, budgets)
        row = measure(step, precision, batch, arguments.rounds)
        emit(kind="step", precision=precision, floor=floor_ms(size, precision, rates()), **row)
        if not plain:
            emit(kind="stages", precision=precision, whole=row.get("ms"), stages=stages(sae, optimizer, x, precision))
            emit(kind="kernels", precision=precision, text=kernel_table(step, precision))
        del step, sae, optimizer
        clear()
    if not plain:
        emit(kind="selection", **selections(x, k, d_sae, arguments.rounds))


def peer(size: tuple, emit, arguments: argparse.Namespace, *, maker, precisions: tuple) -> None:
    batch, k, d_sae, d_in = size
    x = activations(batch, d_in)
    for precision in precisions:
        try:
            step = maker(x, k, d_sae)
        except ImportError as error:
            emit(kind="step", precision=precision, note=f"not installed: {error}")
            continue
        emit(kind="step", precision=precision, **measure(step, precision, batch, arguments.rounds))
        del step
        clear()


FAMILIES = {
    "ours, HierarchicalTopK": functools.partial(ours, plain=False),
    "ours, plain TopK": functools.partial(ours, plain=True),
    "SAELens 6.54, TopK": functools.partial(peer, maker=sae_lens_step, precisions=PRECISIONS),
    # Its forward is under autocast whatever one asks for.
    "sparsify 1.3, TopK, Triton decoder": functools.partial(
        peer, maker=functools.partial(sparsify_step, triton=True), precisions=PRECISIONS[:1]
    ),
    "sparsify 1.3, TopK, `embedding_bag`": functools.partial(
        peer, maker=functools.partial(sparsify_step, triton=False), precisions=PRECISIONS[:1]
    ),
}


def activations(batch: int, d_in: int) -> torch.Tensor:
    mixing = torch.randn(d_in, d_in, device=DEVICE) * d_in**-0.5
    return torch.randn(batch, d_in, device=DEVICE) @ mixing


def clear() -> None:
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def precision_of(name: str):
    """TF32 as the precision says; yields what a forward pass runs in."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "float32, TF32"
    halves = functools.partial(torch.autocast, DEVICE, dtype=torch.bfloat16)
    yield halves if name == "bfloat16 autocast" else contextlib.nullcontext
    torch.backends.cuda.matmul.allow_tf32 = before


def times(function, rounds: int) -> list[float]:
    """Milliseconds of each call, queued one after another; on the wall's clock where there is no GPU."""
    if DEVICE != "cuda":
        marks = [time.perf_counter()]
        for _ in range(rounds):
            function()
            marks.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in zip(marks, marks[1:])]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in zip(events, events[1:])]


def median_ms(function, rounds: int, warm_up: int = 3) -> float:
    for _ in range(warm_up):
        function()
    return statistics.median(times(function, rounds))


def measure(step, precision: str, batch: int, rounds: int) -> dict:
    """Milliseconds, tokens per second, peak bytes and losses of a step, or a note of why there are none."""
    clear()
    try:
        with precision_of(precision) as autocast:
            first = step(autocast).item()
            milliseconds = median_ms(lambda: step(autocast), rounds)
            last = step(autocast).item()
    except Exception as error:
        return {"note": f"failed: {type(error).__name__}: {str(error)[:120]}"}
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    return {"ms": milliseconds, "tokens": batch / milliseconds * 1e3, "peak": peak, "losses": [first, last]}


def stages(sae: HierarchicalSaeModel, optimizer: torch.optim.Optimizer, x: torch.Tensor, precision: str) -> dict:
    """Stage of our step -> milliseconds."""
    k = sae.config.k
    result = {}
    with precision_of(precision) as autocast:

        def of(name, function):
            result[name] = median_ms(function, 10)

        scaled = x * sae.input_scale
        with torch.no_grad(), autocast():
            of("unit norm of the decoder", sae.normalize_decoder)
            of("encoder product", lambda: list(sae._chunks(scaled)))
            ((_, latents),) = sae._chunks(scaled)
            of("top-k", functools.partial(topk_of_rows, latents, k))
            del latents
        top_indices, top_values = sae._encode_scaled(scaled, None)
        of("counters", lambda: sae._count_firing(top_indices, top_values.detach()))
        values = top_values.detach().requires_grad_()
        of("loss, forward", lambda: sae._loss(scaled, scaled, top_indices, values))
        selected_loss, _, _ = sae._loss(scaled, scaled, top_indices, values)
        wanted = (values, sae.W_dec, sae.b_dec)
        of("loss, backward", lambda: torch.autograd.grad(selected_loss, wanted, retain_graph=True))
        grad, encoder = torch.randn_like(values), (sae.encoder_weight, sae.b_enc)
        of("encoder, backward", lambda: torch.autograd.grad(top_values, encoder, grad, retain_graph=True))
        with autocast():
            loss = sae(x).loss
        loss.backward()
        of("gradient clipping", lambda: torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0))
        of("optimizer", optimizer.step)
    return result


def selections(x: torch.Tensor, k: int, d_sae: int, rounds: int) -> dict:
    """The encoder's selection alone, in each precision: milliseconds, and the share of float64's latents that it finds."""
    weight = torch.nn.functional.normalize(torch.randn(d_sae, x.shape[1], device=DEVICE), dim=1)
    bias = torch.zeros(d_sae, device=DEVICE)
    some = x[:256]
    exact = (some.double() @ weight.double().T).topk(k, dim=1).indices

    def product(autocast):
        with autocast():
            return topk_of_rows(torch.nn.functional.linear(x, weight, bias), k)[1]

    result = {}
    for precision in PRECISIONS:
        with precision_of(precision) as autocast, torch.no_grad():
            call = functools.partial(product, autocast)
            found = (call()[: len(some), :, None] == exact[:, None]).any(dim=1).float().mean().item()
            result[precision] = [median_ms(call, rounds), found]
    return {"ways": result}


def kernel_table(step, precision: str) -> str:
    """The kernels of one step by the time that they take."""
    if DEVICE != "cuda":
        return "no GPU"
    with precision_of(precision) as autocast, torch.profiler.profile() as profile:
        step(autocast)
        torch.cuda.synchronize()
    return profile.key_averages().table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=70)


@functools.cache
def rates() -> dict:
    """Bytes per second of a copy, and operations per second of a large product in each precision."""
    n, count = (8192, 2**30) if DEVICE == "cuda" else (64, 2**16)
    source = torch.empty(count, dtype=torch.uint8, device=DEVICE)
    copy = torch.empty_like(source)
    result = {"copy": 2 * count / median_ms(lambda: copy.copy_(source), 10) * 1e3}
    a, b = torch.randn(2, n, n, device=DEVICE)
    for precision in PRECISIONS:
        with precision_of(precision) as autocast, autocast():
            left, right = (a.bfloat16(), b.bfloat16()) if "bfloat16" in precision else (a, b)
            result[precision] = 2 * n**3 / median_ms(functools.partial(torch.mm, left, right), 5) * 1e3
    return result


def floor_ms(size: tuple, precision: str, rate: dict) -> float:
    """Of our step: in passes over one float32 dictionary, the optimizer 14, the norm of the gradients 2, the loss 4, the
    encoder's weight and gradient 2, unit norm 2; and what the loss moves of the batch."""
    batch, k, d_sae, d_in = size
    moved = 24 * 4 * d_sae * d_in + 8 * batch * k * d_in + 40 * batch * d_in
    return 1e3 * (2 * batch * d_sae * d_in / rate[precision] + moved / rate["copy"])


def run_family(arguments: argparse.Namespace) -> None:
    """In a process of its own: a JSON line for each thing measured."""

    def emit(**found):
        print("JSON " + json.dumps(found), flush=True)

    torch.manual_seed(0)
    if arguments.family.startswith("ours, H"):
        name = torch.cuda.get_device_name() if DEVICE == "cuda" else "A dry run, not a measurement"
        emit(kind="rates", name=name, **rates())
    for size in arguments.sizes:
        with contextlib.suppress(torch.OutOfMemoryError):
            numbers = tuple(int(number) for number in size.split(","))
            FAMILIES[arguments.family](numbers, functools.partial(emit, size=size), arguments)


def render(found: list[tuple[str, dict]]) -> str:
    """The tables of (family, what it printed)."""
    lines = []
    for _, row in found:
        if row["kind"] == "rates":
            flops = ", ".join(f"{precision} {row[precision] / 1e12:.0f}" for precision in PRECISIONS)
            lines.append(
                f"{row['name']}, torch {torch.__version__}. Copy {row['copy'] / 1e12:.2f} TB/s; products, TFLOP/s: {flops}."
            )
    for size in dict.fromkeys(row["size"] for _, row in found if "size" in row):
        of_size = [(family, row) for family, row in found if row.get("size") == size]
        lines += ["", "### batch {}, k {}, d_sae {}, d_in {}".format(*size.split(",")), ""]
        lines += ["| step | precision | ms | tokens per second | peak memory, GiB | floor, ms | loss, first to last |"]
        lines += ["|---|---|---:|---:|---:|---:|---|"]
        for family, row in of_size:
            if row["kind"] != "step":
                continue
            cells = f"{row.get('note')} | | | | "
            if "ms" in row:
                floor = f"{row['floor']:.2f}" if "floor" in row else ""
                losses = "{:.4g} to {:.4g}".format(*row["losses"])
                cells = f"{row['ms']:.2f} | {row['tokens']:,.0f} | {row['peak'] / 2**30:.2f} | {floor} | {losses}"
            lines.append(f"| {family} | {row['precision']} | {cells} |")
        columns = [row for _, row in of_size if row["kind"] == "stages"]
        if columns:
            lines += ["", "| stage of our step, ms | " + " | ".join(row["precision"] for row in columns) + " |"]
            lines += ["|---|" + "---:|" * len(columns)]
            for name in columns[0]["stages"]:
                lines.append(f"| {name} | " + " | ".join(f"{row['stages'][name]:.2f}" for row in columns) + " |")
            rest = [f"{row['whole'] - sum(row['stages'].values()):.2f}" if row["whole"] else "" for row in columns]
            lines.append("| the rest | " + " | ".join(rest) + " |")
        for _, row in of_size:
            if row["kind"] == "selection":
                lines += ["", "| selection alone | ms | latents of float64 found |", "|---|---:|---:|"]
                lines += [f"| {way} | {ms:.2f} | {share:.4%} |" for way, (ms, share) in row["ways"].items()]
    return "\n".join(lines).strip() + "\n"


def main() -> None:
    arguments = parse_arguments()
    if DEVICE != "cuda" and not arguments.dry_run:
        raise SystemExit(
            "sae_step_gpu.py found no CUDA GPU: run it on a machine with one, or --dry_run to see it run."
        )
    if arguments.family:
        run_family(arguments)
        return
    found = []
    for family in arguments.only:
        command = [sys.executable, __file__, "--family", family, "--rounds", str(arguments.rounds)]
        command += ["--dry_run"] if arguments.dry_run else ["--sizes", *arguments.sizes]
        begun = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        timer = threading.Timer(arguments.seconds, process.kill)
        timer.start()
        errors = []
        reader = threading.Thread(target=lambda pipe=process.stderr, errors=errors: errors.extend(pipe))
        reader.start()
        for line in process.stdout or ():
            if line.startswith("JSON "):
                found.append((family, json.loads(line.removeprefix("JSON "))))
                write(arguments.output, found)
        process.wait()
        reader.join()
        timer.cancel()
        print(f"{family}: {time.monotonic() - begun:.0f} s", flush=True)
        if process.returncode:
            reason = "".join(errors).strip().splitlines()[-1:]
            if process.returncode < 0 or not reason:
                reason = [f"ended after {time.monotonic() - begun:.0f} s, exit status {process.returncode}"]
            found.append(
                (family, {"kind": "step", "size": arguments.sizes[-1], "precision": "", "note": reason[0][:160]})
            )
            print("".join(errors[-20:]), file=sys.stderr, flush=True)
            write(arguments.output, found)
    print(render(found))


def write(output: Path | None, found: list[tuple[str, dict]]) -> None:
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(found))
    kernels = [(row["size"], row["precision"], row["text"]) for _, row in found if row["kind"] == "kernels"]
    text = "\n".join(f"{size}, {precision}\n{table}" for size, precision, table in kernels)
    output.with_name(output.stem + "_kernels.txt").write_text(text)


if __name__ == "__main__":
    main()
