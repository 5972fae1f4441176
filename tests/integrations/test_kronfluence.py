"""kronfluence: the influence of training rows, on `LinearLayers`."""

import gc

import pytest
import torch
from subjects import LINEAR, subject

import lora_lite as ll
from lora_lite.integrations.linear_layers import LinearLayers

kronfluence = pytest.importorskip("kronfluence", reason="kronfluence is not installed: pip install kronfluence")
from kronfluence.arguments import FactorArguments, ScoreArguments  # noqa: E402  # after the skip

DAMPING = 1e-3


@pytest.fixture(autouse=True)
def _few_objects_to_collect():
    """kronfluence collects garbage ten times a run, which takes seconds with all that a test run has imported."""
    gc.freeze()
    yield
    gc.unfreeze()


class Squares(kronfluence.Task):
    """Half the sum of squares, as loss and as measurement."""

    def compute_train_loss(self, batch, model, sample=False):
        return 0.5 * (model(batch[0]) - batch[1]).square().sum()

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


def _scores(module, strategy, train, query, folder):
    model = kronfluence.prepare_model(module, Squares())
    analyzer = kronfluence.Analyzer("it", model, Squares(), cpu=True, output_dir=str(folder), disable_tqdm=True, disable_model_save=True)
    analyzer.fit_all_factors(
        *("factors", train, 2),
        factor_args=FactorArguments(
            strategy=strategy,
            use_empirical_fisher=True,
            **{
                f"{kind}_dtype": torch.float64 for kind in ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
            },
        ),
        overwrite_output_dir=True,
    )
    analyzer.compute_pairwise_scores(
        *("scores", "factors", query, train, 2, 2),
        score_args=ScoreArguments(
            damping_factor=DAMPING, per_sample_gradient_dtype=torch.float64, precondition_dtype=torch.float64, score_dtype=torch.float64
        ),
        overwrite_output_dir=True,
    )
    return analyzer.load_pairwise_scores("scores")["all_modules"]


def _setting(cfg):
    adapt, params, x, y = subject(cfg, rows=6)
    rows = {}
    for part in (slice(0, 4), slice(4, 6)):
        losses = ll.per_example_grad(adapt, lambda output, _, part=part: 0.5 * (output - y[part]).square().sum(-1))
        rows[part.start] = losses(params, x[part])
    data = [torch.utils.data.TensorDataset(x[part], y[part]) for part in (slice(0, 4), slice(4, 6))]
    return adapt, params, data, rows[0], rows[4]


def _tall(g):
    """Return a leaf's gradients as matrices `(rows, long, short)`."""
    g = g.flatten(2) if g.dim() > 2 else g.reshape(len(g), -1, 1)
    return g.transpose(1, 2) if g.shape[1] < g.shape[2] else g


def gradients(cfg, folder):
    """Without curvature a score is the product of a training row's gradient and a query's."""
    adapt, params, (train, query), trained, asked = _setting(cfg)
    want = sum(q.reshape(len(q), -1) @ g.reshape(len(g), -1).t() for q, g in zip(ll.tree_leaves(asked), ll.tree_leaves(trained)))
    got = _scores(LinearLayers(adapt, params), "identity", train, query, folder)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))
    assert want.abs().min() > 0


def ekfac(cfg, folder):
    """With EK-FAC's curvature a score is the product through the eigenvectors of each leaf's factor, and their second moments."""
    adapt, params, (train, query), trained, asked = _setting(cfg)
    want = 0
    for q, g in zip(map(_tall, ll.tree_leaves(asked)), map(_tall, ll.tree_leaves(trained))):
        vectors = torch.linalg.eigh(torch.einsum("nak,nbk->ab", g, g))[1]
        q, g = vectors.t() @ q, vectors.t() @ g
        want = want + torch.einsum("qak,nak->qn", q, g / (g.square().mean(0) + DAMPING))
    got = _scores(LinearLayers(adapt, params), "ekfac", train, query, folder)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


CHECKS = {"kronfluence": (gradients, ekfac)}


@LINEAR
@pytest.mark.parametrize("check", CHECKS["kronfluence"], ids=lambda check: check.__name__)
def test_kronfluence(row, check, tmp_path):
    check(row.cfg, tmp_path)
