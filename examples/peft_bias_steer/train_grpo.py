# /// script
# dependencies = ["peft_bias_steer", "accelerate", "trl", "datasets", "matplotlib", "reasoning-gym", "tensorboard"]
# ///
"""
Train one bias vector per decoder layer with GRPO on questions whose answers can be checked:

    accelerate launch examples/peft_bias_steer/train_grpo.py --output_dir outputs/steer

Several processes: `--config_file examples/peft_bias_steer/configs/ddp.yaml` (or `fsdp2.yaml`, `deepspeed.yaml`) after
`accelerate launch`. With `--use_vllm` vLLM samples, and receives the vectors alone.

Questions are of any task of reasoning-gym whose answers are integers (`--task chain_sum`), held-out ones are answered before
and after; the reward is 1 if a completion's last integer is right. More: examples/studies/train_methods.py.
"""

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard
from matplotlib.figure import Figure
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, logging, set_seed
from trl import GRPOConfig, GRPOTrainer

from peft_bias_steer import BiasSteerConfig
from peft_bias_steer.model_card import set_metrics
from peft_bias_steer.serving.trl import check_vllm_sync, prepare_for_vllm, sync_vectors_only


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from interrupts import StopOnInterrupt, add_resume_option, find_checkpoint, train_from
from options import check_grpo
from progress import PassesShown, shown


# no division: those of this task carry the answer of another expression
ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "allow_parentheses": False}
EASY_ARITHMETIC = {**ONE_DIGIT, "operators": ["+", "-", "*"]}
# ChatML without the system message that many models' own templates put in front
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder of the base (%(default)s)")
    add("--output_dir", type=Path, default=Path("outputs/steer"), help="for all artefacts (%(default)s)")
    add("--task", default="basic_arithmetic", help="of reasoning-gym, with integers as answers (%(default)s)")
    add("--task_options", type=json.loads, help="of the task, as JSON (default: easy ones for basic_arithmetic)")
    add("--layers", type=int, nargs="+", help="layers to steer (default: all)")
    add("--eval_size", type=int, default=64, help="questions held out (%(default)s)")
    add("--max_steps", type=int, default=20, help="optimizer steps (%(default)s)")
    add("--learning_rate", type=float, default=1e-2, help="constant, for AdamW (%(default)s)")
    add("--prompts_per_step", type=int, default=4, help="questions in one step (%(default)s)")
    add("--num_generations", type=int, default=8, help="samples for each question (%(default)s)")
    add("--max_completion_length", type=int, default=12, help="tokens of an answer (%(default)s)")
    add("--use_vllm", action="store_true", help="sample with vLLM")
    add("--seed", type=int, default=0, help="of sampling and training order (%(default)s)")
    add("--report_to", nargs="+", default=["none"], help="tensorboard, trackio, ... (%(default)s)")
    add_resume_option(parser)


def make_questions(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Questions to train on, and the first `eval_size` distinct ones, which are held out."""
    options = args.task_options or (EASY_ARITHMETIC if args.task == "basic_arithmetic" else {})
    try:
        source = reasoning_gym.create_dataset(args.task, size=2000, seed=0, **options)
        rows = list({row["question"]: row for row in (source[index] for index in range(len(source)))}.values())
    except (TypeError, ValueError, AssertionError) as error:
        raise SystemExit(f"--task and --task_options must name a task of reasoning-gym: {error}") from None
    if not all(re.fullmatch(r"-?\d+", row["answer"]) for row in rows):
        raise SystemExit(f"--task must be one whose answers are integers, got {args.task}")
    if not 0 < args.eval_size < len(rows):
        raise SystemExit(f"--eval_size must be in [1, {len(rows) - 1}] so that some are left, got {args.eval_size}")
    return rows[args.eval_size :], rows[: args.eval_size]


def is_right(completion: str, answer: str) -> bool:
    return re.findall(r"-?\d+", completion)[-1:] == [answer]


def load(name: str | Path) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(PartialState().device)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"--model must be a folder with a checkpoint or a hub id, got {name!r}: {reason}") from None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


def make_prompt(tokenizer: Any, row: dict) -> str:
    template = CHATML if "<|im_start|>" in tokenizer.get_added_vocab() else None
    messages = [{"role": "user", "content": row["question"]}]
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    adds_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return text.removeprefix(tokenizer.bos_token) if adds_bos else text


def generate(model: Any, tokenizer: Any, prompts: list[str], batch_size: int = 32, **options: Any) -> list[list[int]]:
    """The tokens that follow each prompt, in order; the prompts are shared out among the processes."""
    done: list[tuple[int, list[int]]] = []
    plain = {"repetition_penalty": 1.0, "pad_token_id": tokenizer.pad_token_id}  # its own config may penalise
    # padded, so that sharded models generate equally often in every process; that repeats some prompts
    with PartialState().split_between_processes([*range(len(prompts))], apply_padding=True) as share, shown(model):
        for start in range(0, len(share), batch_size):
            indices = share[start : start + batch_size]
            batch = tokenizer([prompts[i] for i in indices], return_tensors="pt", padding=True).to(model.device)
            output = model.eval().generate(**batch, **plain, **options)
            done += zip(indices, output[:, batch["input_ids"].shape[1] :].tolist())
    return [tokens for _, tokens in sorted(dict(gather_object(done)).items())]


def answer(model: Any, tokenizer: Any, rows: list[dict], max_new_tokens: int) -> list[str]:
    """One greedy completion per question."""
    prompts = [make_prompt(tokenizer, row) for row in rows]
    tokens = generate(model, tokenizer, prompts, do_sample=False, max_new_tokens=max_new_tokens)
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def training_config(args: argparse.Namespace, accumulation: int = 1, **options: Any) -> GRPOConfig:
    """What the paper's recipe says; `options` go before it."""
    batches, samples = PartialState().num_processes * accumulation, args.prompts_per_step * args.num_generations
    if samples % batches:
        raise SystemExit(f"prompts_per_step × num_generations = {samples} must be a multiple of {batches} batches")
    if args.use_vllm and importlib.util.find_spec("vllm") is None:
        raise SystemExit("--use_vllm needs vLLM, which is not installed: pip install 'trl[vllm]', or leave it out")
    same = ("max_steps", "learning_rate", "num_generations", "max_completion_length", "use_vllm", "report_to", "seed")
    recipe = {"loss_type": "dapo", "scale_rewards": "none", "beta": 0.0, "max_grad_norm": 2.0}
    settings: dict[str, Any] = {name: getattr(args, name) for name in same} | recipe
    settings |= {"lr_scheduler_type": "constant", "gradient_checkpointing": False, "logging_steps": 1}
    settings |= {"per_device_train_batch_size": samples // batches, "gradient_accumulation_steps": accumulation}
    settings |= {"output_dir": str(args.output_dir), "bf16": torch.cuda.is_available(), "save_steps": 10}
    return GRPOConfig(**(settings | options))


def with_room_for_vectors(base: Any, tokenizer: Any, folder: Path) -> Any:
    """The same model, in a form whose copy in vLLM can receive vectors."""
    with PartialState().main_process_first():
        try:
            return load(folder)[0] if folder.exists() else prepare_for_vllm(base, folder, tokenizer=tokenizer)
        except ValueError as error:
            raise SystemExit(f"--use_vllm: {error}") from None


def train(trainer: Any, args: argparse.Namespace, *, steers_vllm: bool) -> bool:
    """Trains to the end, or until Ctrl-C; returns whether it came to the end."""
    if steers_vllm:
        sync_vectors_only(trainer)
        check_vllm_sync(trainer)
    stop_on_interrupt = StopOnInterrupt(args)
    trainer.add_callback(stop_on_interrupt)
    trainer.add_callback(PassesShown(trainer))
    train_from(trainer, args.resume_from_checkpoint)
    if stop_on_interrupt.interrupted:
        step = trainer.state.global_step
        folder = args.output_dir / f"checkpoint-{step}"
        PartialState().print(f"Stopped after step {step}. Go on with: --resume_from_checkpoint {folder}", flush=True)
    return not stop_on_interrupt.interrupted


def plot(rewards: list[float], accuracies: dict[str, float]) -> Figure:
    axes = (figure := Figure(figsize=(6, 3.6), layout="constrained")).subplots()
    axes.plot(range(1, len(rewards) + 1), rewards, label="mean reward of the samples of each step")
    for (when, share), style in zip(accuracies.items(), ("k:", "k--")):
        axes.plot([1, len(rewards)], [share, share], style, label=f"held-out accuracy {when} ({share:.1%})")
    axes.legend()
    return figure


def report(args: argparse.Namespace, held_out: list[dict], texts: list[list[str]], summary: str) -> None:
    """Some answers before and after, and the summary, which is kept."""
    for row, old, new in list(zip(held_out, *texts))[:4]:
        print(f"{row['question']}   right: {row['answer']}\n  before: {old!r}\n  after:  {new!r}")
    (args.output_dir / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    args = parser.parse_args()
    check_grpo(parser, args, max_steps=1)
    find_checkpoint(parser, args)
    logging.disable_progress_bar()  # of weights; training keeps its own
    state, config = PartialState(), training_config(args)
    set_seed(args.seed)
    questions, held_out = make_questions(args)
    base, tokenizer = load(args.model)
    if args.use_vllm:
        base = with_room_for_vectors(base, tokenizer, args.output_dir / "base")
    model = get_peft_model(base, BiasSteerConfig(task_type="CAUSAL_LM", layers_to_transform=args.layers))
    model.peft_config["default"].base_model_name_or_path = args.model
    state.print(f"Answering {len(held_out)} held-out questions with the base model ...", flush=True)
    before = answer(model, tokenizer, held_out, args.max_completion_length)  # the vectors are zero
    trainable, total = model.get_nb_trainable_parameters()
    state.print(f"Training {trainable:,} of {total:,} parameters ...", flush=True)

    def reward(completions: list[str], answer: list[str], **kwargs: Any) -> list[float | None]:
        return [float(is_right(text, right)) for text, right in zip(completions, answer)]

    data = Dataset.from_list([{"prompt": make_prompt(tokenizer, row), "answer": row["answer"]} for row in questions])
    trainer = GRPOTrainer(model, reward, args=config, train_dataset=data, processing_class=tokenizer)
    if not train(trainer, args, steers_vllm=args.use_vllm):
        raise SystemExit(130)
    adapter, step = args.output_dir / "adapter", trainer.state.global_step
    trainer.save_model(str(adapter))
    state.wait_for_everyone()
    model = PeftModel.from_pretrained(load(args.model)[0], adapter).to(state.device)
    state.print(f"Answering {len(held_out)} held-out questions with the vectors from {adapter} ...", flush=True)
    after = answer(model, tokenizer, held_out, args.max_completion_length)
    if not state.is_main_process:
        return

    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    grades = [[is_right(text, row["answer"]) for text, row in zip(texts, held_out)] for texts in (before, after)]
    accuracies = [sum(right) / len(held_out) for right in grades]
    plot(rewards, dict(zip(("before", "after"), accuracies))).savefig(args.output_dir / "reward.png", dpi=120)
    result = {"model": args.model, "steps": step, "before": accuracies[0], "after": accuracies[1], "rewards": rewards}
    result["answers"] = [[row["question"], row["answer"], *two] for row, *two in zip(held_out, before, after)]
    (args.output_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    card = ModelCard.load(adapter / "README.md")
    metric = EvalResult("text-generation", f"reasoning-gym-{args.task}", args.task, "accuracy", accuracies[1])
    set_metrics(card, [metric], str(args.output_dir))
    card.save(adapter / "README.md")
    summary = (
        f"Trained:    {trainable:,} of {total:,} parameters of {args.model}, {step} steps"
        f"\nHeld out:   {accuracies[0]:.1%} right before, {accuracies[1]:.1%} after ({len(held_out)} questions, greedy)"
        f"\nArtefacts:  {adapter}/  {args.output_dir}/result.json  {args.output_dir}/reward.png"
    )
    report(args, held_out, [before, after], summary)


if __name__ == "__main__":
    main()
