"""Analyses of studies: made-up runs say what they were made to say, and verdicts follow from criteria."""

import dataclasses
import json
import math

import numpy as np
import pytest

from configs import trials
from eval.report import save
from eval.report.document import HeatMap
from eval.report.heatmaps import draw, shade
from eval.report.pictures import save_pictures
from eval.studies import ANALYSES
from eval.studies.page import report_of
from eval.studies.reading import difference, result
from eval.studies.types import Record, judge


def record(factors, *, seed=0, state=1000, result=None, probes=None):
    arm = "_".join(map(str, factors.values()))
    return Record(arm, factors, 1.0, seed, f"runs/{arm}", 10_000, state, {}, result or {}, probes or {})


def verdicts(analysis):
    return {finding.claim: finding.verdict for finding in analysis.findings}


def starting(analysis, words):
    (found,) = [finding for finding in analysis.findings if words in finding.claim]
    return found


def test_verdicts():
    assert judge((0.1, 0.3)) == "reproduced"
    assert judge((0.1, 0.3), clear=False) == "not reproduced at this scale"
    assert judge((-0.1, 0.3)) == judge((0.1, 0.3), 0.2) == "not reproduced at this scale"
    assert judge((-0.2, -0.1)) == judge((0.1, 0.15), 0.2) == "contradicted"
    assert judge((math.nan, math.nan)) == "not measured"


def test_differences_are_of_seeds_drawn_anew():
    sides = [
        [record({"a": side}, seed=s, result={"m": side + s / 10}) for s in range(3)] for side in (1.0, 0.0)
    ]
    apart, (low, high) = difference(*sides, result("m"))
    assert apart == pytest.approx(1) and 0.8 < low < 1 < high < 1.2
    assert difference(sides[0][:1], sides[1][:1], result("m"))[1] == (1.0, 1.0)
    assert math.isnan(difference(sides[0], [], result("m"))[0])


def recall_records(attention, mamba2):
    metric = "validation/accuracy"
    at = {"attention": attention, "mamba2": mamba2, "hybrid": attention - 0.01}
    sized = {f"{metric}_32_4": 0.9, f"{metric}_64_8": 0.5, f"{metric}_128_8": 0.1}
    equal = [
        record(
            {"task": "mqar", "architecture": name, "compared": True},
            seed=s,
            result={metric: v - s / 100, **sized},
        )
        for name, v in at.items()
        for s in (0, 1)
    ]
    swept = [
        record(
            {"task": "mqar", "architecture": "mamba2", "d_state": n}, state=100 * n, result={metric: n / 100}
        )
        for n in (4, 8, 16, 32, 64)
    ]
    return equal + swept


def test_recall_by_architecture_and_by_state():
    analysis = ANALYSES["recall"](recall_records(0.99, 0.5), {})
    assert set(verdicts(analysis).values()) == {"reproduced"} and len(analysis.findings) == 3
    assert starting(analysis, "grows").numbers["correlation"] == pytest.approx(1)
    (heat, by_items), (chart,) = (section.blocks for section in analysis.sections)
    assert list(by_items.series[-1].x) == [4, 8] and by_items.series[-1].y == [0.9, 0.5]
    assert heat.y == ["attention", "mamba2", "hybrid"] and heat.values[1][0] == pytest.approx(0.495)
    assert list(chart.series[0].x) == [400, 800, 1600, 3200, 6400]
    assert (
        starting(ANALYSES["recall"](recall_records(0.5, 0.9), {}), "At equal size").verdict == "contradicted"
    )


def capacity_records(t_forget, t_recall):
    lengths, found = [64, 128, 256, 512, 1024], []
    for d_state, state in ((4, 1000), (8, 2000), (16, 4000), (32, 8000), (64, 16_000)):
        for length in lengths:
            learned = length >= t_forget(state / 1e3)
            numbers = {"forgets": int(learned), "loss_growth": {"text": 1 if learned else 3}}
            probes = {"": {"state_collapse": numbers}}
            factors = {"measures": "forget", "d_state": d_state, "length": length}
            found.append(record(factors, state=state, probes=probes))
        reach = t_recall(state / 1e3)
        reached = {f"{at}x": at for at in (reach, 2 * reach, 9999)}
        exact = dict(zip(reached, (0.97, 0.5, state / 20_000)))
        passkey = {"lengths": reached, "stuffed_mamba_exact_match": exact}
        factors = {"measures": "recall", "d_state": d_state, "length": 512}
        found.append(record(factors, state=state, probes={"": {"passkey": passkey}}))
    return found


def test_state_capacity_fits_its_two_laws():
    analysis = ANALYSES["state_capacity"](
        capacity_records(lambda n: 64 * n + 1, lambda n: 100 * (1.4**n - 1) + 64), {}
    )
    forget, ranks, recall = analysis.findings
    # From the second size on: the first forgets at 128, the last at none of the lengths.
    assert list(forget.numbers["points"]) == [(1, 128), (2, 256), (4, 512), (8, 1024)]
    assert forget.verdict == "reproduced" and forget.numbers["parameters"]["a"] == pytest.approx(126, rel=0.1)
    assert "1 at none" in forget.found
    assert recall.verdict == "reproduced" and recall.numbers["parameters"]["c"] == pytest.approx(
        1.4, rel=1e-3
    )
    # Of the one context that every size was asked at.
    assert [y for _, y in ranks.numbers["points"]] == [0.05, 0.1, 0.2, 0.4, 0.8]
    assert ranks.verdict == "reproduced" and ranks.numbers["correlation"] == pytest.approx(1)
    assert recall.numbers["r2"] > recall.numbers["r2_of_a_line"]
    scatter, curve = analysis.sections[1].blocks[0].series
    assert (
        curve.name.startswith("T = 100 (1.4^x - 1) + 64")
        and not scatter.line
        and curve.y[-1] == pytest.approx(scatter.y[-1], rel=1e-2)
    )
    _, heat, growth = analysis.sections[0].blocks
    assert growth.values[0] == [3, 1, 1, 1, 1]
    _, exact = analysis.sections[1].blocks  # no digits were counted
    assert exact.values[0][0] == 0.97
    assert heat.values[0] == [0, 1, 1, 1, 1] and heat.values[-1] == [0] * 5


def test_models_that_all_forget_measure_no_law():
    analysis = ANALYSES["state_capacity"](capacity_records(lambda n: 1, lambda n: 100), {})
    forget, _, recall = analysis.findings
    assert forget.verdict == "not measured" and "5 sizes already at the shortest length" in forget.found
    assert recall.verdict != "reproduced", "the same context whatever the state"


def probe(longest, error=0.01, lengths=(128, 256, 1024)):
    names = {f"{n // 128}x": n for n in lengths}
    above = dict(zip(names, np.linspace(0, longest, len(names)).tolist()))
    return {
        "length_extrapolation": {
            "training_length": 128,
            "lengths": names,
            "bits_per_byte": {name: 2 + value for name, value in above.items()},
            "bits_per_byte_above_1x": above,
            "bits_per_byte_above_1x_standard_error": dict.fromkeys(names, error),
            "bits_per_byte_sliding_window": {"1x": 2.0, "2x": 1.9},
        },
        "loss_by_position": {"bins": {"long_documents": {"context": [1, 2], "loss": [3, 2]}}},
    }


def test_length_extrapolation_and_what_mends_it():
    runs = [
        record({"architecture": "mamba2"}, probes={"": probe(1.0), "window": probe(0.1), "rri": probe(1.5)}),
        record({"architecture": "mamba2", "longer": True}, probes={"": probe(-0.2)}),
        record({"architecture": "attention"}, probes={"": probe(0.01), "yarn": probe(0.005)}),
    ]
    analysis = ANALYSES["length"](runs, {})
    found = {claim.split(" (")[0]: verdict for claim, verdict in verdicts(analysis).items()}
    assert found == {
        "mamba2: the loss rises beyond the training length": "reproduced",
        "mamba2: window keeps the loss from rising beyond the training length": "reproduced",
        "mamba2: rri keeps the loss from rising beyond the training length": "contradicted",
        "mamba2: after training on longer text, states carried on, the loss does not rise": "reproduced",
        "attention: the loss rises beyond the training length": "not reproduced at this scale",
        "attention: yarn keeps the loss from rising beyond the training length": "not measured",
    }
    last, sliding, positions = analysis.sections[0].blocks
    assert list(sliding.series[0].x) == [128, 256] and list(positions.series[0].y) == [3, 2]
    assert [s.name for s in last.series] == ["mamba2", "attention"]
    assert [s.name for s in analysis.sections[1].blocks[0].series] == [
        "as trained",
        "window",
        "rri",
        "trained longer",
    ]


def test_polarisation_needs_depth_to_pay_only_with_channels():
    at = {("default", 2): 0.36, ("default", 4): 0.34, ("one", 2): 0.56, ("both", 2): 0.55, ("both", 4): 0.82}
    runs = [
        record({"channels": c, "depth": d}, seed=s, result={"m": v + s / 100})
        for (c, d), v in at.items()
        for s in (0, 1)
    ]
    analysis = ANALYSES["polarisation"](runs, {"by_pairs": {256: "m"}})
    assert set(verdicts(analysis).values()) == {"reproduced"} and len(analysis.findings) == 3
    assert "81.56 % against 33.52 %" in analysis.findings[0].claim
    assert analysis.findings[2].numbers["difference"] == pytest.approx(0.29)


def test_a_hybrid_needs_little_attention():
    lm, mqar = {0: 1.6, 0.25: 1.4, 1: 1.5}, {0: 0.4, 0.25: 0.97, 1: 0.99}
    runs = [record({"task": "lm", "share": s}, result={"validation/bits_per_byte": v}) for s, v in lm.items()]
    runs += [record({"task": "mqar", "share": s}, result={"validation/accuracy": v}) for s, v in mqar.items()]
    analysis = ANALYSES["hybrid_ratio"](runs, {})
    assert set(verdicts(analysis).values()) == {"reproduced"}
    assert analysis.findings[0].numbers["share"] == 0.25 and analysis.findings[0].numbers[
        "difference"
    ] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "name",
    ["architectures_recall", "state_capacity", "length_extrapolation", "polarisation", "layers_hybrid_ratio"],
)
def test_every_study_has_its_presets_and_reports_an_empty_directory(name, tmp_path):
    for preset in ("smoke", "cpu", "full"):
        study = trials.load(f"configs/sweeps/{name}.py:{preset}")
        assert study.name == f"{name}:{preset}" and study.analysis in ANALYSES
    page = report_of(study, [])
    assert "0 of" in page.notes[0]
    save(page, tmp_path / "study.html")
    some = "smoke, (mqar, copying, |passkey, |mamba2, )?cpu or full"
    with pytest.raises(ValueError, match=f"{name}.py:tiny: use {some}"):
        trials.load(f"configs/sweeps/{name}.py:tiny")


def test_a_report_shows_findings_heat_maps_and_points_and_saves_pictures(tmp_path):
    study = trials.load("configs/sweeps/architectures_recall.py:smoke")
    report = report_of(study, recall_records(0.9, 0.4), tried={"mqar_mamba2": {1.0: 0.4, 0.3: None}})
    save(report, tmp_path / "s.html")
    page, data = (tmp_path / "s.html").read_text(), json.loads((tmp_path / "s.json").read_text())
    assert "reproduced" in page and "1: 0.4, 0.3: failed" in page and 'class="cell"' in page
    assert len(data["data"]["records"]) == 11 and data["data"]["findings"][0]["verdict"] == "reproduced"
    paths = save_pictures(report, tmp_path / "pictures")
    assert [p.name for p in paths] == [
        "01_by_architecture_accuracy.png",
        "02_by_architecture_accuracy_on_mqar.png",
        "03_by_size_of_the_state_accuracy_by_state_size.png",
    ]
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in paths)


def test_heat_maps_leave_blank_what_is_missing_and_escape_names():
    heat = HeatMap("T", "x", "y", ["<a>", "b"], ["r"], [[0.5, math.nan]], high=2.0)
    drawn = draw(heat)
    assert drawn.count('class="cell"') == 1 and drawn.count('class="cell none"') == 1
    assert "&lt;a&gt;" in drawn and ">0.50<" in drawn
    assert (shade(heat, 0.5), shade(heat, 9.0), shade(heat, -1.0)) == (0.25, 1.0, 0.0)
    assert "nothing recorded" in draw(dataclasses.replace(heat, x=[], values=[[]]))
