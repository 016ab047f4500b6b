"""Configuration of a sparse autoencoder or transcoder that is trained for every sparsity budget at once."""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import numpy
import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class HierarchicalSaeConfig(PreTrainedConfig):
    r"""
    Configuration of a [`HierarchicalSaeModel`]. Source of the objective: arXiv 2505.24473.

    Args:
        d_in (`int`, defaults to 768): size of the activations, the language model's `hidden_size`.
        d_out (`int`, *optional*): size of a transcoder's targets; `d_in` by default.
        d_sae (`int`, defaults to 16384): number of latents.
        k (`int`, defaults to 64): largest number of latents per input. With `selection="batch_topk"` it is the mean
            number over a batch, with `"relu"` and `"jumprelu"` it is `d_sae`.
        budgets (`list[int]`, *optional*): sparsity budgets that the loss averages over, strictly increasing, in
            [1, k]. Every prefix 1…k by default; `[k]` is a plain TopK autoencoder.
        budget_weights (`list[int | float]`, *optional*): one weight per budget, equal by default.
        selection (`str`, defaults to `"topk"`): `"topk"` keeps k latents of each input; `"batch_topk"`
            (arXiv 2412.06410) keeps the batch × k strongest of a training batch and, at inference, those above a
            learned threshold. `"relu"` keeps every latent that is active, `"jumprelu"` (arXiv 2407.14435) those above
            a threshold of their own: dictionaries trained elsewhere, for use. All but `"topk"` take `budgets=[k]`.
        matryoshka_prefixes (`list[int]`, *optional*): train on prefixes of the dictionary as well (Matryoshka SAE,
            arXiv 2503.17547): the loss is averaged over reconstructions from the first m latents, for each m here, and over
            budgets: from those of the j strongest latents of an input that are among the first m. Strictly increasing,
            ending in `d_sae`. A plain Matryoshka SAE has `budgets=[k]`.
        normalize_decoder (`bool`, defaults to `True`): keep the rows of `W_dec` at unit norm.
        aux_loss_coefficient (`int` or `float`, defaults to 0.0): weight of the auxiliary loss that lets dead latents model
            the residual (arXiv 2406.04093). 0 leaves it out.
        aux_k (`int`, *optional*): dead latents per input in the auxiliary loss; `d_in // 2` by default.
        dead_after_tokens (`int`, defaults to 1000000): a latent is dead once it has not fired for this many tokens.
        encoder_chunk_size (`int`, *optional*): compute the encoder this many latents at a time, so that memory is
            batch × chunk instead of batch × `d_sae`.
        model_name (`str`, *optional*): language model that the activations come from.
        layer (`int`, *optional*): its decoder layer, counted from 0.
        hook_point (`str`, *optional*): where in the layer, `"output"` for the residual stream after it, others as in
            [`iterate_activations`]; without a layer, a module's path within the language model.
        target_hook_point (`str`, *optional*): what makes a transcoder (arXiv 2406.11944): the site of the same layer
            whose activations it computes from those at `hook_point`, such as `"mlp.output"` from `"mlp.input"`. An
            autoencoder, which computes its own input, has none.
        skip_connection (`bool`, defaults to `False`): a transcoder adds a linear map of its input to what it gives
            (arXiv 2501.18823).
        dataset_name (`str`, *optional*): text that the activations come from.
    """

    model_type = "hierarchical_sae"
    attribute_map = {"hidden_size": "d_in"}
    keys_to_ignore_at_inference = ["top_indices", "top_values", "budget_errors"]

    d_in: int = 768
    d_out: int | None = None
    d_sae: int = 16384
    k: int = 64
    budgets: list[int] | tuple[int, ...] | None = None
    budget_weights: list[int | float] | tuple[int | float, ...] | None = None
    selection: str = "topk"
    matryoshka_prefixes: list[int] | tuple[int, ...] | None = None
    normalize_decoder: bool = True
    aux_loss_coefficient: int | float = 0.0
    aux_k: int | None = None
    dead_after_tokens: int = 1_000_000
    encoder_chunk_size: int | None = None
    model_name: str | None = None
    layer: int | None = None
    hook_point: str | None = None
    target_hook_point: str | None = None
    skip_connection: bool = False
    dataset_name: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.d_out is None:
            self.d_out = self.d_in
        super().__post_init__(**kwargs)

    @property
    def is_transcoder(self) -> bool:
        """Whether it computes the activations of another site than the one that it reads."""
        return self.target_hook_point is not None

    @property
    def kind(self) -> str:
        """`"autoencoder"` or `"transcoder"`."""
        return "transcoder" if self.is_transcoder else "autoencoder"

    @property
    def has_budgets(self) -> bool:
        """Whether every number of latents up to k can be asked for, as with `selection="topk"` alone."""
        return self.selection == "topk"

    @property
    def is_trainable(self) -> bool:
        """Whether it can be trained here; `selection="relu"` and `"jumprelu"` are for use."""
        return self.selection in ("topk", "batch_topk")

    @property
    def trained_budgets(self) -> tuple[int, ...]:
        """The budgets that the loss averages over."""
        return tuple(self.budgets or range(1, self.k + 1))

    @property
    def default_budgets(self) -> list[int]:
        """Budgets to measure at: 1, 2, 4, … and k, or k alone where there is no other."""
        return powers_of_two_and(self.k) if self.has_budgets else [self.k]

    def check_k(self, k: int | None) -> int:
        """
        Args:
            k (`int`, *optional*): latents per input; `config.k` by default.

        Returns:
            `int`: the number to use.

        Raises:
            `ValueError`: If it is no integer, or not a budget of this autoencoder.
        """
        k = self.k if k is None else k
        if not is_integer(k):
            raise ValueError(f"k must be an integer in [1, {self.k}], got {k!r}")
        if not self.is_trainable and k != self.k:
            raise ValueError(f"a {self.selection} SAE keeps any number of latents: it has no budget, got {k}")
        if not 1 <= k <= self.k:
            raise ValueError(f"k must be in [1, {self.k}], the trained budget, got {k}")
        if not self.has_budgets and k != self.k:
            raise ValueError(f"a batch_topk SAE selects by a threshold and has one budget, k={self.k}, got {k}")
        return int(k)

    def check_budgets(self, budgets: Iterable[int] | None) -> list[int]:
        """
        Args:
            budgets (`Iterable[int]`, *optional*): numbers of latents per input, in any order, a tensor or an array
                too; `default_budgets` by default.

        Returns:
            `list[int]`: each once, increasing.

        Raises:
            `ValueError`: If there are none, or one is no integer or not a budget of this autoencoder.
        """
        least = self.default_budgets[0]
        budgets = sorted(set(integers("budgets", self.default_budgets if budgets is None else budgets)))
        if not self.is_trainable:
            for budget in budgets:
                self.check_k(budget)
        if not budgets or budgets[0] < least or budgets[-1] > self.k:
            raise ValueError(f"budgets must be in [{least}, {self.k}], the trained budget, got {budgets}")
        return budgets

    def check_latents(self, latents: Any) -> list[int]:
        """
        Args:
            latents (`int` or `Iterable[int]`): one or several, a tensor or an array too.

        Returns:
            `list[int]`: the same, in their order.

        Raises:
            `ValueError`: If there are none, or one is no integer or not a latent of this autoencoder.
        """
        if isinstance(latents, torch.Tensor | numpy.ndarray):
            latents = latents.reshape(-1)
        latents = integers("latents", latents if isinstance(latents, Iterable) else [latents])
        wrong = [latent for latent in latents if not 0 <= latent < self.d_sae]
        if wrong or not latents:
            raise ValueError(f"latents must be in [0, d_sae={self.d_sae}), got {wrong or 'none'}")
        return latents

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """[`~PreTrainedConfig.from_dict`] that raises a `ValueError` for the config of another kind of model."""
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"expected the config of an autoencoder, model_type {cls.model_type!r}, got model_type {found!r}: give "
                "the folder or repository of an autoencoder, not of the model that it reads"
            )
        return super().from_dict(config_dict, **kwargs)

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation."""
        if self.d_in < 1 or self.d_sae < 1:
            raise ValueError(f"d_in and d_sae must be positive, got {self.d_in} and {self.d_sae}")
        self._check_transcoder()
        if not 1 <= self.k <= self.d_sae:
            raise ValueError(f"k must be in [1, d_sae={self.d_sae}], got {self.k}")
        for name, largest in (("budgets", self.k), ("matryoshka_prefixes", self.d_sae)):
            if getattr(self, name) is not None:
                increasing_integers(name, getattr(self, name), largest)
        if self.budget_weights is not None and len(self.budget_weights) != len(self.trained_budgets):
            raise ValueError(
                f"budget_weights needs one weight per budget ({len(self.trained_budgets)}), "
                f"got {len(self.budget_weights)}"
            )
        weights = list(self.budget_weights or [1.0])
        if not all(0 <= weight < math.inf for weight in weights) or sum(weights) == 0:
            raise ValueError(f"budget_weights must be finite, not negative and not all zero, got {weights}")
        if self.selection not in ("topk", "batch_topk", "relu", "jumprelu"):
            raise ValueError(f"selection must be 'topk', 'batch_topk', 'relu' or 'jumprelu', got {self.selection!r}")
        if not self.is_trainable and (self.k, list(self.budgets or [])) != (self.d_sae, [self.d_sae]):
            raise ValueError(
                f"selection={self.selection!r} keeps any number of latents: it takes k=d_sae and "
                f"budgets=[{self.d_sae}], got k={self.k} and budgets={self.budgets}"
            )
        if self.matryoshka_prefixes is not None and self.matryoshka_prefixes[-1] != self.d_sae:
            raise ValueError(
                f"matryoshka_prefixes must end in d_sae={self.d_sae}, got {list(self.matryoshka_prefixes)}"
            )
        if not self.has_budgets and list(self.budgets or []) != [self.k]:
            raise ValueError(f"selection='batch_topk' takes budgets=[k] ([{self.k}]), got {self.budgets}")
        if self.encoder_chunk_size is not None and self.encoder_chunk_size < 1:
            raise ValueError(f"encoder_chunk_size must be positive or None, got {self.encoder_chunk_size}")
        if not 0 <= self.aux_loss_coefficient < math.inf or (self.aux_k is not None and self.aux_k < 1):
            raise ValueError(
                "aux_loss_coefficient must be finite and not negative, and aux_k must be positive or None, "
                f"got {self.aux_loss_coefficient} and {self.aux_k}"
            )

        if self.dead_after_tokens < 1:
            raise ValueError(f"dead_after_tokens must be positive, got {self.dead_after_tokens}")
        if self.layer is not None and self.layer < 0:
            raise ValueError(f"layer must be counted from 0, or None, got {self.layer}")

    def _check_transcoder(self) -> None:
        if self.is_transcoder:
            if self.target_hook_point == (self.hook_point or "output"):
                raise ValueError(
                    f"a transcoder computes another site than it reads, got {self.target_hook_point!r} as hook_point and "
                    "target_hook_point: leave target_hook_point out for an autoencoder"
                )
            if not self.d_out or self.d_out < 1:
                raise ValueError(f"d_out must be positive, got {self.d_out}")
        elif self.d_out != self.d_in or self.skip_connection:
            raise ValueError(
                "d_out other than d_in and skip_connection are for transcoders: say which site it computes with "
                f"target_hook_point, got d_in={self.d_in}, d_out={self.d_out} and skip_connection={self.skip_connection}"
            )


def place_name(layer: int | None, hook_point: str) -> str:
    """A site as errors call it: `"layer 3"` is its output."""
    if layer is None:
        return f"the module {hook_point}"
    return f"layer {layer}" if hook_point == "output" else f"{hook_point} of layer {layer}"


def is_integer(number: Any) -> bool:
    """Whether it is a whole number by its type, that of a tensor without dimensions too, as `True` and 2.0 are not."""
    if isinstance(number, torch.Tensor) and number.ndim == 0:
        number = number.item()
    return isinstance(number, Integral) and not isinstance(number, bool)


def integer(name: str, number: Any, least: int | None = None) -> int:
    """
    Args:
        name (`str`): what it is, for the error.
        number (`int`): one of numpy or torch too.
        least (`int`, *optional*): the smallest that is allowed.

    Returns:
        `int`: the same as Python's own.

    Raises:
        `ValueError`: If it is smaller, or no integer, as booleans and fractions are.
    """
    if not is_integer(number):
        raise ValueError(f"{name} must be an integer, got {number!r}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return int(number)


def integers(name: str, numbers: Any) -> list[int]:
    """
    Args:
        name (`str`): what they are, for the error.
        numbers (`Iterable[int]`): a tensor or an array too.

    Returns:
        `list[int]`: the same as Python's own.

    Raises:
        `ValueError`: If one is no integer, as booleans and fractions are.
    """
    found = numbers.tolist() if isinstance(numbers, torch.Tensor | numpy.ndarray) else numbers
    found = list(found) if isinstance(found, Iterable) else [None]
    if set(map(type, found)) <= {int}:
        # Ids of a long text: to look at each takes longer than to tokenise it.
        return found
    if not all(map(is_integer, found)):
        raise ValueError(f"{name} must be integers, got {numbers}")
    return [int(number) for number in found]


def positive_number(name: str, number: Any) -> float:
    """A number above 0, infinity too, as Python's own; raises a `ValueError` for others, NaN and booleans among them."""
    found = number.item() if isinstance(number, torch.Tensor) and number.ndim == 0 else number
    if not isinstance(found, Real) or isinstance(found, bool) or not found > 0:
        raise ValueError(f"{name} must be a positive number, got {number!r}")
    return float(found)


def increasing_integers(name: str, numbers: Any, largest: int) -> tuple[int, ...]:
    """[`integers`] that are strictly increasing and in [1, largest]; raises a `ValueError` for others."""
    found = integers(name, numbers)
    increasing = all(first < second for first, second in zip(found, found[1:]))
    if not found or not increasing or found[0] < 1 or found[-1] > largest:
        raise ValueError(f"{name} must be strictly increasing integers in [1, {largest}], got {found}")
    return tuple(found)


def powers_of_two_and(k: int) -> list[int]:
    """1, 2, 4, … and k itself."""
    return sorted({*(2**power for power in range(k.bit_length())), k})


__all__ = ["HierarchicalSaeConfig"]
