from dataclasses import dataclass
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType

from .guards import add_usage_to_card, saved_shapes


@dataclass
class BiasSteerConfig(PeftConfig):
    """
    Configuration of a [`BiasSteerModel`]: which modules get a trainable vector added to their output.

    Args:
        target_modules (`list[str]` or `str`, *optional*):
            Names (list) or a regular expression (string) of the modules to steer: decoder layers, or `nn.Linear` and
            `Conv1D` modules. If unset, every layer of the model's decoder (of its encoder, if it has no decoder).
        exclude_modules (`list[str]` or `str`, *optional*):
            Names or a regular expression of modules to leave alone although they are targeted.
        layers_to_transform (`int`, `range` or `list[int]`, *optional*):
            Indices of the layers to steer; negative ones count from the last layer. All layers if unset.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the `nn.ModuleList` that holds the layers, if it is none of `layers`, `layer`, `h`, `block`,
            `blocks`.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained and saved whole, for example a classification head.
        init_weights (`bool`, defaults to `True`):
            Start from zero vectors, i.e. from the base model. `False` draws them from a standard normal distribution,
            which is of use in tests only.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from peft_bias_steer import BiasSteerConfig

    >>> model = get_peft_model(model, BiasSteerConfig())
    ```
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("BIAS_STEER")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.layers_to_transform, range):
            self.layers_to_transform = list(self.layers_to_transform)
        # shapes of the tensors beside a config that was loaded: PEFT reads those only once the model is changed
        self.saved_shapes: dict[str, list[int]] = {}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        hub_kwargs, _, _ = cls._split_kwargs(kwargs)
        config.saved_shapes = saved_shapes(str(pretrained_model_name_or_path), subfolder, hub_kwargs)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        add_usage_to_card(save_directory, self.task_type)
