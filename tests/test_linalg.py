"""Products of blocks are the same whether the rows of a batch are apart, as on a GPU, or not."""

import torch

from lora_lite.core import block_product


def test_block_products_with_rows_apart():
    x, M = torch.randn(3, 7, 4, 5, dtype=torch.float64), torch.randn(4, 5, 6, dtype=torch.float64)

    def product(flat):
        return lambda x, M: block_product(x.flatten(0, 1) if flat else x, M).reshape(3, 7, 4, 6)

    want, pull = torch.func.vjp(product(True), x, M)
    got, pull_apart = torch.func.vjp(product(False), x, M)
    torch.testing.assert_close(want, torch.einsum("btnj,njk->btnk", x, M))
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    torch.testing.assert_close(pull_apart(grad), pull(grad))
