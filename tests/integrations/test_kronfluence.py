"""kronfluence: the influence of training rows, on `LinearLayers`."""

import gc

import pytest
import torch
from subjects import LINEAR, THEIRS

import lora_lite as ll

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
    """Half the sum of squares, as loss and as measurement.

    Args:
        module: what is to be analysed; of its linear layers those count that are trained.
    """

    def __init__(self, module):
        self.tracked = [path for path, layer in module.named_modules() if type(layer) is torch.nn.Linear and layer.weight.requires_grad]

    def get_influence_tracked_modules(self):
        return self.tracked

    def compute_train_loss(self, batch, model, sample=False):
        return 0.5 * (model(batch[0]) - batch[1]).square().sum()

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


def _scores(module, strategy, train, query, folder):
    task = Squares(module)
    model = kronfluence.prepare_model(module, task)
    analyzer = kronfluence.Analyzer("it", model, task, cpu=True, output_dir=str(folder), disable_tqdm=True, disable_model_save=True)
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


PARTS = (slice(0, 4), slice(4, 6))


def _setting(case):
    """Return a subject, its training rows and its queries as data, and the gradients of both."""
    s = case(rows=6)
    rows = [s.by_row(lambda output, rows: 0.5 * (output - s.y[rows]).square().sum(-1), part) for part in PARTS]
    data = [torch.utils.data.TensorDataset(s.x[part], s.y[part]) for part in PARTS]
    return s, data, rows


def _tall(g):
    """Return a leaf's gradients as matrices `(rows, long, short)`."""
    g = g.flatten(2) if g.dim() > 2 else g.reshape(len(g), -1, 1)
    return g.transpose(1, 2) if g.shape[1] < g.shape[2] else g


def gradients(case, folder):
    """Without curvature a score is the product of a training row's gradient and a query's."""
    s, (train, query), (trained, asked) = _setting(case)
    want = sum(q.reshape(len(q), -1) @ g.reshape(len(g), -1).t() for q, g in zip(ll.tree_leaves(asked), ll.tree_leaves(trained)))
    got = _scores(s.layers(), "identity", train, query, folder)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))
    assert want.abs().min() > 0


def _assert_scores(got, want):
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def ekfac(case, folder):
    """With EK-FAC's curvature a score is the product through the eigenvectors of each leaf's factor, and their second moments."""
    s, (train, query), (trained, asked) = _setting(case)
    want = 0
    for q, g in zip(map(_tall, ll.tree_leaves(asked)), map(_tall, ll.tree_leaves(trained))):
        vectors = torch.linalg.eigh(torch.einsum("nak,nbk->ab", g, g))[1]
        q, g = vectors.t() @ q, vectors.t() @ g
        want = want + torch.einsum("qak,nak->qn", q, g / (g.square().mean(0) + DAMPING))
    _assert_scores(_scores(s.layers(), "ekfac", train, query, folder), want)


def ekfac_of_layers(case, folder):
    """The same with the eigenvectors of both factors of each linear layer: of its inputs, and of its outputs' gradients."""
    s, (train, query), (trained, asked) = _setting(case)
    module = s.layers()
    inputs, slopes = _moments(module, s.x[PARTS[0]], s.y[PARTS[0]])
    want = 0
    for (path, q), g in zip(asked[""].items(), trained[""].values()):
        right, left = (torch.linalg.eigh(moments[path.removesuffix(".weight")])[1] for moments in (inputs, slopes))
        q, g = left.t() @ q @ right, left.t() @ g @ right
        want = want + torch.einsum("qak,nak->qn", q, g / (g.square().mean(0) + DAMPING))
    _assert_scores(_scores(module, "ekfac", train, query, folder), want)


def _moments(module, x, y):
    """Return the second moments of the inputs, and of the outputs' gradients, of each linear layer by its path."""
    inputs, slopes, handles = {}, {}, []
    for path in Squares(module).tracked:

        def note(layer, args, output, path=path):
            inputs[path] = args[0].flatten(0, 1).t() @ args[0].flatten(0, 1)
            output.register_hook(lambda g: slopes.__setitem__(path, g.flatten(0, 1).t() @ g.flatten(0, 1)))

        handles.append(module.get_submodule(path).register_forward_hook(note))
    (0.5 * (module(x) - y).square().sum()).backward()
    for handle in handles:
        handle.remove()
    module.zero_grad()
    return inputs, slopes


CHECKS = {"kronfluence": (gradients, ekfac)}
OF_PEFT = {"kronfluence": (gradients, ekfac_of_layers)}


@LINEAR
@pytest.mark.parametrize("check", CHECKS["kronfluence"], ids=lambda check: check.__name__)
def test_kronfluence(case, check, tmp_path):
    check(case, tmp_path)


@pytest.mark.parametrize("case", [case for case in THEIRS if case.cfg.name == "lora"], ids=lambda case: case.cfg.name)
@pytest.mark.parametrize("check", OF_PEFT["kronfluence"], ids=lambda check: check.__name__)
def test_kronfluence_with_pefts_lora(case, check, tmp_path):
    check(case, tmp_path)
