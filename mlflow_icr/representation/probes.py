"""Measures of a representation with labels, by scikit-learn: silhouette, linear probe and nearest neighbours."""

from __future__ import annotations

from torch import Tensor

from mlflow_icr.representation.companions import check_labels


def _check_rows(name: str, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if features.ndim != 2:
        raise ValueError(f"{name} features have shape {tuple(features.shape)}; expected (N, D): images, dimensions")
    return features.detach().double().cpu(), check_labels(labels, len(features)).cpu()


def silhouette(features: Tensor, labels: Tensor) -> float:
    """Mean silhouette coefficient of labelled features (N, D), from -1 to 1, in Euclidean distance.

    Raises ValueError for fewer than 2 or more than N - 1 classes. Source: Rousseeuw 1987; scikit-learn's `silhouette_score`.
    """
    from sklearn.metrics import silhouette_score

    x, y = _check_rows("labelled", features, labels)
    return float(silhouette_score(x.numpy(), y.numpy()))


def linear_probe_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, c: float = 1.0) -> float:
    """Share of test features (M, D) that logistic regression on the training features (N, D) classifies correctly.

    Features are standardised by the training set; `c` is the inverse strength of scikit-learn's l2 penalty.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = _check_rows("training", train, train_labels)
    x_test, y_test = _check_rows("test", test, test_labels)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))
    return float(probe.fit(x.numpy(), y.numpy()).score(x_test.numpy(), y_test.numpy()))


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, k: int = 20) -> float:
    """Share of test features (M, D) that their k nearest training features (N, D), by cosine, classify correctly.

    The majority decides, as in `KNeighborsClassifier`; k is at most N.
    """
    from sklearn.neighbors import KNeighborsClassifier

    x, y = _check_rows("training", train, train_labels)
    x_test, y_test = _check_rows("test", test, test_labels)
    neighbours = KNeighborsClassifier(n_neighbors=min(k, len(x)), metric="cosine", algorithm="brute")
    return float(neighbours.fit(x.numpy(), y.numpy()).score(x_test.numpy(), y_test.numpy()))
