# /// script
# dependencies = ["hf_based_kernel", "accelerate", "matplotlib", "peft"]
# ///
"""Take a pretrained Llama, replace its attention by linear attention layer by layer, and keep its language.

    accelerate launch examples/hf_based_kernel/convert_llama.py --preset minutes

Stage 1 trains what is new in every layer to give its teacher layer's output for the teacher's inputs, all layers in one pass.
Then the --replace layers that text and copying miss least are replaced, and stage 2 trains the whole model to give the
teacher's next tokens (--distill_steps 0 leaves it out). It is saved to OUTPUT_DIR/NUMBER. Ctrl-C saves a checkpoint and stops;
the same command goes on from there, and with another --replace from stage 1. `studies/compare_conversions.py` measures several.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, set_seed

from hf_based_kernel import RebasedForCausalLM
from hf_based_kernel.llama_rebased import LLAMAS


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from conversions import (
    COPIED,
    AttentionTransfer,
    DistillationTrainer,
    answer,
    fidelity,
    read_rows,
    repeated_tokens,
    spread,
    train,
)
from interrupts import record_settings, whole
from options import check_least
from packed_text import DEMO_MODEL


PRESETS = {
    "minutes": {"transfer_steps": 30, "distill_steps": 20, "batch_size": 2},
    "hour": {"transfer_steps": 100, "distill_steps": 80, "batch_size": 2},
    "gpu": {"transfer_steps": 2000, "distill_steps": 2000, "batch_size": 16},
}
# Rows from which the maps take their principal directions.
CALIBRATION_ROWS = 8
# Rows of text and sequences to be copied by which layers are put in order; seed of the latter, which no measure has.
ORDER_ROWS, ORDER_COPIES, ORDER_SEED = 2, 4, 1
QUESTION = "Why is the sky blue?"
# Peak learning rates, of stage 1 and of what stage 2 may train.
TRANSFER_RATE, RATES = 1e-2, {"all": 3e-5, "lora": 1e-3}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--replace", type=int, help="number of layers to replace (half)")
    return complete(parser, parser.parse_args())


def add_options(parser):
    model = str(DEMO_MODEL) if DEMO_MODEL.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct"
    parser.add_argument("--model", default=model, help=f"hub id or folder of a Llama, Mistral or Qwen ({model})")
    parser.add_argument("--text_files", nargs="+", type=Path, help="text files to read instead of the demo's plays")
    parser.add_argument("--dataset", help="hub id of a dataset with a column `text`, read as a stream")
    parser.add_argument("--preset", choices=PRESETS, default="minutes", help="steps and rows of a step (minutes)")
    parser.add_argument("--window", type=int, default=64, help="tokens of softmax beside linear attention, or 0 (64)")
    parser.add_argument("--feature_dim", type=int, default=16, help="query and key numbers of a head (16)")
    parser.add_argument("--transfer_steps", type=int, help="steps of stage 1")
    parser.add_argument("--distill_steps", type=int, help="steps of stage 2")
    parser.add_argument(
        "--distill", choices=RATES, default="all", help="what stage 2 trains: all weights, or LoRA (all)"
    )
    parser.add_argument("--seq_len", type=int, default=512, help="tokens of a row (512)")
    parser.add_argument("--batch_size", type=int, help="rows of a step and process")
    parser.add_argument("--eval_texts", type=int, default=12, help="texts held out, a row of each (12)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the text (0)")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/converted"), help="where all is written (outputs/converted)"
    )


def complete(parser, arguments):
    for name, value in PRESETS[arguments.preset].items():
        setattr(arguments, name, value if getattr(arguments, name) is None else getattr(arguments, name))
    least = {"window": 0, "feature_dim": 1, "transfer_steps": 1, "distill_steps": 0, "batch_size": 1}
    # One text has no standard error, and recall is measured beyond the window.
    check_least(parser, arguments, **least, eval_texts=2, seq_len=max(8, arguments.window + 2))
    return arguments


def begin(arguments, held_out_texts):
    """Called when model and text are there, so that nothing is begun with options that were wrong."""
    # How many layers are replaced may differ, as stage 1 is of all, and what is measured, but not on a text of training.
    free = ("replace", "numbers", "output_dir", "long_rows", "other_files", "lm_eval")
    given = ((name, value) for name, value in vars(arguments).items() if name not in free and value is not None)
    settings = {name: str(value) for name, value in given}
    record_settings(arguments.output_dir, settings | {"held_out_texts": held_out_texts})
    set_seed(arguments.seed)


def load_teacher(arguments, device):
    try:
        teacher = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model: expected a hub id or a folder, got {arguments.model!r} ({error})") from None
    if type(teacher).__name__ not in LLAMAS:
        raise SystemExit(f"--model: expected one of {', '.join(LLAMAS)}, got a {type(teacher).__name__}")
    layers = teacher.config.num_hidden_layers
    arguments.replace = layers // 2 if arguments.replace is None else arguments.replace
    if not 1 <= arguments.replace <= layers:
        raise SystemExit(f"--replace: expected 1 to {layers}, the layers of the model, got {arguments.replace}")
    return teacher.eval().requires_grad_(False).to(device), tokenizer


def options_of(arguments):
    return {"feature_dim": arguments.feature_dim, "linear_attention_window": arguments.window}


def transfer(arguments, teacher, rows):
    """Stage 1: the weights of every replaced layer, a dictionary for each."""
    path = arguments.output_dir / "attention.safetensors"
    if not path.exists():
        every = range(teacher.config.num_hidden_layers)
        model = RebasedForCausalLM.from_llama(
            teacher, every, input_ids=rows[:CALIBRATION_ROWS], **options_of(arguments)
        )
        module = AttentionTransfer(teacher, model)
        folder = arguments.output_dir / "transfer"
        curve = train(arguments, Trainer, module, rows, folder, arguments.transfer_steps, TRANSFER_RATE)
        if PartialState().is_main_process:
            (arguments.output_dir / "transfer.json").write_text(json.dumps(curve) + "\n")
            with whole(path) as unfinished:
                save_file({name: x.contiguous() for name, x in module.mixers.state_dict().items()}, unfinished)
        PartialState().wait_for_everyone()
    weights = {}
    for name, x in load_file(path).items():
        layer, _, name = name.partition(".")
        weights.setdefault(int(layer), {})[name] = x
    return weights


def replaced(arguments, teacher, weights, layers):
    """The teacher with these layers replaced, as stage 1 left them."""
    model = RebasedForCausalLM.from_llama(teacher, layers, **options_of(arguments))
    for i in layers:
        model.model.layers[i].self_attn.load_state_dict(weights[i])
    return model.eval()


@torch.no_grad()
def order_layers(arguments, teacher, weights, rows):
    """
    Indices of the layers, those first whose replacement alone changes the teacher's next tokens least: in rows of text, and
    where random tokens come a second time, which text hardly asks for and few layers do.
    """
    path = arguments.output_dir / "order.json"
    if not path.exists():
        module = AttentionTransfer(teacher, replaced(arguments, teacher, weights, sorted(weights)))
        asked = {
            "text": (rows[-ORDER_ROWS:], None),
            "copying": (repeated_tokens(int(teacher.config.vocab_size), ORDER_COPIES, ORDER_SEED), COPIED),
        }
        harm = {}
        for name, (tokens, last) in asked.items():
            alone = module.divergences(tokens, ([i] for i in sorted(weights)), last)
            found = list(tqdm(alone, desc=f"each layer alone, {name}", total=len(weights)))
            harm[name] = dict(zip(sorted(weights), found))
        if PartialState().is_main_process:
            with whole(path) as unfinished:
                unfinished.write_text(json.dumps(harm) + "\n")
    PartialState().wait_for_everyone()
    harm = json.loads(path.read_text())
    return sorted(map(int, harm["text"]), key=lambda i: sum(of_layer[str(i)] for of_layer in harm.values()))


def distill(arguments, teacher, tokenizer, weights, rows, layers, rate=None):
    """Stage 2: the model with these layers replaced, trained as a whole."""
    folder = arguments.output_dir / str(len(layers))
    if folder.exists():
        return RebasedForCausalLM.from_pretrained(folder).to(teacher.device).eval()
    model: Any = replaced(arguments, teacher, weights, layers)
    if arguments.distill_steps:
        trained, steps, rate = model, arguments.distill_steps, rate or RATES[arguments.distill]
        if arguments.distill == "lora":
            from peft import LoraConfig, get_peft_model

            new, projections = ["q_map", "k_map", "window_gate"], ["q_proj", "k_proj", "v_proj", "o_proj"]
            trained: Any = get_peft_model(model, LoraConfig(target_modules=projections, modules_to_save=new))
        checkpoints = arguments.output_dir / f"distill_{len(layers)}"
        train(arguments, DistillationTrainer, trained, rows, checkpoints, steps, rate, teacher)
        if arguments.distill == "lora":
            model: Any = trained.merge_and_unload()
    if PartialState().is_main_process:
        with whole(folder) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    return model.eval()


def main():
    arguments, started = parse_arguments(), time.time()
    teacher, tokenizer = load_teacher(arguments, PartialState().device)
    rows, held_out, held_out_texts, text_name = read_rows(arguments, tokenizer)
    begin(arguments, held_out_texts)
    weights = transfer(arguments, teacher, rows)
    layers = order_layers(arguments, teacher, weights, rows)[: arguments.replace]
    model = distill(arguments, teacher, tokenizer, weights, rows, layers)
    if not PartialState().is_main_process:
        return
    left = {name: spread(values) for name, values in fidelity(model, teacher, held_out, arguments.window).items()}
    lines = [
        f"Converted:  layers {' '.join(map(str, sorted(layers)))} of {teacher.config.num_hidden_layers}, "
        f"{arguments.transfer_steps} and {arguments.distill_steps} steps of {arguments.batch_size * arguments.seq_len} tokens of "
        f"{text_name}, {time.time() - started:.0f} s",
        f"Left of it: the same next token for {100 * left['agreement'][0]:.1f} % of {held_out.numel()} tokens held out, KL "
        f"{left['kl'][0]:.3f} nats, perplexity {left['perplexity'][0]:.1f}",
        f"Asked:      {QUESTION}",
        *(
            f"{name:<12}{' '.join(answer(each, tokenizer, QUESTION).split())}"
            for name, each in (("Teacher:", teacher), ("Model:", model))
        ),
        f"Artefacts:  {arguments.output_dir}/{arguments.replace}/",
    ]
    summary = "\n".join(lines)
    (arguments.output_dir / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}")


if __name__ == "__main__":
    main()
