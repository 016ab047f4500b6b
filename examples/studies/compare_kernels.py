# /// script
# dependencies = ["hf_based_kernel", "accelerate", "datasets", "matplotlib", "tokenizers"]
# ///
"""Compare language models with different attention kernels at (nearly) equal parameters: a table and loss curves.

    python examples/studies/compare_kernels.py --train_tokenizer 2048 --seq_len 512 --batch_size 4 --minutes 4

--minutes gives each the same time instead of the same steps. Perplexity is told apart over hits of associative recall, as in
Zoology (arXiv 2312.04927), and over the others. Ctrl-C saves a checkpoint and stops; the same command goes on from there.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from accelerate import PartialState
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import TrainerState


sys.path.append(str(Path(__file__).parents[1] / "shared"))
sys.path.append(str(Path(__file__).parents[1] / "hf_based_kernel"))
import train_language_model as example
from interrupts import StopOnInterrupt, last_checkpoint, train_from, whole
from packed_text import make_blocks, make_tokenizer, read_texts


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    example.add_options(parser)
    parser.set_defaults(output_dir="outputs/compare_kernels")
    parser.add_argument("--feature_dim", type=int, default=16, help="query and key numbers per head (default: 16)")
    parser.add_argument(
        "--kernel",
        nargs="+",
        default=["rebased", "taylor", "attention"],
        choices=["rebased", "taylor", "attention"],
        help="similarity: rebased, taylor (Based), or softmax over the whole row in the place of linear attention, with the "
        "feed-forwards made narrower until the parameters are as many (default: all three)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="training time of each kernel instead of --max_steps, by its first steps; CPU time where there is no GPU",
    )
    parser.add_argument(
        "--train_tokens", type=int, help="tokens to read at most (default: twice those of --max_steps, or 10 million)"
    )
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        help="bfloat16 autocast; weights and moments stay float32 (default: on a GPU that has it)",
    )
    parser.add_argument(
        "--eval_steps", type=int, help="steps between held-out losses (default: only before and after)"
    )
    parser.add_argument("--save_steps", type=int, default=200, help="steps between checkpoints (default: 200)")
    arguments = parser.parse_args()
    example.check_options(parser, arguments)
    if "attention" in arguments.kernel and arguments.layer_types:
        parser.error(
            "--layer_types: expected none with --kernel attention, whose layers are conv and sliding_attention"
        )
    if arguments.minutes is not None and arguments.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {arguments.minutes:g}")
    return arguments


def make_model(arguments, kernel, tokenizer):
    heads = arguments.num_attention_heads
    options: dict[str, Any] = {"kernel": kernel, "feature_dim": arguments.feature_dim}
    if kernel == "attention":
        # Its queries and keys are hidden_size wide; the feed-forwards give back what that costs.
        layers = arguments.num_hidden_layers
        attention_layers = layers // 2
        wider = 2 * attention_layers * (arguments.hidden_size - heads * arguments.feature_dim)
        options = {
            "feature_dim": arguments.feature_dim,
            "layer_types": [("conv", "sliding_attention")[i % 2] for i in range(layers)],
            "sliding_window": arguments.seq_len,
            "intermediate_size": 2 * arguments.hidden_size - round(wider / (3 * layers)),
        }
    return example.make_model(arguments, tokenizer, **options)


def make_trainer(arguments, model, train, held_out, **options):
    return example.make_trainer(
        arguments,
        model,
        train,
        held_out,
        bf16=arguments.bf16,
        eval_strategy="steps" if arguments.eval_steps else "no",
        eval_steps=arguments.eval_steps,
        save_steps=arguments.save_steps,
        **options,
    )


def clock():
    """Seconds of this process's work: CPU time, so that other programs do not count, unless a GPU does the work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class StepTimer(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(clock())


def steps_within(arguments, kernel, tokenizer, train):
    """Steps that fit into `minutes`, from the time of 15 steps after the first five."""
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(arguments, kernel, tokenizer)
        trainer = make_trainer(arguments, model, train, train, output_dir=folder, max_steps=20)
        trainer.args.eval_strategy = trainer.args.save_strategy = "no"
        trainer.add_callback(timer)
        trainer.train()
    return max(1, round(60 * arguments.minutes * 15 / (timer.times[19] - timer.times[4])))


def recall_hits(rows, frequent_bigrams):
    """
    Where a token ends a bigram that was in its document before, and is not frequent in training: (rows, seq), bool.

    These are Zoology's hits of associative recall (arXiv 2312.04927, section 3); all other tokens are its "others".
    """
    starts = rows["position_ids"] == 0
    documents, bigrams = starts.cumsum(1)[:, 1:], encode_bigrams(rows["input_ids"])
    # A bigram across the border of two documents is none: a number of its own.
    bigrams = bigrams.masked_fill(starts[:, 1:], -1)
    earlier = torch.ones(bigrams.shape[1], bigrams.shape[1], dtype=torch.bool).tril(-1)
    hits = torch.zeros_like(starts)
    for row, (bigram, document) in enumerate(zip(bigrams, documents)):
        hits[row, 1:] = ((bigram[:, None] == bigram) & (document[:, None] == document) & earlier).any(1)
    hits[:, 1:] &= ~torch.isin(bigrams, frequent_bigrams)
    return hits & ~starts


def encode_bigrams(input_ids):
    """(rows, seq) -> (rows, seq - 1), one number for each two neighbours"""
    return input_ids[:, :-1] * 2**32 + input_ids[:, 1:]


def find_frequent_bigrams(rows):
    """(bigrams,), those that Zoology takes for memorised: more than 1,250 times in the training text"""
    bigrams, counts = encode_bigrams(rows["input_ids"]).unique(return_counts=True)
    return bigrams[counts > 1250]


def perplexities(model, rows, hits, batch_size):
    """Perplexity of all tokens, of the hits of associative recall, and of the others."""
    (losses, counted), hits = example.token_losses(model, rows, batch_size), hits[:, 1:]
    kinds = {"all": counted, "recall": counted & hits, "other": counted & ~hits}
    # A text without a repeated bigram has no hits: not a number, written as null.
    return {kind: losses[chosen].mean().exp().item() if chosen.any() else None for kind, chosen in kinds.items()}


def plot(results, path):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for i, result in enumerate(results):
        tokens = result["tokens_per_step"] / 1e6
        steps, losses = zip(*result["training_curve"])
        name = f"{result['kernel']}, " if len(results) > 1 else ""
        axes.plot(
            [step * tokens for step in steps], [math.exp(loss) for loss in losses], f"C{i}:", label=f"{name}training"
        )
        curve = [[0, math.log(result["perplexity_before"])], *result["held_out_curve"]]
        curve.append([result["steps"], math.log(result["perplexity_after"])])
        steps, losses = zip(*curve)
        # Two points are no curve.
        style = f"C{i}o-" if result["held_out_curve"] else f"C{i}o"
        axes.plot(
            [step * tokens for step in steps], [math.exp(loss) for loss in losses], style, label=f"{name}held out"
        )
    axes.set_yscale("log")
    axes.set_xlabel("million tokens of training")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def train_kernel(arguments, kernel, tokenizer, train, held_out, hits, folder, checkpoint):
    """Train, save, reload and evaluate one model: its results, or None where Ctrl-C stopped it."""
    max_steps = arguments.max_steps
    if arguments.minutes is not None and checkpoint:
        max_steps = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")).max_steps
    elif arguments.minutes is not None:
        max_steps = steps_within(arguments, kernel, tokenizer, train)
    set_seed(arguments.seed)
    model = make_model(arguments, kernel, tokenizer)
    trainer = make_trainer(arguments, model, train, held_out, output_dir=folder, max_steps=max_steps)
    interrupt = StopOnInterrupt()
    trainer.add_callback(interrupt)
    before = perplexities(model, held_out, hits, arguments.batch_size)
    started = clock()
    train_from(trainer, checkpoint)
    minutes = (clock() - started) / 60
    if interrupt.interrupted:
        print(
            f"Stopped at step {trainer.state.global_step} of {max_steps}; checkpoint in {folder}. Run the same command to "
            "go on."
        )
        return None
    after = perplexities(model, held_out, hits, arguments.batch_size)
    log = trainer.state.log_history
    result = {
        "parameters": model.num_parameters(),
        "vocab_size": len(tokenizer),
        "layer_types": model.config.layer_types,
        "kernel": kernel,
        "tokens_per_step": arguments.batch_size * arguments.seq_len * trainer.args.world_size,
        "steps": trainer.state.global_step,
        "minutes": minutes,
        "resumed": bool(checkpoint),
        "perplexity_before": before["all"],
        "perplexity_after": after["all"],
        "perplexity_of_recall_hits": after["recall"],
        "perplexity_of_others": after["other"],
        "share_of_recall_hits": hits.double().mean().item(),
        "training_curve": [[entry["step"], entry["loss"]] for entry in log if "loss" in entry],
        "held_out_curve": [[entry["step"], entry["eval_loss"]] for entry in log if "eval_loss" in entry],
    }
    if not trainer.is_world_process_zero():
        return result

    reloaded = example.reload(model, tokenizer, held_out, folder)
    prompts = held_out["input_ids"][:3, : min(24, arguments.seq_len)]
    result["generated"], result["state_bytes"] = example.generate(reloaded, tokenizer, prompts)
    return result


def compare(arguments, tokenizer, train, held_out, hits, text_name):
    output, results = Path(arguments.output_dir), []
    asked = {name: str(value) for name, value in vars(arguments).items() if name not in ("kernel", "output_dir")}
    for kernel in arguments.kernel:
        folder = output / kernel
        path = folder / "language_model.json"
        if path.exists():
            result = json.loads(path.read_text())
            if result["settings"] != asked:
                raise SystemExit(f"{folder} holds a run with other settings; choose another --output_dir")
        else:
            result = train_kernel(arguments, kernel, tokenizer, train, held_out, hits, folder, last_checkpoint(folder))
            if result is None:
                raise SystemExit(130)
            result |= {"text": text_name, "settings": asked}
            if "generated" in result:
                with whole(path) as unfinished:
                    unfinished.write_text(json.dumps(result, indent=2) + "\n")
        results.append(result)
    if not PartialState().is_main_process:
        return
    plot(results, output / "comparison.png")
    kind = "minutes" if torch.cuda.is_available() else "CPU-minutes"
    lines = [
        f"{text_name}; {held_out['input_ids'].numel():,} held-out tokens of a vocabulary of {len(tokenizer):,}, of which "
        f"{results[0]['share_of_recall_hits']:.0%} are hits of associative recall",
        "",
        f"| kernel | parameters | steps | tokens | {kind} | perplexity: all | recall hits | others |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        hit = result["perplexity_of_recall_hits"]
        minutes = "resumed" if result["resumed"] else f"{result['minutes']:.1f}"
        lines.append(
            f"| {result['kernel']} | {result['parameters']:,} | {result['steps']:,} | "
            f"{result['steps'] * result['tokens_per_step']:,} | {minutes} | {result['perplexity_after']:.2f} | "
            f"{'none' if hit is None else f'{hit:.2f}'} | {result['perplexity_of_others']:.2f} |"
        )
    table = "\n".join(lines)
    (output / "comparison.md").write_text(table + "\n")
    print(f"\n{table}\n\nArtefacts: {output}/comparison.md  {output}/comparison.png  {output}/*/language_model.json")


def main():
    arguments = parse_arguments()
    set_seed(arguments.seed)
    texts, text_name = read_texts(arguments, arguments.seed)
    tokenizer, texts = make_tokenizer(arguments, texts)
    for kernel in arguments.kernel:
        make_model(arguments, kernel, tokenizer)
    wanted = arguments.train_tokens or (10_000_000 if arguments.minutes is not None else None)
    train, held_out = make_blocks(arguments, tokenizer, texts, wanted=wanted, seed=arguments.seed)
    hits = recall_hits(held_out, find_frequent_bigrams(train))
    compare(arguments, tokenizer, train, held_out, hits, text_name)


if __name__ == "__main__":
    main()
