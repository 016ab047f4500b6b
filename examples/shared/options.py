"""What the options of several examples are checked for."""

import argparse
import math


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
