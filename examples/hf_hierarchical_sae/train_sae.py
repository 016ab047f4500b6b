# /// script
# dependencies = ["hf_hierarchical_sae", "accelerate", "datasets", "matplotlib"]
# ///
"""Train a sparse autoencoder for every sparsity budget on one layer of a language model, with stock `Trainer`.

    accelerate launch examples/hf_hierarchical_sae/train_sae.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Ctrl-C saves a checkpoint and stops; the same command with --resume_from_checkpoint goes on from there. The command
`hierarchical-sae` has more options, and reads activations from disk: more of them than memory holds.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from huggingface_hub import create_repo, upload_folder
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, logging, set_seed

from hf_hierarchical_sae import (
    HierarchicalSaeConfig,
    HierarchicalSaeModel,
    evaluate_budgets,
    explained_variance,
    iterate_activations,
)
from hf_hierarchical_sae.texts import Passages
from hf_hierarchical_sae.training import starting_point, train_sae, training_arguments


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from interrupts import StopOnInterrupt, add_resume_option
from options import check_least
from plays import PLAYS, find_plays


DEMO_MODEL = Path("outputs/SmolLM2-135M-Instruct")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = str(DEMO_MODEL) if DEMO_MODEL.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct"
    parser.add_argument("--model", default=model, help=f"hub id or folder of the language model (default: {model})")
    parser.add_argument("--layer", type=int, help="decoder layer, counted from 0 (default: the middle one)")
    parser.add_argument("--text_files", nargs="+", type=Path, help="text files to read instead of the demo's plays")
    parser.add_argument("--dataset", help="hub id of a dataset with a column `text`, read as a stream")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens to train on (default: 100000)")
    parser.add_argument("--eval_tokens", type=int, default=8_192, help="tokens held out (default: 8192)")
    parser.add_argument("--k", type=int, default=64, help="largest number of latents per token (default: 64)")
    parser.add_argument("--d_sae", type=int, help="number of latents (default: 8 times the model's hidden size)")
    parser.add_argument("--max_steps", type=int, default=300, help="optimizer steps (default: 300)")
    parser.add_argument("--batch_size", type=int, default=1024, help="tokens per step and process (default: 1024)")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="peak learning rate (default: 3e-3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order (default: 0)")
    parser.add_argument("--output_dir", default="outputs/sae", help="where everything is written (outputs/sae)")
    parser.add_argument("--hub_model_id", help="repository on the Hub to upload the result to (default: no upload)")
    parser.add_argument("--overwrite", action="store_true", help="start afresh where --output_dir holds a training")
    add_resume_option(parser)
    arguments = parser.parse_args()
    # One token has no variance that could be explained.
    check_least(parser, arguments, tokens=1, eval_tokens=2, max_steps=1, batch_size=1, learning_rate=0.0)
    try:
        starting_point(arguments.output_dir, resume=arguments.resume_from_checkpoint, overwrite=arguments.overwrite)
    except ValueError as error:
        parser.error(str(error))
    try:
        config = AutoConfig.from_pretrained(arguments.model).get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        parser.error(f"--model: expected a hub id or a folder with a model, got {arguments.model!r}: {reason}")
    arguments.d_in = config.hidden_size
    arguments.d_sae = 8 * arguments.d_in if arguments.d_sae is None else arguments.d_sae
    arguments.layer = config.num_hidden_layers // 2 if arguments.layer is None else arguments.layer
    if not 0 <= arguments.layer < config.num_hidden_layers:
        parser.error(f"--layer must be in [0, {config.num_hidden_layers - 1}], got {arguments.layer}")
    if not 1 <= arguments.k <= arguments.d_sae:
        parser.error(f"--k must be in [1, d_sae={arguments.d_sae}], got {arguments.k}: lower --k or raise --d_sae")
    return arguments


def read_texts(arguments):
    """Texts to harvest from, with a name for them."""
    if arguments.dataset:
        import datasets

        return datasets.load_dataset(arguments.dataset, split="train", streaming=True), arguments.dataset
    files, name = arguments.text_files, "text files"
    if not files:
        files, name = find_plays(), PLAYS
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise SystemExit(f"--text_files: expected files, got {', '.join(missing)}, which do not exist")
    try:
        texts = ["".join(Passages([file])) for file in files]
    except ValueError as error:
        raise SystemExit(f"--text_files: {error}") from error
    passages = [text[start : start + 2000] for text in texts for start in range(0, len(text), 2000)]
    random.Random(0).shuffle(passages)
    return passages, name


def harvest(arguments, texts, dtype):
    """(tokens + eval_tokens, hidden_size) activations of a language model in this dtype."""
    language_model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    if torch.cuda.is_available():
        language_model.cuda()
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model)
    stream = iterate_activations(
        language_model, tokenizer, texts, arguments.layer, max_tokens=arguments.tokens + arguments.eval_tokens
    )
    activations = torch.cat([piece.cpu() for piece in stream])
    if len(activations) <= arguments.eval_tokens + arguments.batch_size:
        raise SystemExit(
            f"the text gave {len(activations)} tokens: expected more than --eval_tokens {arguments.eval_tokens} plus "
            f"one batch of {arguments.batch_size}; give more text or lower these"
        )
    return activations


def plot(before, after, path):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(list(before), list(before.values()), "o--", color="gray", label="before training")
    axes.plot(list(after), list(after.values()), "o-", label="after")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(after), [str(budget) for budget in after])
    axes.set_xlabel("latents per token")
    axes.set_ylabel("explained variance")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    logging.disable_progress_bar()  # of weights; training keeps its own
    arguments = parse_arguments()
    started, output = time.time(), Path(arguments.output_dir)
    set_seed(arguments.seed)
    if arguments.hub_model_id:
        # What would fail after training fails here.
        create_repo(arguments.hub_model_id, exist_ok=True)
    texts, dataset_name = read_texts(arguments)
    # A processor with matrix units for bfloat16 reads several times as fast with them.
    has_units = "AVX512" in torch.backends.cpu.get_cpu_capability() and torch.cpu._is_amx_tile_supported()
    dtype = "bfloat16" if has_units and not torch.cuda.is_available() else "float32"
    activations = harvest(arguments, texts, dtype)
    train, held_out = activations[: -arguments.eval_tokens], activations[-arguments.eval_tokens :]

    config = HierarchicalSaeConfig(
        d_in=arguments.d_in,
        d_sae=arguments.d_sae,
        k=arguments.k,
        model_name=arguments.model,
        layer=arguments.layer,
        hook_point="output",
        dataset_name=dataset_name,
    )
    sae, interrupt = HierarchicalSaeModel(config), StopOnInterrupt()
    sae.initialize_from_activations(train[:8192])
    before = explained_variance(sae, held_out)
    training = training_arguments(
        output,
        max_steps=arguments.max_steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        save_steps=max(1, arguments.max_steps // 3),
        seed=arguments.seed,
    )
    data = torch.utils.data.StackDataset(hidden_states=train)
    going_on = {"resume": arguments.resume_from_checkpoint, "overwrite": arguments.overwrite}
    try:
        trainer = train_sae(sae, data, train[:65536], training, callbacks=[interrupt], **going_on)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if trainer.state.global_step < arguments.max_steps:
        print(
            f"Stopped at step {trainer.state.global_step} of {arguments.max_steps}; checkpoint in {output}. "
            "Run the same command with --resume_from_checkpoint to go on."
        )
        raise SystemExit(130)
    if not trainer.is_world_process_zero():
        return

    evaluation = evaluate_budgets(sae, held_out)
    after = dict(zip(evaluation.budgets, evaluation.explained_variance))
    reloaded = AutoModel.from_pretrained(output).state_dict()
    lost = [name for name, tensor in sae.state_dict().items() if not torch.equal(tensor.cpu(), reloaded[name])]
    if lost:
        raise SystemExit(f"the reloaded autoencoder differs in {', '.join(lost)}")
    result = {
        "model": arguments.model,
        "layer": arguments.layer,
        "text": dataset_name,
        "tokens": len(train),
        "dtype": dtype,
        "d_sae": arguments.d_sae,
        "k": arguments.k,
        "steps": trainer.state.global_step,
        "explained_variance_before": before,
        "explained_variance_after": after,
        "dead_fraction": sae.dead_fraction,
        "seconds": round(time.time() - started, 1),
    }
    (output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(before, after, output / "explained_variance.png")
    metrics = evaluation.metrics(dataset_name, "held out")
    card = sae.model_card(arguments.hub_model_id or arguments.output_dir, "explained_variance.png", metrics)
    card.save(output / "README.md")
    if arguments.hub_model_id:
        repo_id = create_repo(arguments.hub_model_id, exist_ok=True).repo_id
        upload_folder(repo_id=repo_id, folder_path=output, ignore_patterns=["checkpoint-*", "training.json"])

    lines = [
        f"Trained:    a sparse autoencoder, {arguments.d_sae} latents, on layer {arguments.layer} of {arguments.model}: "
        f"{len(train)} tokens of {dataset_name}, {trainer.state.global_step} steps, {result['seconds']} s",
        f"Held out:   explained variance of {len(held_out)} tokens, the same after saving and loading",
        f"{'latents per token':>28} {'before':>8} {'after':>8}",
        *(f"{budget:>28} {before[budget]:>8.3f} {after[budget]:>8.3f}" for budget in after),
        f"Artefacts:  {output}/  {output}/result.json  {output}/explained_variance.png",
    ]
    summary = "\n".join(lines)
    (output / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}")


if __name__ == "__main__":
    main()
