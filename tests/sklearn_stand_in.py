"""A stand-in for scikit-learn, which PEFT's AdaMSS needs for k-means alone. `test_adamss.py` holds ours against recorded results of it."""

import sys
import types

import torch

from lora_lite.variants._subspaces import clusters


class KMeans:
    """The part of `sklearn.cluster.KMeans` that PEFT uses, for the options that it uses."""

    def __init__(self, n_clusters, init, n_init, max_iter, random_state):
        assert (init, n_init, max_iter, random_state) == ("random", 1, 10, 123456789)
        self.n_clusters = n_clusters

    def fit_predict(self, rows):
        return clusters(torch.from_numpy(rows), self.n_clusters).numpy()


def stand_in(monkeypatch):
    """Let `import sklearn` find the stand-in during a test."""
    cluster = types.ModuleType("sklearn.cluster")
    cluster.KMeans = KMeans
    whole = types.ModuleType("sklearn")
    whole.cluster = cluster
    monkeypatch.setitem(sys.modules, "sklearn", whole)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", cluster)
