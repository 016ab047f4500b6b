import resource
from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture
def llama():
    """Builds a random three-layer Llama of width 32; the same one each time."""

    def build(**options) -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(vocab_size=64, **{**sizes, **heads, **options})
        return LlamaForCausalLM(config).eval()

    return build


@pytest.fixture
def tokens():
    return torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def set_vectors():
    """Fills an adapter's vectors with random numbers and returns them, one (size,) per steered module."""

    def fill(model, adapter_name: str = "default", std: float = 0.5) -> list[torch.Tensor]:
        vectors = [
            layer.vector(adapter_name)
            for layer in model.base_model.steering_layers.values()
            if adapter_name in layer.bias_steer_vector
        ]
        for vector in vectors:
            torch.nn.init.normal_(vector, std=std)
        return [vector.detach().clone() for vector in vectors]

    return fill


@pytest.fixture
def add_by_plain_hooks():
    """The oracle: a forward hook on each layer that adds its vector to what the layer returns."""

    def add(layers, vectors):
        def hook_for(vector):
            def hook(module, args, output):
                if isinstance(output, torch.Tensor):
                    return (output.float() + vector).to(output.dtype)
                return type(output)([(output[0].float() + vector).to(output[0].dtype), *output[1:]])

            return hook

        for layer, vector in zip(layers, vectors):
            layer.register_forward_hook(hook_for(vector))

    return add


@pytest.fixture
def small_files():
    """A disk that takes no file of more than some bytes, as a full one does."""

    @contextmanager
    def limit(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit
