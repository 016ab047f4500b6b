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
