# /// script
# dependencies = [
#     "peft_bias_steer", "accelerate", "trl", "datasets", "math-verify", "matplotlib", "reasoning-gym", "tensorboard"
# ]
# ///
"""
Bias vectors, LoRA and other methods (examples/shared/grpo_methods.py) with GRPO on the same questions, everything measured that
compare_methods.py and read_vectors.py need (examples/peft_bias_steer/train_grpo.py is the one to copy):

    accelerate launch examples/studies/train_methods.py --method lora --output_dir outputs/lora

Questions come from reasoning-gym (`--task chain_sum --task_options '{"max_terms": 3}'`), from a dataset with a column of
questions and one of answers, checked by math-verify (`--task user/dataset --question_column problem`), or from a preset
(gsm8k, math, deepscaler: the prompt of arXiv 2505.18706). The reward is 1 if a completion's answer is right, otherwise
0. Held-out questions are answered before, during and after training; everything lands in one result.json.
"""

import argparse
import json
import math
import re
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from math_verify import parse, verify
from peft import PeftModel
from reasoning_gym.factory import DATASETS
from reasoning_gym.utils import SYSTEM_PROMPTS
from transformers import ProgressCallback, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from peft_bias_steer.whole_files import whole_file


sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("shared", "peft_bias_steer")]
import train_grpo as example
from answer_forms import ANSWER_FORMS, AnswerForm, gold_answer
from grpo_methods import LEARNING_RATES, METHODS, adapt, untie
from options import check_grpo, check_least


DEMO_MODEL = "outputs/SmolLM2-135M-Instruct"
BOXED_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
PRESETS: dict[str, dict[str, Any]] = {
    "basic_arithmetic": {"task_options": example.EASY_ARITHMETIC},
    # what a small model cannot do: the negative control
    "four_digit_products": {
        "task": "basic_arithmetic",
        "task_options": {**example.ONE_DIGIT, "min_digits": 4, "max_digits": 4, "operators": ["*"]},
    },
    # what it is right about now and then
    "two_digit_sums": {"task": "chain_sum", "task_options": {"max_terms": 3, "max_digits": 2}},
    "three_numbers": {"task": "chain_sum", "task_options": {"min_terms": 3, "max_terms": 3, "max_digits": 1}},
    "two_digit_products": {"task": "products", "task_options": {"max_digits": 2}},
    # of words, as search_tasks.py reads them
    "syllogism": {"answer_form": "line"},
    "calendar_arithmetic": {"answer_form": "line"},
    "course_schedule": {"answer_form": "line"},
    "gsm8k": {"task": "openai/gsm8k", "dataset_config": "main", "eval_split": "test"},
    "math": {
        "task": "DigitalLearningGmbH/MATH-lighteval",
        "question_column": "problem",
        "answer_column": "solution",
        "eval_split": "test",
    },
    "deepscaler": {"task": "agentica-org/DeepScaleR-Preview-Dataset", "question_column": "problem"},
}
CHAT_TEMPLATES = {
    "chatml": example.CHATML,
    "plain": "{% for m in messages %}{{ m.content }}\n\n{% endfor %}",
}


@dataclass
class Task:
    """
    Questions and the check of their answers.

    Args:
        train (`list[dict]`): Each with at least `question` and `answer`.
        held_out (`list[dict]`): The same; no question is in both.
        form (`AnswerForm`): How answers are read.
        check (`Callable[[str, dict], bool]`): Whether an answer that was read is right.
        system_prompt (`str`): Empty for none.
    """

    train: list[dict]
    held_out: list[dict]
    form: AnswerForm
    check: Callable[[str, dict], bool]
    system_prompt: str

    def grade(self, completion: str, row: dict) -> dict[str, bool]:
        answer = self.form.read(completion)
        return {
            "right": answer is not None and self.check(answer, row),
            "formatted": self.form.is_formatted(completion),
            "unparsable": answer is None,
            "exact_string": completion.strip() == row["answer"],
        }


def split(rows: list[dict], args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """The first `eval_size` distinct questions are held out."""
    distinct = list({row["question"]: row for row in rows}.values())
    if not 0 < args.eval_size < len(distinct) - args.few_shot:
        raise SystemExit(
            f"--eval_size must be in [1, {max(1, len(distinct) - args.few_shot - 1)}] so that questions are left to "
            f"train on, got {args.eval_size}"
        )
    return distinct[args.eval_size :], distinct[: args.eval_size]


def reasoning_gym_task(args: argparse.Namespace) -> Task:
    try:
        source = reasoning_gym.create_dataset(
            args.task, size=args.num_questions, seed=args.split_seed, **args.task_options
        )
        entries = [source[index] for index in range(len(source))]
    except (TypeError, ValueError, AssertionError) as error:
        raise SystemExit(f"--task_options do not fit the task {args.task}: {error}") from None
    train, held_out = split([{**entry["metadata"], **entry} for entry in entries], args)
    integers = all(re.fullmatch(r"-?\d+", str(entry["answer"])) for entry in entries)
    form = args.answer_form or ("integer" if integers else "tag")

    def check(answer: str, row: dict) -> bool:
        # score_answer gives part of a point for "18" where "8" is right, and may raise at what it cannot read
        try:
            return source.score_answer(answer, row) == 1.0
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError):
            return False

    system_prompt = SYSTEM_PROMPTS["default"] if form == "tag" else ""
    return Task(train, held_out, ANSWER_FORMS[form], check, system_prompt)


def dataset_task(args: argparse.Namespace) -> Task:
    def rows(split_name: str) -> list[dict]:
        try:
            data = load_dataset(args.task, args.dataset_config, split=split_name)
        except (OSError, ValueError) as error:
            raise SystemExit(
                "--task must be a reasoning-gym task, a preset, or a dataset on the hub or in a folder with questions in "
                f"split {split_name!r}, got {args.task!r}: {str(error).splitlines()[0]}"
            ) from None
        columns = [args.question_column, args.answer_column]
        if missing := [column for column in columns if column not in data.column_names]:
            raise SystemExit(
                f"{args.task} has no column {' or '.join(missing)}, but {', '.join(data.column_names)}: name them in "
                "--question_column and --answer_column"
            )
        data = data.shuffle(seed=args.split_seed)
        return [{"question": q, "answer": gold_answer(str(a))} for q, a in zip(data[columns[0]], data[columns[1]])]

    def check(answer: str, row: dict) -> bool:
        return verify(parse(f"${row['answer']}$"), parse(f"${answer}$"))

    if args.eval_split is None:
        train, held_out = split(rows(args.train_split), args)
    else:
        train, held_out = rows(args.train_split), rows(args.eval_split)[: args.eval_size]
    form = args.answer_form or "boxed"
    return Task(train, held_out, ANSWER_FORMS[form], check, BOXED_PROMPT if form == "boxed" else "")


def load_task(args: argparse.Namespace) -> Task:
    return reasoning_gym_task(args) if args.task in DATASETS else dataset_task(args)


def prompt_maker(tokenizer: Any, task: Task, args: argparse.Namespace) -> Callable[[dict], str]:
    """Puts a question into the chat template, after the system prompt and the solved examples."""
    system_prompt = task.system_prompt if args.system_prompt is None else args.system_prompt
    template = args.chat_template
    if template is None and not system_prompt and "<|im_start|>" in tokenizer.get_added_vocab():
        template = "chatml"
    if template is None and tokenizer.chat_template is None:
        raise SystemExit(
            f"the tokenizer of {args.model} has no chat template: choose --chat_template plain, chatml or a file with one"
        )
    if template is not None and template not in CHAT_TEMPLATES and not Path(template).is_file():
        raise SystemExit(f"--chat_template must be {', '.join(CHAT_TEMPLATES)} or a Jinja file, got {template!r}")
    jinja = template and (CHAT_TEMPLATES.get(template) or Path(template).read_text())
    opening = [{"role": "system", "content": system_prompt}] if system_prompt else []
    for row in task.train[: args.few_shot]:
        shot = args.few_shot_answer.format_map(row)
        opening += [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": shot}]
    adds_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id

    def prompt(row: dict) -> str:
        messages = [*opening, {"role": "user", "content": row["question"]}]
        text = tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False, add_generation_prompt=True)
        return text.removeprefix(tokenizer.bos_token) if adds_bos else text

    return prompt


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    z = statistics.NormalDist().inv_cdf(0.975)
    share = right / total
    centre = share + z**2 / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return (centre - half) / (1 + z**2 / total), (centre + half) / (1 + z**2 / total)


def complete(
    model: Any, tokenizer: Any, prompts: list[str], *, max_new_tokens: int, sample: bool = False, bf16: bool = False
) -> list[dict]:
    """One completion per prompt, in order: its text, length and end."""
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    device = PartialState().device.type
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        options = {"batch_size": 32 if device == "cpu" else 128, "max_new_tokens": max_new_tokens, **sampling}
        completions = example.generate(model, tokenizer, prompts, **options)
    stops = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, tokenizer.pad_token_id, *(stops if isinstance(stops, list) else [stops])}
    done = []
    for tokens in completions:
        end = next((position for position, token in enumerate(tokens) if token in stops), len(tokens))
        text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        done.append({"text": text, "tokens": end, "finished": end < len(tokens)})
    return done


def score(completions: list[dict], rows: list[dict], task: Task) -> dict:
    """Rates of one evaluation. Unparsable completions are wrong, and counted apart."""
    grades = [task.grade(entry["text"], row) for entry, row in zip(completions, rows)]
    total = len(grades)
    count = {key: sum(grade[key] for grade in grades) for key in grades[0]}
    both = sum(grade["right"] and grade["formatted"] for grade in grades)
    return {
        "questions": total,
        "right": count["right"],
        "accuracy": count["right"] / total,
        "interval": wilson_interval(count["right"], total),
        "format_rate": count["formatted"] / total,
        "accuracy_when_formatted": both / count["formatted"] if count["formatted"] else None,
        "unparsable": count["unparsable"],
        "exact_string": count["exact_string"] / total,
        "finished": sum(entry["finished"] for entry in completions) / total,
        "most_frequent": max(Counter(row["answer"] for row in rows).values()) / total,
        "mean_tokens": statistics.mean(entry["tokens"] for entry in completions),
    }


class RewardBar(ProgressCallback):
    """Trainer's progress bar, with the reward beside it instead of a line of metrics under it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "reward" in logs:
            self.training_bar.set_postfix(reward=f"{logs['reward']:.2f}")


class StepClock(TrainerCallback):
    """Seconds of each step, of the clock and of the CPU, and of the CPU for its samples."""

    def __init__(self):
        self.wall, self.cpu, self.sampling = [], [], []

    def watch_sampling(self, trainer: GRPOTrainer) -> None:
        generate = trainer._generate

        def timed(prompts: list) -> Any:
            start = time.process_time()
            generated = generate(prompts)
            self.sampling.append(time.process_time() - start)
            return generated

        trainer._generate = timed  # on this trainer alone

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.wall.append(time.perf_counter() - self.start[0])
        self.cpu.append(time.process_time() - self.start[1])


class SignalWatch(TrainerCallback):
    """Warns, and stops if told to, once the samples of every question have had equal rewards for some steps."""

    def __init__(self, patience: int, stop: bool):
        self.patience, self.stop = patience, stop
        self.flat_steps = self.flat_in_a_row = 0
        self.warning: str | None = None

    def count(self, logs: dict, step: int) -> None:
        if "frac_reward_zero_std" not in logs:
            return
        flat = logs["frac_reward_zero_std"] == 1.0
        self.flat_steps += flat
        self.flat_in_a_row = self.flat_in_a_row + 1 if flat else 0
        if self.flat_in_a_row >= self.patience and self.warning is None:
            self.warning = (
                f"No signal: up to step {step}, all samples of each question had the same reward for {self.patience} "
                f"steps (mean {logs['reward']:.2f}), so nothing is learned from them. Take questions that the model "
                "answers rightly now and then, or more samples of each."
            )

    def on_train_begin(self, args, state, control, **kwargs):
        for logs in state.log_history:  # of the steps before the checkpoint that it goes on from
            self.count(logs, logs["step"])

    def on_log(self, args, state, control, logs=None, **kwargs):
        known = self.warning
        self.count(logs or {}, state.global_step)
        if self.warning != known and state.is_world_process_zero:
            print(f"\n{self.warning}", file=sys.stderr, flush=True)
        control.should_training_stop |= self.stop and self.flat_in_a_row >= self.patience


class EvaluateDuringTraining(TrainerCallback):
    """Answers the held-out questions greedily every few steps, and logs the accuracy."""

    def __init__(self, every: int, evaluate: Callable[[Any], dict]):
        self.every, self.evaluate = every, evaluate
        self.trainer: Any = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every or state.global_step >= state.max_steps:
            return
        trainer = self.trainer
        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
            result = self.evaluate(model)
        trainer.model_wrapped.train()
        trainer.log({f"held_out/{key}": result[key] for key in ("accuracy", "format_rate")})


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the example, and those below."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    example.add_options(parser)
    if Path(DEMO_MODEL).is_dir():
        parser.set_defaults(model=DEMO_MODEL)
    parser.set_defaults(learning_rate=None)
    add = parser.add_argument
    add("--method", choices=METHODS, default="bias", help=f"what is trained, by default at {LEARNING_RATES}")
    questions = parser.add_argument_group(f"questions (--task {', '.join(PRESETS)}, or a dataset)").add_argument
    questions("--num_questions", type=int, default=2000, help="to draw from reasoning-gym, before duplicates go")
    questions("--dataset_config", help="name of the dataset's configuration")
    questions("--question_column", help="of a dataset (question)")
    questions("--answer_column", help="of a dataset (answer)")
    questions("--train_split", default="train", help="of a dataset (%(default)s)")
    questions("--eval_split", help="of a dataset; by default questions are held out from --train_split")
    questions(
        "--answer_form",
        choices=ANSWER_FORMS,
        help="last integer, \\boxed{}, tag, first line or what an 'Answer:' says (default: by task)",
    )
    questions("--system_prompt", help="in front of each question (default: by task)")
    questions(
        "--chat_template", help="chatml, plain or a Jinja file (default: the tokenizer's; ChatML without system)"
    )
    questions("--few_shot", type=int, default=0, help="solved examples in front of each question (%(default)s)")
    questions("--few_shot_answer", default="{answer}", help="how they are solved, e.g. '{expression} = {answer}'")
    questions("--split_seed", type=int, default=0, help="of the questions and of what is held out (%(default)s)")
    training = parser.add_argument_group("training (--max_steps 0 only evaluates the base)").add_argument
    training("--warmup_ratio", type=float, default=0.0, help="share of the steps with a rising rate (%(default)s)")
    training("--reward", choices=["right", "formatted"], default="right", help="formatted: for any answer in the form")
    training("--gradient_accumulation_steps", type=int, default=1, help="batches per step (%(default)s)")
    training("--gradient_checkpointing", action="store_true", help="trade time for memory")
    training("--bf16", action="store_true", help="compute in bfloat16 (autocast) on a CPU too, where it is faster")
    training("--signal_patience", type=int, default=5, help="steps without any difference in reward before a warning")
    training("--stop_without_signal", action="store_true", help="stop at that warning")
    training("--save_steps", type=int, default=10, help="steps between checkpoints (%(default)s)")
    evaluation = parser.add_argument_group("evaluation").add_argument
    evaluation("--eval_samples", type=int, default=0, help="samples at temperature 1 of each, beside the greedy one")
    evaluation("--eval_steps", type=int, default=0, help="steps between greedy evaluations, 0 for none (%(default)s)")
    evaluation("--skip_eval_before", action="store_true", help="the base model's accuracy is known already")
    args = parser.parse_args(arguments)
    fill_defaults(args)
    example.find_checkpoint(parser, args)
    check_grpo(parser, args, max_steps=0)
    check_least(parser, args, few_shot=0, eval_samples=0, eval_steps=0, gradient_accumulation_steps=1, save_steps=1)
    return args


def fill_defaults(args: argparse.Namespace) -> None:
    """What the preset of the task says, where the command line does not; then what every dataset takes."""
    args.preset = args.task
    for name, value in PRESETS.get(args.task, {}).items():
        if name == "task" or getattr(args, name) is None:
            setattr(args, name, value)
    args.task_options = args.task_options or {}
    args.question_column = args.question_column or "question"
    args.answer_column = args.answer_column or "answer"
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES[args.method]
    if args.layers is not None and not METHODS[args.method].can_leave_layers_out:
        raise SystemExit(f"--layers is for methods that can leave some out: --method {args.method} trains every layer")


def training_config(args: argparse.Namespace) -> GRPOConfig:
    if args.use_vllm and args.method == "beft":
        raise SystemExit("--use_vllm cannot sample with BEFT, whose biases do not merge: choose --method bias")
    if args.use_vllm and METHODS[args.method].tie:
        raise SystemExit("--use_vllm cannot sample with vectors that share parameters: choose --method bias")
    return example.training_config(
        args,
        args.gradient_accumulation_steps,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=math.ceil(args.warmup_ratio * args.max_steps),
        gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if args.gradient_checkpointing else None,
        bf16=args.bf16 or torch.cuda.is_available(),
        use_cpu=args.bf16 and not torch.cuda.is_available(),
        save_steps=args.save_steps,
        save_total_limit=2,
    )


def peak_memory() -> int:
    """Bytes: the highest allocation on the GPU, or the highest resident size of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def optimizer_bytes(optimizer: Any) -> int:
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def write_completions(completions: list[dict], task: Task, path: Path) -> None:
    with path.open("w") as file:
        for entry, row in zip(completions, task.held_out):
            line = {"question": row["question"], "answer": row["answer"], "completion": entry["text"]}
            file.write(json.dumps(line | task.grade(entry["text"], row)) + "\n")


def write_result(result: dict, output_dir: Path) -> None:
    """Last of all and in one step: compare_methods.py takes a run with a result for done."""
    with whole_file(output_dir / "result.json") as unfinished:
        unfinished.write_text(json.dumps(result, indent=2) + "\n")


def median(seconds: list[float]) -> float | None:
    """None of a training that went on after its last step."""
    return statistics.median(seconds) if seconds else None


def plot(result: dict, path: Path) -> None:
    measured = {when: result[when]["greedy"]["accuracy"] for when in ("before", "after") if result[when]}
    figure = example.plot(result["rewards"], measured)
    (axes,) = figure.axes
    if result["during"]:
        steps, shares = zip(*[(entry["step"], entry["accuracy"]) for entry in result["during"]])
        axes.plot(steps, shares, "o", color="black", label="held-out accuracy during training")
    axes.set(xlabel="step", ylim=(0, 1), title=f"GRPO, {result['method']}: {result['task']}")
    axes.legend()
    figure.savefig(path, dpi=120)


def describe(evaluation: dict | None) -> str:
    if evaluation is None:
        return "not measured"
    greedy = evaluation["greedy"]
    low, high = greedy["interval"]
    return f"{greedy['accuracy']:.1%} [{low:.1%}, {high:.1%}], format {greedy['format_rate']:.1%}"


def main() -> None:
    args = parse_arguments()
    started = time.perf_counter()
    state = PartialState()
    config = training_config(args) if args.max_steps else None
    set_seed(args.seed)
    task = load_task(args)
    model, tokenizer = example.load(args.model)
    prompt_of = prompt_maker(tokenizer, task, args)

    def answer(model: Any, samples: int = 0) -> tuple[list[dict], dict]:
        """Answers the held-out questions: once greedily, `samples` times at temperature 1."""
        prompts = [prompt_of(row) for row in task.held_out]
        options: dict[str, Any] = {"max_new_tokens": args.max_completion_length, "bf16": args.bf16}
        completions = complete(model, tokenizer, prompts, **options)
        scores = {"greedy": score(completions, task.held_out, task)}
        if samples:
            sampled = complete(model, tokenizer, prompts * samples, sample=True, **options)
            scores["sampled"] = score(sampled, task.held_out * samples, task)
        return completions, scores

    before, completions_before = None, []
    if not args.skip_eval_before:
        state.print(f"Answering {len(task.held_out)} held-out questions with the base model ...", flush=True)
        completions_before, before = answer(model, args.eval_samples)
    result: dict[str, Any] = {
        "model": args.model,
        "method": args.method,
        "task": args.preset,
        "before": before,
        "arguments": {name: value if value is None else str(value) for name, value in vars(args).items()},
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if state.is_main_process and completions_before:
        write_completions(completions_before, task, args.output_dir / "completions_before.jsonl")
    if config is None:
        write_result(result, args.output_dir)
        return state.print(
            f"Held out:   {describe(before)} ({len(task.held_out)} questions, greedy, {args.few_shot} examples)"
        )

    steers_vllm = args.use_vllm and args.method == "bias"
    if steers_vllm:
        model = example.with_room_for_vectors(model, tokenizer, args.output_dir / "base")
    model = adapt(model, args.method, args.layers)
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    state.print(f"Training {trainable:,} of {total:,} parameters ...", flush=True)

    def reward(completions: list[str], index: list[int], **kwargs) -> list[float | None]:
        return [float(task.grade(text, task.train[i])[args.reward]) for text, i in zip(completions, index)]

    clock, watch = StepClock(), SignalWatch(args.signal_patience, args.stop_without_signal)
    during_training = EvaluateDuringTraining(args.eval_steps, lambda model: answer(model)[1]["greedy"])
    indices = list(range(args.few_shot, len(task.train)))
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": [prompt_of(task.train[i]) for i in indices], "index": indices}),
        callbacks=[clock, watch, *([during_training] if args.eval_steps else [])],
        args=config,
    )
    during_training.trainer = trainer
    clock.watch_sampling(trainer)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(RewardBar)
    if not example.train(trainer, args, steers_vllm=steers_vllm):
        return
    memory = peak_memory()
    is_adapter = isinstance(model, PeftModel)
    if METHODS[args.method].tie:
        untie(model)
    trained_dir = args.output_dir / ("adapter" if is_adapter else "model")
    trainer.save_model(str(trained_dir))
    state.wait_for_everyone()
    model, _ = example.load(args.model if is_adapter else trained_dir)
    if is_adapter:
        model = PeftModel.from_pretrained(model, trained_dir).to(state.device)
    state.print(
        f"Answering {len(task.held_out)} held-out questions with the weights from {trained_dir} ...", flush=True
    )
    completions_after, after = answer(model, args.eval_samples)

    history = trainer.state.log_history
    during = [entry for entry in history if "held_out/accuracy" in entry]
    result |= {
        "steps": trainer.state.global_step,
        "after": after,
        "during": [
            {"step": e["step"], "accuracy": e["held_out/accuracy"], "format_rate": e["held_out/format_rate"]}
            for e in during
        ],
        "rewards": [entry["reward"] for entry in history if "reward" in entry],
        "steps_without_signal": watch.flat_steps,
        "no_signal_warning": watch.warning,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "optimizer_bytes": optimizer_bytes(trainer.optimizer),
        "peak_memory_bytes": memory,
        "file_bytes": sum(file.stat().st_size for file in trained_dir.glob("*.safetensors")),
        "seconds_per_step": median(clock.wall),
        "cpu_seconds_per_step": median(clock.cpu),
        "cpu_seconds_sampling": median(clock.sampling),
        "seconds": round(time.perf_counter() - started, 1),
    }
    if not state.is_main_process:
        return
    write_completions(completions_after, task, args.output_dir / "completions_after.jsonl")
    plot(result, args.output_dir / "reward.png")
    write_result(result, args.output_dir)

    shares = [f"{scores['greedy']['accuracy']:.1%}" if scores else "not measured" for scores in (before, after)]
    summary = (
        f"Trained:    {trainable:,} of {total:,} parameters of {args.model}, {result['steps']} steps, {result['seconds']:.0f} s"
        f"\nHeld out:   {shares[0]} right before, {shares[1]} after ({len(task.held_out)} questions, greedy)"
        f"\nArtefacts:  {trained_dir}/  {args.output_dir}/result.json  {args.output_dir}/reward.png"
    )
    if watch.warning:
        summary += f"\n{watch.warning}"
    texts = [[entry["text"] for entry in completions] for completions in (completions_before, completions_after)]
    example.report(args, task.held_out, texts, summary)


if __name__ == "__main__":
    main()
