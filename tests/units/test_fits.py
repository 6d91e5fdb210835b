"""Fitted laws: exact on exact data, honest about noise and about too few points."""

import math

import numpy as np
import pytest

from eval import fits


def test_a_line_is_found_with_an_interval_that_covers_it():
    x = np.linspace(0.8, 19.3, 12)
    exact = fits.linear(x, 5.172 * x - 4.469, resamples=50)
    assert exact.parameters == pytest.approx({"a": 5.172, "b": -4.469}) and exact.r2 == pytest.approx(1)
    noisy = fits.linear(x, 5.172 * x - 4.469 + np.random.default_rng(0).normal(0, 3, x.size), resamples=300)
    low, high = noisy.intervals["a"]
    assert low < 5.172 < high and 0.2 < high - low < 2 and 0.9 < noisy.r2 < 1
    assert noisy.points == 12 and noisy(2.0) == pytest.approx(
        2 * noisy.parameters["a"] + noisy.parameters["b"]
    )


def test_the_published_law_of_recall_is_found_back():
    x = np.array([0.8, 1.6, 2.4, 4.8, 12.9, 19.3])
    fit = fits.exponential(x, 4.756 * (1.365**x - 1) - 0.742, resamples=100)
    assert fit.parameters == pytest.approx({"a": 4.756, "c": 1.365, "b": -0.742}, rel=1e-3)
    assert fit.r2 > 0.999999 and fit(12.9) == pytest.approx(4.756 * (1.365**12.9 - 1) - 0.742, rel=1e-4)
    low, high = fit.intervals["c"]
    assert low == pytest.approx(1.365, rel=1e-2) and high == pytest.approx(1.365, rel=1e-2)


def test_an_exponential_of_a_straight_line_is_nearly_straight():
    x = np.arange(6.0)
    fit = fits.exponential(x, 3 * x + 1, resamples=0)
    assert fit.parameters["c"] < 1.01 and fit.r2 > 0.9999


def test_as_many_points_as_parameters_test_nothing():
    fit = fits.linear([1, 2], [3, 5])
    assert fit.parameters == pytest.approx({"a": 2, "b": 1})
    assert math.isnan(fit.r2) and math.isnan(fit.intervals["a"][0])


def test_rank_correlation():
    x = np.arange(1.0, 9)
    perfect = fits.spearman(x, np.exp(x), resamples=100)
    assert perfect.value == pytest.approx(1) and perfect.interval == pytest.approx((1, 1))
    tied = fits.spearman([1, 1, 2, 2], [1, 2, 3, 4], resamples=10)
    assert tied.value == pytest.approx(0.8944, abs=1e-4)
    assert math.isnan(fits.spearman(x, np.ones(8), resamples=10).value)


def test_intervals_of_means():
    assert math.isnan(fits.mean_interval([1.0])[0])
    low, high = fits.mean_interval([0.4, 0.5, 0.6, 0.5])
    assert 0.4 <= low < 0.5 < high <= 0.6


@pytest.mark.parametrize(
    ("fit", "x", "y", "message"),
    [
        (fits.linear, [1, 1], [1, 2], "2 different x, found 1"),
        (fits.exponential, [1, 2], [1, 2], "3 different x, found 2"),
        (fits.linear, [1, 2, 3], [1, 2], "shapes"),
        (fits.linear, [1, 2], [1, math.nan], "point 1"),
        (fits.spearman, [1, 2], [1, 2], "at least 3 points"),
    ],
)
def test_what_cannot_be_fitted_is_named(fit, x, y, message):
    with pytest.raises(ValueError, match=message):
        fit(x, y)
