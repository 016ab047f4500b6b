import torch
from peft import get_peft_model

from peft_bias_steer import BiasSteerConfig, BiasSteerFloat32Callback


def test_vectors_that_a_trainer_has_cast_are_float32_again_and_the_base_is_not(llama):
    model = get_peft_model(llama().bfloat16(), BiasSteerConfig()).bfloat16()

    BiasSteerFloat32Callback().on_init_end(None, None, None, model=model)

    layers = model.base_model.steering_layers.values()
    assert {layer.vector("default").dtype for layer in layers} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}
