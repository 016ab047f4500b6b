import pytest


@pytest.fixture(scope="session")
def interpreted_module():
    from tests.hf_based_kernel.triton_form import load_module

    return load_module("rebased_attention_interpreted", interpreted=True)


@pytest.fixture
def interpreted(interpreted_module):
    """The Triton form, ready to run on CPU tensors, even if something has imported triton for compiling before."""
    from tests.hf_based_kernel.triton_form import interpreted_language

    with interpreted_language():
        yield interpreted_module
