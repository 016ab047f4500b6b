"""What the options of several examples are checked for."""

import argparse
import math

from transformers import AutoConfig


def check_least(parser: argparse.ArgumentParser, arguments: argparse.Namespace, **least: float) -> None:
    """Refuse an option below its least value; 0.0 is that of one that has to be positive."""
    for name, minimum in least.items():
        value = getattr(arguments, name)
        if isinstance(minimum, float) and not minimum < value < math.inf:
            parser.error(f"--{name} must be positive, got {value}")
        if value < minimum:
            parser.error(f"--{name} must be at least {minimum}, got {value}")


def check_seeds(parser: argparse.ArgumentParser, seeds: list[int]) -> None:
    """Refuse seeds that torch cannot take, and one that is given twice: intervals take each for another draw."""
    if min(seeds) < 0:
        parser.error(f"--seeds must be at least 0, got {min(seeds)}")
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        parser.error(f"--seeds: every seed is one draw, got {', '.join(map(str, twice))} more than once")


def check_grpo(parser: argparse.ArgumentParser, arguments: argparse.Namespace, *, max_steps: int) -> None:
    """Refuse what a training by GRPO cannot take; `max_steps` is the least."""
    least = {
        "max_steps": max_steps,
        "prompts_per_step": 1,
        "num_generations": 2,
        "max_completion_length": 1,
        "seed": 0,
    }
    check_least(parser, arguments, learning_rate=0.0, **least)
    if arguments.layers:
        check_layers(parser, arguments.model, "layers", *arguments.layers)


def check_layers(parser: argparse.ArgumentParser, model: str, option: str, *indices: int) -> None:
    """Refuse a language model that is not there, and decoder layers that it does not have."""
    try:
        layers = AutoConfig.from_pretrained(model).get_text_config().num_hidden_layers
    except (OSError, ValueError) as error:
        parser.error(f"--model: expected the hub id or the folder of a language model, got {model!r} ({error})")
    if wrong := [index for index in indices if not 0 <= index < layers]:
        parser.error(f"--{option} must be in [0, {layers - 1}], the layers of {model}, got {wrong[0]}")
