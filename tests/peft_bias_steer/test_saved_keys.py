import pytest
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict

from peft_bias_steer import BiasSteerConfig
from peft_bias_steer.saved_keys import VECTOR, check_saved_names, check_shape, host_name
from tests.peft_bias_steer.tiny_models import make_base


def test_keys_of_a_saved_adapter_name_the_steered_modules():
    model = get_peft_model(make_base(), BiasSteerConfig(modules_to_save=["lm_head"]))

    keys = get_peft_model_state_dict(model)

    assert [host_name(key) for key in keys if VECTOR in key] == list(model.base_model.steering_layers)
    assert [host_name(key) for key in keys if VECTOR not in key] == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (["a"], "holds no vector for b, c: copy or save it again"),
        (["a", "b", "c", "d"], "holds a vector for d, which its config does not steer"),
        ([], "holds no vector for a, b, c"),
        (["x", "y"], "holds no vector for a, b, c"),
    ],
)
def test_a_vector_too_few_or_too_many_is_named(saved, message):
    with pytest.raises(ValueError, match=message):
        check_saved_names(["a", "b", "c"], saved)


def test_as_many_vectors_under_other_names_may_yet_be_renamed():
    check_saved_names(["a", "b"], ["x", "y"])


def test_a_shape_of_another_base_is_refused():
    check_shape("layers.0", (4,), (4,))
    with pytest.raises(ValueError, match=r"expected a vector of shape \(4,\) for layers.0, got \(8,\): load it into"):
        check_shape("layers.0", (4,), (8,))


def test_a_whole_file_for_fewer_layers_is_not_called_damaged():
    with pytest.raises(ValueError, match="has 2 vectors and none for c, which this model has: load it into the base"):
        check_saved_names(["a", "b", "c"], ["a", "b"], num_vectors=2)
    with pytest.raises(ValueError, match="holds no vector for c: copy or save it again"):
        check_saved_names(["a", "b", "c"], ["a", "b"], num_vectors=3)
