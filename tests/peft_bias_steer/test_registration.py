import pickle

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

from peft_bias_steer import BiasSteerConfig, BiasSteerModel
from peft_bias_steer.registration import register


def test_type_is_a_member_of_the_enum_like_any_other():
    member = PeftType("BIAS_STEER")

    assert member is PeftType["BIAS_STEER"] is PeftType.BIAS_STEER
    assert member == "BIAS_STEER" and member.name == member.value == "BIAS_STEER"
    assert isinstance(member, PeftType) and list(PeftType)[-1] is member
    assert pickle.loads(pickle.dumps(member)) is member


def test_config_and_tuner_are_found_by_type():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("BIAS_STEER")] is BiasSteerConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType("BIAS_STEER")] is BiasSteerModel


def test_registering_twice_changes_nothing():
    members = list(PeftType)

    register()

    assert list(PeftType) == members


def test_a_peft_that_has_taken_the_name_is_reported(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType("BIAS_STEER"), dict)

    with pytest.raises(RuntimeError, match="BIAS_STEER already belongs to builtins.dict"):
        register()
