"""Counting cycles in the schedule that the TPU compiler writes."""

import pytest

from benchmarks import static_cycles
from runtime import aot

# Three bundles before the grid loop of 10 trips, whose body holds an inner loop of 64; 4 bundles run after a
# branch.
SCHEDULE = """
  0x0   : > { %s1 = smov 0 }
  0x1   : > { %p9_p2 = scmp.ge.s32.totalorder %s1, 7 }
  0x2   : > { }
  0x3 LB: > { %v1 = vld [vmem:[%s1]] }
  0x4   : > { %20 = sbr.rel (%p9_p2) target = $region2 }
  0x5 LB: >> { %p5_p1 = scmp.ge.s32.totalorder %s2, 64 /* loop exit test */ }
  0x6   : >> { %21 = sbr.rel (!%p5_p1) target = $region5 }
  0x7   :  {}
  0x8   :  {}
  0x9   :  {}
  0xa   :  {}
  0xb   : > { %p6_p1 = scmp.ge.s32.totalorder %s3, 10 /* loop exit test */ }
  0xc   : > { %22 = sbr.rel (!%p6_p1) target = $region1 }
  0xd   :  {}
  0xe   :  {}
  0xf   :  {}
  0x10   :  {} /* exit bundle: %kernel.1 = custom-call(%x.1) */
"""
# Of a loop of 10 trips, two of twelve bundles run in the first only.
FIRST = """
  0x0 LB: > { %p1_p1 = scmp.ne.s32.totalorder %s3, 0 }
  0x1   : > { %21 = sbr.rel (%p1_p1) target = $region7 }
  0x2   :  {}
  0x3   :  {}
  0x4   :  {}
  0x5   :  {}
  0x6   : > { %v1 = vld [vmem:[%s1]] }
  0x7   : > { %v1 = vld [vmem:[%s1]] }
  0x8 PF: > { } /* Start/End empty region 7 :: Start region 71 */
  0x9   : > { %p6_p1 = scmp.ge.s32.totalorder %s3, 10 /* loop exit test */ }
  0xa   : > { %22 = sbr.rel (!%p6_p1) target = $region1 }
"""
UTILIZATION = "== CAPACITY:\nMXU, VSTORE:SPILL\n 4 1\n== UTILIZATION:\n" + "4 0\n" * 5 + "0 1\n" * 12


def test_bundles_count_as_often_as_their_loops_run(tmp_path):
    (tmp_path / "17-kernel.1-72-final_bundles.txt").write_text(SCHEDULE)
    (tmp_path / "17-kernel.1-71-schedule-analysis_final_bundles.txt").write_text(SCHEDULE)
    (tmp_path / "17-kernel.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(UTILIZATION)
    (tmp_path / "18-fusion.1-72-final_bundles.txt").write_text(SCHEDULE.replace("custom-call", "fusion"))
    (kernel,) = static_cycles.read_dump(tmp_path, "v5e")
    assert (kernel.name, kernel.bundles, kernel.trips) == ("kernel.1", 14, 10)
    assert kernel.cycles == 3 + 10 * (14 - 6) + 640 * 6
    assert kernel.ms == pytest.approx(kernel.cycles / 1.5e6)
    assert kernel.unit_use["MXU"] == pytest.approx((3 + 20) / kernel.cycles)


def test_a_loop_of_unknown_length_counts_once():
    text = SCHEDULE.replace("%s2, 64", "%s2, %s7")
    kernel = static_cycles.read_schedule("kernel.1", "v6e", text, UTILIZATION)
    assert kernel.unknown_loops == 1 and kernel.cycles == 3 + 10 * 14


def test_what_runs_once_a_walk_is_counted_apart():
    kernel = static_cycles.read_schedule("kernel.1", "v5e", FIRST, UTILIZATION)
    assert (kernel.cycles, kernel.seldom) == (11 * 10, 2 * 10)
    assert kernel.steady_ms == pytest.approx(90 / 1.5e6)


@pytest.mark.aot
@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
def test_a_program_that_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match="(?s)does not compile for v5e.*B has 3 groups for 8 heads"):
        static_cycles.measure("benchmarks.static_cases:ssd", "v5e", heads=8, groups=3)
