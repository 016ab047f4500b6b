# /// script
# dependencies = ["hf_based_kernel", "accelerate", "matplotlib", "peft"]
# ///
"""Take a pretrained Llama, replace its attention by linear attention layer by layer, and keep its language.

    accelerate launch examples/hf_based_kernel/convert_llama.py --preset minutes

Stage 1 trains what is new in every layer to give its teacher layer's output for the teacher's inputs, all layers in one pass.
Then the layers that the language model misses least are replaced, as many as each number of --replace says, and stage 2 trains
the whole model to give the teacher's next tokens (--distill_steps 0 leaves it out). Each model is saved to OUTPUT_DIR/NUMBER.
Ctrl-C saves a checkpoint and stops; the same command goes on from there.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import matplotlib
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch.utils.data import StackDataset
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_based_kernel import RebasedForCausalLM
from hf_based_kernel.llama_rebased import LLAMAS, recorded_attention
from hf_based_kernel.window_attention_rebased import make_window_mask


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from conversions import divergence, fidelity, log_probabilities, spread
from interrupts import StopOnInterrupt, last_checkpoint
from packed_text import DEMO_MODEL, read_texts


PRESETS = {
    "minutes": {"transfer_steps": 60, "distill_steps": 40, "batch_size": 2, "replace": [4, 15]},
    "hour": {"transfer_steps": 200, "distill_steps": 100, "batch_size": 2, "replace": [4, 8, 15, 22, 30]},
    "gpu": {"transfer_steps": 2000, "distill_steps": 2000, "batch_size": 16, "replace": [8, 15, 22, 30]},
}
# Rows from which the maps take their principal directions.
CALIBRATION_ROWS = 8
# Texts by which layers are put in order, of those held out.
ORDER_TEXTS = 2
DISTILLED = {"all": {}, "lora": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = str(DEMO_MODEL) if DEMO_MODEL.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct"
    parser.add_argument(
        "--model", default=model, help=f"hub id or folder of a Llama, Mistral, Qwen2 or Qwen3 ({model})"
    )
    parser.add_argument("--text_files", nargs="+", type=Path, help="text files to read instead of the demo's plays")
    parser.add_argument("--dataset", help="hub id of a dataset with a column `text`, read as a stream")
    parser.add_argument("--preset", choices=PRESETS, default="minutes", help="steps and layers (minutes)")
    parser.add_argument("--replace", type=int, nargs="+", help="numbers of layers to replace, a model for each")
    parser.add_argument("--window", type=int, default=64, help="tokens of softmax beside linear attention, or 0 (64)")
    parser.add_argument("--feature_dim", type=int, default=16, help="query and key numbers of a head (16)")
    parser.add_argument("--transfer_steps", type=int, help="steps of stage 1")
    parser.add_argument("--transfer_learning_rate", type=float, default=1e-2, help="peak rate of stage 1 (1e-2)")
    parser.add_argument("--distill_steps", type=int, help="steps of stage 2")
    parser.add_argument("--distill_learning_rate", type=float, help="peak rate of stage 2 (1e-4, of LoRA 1e-3)")
    parser.add_argument(
        "--distill", choices=DISTILLED, default="all", help="what stage 2 trains: all weights, or LoRA"
    )
    parser.add_argument("--seq_len", type=int, default=512, help="tokens of a row (512)")
    parser.add_argument("--batch_size", type=int, help="rows of a step and process")
    parser.add_argument("--eval_texts", type=int, default=12, help="texts held out, a row of each (12)")
    parser.add_argument("--question", default="Why is the sky blue?", help="which every model answers, to be read")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the text (0)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/converted"), help="(outputs/converted)")
    arguments = parser.parse_args()
    for name, value in PRESETS[arguments.preset].items():
        setattr(arguments, name, value if getattr(arguments, name) is None else getattr(arguments, name))
    arguments.distill_learning_rate = arguments.distill_learning_rate or (
        1e-3 if arguments.distill == "lora" else 1e-4
    )
    least = {"window": 0, "feature_dim": 1, "transfer_steps": 1, "distill_steps": 0, "seq_len": 8, "batch_size": 1}
    for name, minimum in {**least, "eval_texts": ORDER_TEXTS}.items():
        if getattr(arguments, name) < minimum:
            parser.error(f"--{name} must be at least {minimum}, got {getattr(arguments, name)}")
    return arguments


def load_teacher(arguments, device):
    try:
        teacher = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model: expected a hub id or a folder, got {arguments.model!r} ({error})") from None
    if type(teacher).__name__ not in LLAMAS:
        raise SystemExit(f"--model: expected one of {', '.join(LLAMAS)}, got a {type(teacher).__name__}")
    layers = teacher.config.num_hidden_layers
    if not all(1 <= number <= layers for number in arguments.replace):
        raise SystemExit(
            f"--replace: expected numbers from 1 to {layers}, the layers of the model, got {arguments.replace}"
        )
    return teacher.eval().requires_grad_(False).to(device), tokenizer


def read_rows(arguments, tokenizer):
    """Rows (rows, seq_len) to train on, and one row of each text held out."""
    wanted = (
        arguments.batch_size * max(arguments.transfer_steps, arguments.distill_steps) * PartialState().num_processes
    )
    texts, name = read_texts(arguments, arguments.seed)
    train, held_out = [], []
    for text in texts:
        ids = tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
        rows = [ids[i : i + arguments.seq_len] for i in range(0, len(ids) - arguments.seq_len + 1, arguments.seq_len)]
        if rows and len(held_out) < arguments.eval_texts:
            held_out.append(rows[len(rows) // 2])
        else:
            train += rows
        if len(train) >= wanted:
            break
    if len(held_out) < arguments.eval_texts or len(train) < max(CALIBRATION_ROWS, arguments.batch_size):
        raise SystemExit(
            f"{name} has {len(held_out)} texts for --eval_texts {arguments.eval_texts} and {len(train)} rows besides of "
            f"--seq_len {arguments.seq_len} tokens; give more text or lower these"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(arguments.seed))
    return torch.tensor(train)[order], torch.tensor(held_out), name


class AttentionTransfer(torch.nn.Module):
    """The replaced layers of a model, each learning what its teacher layer gives for the teacher's own inputs."""

    def __init__(self, teacher, model):
        super().__init__()
        # A tuple hides it: its weights are not part of this module's.
        self.teacher = (teacher,)
        self.mixers = torch.nn.ModuleList(layer.self_attn for layer in model.model.layers)
        self.window = model.config.linear_attention_window
        for name, parameter in self.mixers.named_parameters():
            parameter.requires_grad_(any(part in name for part in ("_map.", "window_gate.")))

    def forward(self, input_ids):
        """The sum over layers of a token's squared error, relative to the square of what is to be learned."""
        with torch.no_grad(), recorded_attention(self.teacher[0], range(len(self.mixers))) as calls:
            self.teacher[0].get_decoder()(input_ids, use_cache=False)
        losses = []
        for i, call in calls.items():
            out = self.attend(i, call.hidden_states, call.position_embeddings)
            # Some tokens have outputs a thousand times larger than others: each counts by its own size.
            losses.append(((out - call.output).square().sum(-1) / call.output.square().sum(-1)).mean())
        return {"loss": torch.stack(losses).sum()}

    def attend(self, i, hidden_states, position_embeddings):
        sizes = {"seen_tokens": 0, "first_tokens": None, "attention_mask": None, "device": hidden_states.device}
        mask = make_window_mask(self.window, hidden_states.shape[1], **sizes) if self.window else None
        return self.mixers[i](hidden_states, position_embeddings=position_embeddings, window_mask=mask)

    @contextlib.contextmanager
    def in_place_of(self, i):
        """Layer i of the teacher gives what its replacement does, while the context is open."""
        attention = self.teacher[0].get_decoder().layers[i].self_attn

        def replace(module, args, call, output):
            return self.attend(i, call["hidden_states"], call["position_embeddings"]), None

        handle = attention.register_forward_hook(replace, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


class DistillationTrainer(Trainer):
    """Stock `Trainer` with KL(teacher ‖ model) of the next token as the loss."""

    teacher = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            expected = self.teacher(**inputs, use_cache=False).logits.log_softmax(-1)
        outputs = model(**inputs, use_cache=False)
        loss = divergence(outputs.logits.log_softmax(-1).flatten(0, 1), expected.flatten(0, 1))
        return (loss, outputs) if return_outputs else loss


def train(arguments, trainer_class, model, rows, folder, steps, learning_rate, teacher=None):
    """Train to the end, from the last checkpoint in the folder if there is one; ends the program after a Ctrl-C."""
    training = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        adam_beta2=0.95,
        max_grad_norm=1.0,
        seed=arguments.seed,
        logging_steps=max(1, steps // 20),
        save_steps=max(1, steps // 4),
        save_total_limit=1,
        prediction_loss_only=True,
        remove_unused_columns=False,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    trainer = trainer_class(
        model=model, args=training, train_dataset=StackDataset(input_ids=rows), data_collator=default_data_collator
    )
    trainer.teacher = teacher
    interrupt = StopOnInterrupt()
    trainer.add_callback(interrupt)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    if interrupt.interrupted:
        raise SystemExit(f"Stopped at step {trainer.state.global_step} of {steps}; the same command goes on.")
    return [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]


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
        curve = train(
            arguments, Trainer, module, rows, folder, arguments.transfer_steps, arguments.transfer_learning_rate
        )
        if PartialState().is_main_process:
            (arguments.output_dir / "transfer.json").write_text(json.dumps(curve) + "\n")
            save_file({name: x.contiguous() for name, x in module.mixers.state_dict().items()}, path)
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
def order_layers(arguments, teacher, weights, held_out):
    """Indices of the layers, those first whose replacement alone changes the teacher's next tokens least."""
    path = arguments.output_dir / "order.json"
    if not path.exists():
        module = AttentionTransfer(teacher, replaced(arguments, teacher, weights, sorted(weights)))
        expected, harm = [log_probabilities(teacher, row) for row in held_out[:ORDER_TEXTS]], {}
        for i in tqdm(sorted(weights), desc="each layer alone"):
            with module.in_place_of(i):
                kl = [divergence(log_probabilities(teacher, row), known) for row, known in zip(held_out, expected)]
            harm[i] = torch.stack(kl).mean().item()
        path.write_text(json.dumps(harm) + "\n")
    harm = {int(i): kl for i, kl in json.loads(path.read_text()).items()}
    return sorted(harm, key=harm.get)


def distill(arguments, teacher, weights, rows, layers):
    """Stage 2: the model with these layers replaced, trained as a whole."""
    folder = arguments.output_dir / str(len(layers))
    if (folder / "config.json").exists():
        return RebasedForCausalLM.from_pretrained(folder).to(teacher.device).eval()
    model = replaced(arguments, teacher, weights, layers)
    if arguments.distill_steps:
        if arguments.distill == "lora":
            from peft import LoraConfig, get_peft_model

            new = ["q_map", "k_map", "window_gate"]
            model = get_peft_model(model, LoraConfig(**DISTILLED["lora"], modules_to_save=new))
        steps, rate = arguments.distill_steps, arguments.distill_learning_rate
        train(
            arguments,
            DistillationTrainer,
            model,
            rows,
            arguments.output_dir / f"distill_{len(layers)}",
            steps,
            rate,
            teacher,
        )
        model = model.merge_and_unload() if arguments.distill == "lora" else model
    if PartialState().is_main_process:
        model.save_pretrained(folder)
    return model.eval()


def measure(arguments, teacher, tokenizer, model, held_out):
    """A row of the table: this model, the same with nothing but the windows, and its answer to a question."""
    number = model.config.layer_types.count("linear_attention")
    measured = fidelity(model, teacher, held_out, arguments.window if number else 0)
    measured = {name: spread(values) for name, values in measured.items()}
    return {"replaced": number, **measured, "answer": answer(model, tokenizer, arguments.question)}


def answer(model, tokenizer, question):
    messages = [{"role": "user", "content": question}]
    if tokenizer.chat_template:
        question = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(question, return_tensors="pt", return_token_type_ids=False).to(model.device)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def write_report(arguments, results, seconds, text_name):
    lines = [
        "| layers replaced | perplexity | KL, nats | same next token, % | recall hits, % | copied, % |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        for name in ("", "window only, "):
            if f"{name}kl" in result:
                cells = [
                    "{:.2f} ± {:.2f}".format(*result[f"{name}{key}"])
                    if key in ("perplexity", "kl")
                    else "{:.1f} ± {:.1f}".format(*(100 * x for x in result[f"{name}{key}"]))
                    for key in ("perplexity", "kl", "agreement", "recall", "copying")
                ]
                lines.append(f"| {result['replaced']}{', window only' if name else ''} | {' | '.join(cells)} |")
    lines += ["", f"Asked: {arguments.question}", ""]
    lines += [f"- {result['replaced']} replaced: {' '.join(result['answer'].split())}" for result in results]
    table = "\n".join(lines) + "\n"
    (arguments.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output_dir / "results.md").write_text(table)
    plot(results, arguments.output_dir / "conversion.png")
    print(
        f"\n{table}\n{text_name}, {seconds:.0f} s. Models: {arguments.output_dir}/NUMBER; plot: {arguments.output_dir}/conversion.png"
    )


def plot(results, path):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, keys in ((left, ("kl",)), (right, ("copying", "recall"))):
        for i, key in enumerate(keys):
            for prefix, style in (("", "o-"), ("window only, ", "o:")):
                chosen = [result for result in results if f"{prefix}{key}" in result]
                if not chosen:
                    continue
                means, errors = zip(*(result[f"{prefix}{key}"] for result in chosen))
                axes.errorbar(
                    [result["replaced"] for result in chosen],
                    means,
                    errors,
                    fmt=f"C{i}{style}",
                    capsize=2,
                    label=prefix + key,
                )
        axes.set_xlabel("layers replaced")
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_ylabel("KL(teacher ‖ model), nats a token")
    right.set_ylabel("share that is right")
    figure.savefig(path, dpi=110)


def main():
    arguments, started = parse_arguments(), time.time()
    set_seed(arguments.seed)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    teacher, tokenizer = load_teacher(arguments, PartialState().device)
    rows, held_out, text_name = read_rows(arguments, tokenizer)
    weights = transfer(arguments, teacher, rows)
    order = order_layers(arguments, teacher, weights, held_out)
    results = [measure(arguments, teacher, tokenizer, RebasedForCausalLM.from_llama(teacher).eval(), held_out)]
    for number in sorted(arguments.replace):
        model = distill(arguments, teacher, weights, rows, order[:number])
        tokenizer.save_pretrained(arguments.output_dir / str(number))
        results.append(measure(arguments, teacher, tokenizer, model, held_out))
        if PartialState().is_main_process:
            write_report(arguments, results, time.time() - started, text_name)


if __name__ == "__main__":
    main()
