# /// script
# dependencies = ["peft_bias_steer", "accelerate", "trl", "datasets", "reasoning-gym", "matplotlib"]
# ///
"""
Train one bias vector per decoder layer with GRPO on verifiable arithmetic, and nothing else of the model:

    accelerate launch examples/peft_bias_steer/train_grpo.py --output_dir outputs/steer

Questions and the check of answers come from reasoning-gym; the reward is 1 if the last integer of a completion is the
right one. The vectors do not teach a model arithmetic: they make it answer at once with what it already knows.
"""

import argparse
import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import matplotlib
import reasoning_gym
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from trl import GRPOConfig, GRPOTrainer

from peft_bias_steer import BiasSteerConfig


matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


DEMO_MODEL = "outputs/SmolLM2-135M-Instruct"
# ChatML without a system message
PROMPT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
MAX_NEW_TOKENS = 12


class SaveOnInterrupt(TrainerCallback):
    """The first Ctrl-C saves a checkpoint after the running step and stops; the second one kills."""

    interrupted = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous_handler = signal.signal(signal.SIGINT, self.handle)

    def handle(self, signal_number, frame):
        self.interrupted = True
        signal.signal(signal.SIGINT, self.previous_handler)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= self.interrupted
        control.should_training_stop |= self.interrupted

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, self.previous_handler)


class RewardBar(ProgressCallback):
    """Trainer's progress bar, with the reward beside it instead of a line of metrics under it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "reward" in logs:
            self.training_bar.set_postfix(reward=f"{logs['reward']:.2f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_model = DEMO_MODEL if Path(DEMO_MODEL).is_dir() else "HuggingFaceTB/SmolLM2-135M-Instruct"
    parser.add_argument("--model", default=default_model, help="hub id or folder of the base model (%(default)s)")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/steer"), help="for all artefacts (%(default)s)"
    )
    parser.add_argument("--max_steps", type=int, default=20, help="optimizer steps (%(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-2, help="constant, for AdamW (%(default)s)")
    parser.add_argument("--prompts_per_step", type=int, default=4, help="questions in one step (%(default)s)")
    parser.add_argument("--num_generations", type=int, default=8, help="samples for each question (%(default)s)")
    parser.add_argument(
        "--eval_size", type=int, default=64, help="questions held out for greedy answers (%(default)s)"
    )
    parser.add_argument("--save_steps", type=int, default=10, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of questions, sampling and training order (%(default)s)")
    parser.add_argument(
        "--prompt_template", default=PROMPT, help="text around {question} (default: ChatML without system message)"
    )
    parser.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const=True,
        help="go on from this checkpoint folder; without a value, from the last one in --output_dir",
    )
    return parser.parse_args()


def load_base(name: str):
    """Model and tokenizer of a checkpoint. Raises `SystemExit` with one sentence if there is none."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except OSError as error:
        raise SystemExit(
            f"--model must be a folder with a transformers checkpoint or a reachable hub id, got {name!r}: "
            f"{str(error).splitlines()[0]}"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def make_questions(eval_size: int, seed: int):
    """Sums, differences and products of two numbers up to 10; no question is in both splits."""
    task = reasoning_gym.create_dataset(
        "basic_arithmetic",
        size=2000,
        seed=seed,
        min_terms=2,
        max_terms=2,
        min_digits=1,
        max_digits=1,
        allow_parentheses=False,
        operators=["+", "-", "*"],  # its divisions carry the answer of another expression
    )
    index_of_question = {task[index]["question"]: index for index in range(len(task))}
    indices = list(index_of_question.values())
    if not 0 < eval_size < len(indices):
        raise SystemExit(
            f"--eval_size must be in [1, {len(indices) - 1}] so that questions are left to train on, got {eval_size}"
        )
    return task, indices[eval_size:], indices[:eval_size]


def last_integer(text: str) -> str | None:
    integers = re.findall(r"-?\d+", text)
    return integers[-1] if integers else None


@torch.no_grad()
def greedy_answers(model, tokenizer, prompts: list[str], batch_size: int = 32) -> list[str]:
    answers = []
    model.eval()
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True).to(model.device)
        output = model.generate(
            **batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        answers += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def plot(rewards: list[float], before: float, after: float, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot(range(1, len(rewards) + 1), rewards, label="mean reward of the samples")
    axes.axhline(before, color="grey", linestyle=":", label=f"held-out accuracy before ({before:.1%})")
    axes.axhline(after, color="black", linestyle="--", label=f"held-out accuracy after ({after:.1%})")
    axes.set(xlabel="step", ylim=(0, 1), title="GRPO on one vector per layer")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    args = parse_arguments()
    set_seed(args.seed)
    started = time.perf_counter()
    task, train_indices, eval_indices = make_questions(args.eval_size, args.seed)
    base, tokenizer = load_base(args.model)

    def prompt_of(index: int) -> str:
        return args.prompt_template.format(question=task[index]["question"])

    def is_right(completion: str, index: int) -> bool:
        # score_answer gives part of a point for "18" where "8" is right
        return task.score_answer(last_integer(completion), task[index]) == 1.0

    def last_integer_right(completions: list[str], index: list[int], **kwargs) -> list[float | None]:
        return [float(is_right(completion, i)) for completion, i in zip(completions, index)]

    def accuracy(answers: list[str]) -> float:
        return sum(map(is_right, answers, eval_indices)) / len(answers)

    eval_prompts = [prompt_of(index) for index in eval_indices]
    print(f"Answering {args.eval_size} held-out questions with the base model ...", flush=True)
    answers_before = greedy_answers(base, tokenizer, eval_prompts)

    model = get_peft_model(base, BiasSteerConfig(task_type="CAUSAL_LM"))
    trainable, total = model.get_nb_trainable_parameters()
    print(f"Training {trainable:,} of {total:,} parameters ...", flush=True)

    save_on_interrupt = SaveOnInterrupt()
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=last_integer_right,
        train_dataset=Dataset.from_dict({"prompt": [prompt_of(i) for i in train_indices], "index": train_indices}),
        callbacks=[save_on_interrupt],
        args=GRPOConfig(
            output_dir=str(args.output_dir),
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=2.0,
            per_device_train_batch_size=args.prompts_per_step * args.num_generations,
            num_generations=args.num_generations,
            max_completion_length=MAX_NEW_TOKENS,
            scale_rewards="none",
            loss_type="dapo",
            beta=0.0,
            gradient_checkpointing=False,
            bf16=torch.cuda.is_available(),
            logging_steps=1,
            save_steps=args.save_steps,
            save_total_limit=2,
            report_to="none",
            seed=args.seed,
        ),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(RewardBar)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    step = trainer.state.global_step
    if save_on_interrupt.interrupted:
        print(f"Stopped after step {step}. Go on with: --resume_from_checkpoint {args.output_dir}/checkpoint-{step}")
        return

    adapter_dir = args.output_dir / "adapter"
    model.save_pretrained(adapter_dir)
    tokenizer.save_pretrained(adapter_dir)
    reloaded = PeftModel.from_pretrained(load_base(args.model)[0], adapter_dir).to(trainer.accelerator.device)
    print(f"Answering {args.eval_size} held-out questions with the reloaded adapter ...", flush=True)
    answers_after = greedy_answers(reloaded, tokenizer, eval_prompts)

    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    before, after = accuracy(answers_before), accuracy(answers_after)
    result = {
        "model": args.model,
        "steps": step,
        "trainable_parameters": trainable,
        "held_out_accuracy_before": before,
        "held_out_accuracy_after": after,
        "rewards": rewards,
        "seconds": round(time.perf_counter() - started, 1),
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }
    (args.output_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(rewards, before, after, args.output_dir / "reward.png")

    print()
    for index, old, new in list(zip(eval_indices, answers_before, answers_after))[:4]:
        print(f"{task[index]['question']}   right: {task[index]['answer']}\n  before: {old!r}\n  after:  {new!r}")
    summary = (
        f"Trained:    {trainable:,} of {total:,} parameters of {args.model}, {step} steps, {result['seconds']:.0f} s"
        f"\nHeld out:   {before:.1%} right before, {after:.1%} after ({args.eval_size} questions, greedy)"
        f"\nArtefacts:  {adapter_dir}/  {args.output_dir}/result.json  {args.output_dir}/reward.png"
    )
    (args.output_dir / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}")


if __name__ == "__main__":
    main()
