"""Effects: their sizes, their intervals against contrasts by hand, which cells serve them, and how they are shown."""

import json

import numpy as np
import pytest
from scipy import stats
from synthetic_rows import make_row, make_rows

from ablations.rows.effects import EFFECTS, effect, effects_notes, effects_table, effects_text
from ablations.rows.frame import SUBSETS
from ablations.rows.statistics import make_statistics

# The synthetic AP adds 1.0, 3.0 and 1.5 for L, S and C, and 0.5 where L and S are both on.
KNOWN = {"L": 1.25, "S": 3.25, "C": 1.5, "L×S": 0.5, "L×C": 0.0, "S×C": 0.0, "L×S×C": 0.0}


def table_of(rows, replicates=lambda row: None, metric="AP"):
    table = effects_table(make_statistics(rows, replicates))
    return table if metric is None else table[table["metric"] == metric]


def values(table, name):
    return table[table["effect"] == name]["value"].to_list()


def noisy_rows(depths=(1, 2), seeds=(0, 1, 2)):
    rows = make_rows(depths, seeds)
    draw = np.random.default_rng(3)
    for row in rows:
        row["metrics"]["AP"] += draw.normal()
        row["errors"] = {"cls": 5 + draw.normal(), "loc": 3 + draw.normal()}
        row["images"] = 50
    return rows


def test_effects_have_their_known_sizes():
    table = table_of(make_rows(depths=(1, 2), seeds=(0, 1, 2)))
    assert table["depth"].drop_duplicates().to_list() == ["1", "2", "all"] and set(table["seeds"]) == {3}
    for name, size in KNOWN.items():
        assert values(table, name) == pytest.approx([size] * 3)
    assert table["half_width"].max() < 1e-9


def test_the_triple_effect_is_a_difference_of_differences_of_differences():
    ap = dict.fromkeys(("none", "L", "S", "C", "LS", "LC", "SC", "LSC"), 0.0) | {"LSC": 8.0}
    assert effect(ap, "LSC") == 8 and effect(ap, "LS") == 4 and effect(ap, "L") == 2


def test_effects_need_all_eight_subsets():
    rows = make_rows(depths=(1, 2))
    assert set(table_of(rows[:-1])["depth"]) == {"1"}
    rows[-1]["status"] = "diverged"
    assert set(table_of(rows)["depth"]) == {"1"}
    assert table_of([]).empty and table_of([make_row("baseline")]).empty


def test_effects_of_each_treatment_of_offsets_share_the_cells_without_s():
    rows = make_rows(depths=(1,))
    for row in list(rows):
        if "S" in row["cell"]["attentions"]:
            other = json.loads(json.dumps(row))
            other["cell"]["coarse_offsets"] = "prefix"
            other["key"] += "-prefix"
            other["metrics"]["AP"] += 1
            rows.append(other)
        else:
            row["cell"]["coarse_offsets"] = "crop"
    table = table_of(rows)
    assert table["formulation"].drop_duplicates().to_list() == ["released", "released, prefix"]
    assert values(table, "S") == pytest.approx([3.25, 4.25]) and values(table, "L") == pytest.approx([1.25, 1.25])


def test_effects_take_the_seeds_that_all_eight_have():
    rows = make_rows(depths=(1,), seeds=(0, 1))
    rows[1]["metrics"]["AP"] += 0.5  # the baseline's second seed, so that runs scatter
    table = table_of(rows[:-1])
    assert set(table["seeds"]) == {1} and values(table, "S") == pytest.approx([3.25])
    assert (table["covers"] == "training only").all() and (table["half_width"] > 0).all()


def test_an_effect_is_the_contrast_that_a_hand_makes():
    rows = noisy_rows()
    draws = np.random.default_rng(4)
    replicates = {row["key"]: draws.normal(row["metrics"]["AP"], 1, (400, 12)) for row in rows}
    table = table_of(rows, lambda row: replicates[row["key"]])
    at = {(row["cell"]["attentions"], row["cell"]["depth"], row["cell"]["seed"]): row for row in rows}
    ap = np.array([[[at[s, d, n]["metrics"]["AP"] for n in range(3)] for s in SUBSETS] for d in (1, 2)])
    # With L: L, LS, LC, LSC; without it: none, S, C, SC.
    sign = np.array([-1, 1, -1, -1, 1, 1, -1, 1]) / 4
    everything = np.concatenate([[[at["baseline", None, n]["metrics"]["AP"] for n in range(3)]], *ap])
    rest = everything - everything.mean(0) - everything.mean(1, keepdims=True) + everything.mean()
    freedom = 16 * 2
    trained = (rest**2).sum() / freedom * 2 * (sign**2 / 4).sum() / 3
    drawn = np.array([[[replicates[at[s, d, n]["key"]][:, 0] for n in range(3)] for s in SUBSETS] for d in (1, 2)])
    covariance = np.cov(np.einsum("dsnb,s->nb", drawn, sign) / 2)
    of_images = max(0, covariance[np.triu_indices(3, 1)].mean())
    nu = (trained + of_images) ** 2 / (trained**2 / freedom + of_images**2 / 49)
    (line,) = table[(table["effect"] == "L") & (table["depth"] == "all")].to_dict("records")
    assert line["value"] == pytest.approx((ap * sign[:, None]).sum(1).mean())
    assert line["half_width"] == pytest.approx(stats.t.ppf(0.975, nu) * np.sqrt(trained + of_images))
    assert line["covers"] == "training and images"


def test_error_types_have_effects_where_rows_have_them():
    rows = noisy_rows(depths=(1,))
    table = table_of(rows, metric=None)
    assert set(table["metric"]) == {"AP", "AP50", "AP75", "APm", "APl", "cls", "loc"}
    at = {row["cell"]["attentions"]: row["errors"]["cls"] for row in rows if row["cell"]["seed"] == 0}
    one = table_of([row for row in rows if row["cell"]["seed"] == 0], metric="cls")
    assert values(one, "S×C") == pytest.approx([effect(at, "SC")])
    assert any("TIDE" in note for note in effects_notes(table))


def test_several_detectors_have_a_line_over_all_of_them():
    rows = [*make_rows(depths=(1, 2)), *make_rows(depths=(1, 2), cell={"detector": "fcos"})]
    for row in rows[17:]:
        row["metrics"]["AP"] += 2.0 * ("C" in row["cell"]["attentions"])
    table = table_of(rows)
    lines = table[["detector", "depth"]].drop_duplicates().to_numpy().tolist()
    assert lines == [[d, depth] for d in ("atss", "fcos") for depth in ("1", "2", "all")] + [["all", "all"]]
    assert values(table, "C")[2::3] == pytest.approx([1.5, 3.5]) and values(table, "C")[-1] == pytest.approx(2.5)


def test_effects_are_shown_with_marks_and_told_what_they_mean():
    rows = noisy_rows()
    for row in rows:
        row["metrics"]["AP"] += 10.0 * ("C" in row["cell"]["attentions"])
    # Images that move every cell alike move no effect.
    common = np.random.default_rng(5).normal(size=(100, 12))
    table = table_of(rows, lambda row: row["metrics"]["AP"] + common, metric=None)
    text = effects_text(table)
    assert list(text)[:5] == ["detector", "depth", "formulation", "effect", "AP"] and len(text) == 3 * len(EFFECTS)
    shown = text.set_index(["depth", "effect"])["AP"]
    assert shown["all", "C"].endswith("*") and " ± " in shown["all", "C"]
    assert not shown["all", "L×C"].endswith("*")
    notes = " ".join(effects_notes(table))
    assert f"over all {len(table)} numbers" in notes and "over the depths" in notes


def test_one_seed_without_replicates_says_that_nothing_is_known():
    table = table_of(make_rows(depths=(1,)))
    assert table["half_width"].isna().all() and effects_text(table)["AP"][0] == "+1.2"
    assert any("cannot be told" in note for note in effects_notes(table))
