"""PVeRA: PEFT's draws in training mode, and the distribution that the paper means."""

import peft
import pytest
import torch
from peft_layer import LAYERS, compare

import lora_lite as ll


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_values_and_gradients_are_those_of_peft_with_the_same_noise(layer, train):
    torch.manual_seed(0)
    theirs = peft.PveraConfig(r=5, target_modules=["0"], projection_prng_key=3)
    leaves = {"lambda_d": ("pvera_lambda_d", 0.0), "lambda_b": ("pvera_lambda_b", 0.0)}
    compare(layer, ll.PVeRAConfig(r=5, seed=3), theirs, leaves, train=train, scale=0.3)


def test_training_draws_around_the_mean_that_evaluation_takes():
    generator = torch.Generator().manual_seed(0)
    weight, x, A, B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(6, 8), (8,), (6, 8), (6, 3)])
    d, b = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (6, 6))
    params = {"lambda_d": d, "lambda_b": b}
    mean, log_variance = (d * (A @ x)).split(3)
    still = ll.functional.pvera(params, ll.Frozen(weight, constants={"A": A, "B": B}), x)
    torch.testing.assert_close(still, weight @ x + b * (B @ mean))
    torch.manual_seed(0)
    drawn = ll.functional.pvera(params, ll.Frozen(weight, constants={"A": A, "B": B}, training=True), x.expand(200_000, 8))
    covariance = torch.diag(b) @ B @ torch.diag(log_variance.exp()) @ B.T @ torch.diag(b)
    torch.testing.assert_close(drawn.mean(0), still, rtol=0, atol=0.01 * float(covariance.diag().max().sqrt()))
    torch.testing.assert_close(drawn.T.cov(), covariance, rtol=0, atol=0.02 * float(covariance.max()))


def test_starts_at_the_base_model_while_it_draws():
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 5)), torch.randn(4, 8)
    adapt = ll.build(model, ll.PVeRAConfig(r=4)).train()
    assert torch.equal(adapt(adapt.init(), x), model(x))


def test_sampling_at_inference_is_refused_by_name(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    config = peft.PveraConfig(r=4, target_modules=["0"], sample_at_inference=True, generator_seed=3)
    peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sample_at_inference: expected it off, found True"):
        ll.from_peft(model, tmp_path)
