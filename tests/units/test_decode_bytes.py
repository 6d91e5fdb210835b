"""One-token steps on TPU: XLA reads a state once and writes it once, so they have no kernels."""

import pytest

from benchmarks import case_bytes
from runtime import aot


@pytest.mark.aot
@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
@pytest.mark.parametrize(
    "case, chip, batch",
    [("selective_scan_token", "v5e", 1), ("selective_scan_token", "v6e", 8), ("ssd_token", "v5p", 8)],
)
def test_one_token_moves_what_it_must(case, chip, batch):
    found = case_bytes.measure(f"benchmarks.recurrence_cases:{case}", chip, batch=batch)
    assert not found.kernels
    assert found.moved <= 1.07 * found.held
