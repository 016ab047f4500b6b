"""Keys of the vectors in the file of an adapter, and the names that an adapter can have."""

from torch import nn


VECTOR = ".bias_steer.bias_steer_vector."
# the vector of a module that another tuner wraps
WRAPPED = f".base_layer{VECTOR}"
HINT = "load it into the base model that it was trained on (base_model_name_or_path in adapter_config.json)"


def host_name(key: str) -> str:
    """Name of the module whose vector has this key; of any other weight, its own name in the base model."""
    return key.removeprefix("base_model.model.").partition(VECTOR)[0]


def check_shape(name: str, expected: tuple[int, ...], got: tuple[int, ...]) -> None:
    """
    Compares a saved vector's shape with its module's.

    Raises:
        ValueError: If they differ.
    """
    if got != expected:
        raise ValueError(f"expected a vector of shape {expected} for {name}, got {got}: {HINT}")


def check_saved_names(expected: list[str], saved: list[str], num_vectors: int | None = None) -> None:
    """
    Compares the modules that have a vector in an adapter's file with those that should.

    Args:
        expected (`list[str]`): Names of the modules that the adapter steers.
        saved (`list[str]`): Names of those in the file. PEFT may yet rename them if they have none in common.
        num_vectors (`int`, *optional*): How many the file had when it was saved.

    Raises:
        ValueError: If one is missing, or there is one too many.
    """
    renamed = bool(saved) and set(expected).isdisjoint(saved) and len(saved) == len(expected)
    missing, extra = sorted(set(expected) - set(saved)), sorted(set(saved) - set(expected))
    if missing and not renamed and len(saved) == num_vectors:
        raise ValueError(
            f"the adapter has {num_vectors} vectors and none for {', '.join(missing)}, which this model has: {HINT}"
        )
    if missing and not renamed:
        raise ValueError(f"the adapter's file holds no vector for {', '.join(missing)}: copy or save it again")
    if extra and not renamed:
        raise ValueError(f"the adapter's file holds a vector for {', '.join(extra)}, which its config does not steer")


def check_adapter_name(name: str) -> None:
    """
    Refuses names of adapters that mean something else to PEFT, torch or the file system.

    Raises:
        TypeError: If it is no string.
        ValueError: If it is one of these names.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of an adapter must be a string, got {name!r}")
    taken = name == "__base__" or hasattr(nn.ModuleDict(), name)
    if taken or not name.isprintable() or not name.strip() or set(name) & set("./\\"):
        raise ValueError(
            "the name of an adapter must be printable, without dots and slashes, and none that PEFT or torch use "
            f"themselves, got {name!r}: take another one"
        )
