"""
Makes `BIAS_STEER` a PEFT type. PEFT has no entry points: without one more member in its enum of types, no config of this
type can be made, and no saved adapter read. Without `_disable_per_call`, a thread that disables an adapter does so for
all others, and two that do may leave it disabled. Without `_generate_per_call`, a forward pass of `generate` looks like
any other, and nothing tells the prompt from what was generated. Without `_push_with_card`, `push_to_hub` writes a bare
card over the one of `save_pretrained`, and PEFT has no hook between the two.
"""

import functools
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from peft import PeftModel, PeftModelForCausalLM
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from .config import BiasSteerConfig
from .model import BiasSteerModel
from .model_card import push_adapter


NAME = "BIAS_STEER"


def _add_enum_member(name: str) -> None:
    # CPython 3.11-3.13 keep these; https://docs.python.org/3/howto/enum.html#enum-members-aka-instances
    member = str.__new__(PeftType, name)
    attributes = {"_name_": name, "_value_": name, "__objclass__": PeftType, "_sort_order_": len(PeftType)}
    for attribute, value in attributes.items():
        setattr(member, attribute, value)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    getattr(PeftType, "_hashable_values_", []).append(name)


def _disable_per_call() -> None:
    for_all, enabled = PeftModel.disable_adapter, PeftModel.has_active_enabled_adapter.fget

    @functools.wraps(for_all)
    @contextmanager
    def disable_adapter(self: PeftModel) -> Generator[Any]:
        tuner = self.base_model
        with tuner.disabled() if isinstance(tuner, BiasSteerModel) and tuner.disables_per_call() else for_all(self):
            yield

    def has_active_enabled_adapter(self: PeftModel) -> bool:
        tuner = self.base_model
        return enabled(self) and not (isinstance(tuner, BiasSteerModel) and tuner.is_disabled())

    cast(Any, PeftModel).disable_adapter = disable_adapter
    cast(Any, PeftModel).has_active_enabled_adapter = property(has_active_enabled_adapter, doc=enabled.__doc__)


def _generate_per_call(peft_class: type[PeftModel]) -> None:
    without_prompts = peft_class.generate

    @functools.wraps(without_prompts)
    def generate(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        tuner = self.base_model
        with tuner.in_generate(*args, **kwargs) if isinstance(tuner, BiasSteerModel) else nullcontext():
            return without_prompts(self, *args, **kwargs)

    cast(Any, peft_class).generate = generate


def _push_with_card() -> None:
    with_bare_card = PeftModel.push_to_hub

    @functools.wraps(with_bare_card)
    def push_to_hub(self: PeftModel, repo_id: str, **kwargs: Any) -> Any:
        push = push_adapter if isinstance(self.base_model, BiasSteerModel) else with_bare_card
        return push(self, repo_id, **kwargs)

    cast(Any, PeftModel).push_to_hub = push_to_hub


def register() -> None:
    """
    Registers the tuner with PEFT. `import peft_bias_steer` calls this; calling it again changes nothing.

    Raises:
        RuntimeError: If the installed PEFT has a method of its own under the same name.
    """
    if NAME not in PeftType.__members__:
        _add_enum_member(NAME)
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME])
    if registered is BiasSteerConfig:
        return
    if registered is not None:
        raise RuntimeError(
            f"PEFT's type {NAME} already belongs to {registered.__module__}.{registered.__qualname__}: "
            "use that one, or install an older peft to keep peft_bias_steer"
        )
    _disable_per_call()
    for peft_class in (PeftModel, PeftModelForCausalLM):
        _generate_per_call(peft_class)
    _push_with_card()
    register_peft_method(name=NAME.lower(), config_cls=BiasSteerConfig, model_cls=BiasSteerModel)
