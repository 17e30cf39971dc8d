"""Metrics against torch-fidelity, guided-diffusion's arithmetic, prdc and CMMD's own formula.

torch-fidelity's Inception-v3 gets random weights: by its own initialisation features of different pictures differ by
5e-8, and anything would agree. With He's, and random statistics of the normalisations, they differ by a tenth and more.
"""

from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch_fidelity")
prdc = pytest.importorskip("prdc")

import scipy.linalg
from torch_fidelity import feature_extractor_inceptionv3, metric_fid, metric_isc, metric_kid, metric_prc
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from unclip_jax.evaluation import features
from unclip_jax.evaluation.frechet import cmmd, fid, frechet_distance, grouped_statistics, polynomial_mmd, statistics
from unclip_jax.evaluation.inception_score import inception_score
from unclip_jax.evaluation.manifold import precision_recall
from unclip_jax.models.inception import resize
from unclip_jax.pretrained import __main__ as command

CARD = {"weights": "random", "features": "pool"}


def scenes(n, side, seed=0):
    """Pictures that differ as a whole: a few colours, smoothly joined, and noise."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 255, (n, 2, 2, 3))
    share = np.linspace(0, 1, side)
    weights = np.stack([1 - share, share])
    smooth = np.einsum("ya,xb,nabc->nyxc", weights.T, weights.T, corners)
    return np.clip(smooth + rng.normal(size=smooth.shape) * 30, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as torch-fidelity publishes it, of random weights."""
    torch.manual_seed(0)
    loaded = mock.patch.object(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
    with loaded, mock.patch.object(torch.nn.Module, "load_state_dict", lambda *_, **__: None):
        network = feature_extractor_inceptionv3.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def theirs(weights):
    """Pictures uint8 (N, H, W, 3) → torch-fidelity's features; mixed_6/conv, which it does not give out, by a hook."""
    extractor = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    network = extractor("inception-v3-compat", ["2048", "logits_unbiased"], str(weights))

    def run(images):
        spatial = []
        hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: spatial.append(out))
        with torch.no_grad():
            pool, logits = network(torch.from_numpy(np.moveaxis(images, -1, 1).copy()))
        hook.remove()
        places = spatial[0][:, :7].permute(0, 2, 3, 1).reshape(len(images), -1)
        return {"pool": pool.numpy(), "spatial": places.numpy(), "logits": logits.numpy()}

    return run


@pytest.fixture(scope="module")
def ours(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours") / "inception"
    assert command.main(["pretrained", "inception", str(weights), "--out", str(folder)]) == 0
    return features.inception(folder, features.NAMES, rows=1)


@pytest.mark.parametrize("side", [64, 256, 320])
def test_inception(ours, theirs, side, seen):
    images = scenes(8, side)
    found, expected = ours(images), theirs(images)
    for name, reference in expected.items():
        spread = reference.std(axis=0).mean()
        assert spread > 0.1, f"{name}: pictures that hardly differ compare nothing"
        error = np.abs(found[name] - reference).max() / np.abs(reference).max()
        seen(f"Inception-v3 {name}", error)
        assert error < 2e-5, f"{name}: {error}"


@pytest.mark.parametrize(("height", "width"), [(64, 64), (256, 256), (299, 299), (333, 500), (5, 1000)])
def test_resize(height, width, seen):
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.float32)
    tensor = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
    found = np.moveaxis(np.asarray(resize(images, 299)), -1, 1)
    reference = interpolate_bilinear_2d_like_tensorflow1x(tensor, size=(299, 299), align_corners=False).numpy()
    error = np.abs(found - reference).max()
    seen("TensorFlow 1's resize, grey levels", error)
    assert error < 1e-3
    half_pixel = torch.nn.functional.interpolate(tensor, size=(299, 299), mode="bilinear", align_corners=False)
    assert (height, width) == (299, 299) or np.abs(half_pixel.numpy() - reference).max() > 30


def guided_diffusion(a, b):
    """The arithmetic of guided-diffusion's evaluator: NumPy's covariances, and the root of their product."""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(axis=0), np.cov(x, rowvar=False)) for x in (a, b))
    root = scipy.linalg.sqrtm(cov_a.dot(cov_b))
    step = mean_a - mean_b
    return step.dot(step) + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root.real)


def sets(n, d, shift):
    rng = np.random.default_rng(d)
    mixing = rng.normal(size=(d, d)) / np.sqrt(d)
    both = [np.abs(rng.normal(size=(count, d)) @ mixing + step) for count, step in zip(n, (0, shift), strict=True)]
    return [x.astype(np.float32) for x in both]


@pytest.mark.parametrize(("n", "d"), [((1500, 1000), 64), ((400, 300), 200), ((60, 50), 100)])
def test_fid(n, d, seen):
    """Also of fewer pictures than features, where the covariances are singular."""
    a, b = sets(n, d, 0.3)
    result = fid(grouped_statistics([a], 10, CARD), statistics([b], CARD))
    as_float64 = [x.astype(np.float64) for x in (a, b)]
    by = [metric_fid.fid_features_to_statistics(torch.from_numpy(x)) for x in as_float64]
    fidelity = metric_fid.fid_statistics_to_metric(*by, False)[metric_fid.KEY_METRIC_FID]
    for name, reference in (("torch-fidelity", fidelity), ("guided-diffusion", guided_diffusion(*as_float64))):
        error = abs(result.value - reference) / reference
        seen(f"FID, {name}{', singular' if d > min(n) else ''}", error)
        assert error < 1e-5, name


def test_fid_of_features(ours, theirs, seen):
    """The whole way, from pictures; spatial features too."""
    drawn, truth = scenes(16, 64, 1), scenes(12, 64, 2)
    found, known = ours(drawn), ours(truth)
    expected, reference = theirs(drawn), theirs(truth)
    for name in ("pool", "spatial"):
        value = frechet_distance(statistics([found[name]], CARD), statistics([known[name]], CARD))
        by = [
            metric_fid.fid_features_to_statistics(torch.from_numpy(x[name].astype(np.float64)))
            for x in (expected, reference)
        ]
        theirs_value = metric_fid.fid_statistics_to_metric(*by, False)[metric_fid.KEY_METRIC_FID]
        seen(f"FID of {name} features, from pictures", abs(value - theirs_value) / theirs_value)
        assert value == pytest.approx(theirs_value, rel=1e-4)


def test_kid(seen):
    a, b = (x.astype(np.float64) for x in sets((200, 200), 64, 0.1))
    options = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    reference = metric_kid.kernel_mmd(a, b, **options | {"kid_kernel_poly_coef0": 1.0})
    seen("KID, torch-fidelity", abs(polynomial_mmd(a, b) - reference) / abs(reference))
    assert polynomial_mmd(a, b) == pytest.approx(reference, rel=1e-9)


def test_cmmd(seen):
    """The formula of google-research's cmmd/distance.py, in float64."""
    a, b = (x.astype(np.float64) for x in sets((150, 130), 32, 0.2))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))

    def mean(x, y):
        squares = [np.diag(z @ z.T) for z in (x, y)]
        return np.mean(np.exp(-(1 / (2 * 10**2)) * (-2 * x @ y.T + squares[0][:, None] + squares[1][None])))

    reference = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    seen("CMMD, google-research", abs(cmmd(a, b).value - reference) / reference)
    assert cmmd(a, b).value == pytest.approx(reference, rel=1e-7)


@pytest.mark.parametrize("splits", [1, 4])
def test_inception_score(splits, seen):
    logits = (2 * np.random.default_rng(0).normal(size=(400, 1008))).astype(np.float32)
    reference = metric_isc.isc_features_to_metric(torch.from_numpy(logits), splits, shuffle=False)
    result = inception_score(logits, 400 // splits)
    mean, std = reference[metric_isc.KEY_METRIC_ISC_MEAN], reference[metric_isc.KEY_METRIC_ISC_STD]
    seen("Inception Score, torch-fidelity", abs(result.value - mean) / mean)
    assert result.value == pytest.approx(mean, rel=1e-9)
    assert result.card["std"] == pytest.approx(std, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("k", [3, 5])
def test_manifold(k, seen):
    real, drawn = sets((700, 600), 32, -0.4)
    found = {name: result.value for name, result in precision_recall(drawn, real, k).items()}
    reference = prdc.compute_prdc(real, drawn, k)
    for name, value in reference.items():
        seen(f"{name}, prdc", abs(found[name] - value))
        assert found[name] == pytest.approx(value, abs=1e-9) and value > 0.05
    precision, recall = metric_prc.calculate_precision_recall_full(torch.from_numpy(drawn), torch.from_numpy(real), k)
    assert (found["precision"], found["recall"]) == (pytest.approx(precision), pytest.approx(recall))
