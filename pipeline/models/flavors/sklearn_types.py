"""Types in skops files that are safe to load, beside those that skops itself trusts.

All of them only hold numbers, and call nothing but each other. If they crash, they do so at the first load, in a child
process.
"""

from __future__ import annotations

_BY_MODULE = {
    # What it calls must be trusted, too.
    "functools": ("partial",),
    "numpy": ("dtype",),
    "sklearn._loss.loss": (
        "HalfTweedieLossIdentity",
        "HalfTweedieLoss",
        "HalfSquaredError",
        "HalfPoissonLoss",
        "HalfGammaLoss",
        "HalfBinomialLoss",
        "HalfMultinomialLoss",
        "AbsoluteError",
        "PinballLoss",
        "HuberLoss",
    ),
    "sklearn.calibration": ("_CalibratedClassifier", "_SigmoidCalibration"),
    "sklearn.ensemble._hist_gradient_boosting.predictor": ("TreePredictor",),
    "sklearn.feature_selection._univariate_selection": ("chi2", "f_classif", "f_regression"),
    "sklearn.gaussian_process._gpc": ("_BinaryGaussianProcessClassifierLaplace",),
    "sklearn.gaussian_process.kernels": (
        "ConstantKernel",
        "DotProduct",
        "Matern",
        "Product",
        "RationalQuadratic",
        "RBF",
        "Sum",
        "WhiteKernel",
    ),
    "sklearn.metrics._dist_metrics": ("EuclideanDistance64", "ManhattanDistance64", "MinkowskiDistance64"),
    "sklearn.metrics._scorer": ("_PassthroughScorer",),
    "sklearn.model_selection._split": ("KFold", "StratifiedKFold"),
    "sklearn.neighbors._ball_tree": ("BallTree",),
    "sklearn.neighbors._kd_tree": ("KDTree",),
    "sklearn.neural_network._stochastic_optimizers": ("AdamOptimizer", "SGDOptimizer"),
    "sklearn.tree._tree": ("Tree",),
    "sklearn.utils._bunch": ("Bunch",),
    "sklearn.utils.validation": ("check_array",),
}
TRUSTED = frozenset(f"{module}.{name}" for module, names in _BY_MODULE.items() for name in names)
"""Names of the types."""
