"""The simulation in short: intervals hold the truth as often as they say, and those that leave out a part do not."""

import numpy as np
import pytest

from ablations.simulate import main, write_coverage
from ablations.simulation.coverage import METHODS, Coverage, coverage, holds, make_design, true_ap
from ablations.simulation.detectors import SCORES, Detector, average_precision, draw_images


def test_ap_of_histograms_is_that_of_a_list():
    random = np.random.default_rng(0)
    images = draw_images(40, random)
    run = Detector.draw(0.0, images, random).run(0.0, images, random)
    weights = random.multinomial(40, np.full(40, 1 / 40), size=3)
    expected = []
    for of_image in weights:
        dense = (run.toarray() * of_image).sum(axis=1).reshape(SCORES, -1)
        aps = []
        for threshold in range(1, 11):
            points = []
            hits = every = 0.0
            for score in range(SCORES):
                hits += dense[score, threshold:].sum()
                every += dense[score].sum()
                if every:
                    points.append((hits / (of_image @ images.objects), hits / every))
            best = [max((p for r, p in points if r >= level - 1e-9), default=0.0) for level in np.linspace(0, 1, 101)]
            aps.append(np.mean(best))
        expected.append(100 * np.mean(aps))
    assert average_precision(run, images.objects, weights.T.astype(np.float32)) == pytest.approx(expected, rel=1e-4)


def test_intervals_hold_the_truth_and_those_of_one_part_do_not():
    design = make_design(depths=(1,))
    truth = true_ap(design, 20_000, np.random.default_rng(0))
    lines = coverage(design, truth, 300, 3, draws=40, replicates=50)
    found = {(line.kind, line.method): line for line in lines}
    for kind in ("differences", "effects"):
        reported = found[kind, METHODS[0]]
        # With 40 tables the share is known to some 0.02.
        assert 0.91 < reported.coverage < 0.985 and 0 < reported.error < 0.03, reported
        for method in ("training only", "images only"):
            assert found[kind, method].coverage < reported.coverage - 0.03, found[kind, method]
            assert found[kind, method].half_width < reported.half_width
        assert found[kind, "one part counted twice"].coverage > reported.coverage


def test_true_differences_are_those_of_the_abilities():
    design = make_design()
    truth = true_ap(design, 5_000, np.random.default_rng(1))
    assert len(truth) == 17
    assert sorted(truth, key=truth.get)[0] == ("none", 1) and sorted(truth, key=truth.get)[-1] == ("LSC", 2)


def test_the_table_is_written(tmp_path):
    lines = [
        Coverage(150, 3, "effects", METHODS[0], 0.951, 0.004, 2.5),
        Coverage(150, 3, "effects", METHODS[3], 0.6, 0, 1),
    ]
    csv, markdown = write_coverage(lines, 10, 20, "device: Test CPU", tmp_path)
    assert csv.read_text().startswith("# device: Test CPU\nimages,seeds,kind,method,coverage,error,half_width\n150,3,")
    text = markdown.read_text()
    assert "0.951 ± 0.004 |" in text and "10 tables of 16 cells" in text
    assert holds(lines[0]) and not holds(lines[1])


def test_too_few_draws_are_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--draws", "1"])
    assert caught.value.code == 2 and "2 or more" in capsys.readouterr().err
