"""`rank_dropout` and `module_dropout`: one draw a call, of whole outputs or of the whole update; each row of a mixed batch has its own."""

import dataclasses

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import by_name, move

CONFIGS = [ll.LoHaConfig(r=2), ll.LoKrConfig(r=2), ll.LoKrConfig(r=2, rank_dropout_scale=True)]
RESCALED = {"loha"}


@pytest.fixture(params=CONFIGS, ids=by_name, name="cfg")
def _cfg(request):
    return request.param


def _setup(cfg, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, bias=False))
    adapt = ll.build(model, cfg, **options)
    return adapt, move(adapt.init()), torch.randn(6, 16)


def _kept(adapt, params, x):
    """Return the factor of each output of the update in one call, (6, 24)."""
    return (adapt.train()(params, x) - adapt.base(x)) / (adapt.eval()(params, x) - adapt.base(x))


def test_rank_dropout_drops_outputs_for_all_rows_of_a_call(cfg):
    adapt, params, x = _setup(dataclasses.replace(cfg, rank_dropout=0.5))
    kept = _kept(adapt, params, x)
    torch.testing.assert_close(kept, kept[:1].expand(6, -1), rtol=1e-3, atol=1e-3)
    stay = kept[0] > 0.5
    assert 4 < stay.sum() < 20
    rest = 24 / stay.sum() if cfg.name in RESCALED or getattr(cfg, "rank_dropout_scale", False) else torch.ones(())
    torch.testing.assert_close(kept[0], stay * rest, rtol=1e-3, atol=1e-3)


def test_module_dropout_drops_the_update_of_a_layer(cfg):
    adapt, params, x = _setup(dataclasses.replace(cfg, module_dropout=0.5))
    torch.manual_seed(0)
    calls = torch.stack([_kept(adapt, params, x) for _ in range(20)]).round()
    assert set(calls.amax((1, 2)).tolist()) == set(calls.amin((1, 2)).tolist()) == {0.0, 1.0}


def test_rows_of_a_mixed_batch_have_draws_of_their_own_that_a_seed_repeats(cfg):
    for remat in (None, "^0$"):
        adapt, params, x = _setup(dataclasses.replace(cfg, rank_dropout=0.5, module_dropout=0.1), remat=remat)
        train, stacked, same = adapt.train(), ll.stack([params] * 6), x[:1].expand(6, -1)
        torch.manual_seed(1)
        got = train.mixed(stacked, same)
        assert len({tuple(row.tolist()) for row in got}) > 3
        torch.manual_seed(1)
        assert torch.equal(got, train.mixed(stacked, same))


def test_recomputed_layers_draw_the_same(cfg):
    grads = []
    for remat in (None, "^0$"):
        adapt, params, x = _setup(dataclasses.replace(cfg, rank_dropout=0.5), remat=remat)
        train = adapt.train()
        torch.manual_seed(2)
        grads.append(ll.value_and_grad(lambda p, f=train, x=x: f(p, x).square().sum())(params)[1]["0"])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_nothing_left_is_no_update_and_no_nan(cfg):
    adapt, params, x = _setup(dataclasses.replace(cfg, rank_dropout=0.999))
    torch.manual_seed(3)
    assert adapt.train()(params, x).isfinite().all()
