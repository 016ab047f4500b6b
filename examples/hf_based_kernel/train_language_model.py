# /// script
# dependencies = ["hf_based_kernel", "accelerate", "datasets", "matplotlib", "tokenizers"]
# ///
"""Train a small ReBased language model on real text with stock `Trainer`, reload it and let it generate.

    accelerate launch examples/hf_based_kernel/train_language_model.py --train_tokenizer 2048

Documents are packed without seeing one another. Ctrl-C stops with a checkpoint; --resume_from_checkpoint goes on from it.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from huggingface_hub import EvalResult
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import StackDataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator, logging, set_seed

from hf_based_kernel import RebasedConfig, RebasedForCausalLM


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from interrupts import StopOnInterrupt, add_resume_option, find_checkpoint, train_from
from options import check_least
from packed_text import add_text_options, check_text_options, make_blocks, make_tokenizer, read_texts


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    add_resume_option(parser)
    arguments = parser.parse_args()
    check_options(parser, arguments)
    find_checkpoint(parser, arguments)
    return arguments


def add_options(parser):
    add_text_options(parser)
    parser.add_argument("--hidden_size", type=int, default=128, help="width of the model (default: 128)")
    parser.add_argument("--num_hidden_layers", type=int, default=4, help="layers (default: 4)")
    parser.add_argument("--num_attention_heads", type=int, default=4, help="heads per attention layer (default: 4)")
    parser.add_argument(
        "--layer_types",
        nargs="+",
        help="conv, linear_attention, sliding_attention or full_attention per layer (default: the first two in turn)",
    )
    parser.add_argument("--seq_len", type=int, default=256, help="tokens per sequence (default: 256)")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences per step and process (default: 8)")
    parser.add_argument("--max_steps", type=int, default=400, help="optimizer steps (default: 400)")
    parser.add_argument("--learning_rate", type=float, default=4e-3, help="peak learning rate (default: 4e-3)")
    parser.add_argument("--eval_tokens", type=int, default=32_768, help="tokens held out (default: 32768)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the text (default: 0)")
    parser.add_argument("--output_dir", default="outputs/rebased", help="where all is written (outputs/rebased)")


def check_options(parser, arguments):
    check_text_options(parser, arguments)
    least = {"seq_len": 2, "batch_size": 1, "max_steps": 1, "eval_tokens": arguments.seq_len, "seed": 0}
    check_least(parser, arguments, learning_rate=0.0, **least)


def make_model(arguments, tokenizer, **options):
    try:
        config = RebasedConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.num_hidden_layers,
            num_attention_heads=arguments.num_attention_heads,
            max_position_embeddings=arguments.seq_len,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **{"layer_types": arguments.layer_types} | options,
        )
    except StrictDataclassError as error:
        raise SystemExit(f"the model's sizes do not fit together: {error.__cause__ or error}") from None
    return RebasedForCausalLM(config)


def make_trainer(arguments, model, train, held_out, **options):
    """Stock `Trainer`; the options are more `TrainingArguments`."""
    max_steps = options.pop("max_steps", arguments.max_steps)
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    defaults: dict[str, Any] = {"output_dir": arguments.output_dir, "save_steps": 200, "bf16": has_bf16}
    training = TrainingArguments(
        max_steps=max_steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, max_steps // 20),
        weight_decay=0.1,
        max_grad_norm=1.0,
        seed=arguments.seed,
        logging_steps=max(1, max_steps // 20),
        save_total_limit=1,
        prediction_loss_only=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        # Without it, processes that torchrun starts on CPUs would each train a model of their own.
        use_cpu=not torch.accelerator.is_available(),
        report_to="none",
        **defaults | options,
    )
    return Trainer(
        model=model,
        args=training,
        train_dataset=StackDataset(**train),
        eval_dataset=StackDataset(**held_out),
        data_collator=default_data_collator,
    )


def token_losses(model, rows, batch_size):
    """(rows, seq - 1), the loss of each token but a row's first, and whether it counts"""
    losses = []
    model.eval()
    for start in range(0, len(rows["labels"]), batch_size):
        batch = {name: column[start : start + batch_size].to(model.device) for name, column in rows.items()}
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none").cpu())
    return torch.cat(losses), rows["labels"][:, 1:] != -100


def perplexity(model, rows, batch_size):
    losses, counted = token_losses(model, rows, batch_size)
    return losses[counted].mean().exp().item()


def reload(model, tokenizer, held_out, folder):
    """Save the model and the tokenizer, and load what was saved; its logits must be the same."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder).to(model.device)
    probe = held_out["input_ids"][:1].to(model.device)
    with torch.no_grad():
        if not torch.equal(reloaded(probe).logits, model.eval()(probe).logits):
            raise SystemExit("the reloaded model gives other logits than the trained one")
    return reloaded


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


def plot(training_curve, held_out_curve, path):
    """Each curve is a list of (step, loss)."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for curve, style, name in ((training_curve, "C0:", "training"), (held_out_curve, "C0o", "held out")):
        steps, losses = zip(*curve)
        axes.plot(steps, [math.exp(loss) for loss in losses], style, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main():
    logging.disable_progress_bar()  # of weights; training keeps its own
    arguments, started = parse_arguments(), time.time()
    set_seed(arguments.seed)
    texts, text_name = read_texts(arguments, arguments.seed)
    tokenizer, texts = make_tokenizer(arguments, texts)
    model = make_model(arguments, tokenizer)
    train, held_out = make_blocks(arguments, tokenizer, texts, seed=arguments.seed)
    trainer = make_trainer(arguments, model, train, held_out)
    interrupt = StopOnInterrupt(arguments)
    trainer.add_callback(interrupt)
    before = perplexity(model, held_out, arguments.batch_size)
    train_from(trainer, arguments.resume_from_checkpoint)
    steps, output = trainer.state.global_step, Path(arguments.output_dir)
    if interrupt.interrupted:
        print(
            f"Stopped at step {steps} of {arguments.max_steps}; checkpoint in {output}. "
            "Run the same command with --resume_from_checkpoint to go on."
        )
        raise SystemExit(130)
    after = perplexity(model, held_out, arguments.batch_size)
    if not trainer.is_world_process_zero():
        return
    reloaded = reload(model, tokenizer, held_out, output)
    generated, state_bytes = generate(reloaded, tokenizer, held_out["input_ids"][:3, : min(24, arguments.seq_len)])
    curve = [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
    plot(curve, [(0, math.log(before)), (steps, math.log(after))], output / "language_model.png")
    result = {
        "parameters": model.num_parameters(),
        "vocab_size": len(tokenizer),
        "layer_types": model.config.layer_types,
        "text": text_name,
        "steps": steps,
        "tokens_per_step": arguments.batch_size * arguments.seq_len * trainer.args.world_size,
        "perplexity_before": before,
        "perplexity_after": after,
        "training_curve": curve,
        "generated": generated,
        "state_bytes": state_bytes,
        "seconds": round(time.time() - started, 1),
    }
    (output / "language_model.json").write_text(json.dumps(result, indent=2) + "\n")
    metric = EvalResult("text-generation", "text", text_name, "perplexity", after, dataset_split="held out")
    reloaded.model_card(str(output), [metric]).save(output / "README.md")
    lines = [
        f"Trained:    a ReBased language model, {result['parameters']:,} parameters, layers "
        f"{' '.join(result['layer_types'])}: {steps} steps of {result['tokens_per_step']} tokens of {text_name}, "
        f"{result['seconds']} s",
        f"Held out:   perplexity {before:.1f} before, {after:.1f} after ({held_out['input_ids'].numel()} tokens of a "
        f"vocabulary of {len(tokenizer)})",
        f"Generated after saving and loading, from a recurrent state of {state_bytes:,} bytes at any length:",
        "    " + generated[0].replace("\n", "\n    "),
        f"Artefacts:  {output}/  {output}/language_model.json  {output}/language_model.png",
    ]
    summary = "\n".join(lines)
    (output / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}")


if __name__ == "__main__":
    main()
