"""Global average pooling is torch's mean; only the layout of its gradient is another."""

import pytest
import torch

from pipeline.models.pooling import global_average


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [None, torch.float32])
def test_value_and_gradient_are_the_means(layout, dtype, wanted):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6).to(dtype).to(memory_format=layout).requires_grad_()
    upstream = torch.randn(3, 4)
    found = global_average(x, wanted)
    expected = x.to(wanted or dtype).mean((2, 3))
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found, x, upstream.to(found.dtype))
    (reference,) = torch.autograd.grad(expected, x, upstream.to(found.dtype))
    torch.testing.assert_close(gradient, reference)
    assert gradient.is_contiguous(memory_format=layout)


def test_the_gradient_is_that_of_finite_differences():
    x = torch.randn(2, 3, 2, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(global_average, (x,))
