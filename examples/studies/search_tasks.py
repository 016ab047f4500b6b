# /// script
# dependencies = [
#     "peft_bias_steer", "accelerate", "trl", "datasets", "math-verify", "matplotlib", "reasoning-gym", "tensorboard"
# ]
# ///
"""
What can a model do with every task of reasoning-gym before it is trained: alone, asked for the answer alone, after solved
examples, and step by step? Training is worth its while where samples are right now and then and no prompt does as well, nor
the answer that is right most often.

    python examples/studies/search_tasks.py --model outputs/SmolLM2-135M-Instruct --bf16

Questions and checks are those of train_methods.py: an answer is the last integer of a completion where all answers are
integers, otherwise its first line; step by step what "Answer:" says, or the last line. Writes a table (.md), a line for each
task (.jsonl; a task that is there is not asked again, so an interrupted search goes on) and a plot (.png).
"""

import argparse
import dataclasses
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from reasoning_gym.factory import DATASETS
from tqdm import tqdm

from peft_bias_steer.whole_files import whole_file


sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("shared", "peft_bias_steer", "studies")]
import train_grpo as example
import train_methods as study  # ty: ignore[import-not-found]  # the script beside this one
from answer_forms import ANSWER_FORMS
from grpo_methods import PROMPTS, STEP_BY_STEP
from interrupts import record_settings


# of reasoning-gym 0.1.25
NO_CHECKS = {
    "coin_flip": "its check takes 0 for every probability below 1",
    "game_of_life_halting": "its check takes every answer",
}
# tokens beside the answer, for a sentence that says it
AROUND = 16
KINDS = {**PROMPTS, **STEP_BY_STEP}
SAMPLED = ", sampled"


class LeftOut(Exception):
    """A task that was not asked, with the reason."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder (%(default)s)")
    add("--tasks", nargs="+", choices=sorted(DATASETS), default=sorted(DATASETS), metavar="TASK", help="which (all)")
    add("--questions", type=int, default=32, help="questions of each task (%(default)s)")
    add("--longest_prompt", type=int, default=512, help="tokens of a question; tasks with longer ones are left out")
    add("--longest_answer", type=int, default=128, help="tokens of an answer, with its steps (%(default)s)")
    add("--longest_context", type=int, default=2000, help="tokens of a question and its examples (%(default)s)")
    add("--bf16", action="store_true", help="weights in bfloat16, where that is faster")
    add("--output_dir", type=Path, default=Path("outputs/search_tasks"), help="for all artefacts (%(default)s)")
    args = parser.parse_args()
    if args.questions < 1:
        parser.error(f"--questions must be at least 1, got {args.questions}")
    return args


@torch.inference_mode()
def complete(
    model: Any, tokenizer: Any, prompts: list[str], *, max_new_tokens: int, sample: bool = False
) -> list[str]:
    """One completion per prompt; the tokens that all prompts begin with are read once."""
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    shared = os.path.commonprefix(ids)[: min(map(len, ids)) - 1]
    options: dict[str, Any] = {
        "do_sample": sample,
        **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}),
    }
    rest = tokenizer.pad({"input_ids": [tokens[len(shared) :] for tokens in ids]}, return_tensors="pt").to(
        model.device
    )
    if shared:
        beginning = torch.tensor([shared], device=model.device)
        cache = model(beginning, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(prompts))
        rest["input_ids"] = torch.cat([beginning.expand(len(prompts), -1), rest["input_ids"]], 1)
        rest["attention_mask"] = torch.cat(
            [beginning.expand(len(prompts), -1) >= 0, rest["attention_mask"] > 0], 1
        ).long()
        options["past_key_values"] = cache
    output = model.generate(
        **rest, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, repetition_penalty=1.0, **options
    )
    return tokenizer.batch_decode(output[:, rest["input_ids"].shape[1] :], skip_special_tokens=True)


def settings(args: argparse.Namespace, name: str, *extra: str) -> argparse.Namespace:
    options = ["--model", str(args.model), "--task", name, "--eval_size", str(args.questions)]
    return study.parse_arguments([*options, "--num_questions", str(4 * args.questions + 16), *extra])


def load_task(args: argparse.Namespace, name: str) -> study.Task:
    try:
        task = study.load_task(settings(args, name, "--few_shot", "8"))
    except SystemExit:
        raise LeftOut("fewer distinct questions") from None
    if task.form is ANSWER_FORMS["tag"]:
        task.form, task.system_prompt = ANSWER_FORMS["line"], ""
    return task


def ask(args: argparse.Namespace, model: Any, tokenizer: Any, name: str) -> dict[str, Any]:
    """Right answers to each kind of prompt, of `questions`; `None` where the examples are too long."""
    if name in NO_CHECKS:
        raise LeftOut(NO_CHECKS[name])
    task = load_task(args, name)
    if not all(isinstance(row["answer"], str) for row in task.held_out):
        raise LeftOut("no answer is written down")
    longest = max(len(tokenizer(row["answer"]).input_ids) for row in [*task.held_out, *task.train[:8]])
    if longest > args.longest_answer:
        raise LeftOut(f"answers of {longest} tokens")
    in_steps = task
    if task.form is not ANSWER_FORMS["integer"]:
        in_steps = dataclasses.replace(task, form=ANSWER_FORMS["stated"])
    right: dict[str, int | None] = {}
    for kind, extra in KINDS.items():
        make_prompt = study.prompt_maker(tokenizer, task, settings(args, name, *extra))
        prompts = [make_prompt(row) for row in task.held_out]
        tokens = max(len(tokenizer(prompt).input_ids) for prompt in prompts)
        if kind == "question" and tokens > args.longest_prompt:
            raise LeftOut(f"questions of {tokens} tokens")
        read, length = (in_steps, args.longest_answer) if kind in STEP_BY_STEP else (task, longest + AROUND)
        for way in ways_to_ask(kind):
            if tokens > args.longest_context:
                right[way] = None
                continue
            texts = complete(model, tokenizer, prompts, max_new_tokens=length, sample=way.endswith(SAMPLED))
            right[way] = sum(read.grade(text, row)["right"] for text, row in zip(texts, task.held_out))
    frequent = max(Counter(row["answer"] for row in task.held_out).values())
    return {"right": right, "frequent": frequent, "integers": task.form is ANSWER_FORMS["integer"]}


def ways_to_ask(kind: str) -> list[str]:
    """Greedily; at temperature 1 too where no example shows what to write."""
    return [kind, kind + SAMPLED] if kind in {"question", *STEP_BY_STEP} else [kind]


def best_prompt(result: dict[str, Any]) -> tuple[int, str]:
    """The most right answers to a greedy prompt, and to which."""
    return max((n, kind) for kind, n in result["right"].items() if n is not None and not kind.endswith(SAMPLED))


def write_report(args: argparse.Namespace, results: list[dict[str, Any]]) -> str:
    asked = [result for result in results if "right" in result]
    asked.sort(key=lambda result: (-best_prompt(result)[0], -result["right"]["question, sampled"], result["task"]))
    kinds = [way for kind in KINDS for way in ways_to_ask(kind)]
    lines = [f"| task | answers | {' | '.join(kinds)} | best prompt, 95 % | most frequent answer |"]
    lines.append("|---" * (len(kinds) + 4) + "|")
    nothing = []
    for result in asked:
        counts = [result["right"][kind] for kind in kinds]
        if not any(counts):
            nothing.append(result["task"])
            continue
        shares = ["–" if n is None else f"{100 * n / args.questions:.0f}" for n in counts]
        low, high = study.wilson_interval(best_prompt(result)[0], args.questions)
        form = "integer" if result["integers"] else "line"
        ends = f"{100 * low:.0f} to {100 * high:.0f} | {100 * result['frequent'] / args.questions:.0f}"
        lines.append(f"| {result['task']} | {form} | {' | '.join(shares)} | {ends} |")
    left_out = [f"{result['task']} ({result['left_out']})" for result in results if "left_out" in result]
    lines += ["", f"Right answers of {args.questions} questions, %. {len(asked)} tasks asked."]
    lines += ["", f"Nothing right in any way: {', '.join(nothing)}."] if nothing else []
    lines += ["", f"Left out: {'; '.join(left_out)}."] if left_out else []
    table = "\n".join(lines) + "\n"
    (args.output_dir / "tasks.md").write_text(table)
    if asked:
        plot(args, asked).savefig(args.output_dir / "tasks.png", dpi=120)
    return table


def plot(args: argparse.Namespace, asked: list[dict[str, Any]]) -> Figure:
    """A line for each task with something right: samples, the best prompt with its interval, the most frequent answer."""
    shown = [result for result in reversed(asked) if any(result["right"].values())]
    figure = Figure(figsize=(7, 1.2 + 0.2 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for y, result in enumerate(shown):
        best = best_prompt(result)[0]
        axes.plot(
            [100 * limit for limit in study.wilson_interval(best, args.questions)], [y, y], color="C0", alpha=0.4
        )
        points = (best, "oC0"), (result["right"]["question, sampled"], "^C1"), (result["frequent"], "xk")
        for right, style in points:
            axes.plot(100 * right / args.questions, y, style)
    for style, label in (
        ("oC0", "best prompt, greedy"),
        ("^C1", "question alone, sampled"),
        ("xk", "most frequent answer"),
    ):
        axes.plot([], [], style, label=label)
    axes.set_yticks(range(len(shown)), [result["task"] for result in shown], fontsize="small")
    axes.set(xlabel="right, % (line: 95 % interval of the best prompt)")
    axes.legend(fontsize="small", loc="lower right")
    return figure


def main() -> None:
    args = parse_arguments()
    record_settings(
        args.output_dir, {name: value for name, value in vars(args).items() if name not in ("tasks", "output_dir")}
    )
    path = args.output_dir / "tasks.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {result["task"] for result in results}
    model, tokenizer = example.load(args.model)
    model = model.eval().to(torch.bfloat16 if args.bf16 else model.dtype)
    for name in (bar := tqdm([name for name in args.tasks if name not in done])):
        bar.set_postfix_str(name)
        torch.manual_seed(0)  # so that a task's samples do not hang on the tasks before it
        try:
            result = {"task": name, **ask(args, model, tokenizer, name)}
        except LeftOut as reason:
            result = {"task": name, "left_out": str(reason)}
        results.append(result)
        lines = path.read_text() if path.exists() else ""
        with whole_file(path) as unfinished:
            unfinished.write_text(lines + json.dumps(result) + "\n")
    print(write_report(args, results))


if __name__ == "__main__":
    main()
