# /// script
# dependencies = ["peft_bias_steer", "hf_hierarchical_sae", "hf_based_kernel", "accelerate", "matplotlib", "reasoning-gym"]
# ///
"""Read what reinforcement learning did to a model: its steering vectors in the dictionaries of sparse autoencoders.

    python examples/studies/read_steering_vector.py --adapter outputs/steer/adapter --rebased outputs/rebased

The adapter is what examples/peft_bias_steer/train_grpo.py writes: one vector per layer. For some of the layers an
autoencoder is trained, each vector is written as a sum of a few of its latents, and the model is steered with these
latents alone: if it answers as with the vectors, they are what the training pushed. With --rebased, the same kind of
autoencoder is trained on a layer of a ReBased language model (examples/hf_based_kernel/train_language_model.py).

What was finished is kept in --output_dir: the same command goes on after an interruption.
"""

import argparse
import json
import random
import re
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matplotlib
import reasoning_gym
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import hf_based_kernel  # noqa: F401  registers ReBased models
from hf_hierarchical_sae import (
    ActivationShards,
    HierarchicalSaeConfig,
    HierarchicalSaeModel,
    evaluate_in_model,
    iterate_activations,
    read_latents,
    record_statistics,
    save_shards,
    steer,
)
from peft_bias_steer import set_steering_vectors, steering_vectors


matplotlib.use("Agg")
sys.path.append(str(Path(__file__).parents[1] / "shared"))
from interrupts import record_settings  # noqa: E402
from matplotlib import pyplot  # noqa: E402
from options import check_least  # noqa: E402
from plays import find_plays  # noqa: E402


DEMO_MODEL = "outputs/SmolLM2-135M-Instruct"
PROMPT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
MAX_NEW_TOKENS = 12


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_model = DEMO_MODEL if Path(DEMO_MODEL).is_dir() else "HuggingFaceTB/SmolLM2-135M-Instruct"
    parser.add_argument("--model", default=default_model, help="hub id or folder of the base model (%(default)s)")
    parser.add_argument("--adapter", default="outputs/steer/adapter", help="the trained vectors (%(default)s)")
    parser.add_argument("--rebased", help="hub id or folder of a ReBased language model (default: leave it out)")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=list(range(10, 20)), help="layers to read (default: 10 to 19)"
    )
    parser.add_argument("--text_files", nargs="+", type=Path, help="text files to read instead of the demo's plays")
    parser.add_argument("--tokens", type=int, default=30_000, help="tokens to train each autoencoder on (%(default)s)")
    parser.add_argument("--d_sae", type=int, help="number of latents (default: 4 times the model's hidden size)")
    parser.add_argument("--k", type=int, default=64, help="largest number of latents per token (%(default)s)")
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="latents per vector (default: 1 to 256)"
    )
    parser.add_argument("--max_steps", type=int, default=150, help="optimizer steps per autoencoder (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=512, help="tokens per step (%(default)s)")
    parser.add_argument(
        "--eval_size", type=int, default=64, help="held-out questions; at most train_grpo.py's (%(default)s)"
    )
    parser.add_argument("--shown", type=int, default=3, help="latents shown for each layer (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and text order (%(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/suite"), help="for everything (%(default)s)")
    args = parser.parse_args()
    least = dict.fromkeys(("tokens", "k", "max_steps", "batch_size"), 1) | {"shown": 0, "seed": 0}
    check_least(parser, args, **least, **({} if args.d_sae is None else {"d_sae": args.k}))
    if min(args.budgets) < 1:
        parser.error(f"--budgets must be at least 1, got {min(args.budgets)}")
    return args


def load(name: str, option: str):
    """Model and tokenizer of a checkpoint. Raises `SystemExit` with one sentence if there is none."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    except OSError as error:
        raise SystemExit(
            f"{option} must be a folder with a transformers checkpoint or a reachable hub id, got {name!r}: "
            f"{str(error).splitlines()[0]}"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.cuda() if torch.cuda.is_available() else model, tokenizer


def make_questions(eval_size: int):
    """The task of train_grpo.py, with its held-out questions whatever the seed: arithmetic with two numbers up to 10."""
    task = reasoning_gym.create_dataset(
        "basic_arithmetic",
        size=2000,
        seed=0,
        min_terms=2,
        max_terms=2,
        min_digits=1,
        max_digits=1,
        allow_parentheses=False,
        operators=["+", "-", "*"],
    )
    items = list({item["question"]: item for item in (task[index] for index in range(len(task)))}.values())
    if not 0 < eval_size < len(items):
        raise SystemExit(f"--eval_size must be in [1, {len(items) - 1}], got {eval_size}")
    return task, items[eval_size:], items[:eval_size]


def read_passages(files, seed: int):
    if not files:
        files = find_plays("--text_files")
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise SystemExit(f"--text_files: expected files, got {', '.join(missing)}, which do not exist")
    texts = [file.read_text(encoding="utf-8") for file in files]
    passages = [text[start : start + 1000] for text in texts for start in range(0, len(text), 1000)]
    random.Random(seed).shuffle(passages)
    return passages


def train_autoencoders(args, model, tokenizer, name, layers, texts, folder: Path):
    """One autoencoder for each layer, from one pass over the text; those in `folder` are loaded."""
    options = ("text_files", "tokens", "d_sae", "k", "max_steps", "batch_size", "eval_size", "seed")
    record_settings(folder, {"model": name, "layers": layers} | {each: str(getattr(args, each)) for each in options})
    missing = [layer for layer in layers if not (folder / f"layer_{layer}" / "model.safetensors").exists()]
    if missing:
        stream = iterate_activations(model, tokenizer, texts, layers, max_tokens=args.tokens)
        save_shards(stream, folder / "states", shard_tokens=8192)
    for layer in missing:
        states = ActivationShards(folder / "states", layer)
        hidden_size = states.widths[0]
        set_seed(args.seed)
        sae = HierarchicalSaeModel(
            HierarchicalSaeConfig(
                d_in=hidden_size,
                d_sae=args.d_sae or 4 * hidden_size,
                k=args.k,
                model_name=name,
                layer=layer,
                hook_point="output",
            )
        )
        sample = states.rows(torch.randperm(len(states))[:8192])
        sae.initialize_from_activations(sample)
        training = TrainingArguments(
            str(folder / "trainer"),
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=3e-3,
            warmup_steps=max(1, args.max_steps // 20),
            weight_decay=0.0,
            dataloader_drop_last=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        )
        print(f"Training an autoencoder on layer {layer} ...", flush=True)
        Trainer(model=sae, args=training, train_dataset=states).train()
        sae.eval()
        sae.fold_input_scale()
        record_statistics(sae, states.batches())
        sae.save_pretrained(folder / f"layer_{layer}")
    loaded = {layer: HierarchicalSaeModel.from_pretrained(folder / f"layer_{layer}") for layer in layers}
    return {layer: sae.to(model.device).eval() for layer, sae in loaded.items()}


@torch.no_grad()
def matching_pursuit(vector: torch.Tensor, dictionary: torch.Tensor, budget: int):
    """
    Orthogonal matching pursuit (Pati et al. 1993): at each step the row with the largest product with what is left
    joins, then all coefficients are fitted again.

    Returns, for each number of rows from 1 to `budget`, their indices, coefficients and the share of ‖vector‖² that
    is left.
    """
    chosen, steps, residual = [], [], vector
    for _ in range(budget):
        products = (dictionary @ residual).abs()
        products[chosen] = -1
        chosen.append(int(products.argmax()))
        rows = dictionary[chosen]
        coefficients = torch.linalg.lstsq(rows.T, vector.unsqueeze(1)).solution.squeeze(1)
        residual = vector - coefficients @ rows
        steps.append((list(chosen), coefficients, float(residual.square().sum() / vector.square().sum())))
    return steps


@torch.no_grad()
def answer(model, tokenizer, questions, batch_size=32):
    answers = []
    for start in range(0, len(questions), batch_size):
        prompts = [PROMPT.format(question=item["question"]) for item in questions[start : start + batch_size]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
        output = model.generate(
            **batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        answers += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


@torch.no_grad()
def describe(latent, sae, model, tokenizer, activations):
    """Output tokens that a latent promotes most, and the tokens, in their context, that it fires on most."""
    logits = model.get_output_embeddings().weight.float() @ sae.W_dec[latent]
    promoted = [tokenizer.decode([token]) for token in logits.topk(5).indices.tolist()]
    positions, values, _ = activations.latent(latent)
    contexts = []
    for position in positions[values.argsort(descending=True)[:3]].tolist():
        context = activations.token_ids[max(0, position - 8) : position].tolist()
        token = activations.token_ids[position].item()
        contexts.append(f"{tokenizer.decode(context)}«{tokenizer.decode([token])}»")
    return promoted, contexts


def plot(left, random_left, accuracies, path):
    figure, (quality, bars) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    budgets = range(1, len(random_left) + 1)
    for layer, shares in left.items():
        quality.plot(budgets, [1 - share for share in shares], label=f"layer {layer}", linewidth=1)
    quality.plot(budgets, [1 - share for share in random_left], "k--", label="random vectors")
    quality.set(xlabel="latents", ylabel="share of ‖vector‖² that they hold", xscale="log")
    quality.legend(fontsize="x-small")
    bars.barh(list(accuracies), [100 * value for value in accuracies.values()])
    bars.invert_yaxis()
    bars.set(xlabel="held-out questions answered right, %")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    args = parse_arguments()
    started = time.perf_counter()
    task, train_questions, held_out = make_questions(args.eval_size)
    base, tokenizer = load(args.model, "--model")
    passages = read_passages(args.text_files, args.seed)

    def accuracy(model, *contexts):
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            answers = answer(model, tokenizer, held_out)
        integers = [(re.findall(r"-?\d+", text) or [None])[-1] for text in answers]
        return sum(task.score_answer(found, item) == 1.0 for found, item in zip(integers, held_out)) / len(held_out)

    print(f"Answering {args.eval_size} held-out questions with and without the vectors ...", flush=True)
    accuracies = {"base model": accuracy(base)}
    try:
        steered = PeftModel.from_pretrained(base, args.adapter).eval()
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"--adapter: expected an adapter, got {args.adapter} ({str(error).splitlines()[0]}); make one with "
            "`accelerate launch examples/peft_bias_steer/train_grpo.py --output_dir outputs/steer`"
        ) from None
    vectors = steering_vectors(steered)
    unknown = sorted(set(args.layers) - set(vectors))
    if unknown:
        raise SystemExit(f"--layers must be among the steered layers {sorted(vectors)}, got {unknown}")
    d_sae = args.d_sae or 4 * base.config.hidden_size
    if not max(args.k, *args.budgets) <= d_sae:
        raise SystemExit(
            f"--k and --budgets must be at most {d_sae}, the number of latents, got {args.k}, {args.budgets}"
        )
    accuracies[f"vectors of all {len(vectors)} layers"] = accuracy(steered)
    alone = {layer: vector * (layer in args.layers) for layer, vector in vectors.items()}
    set_steering_vectors(steered, alone)
    accuracies[f"vectors of the {len(args.layers)} layers read"] = accuracy(steered)
    base = steered.unload()

    # The model's text is half prose and half the task with its answers, so that both have latents.
    chats = [PROMPT.format(question=item["question"]) + item["answer"] + "<|im_end|>\n" for item in train_questions]
    groups = ["".join(chats[start : start + 8]) for start in range(0, len(chats), 8)]
    texts = [text for number, passage in enumerate(passages) for text in (passage, groups[number % len(groups)])]
    folder = args.output_dir / "language_model"
    saes = train_autoencoders(args, base, tokenizer, args.model, args.layers, texts, folder)

    # Not the seed of the autoencoders: their first rows start as the first numbers that it gives.
    generator = torch.Generator().manual_seed(args.seed + 1)
    budgets = sorted(args.budgets)
    steps, left, random_left = {}, {}, torch.zeros(budgets[-1])
    for layer, sae in saes.items():
        steps[layer] = matching_pursuit(vectors[layer].float().to(sae.device), sae.W_dec, budgets[-1])
        left[layer] = [share for *_, share in steps[layer]]
        control = torch.randn(sae.config.d_in, generator=generator).to(sae.device)
        random_left += torch.tensor([share for *_, share in matching_pursuit(control, sae.W_dec, budgets[-1])]) / len(
            saes
        )

    def with_latents(budget, shuffled=False):
        for layer, sae in saes.items():
            indices, coefficients, _ = steps[layer][budget - 1]
            if shuffled:
                indices = torch.randperm(sae.config.d_sae, generator=generator)[:budget].tolist()
            yield steer(base, sae, layer, indices, strength=coefficients.tolist(), typical_activation=1.0)

    for budget in budgets:
        print(f"Answering with {budget} latents in each layer ...", flush=True)
        accuracies[f"latents in each: {budget}"] = accuracy(base, *with_latents(budget))
    accuracies[f"random latents in each: {budgets[-1]}"] = accuracy(base, *with_latents(budgets[-1], shuffled=True))

    lines = ["", "Share of each vector's squared norm that the strongest latents hold", ""]
    lines += ["| layer | norm | " + " | ".join(map(str, budgets)) + " |", "|" + "---|" * (len(budgets) + 2)]
    rows = {f"{layer} | {vectors[layer].norm():.2f}": shares for layer, shares in left.items()}
    for name, shares in {**rows, "random vectors | ": random_left.tolist()}.items():
        lines.append(f"| {name} | " + " | ".join(f"{1 - shares[budget - 1]:.3f}" for budget in budgets) + " |")
    lines += ["", "Held-out questions answered right", "", "| steered with | right |", "|---|---|"]
    lines += [f"| {name} | {value:.1%} |" for name, value in accuracies.items()]
    lines += ["", "Latents that the training pushed most", ""]
    lines += ["| layer | latent | coefficient | typical | promotes | fires on |", "|---|---|---|---|---|---|"]
    for layer, sae in saes.items():
        activations = read_latents(sae, base, tokenizer, texts, max_tokens=4_000)
        indices, coefficients, _ = steps[layer][min(16, budgets[-1]) - 1]
        for place in coefficients.abs().argsort(descending=True)[: args.shown].tolist():
            promoted, contexts = describe(indices[place], sae, base, tokenizer, activations)
            cells = [" ".join(map(repr, promoted)), " … ".join(map(repr, contexts))]
            cells = [cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells]
            typical = sae.mean_activation[indices[place]].item()
            row = f"| {layer} | {indices[place]} | {coefficients[place]:+.2f} | {typical:.2f} |"
            lines.append(f"{row} {cells[0]} | {cells[1]} |")

    if args.rebased:
        rebased, rebased_tokenizer = load(args.rebased, "--rebased")
        layer = rebased.config.num_hidden_layers // 2
        folder = args.output_dir / "rebased"
        sae = train_autoencoders(args, rebased, rebased_tokenizer, args.rebased, [layer], passages, folder)[layer]
        stream = iterate_activations(rebased, rebased_tokenizer, passages[::-1], layer, max_tokens=8192)
        found = evaluate_in_model(sae, stream)
        lines += ["", f"An autoencoder on layer {layer} of a ReBased model ({type(rebased).__name__})", "", "```"]
        lines += [str(found), "```"]

    args.output_dir.mkdir(parents=True, exist_ok=True)
    plot(left, random_left.tolist(), accuracies, args.output_dir / "steering_vector.png")
    report = "\n".join(lines)
    (args.output_dir / "report.md").write_text(report.lstrip() + "\n")
    result = {"accuracies": accuracies, "left": left, "random_left": random_left.tolist()}
    (args.output_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(report)
    print(f"\n{time.perf_counter() - started:.0f} s; {args.output_dir}/report.md, result.json, steering_vector.png")


if __name__ == "__main__":
    main()
