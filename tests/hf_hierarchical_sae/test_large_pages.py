"""Memory in large pages: a tensor like any other."""

import pytest
import torch

from hf_hierarchical_sae.large_pages import empty_in_large_pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_it_has_the_shape_and_dtype_asked_for_and_can_be_written(dtype):
    tensor = empty_in_large_pages(3, 5, dtype=dtype, device=torch.device("cpu")).zero_()

    assert tensor.shape == (3, 5) and tensor.dtype == dtype and tensor.is_contiguous()
    assert torch.equal(tensor, torch.zeros(3, 5, dtype=dtype))


def test_another_device_gets_memory_of_its_own():
    assert empty_in_large_pages(3, 5, dtype=torch.float32, device=torch.device("meta")).is_meta
