"""The recommendation follows from the paired differences, and says what they cannot tell."""

import pytest

from pilotage.eval.comparison.answer import answer
from pilotage.eval.comparison.lines import lines_to_copy
from pilotage.eval.comparison.plan import Plan, Setting
from pilotage.eval.comparison.verdicts import number, short_labels
from pilotage.eval.embedded import load_embedded
from pilotage.guidance import APG

from .comparisons import made_up, paired

APG_7 = "apg w=7.5, 20 steps"


def changed(rows, facts, values, half, **options):
    """The answer for other distances, by the rows' order; clear if further apart than `half`."""
    rows = [row | {"fd": value} for row, value in zip(rows, values, strict=True)]
    distances = {row["label"]: row["fd"] for row in rows}
    return answer(rows, facts | {"comparisons": paired(distances, half, **options)})


def test_the_best_is_recommended_where_it_is_clearly_better(tmp_path):
    """The settings' own intervals overlap, all of them, and decide nothing."""
    rows, facts, _ = made_up(tmp_path)
    found = answer(rows, facts)
    assert (found["setting"], found["metric"]) == (APG_7, "fd")
    assert found["headline"] == "Use apg w=7.5."
    assert found["sentences"] == [
        "It has the lowest Fréchet distance of the 5 settings asked for, 9 (95 % interval 0 to 18),"
        " and is clearly better than every other.",
        "Plain CFG (cfg w=7.5) is clearly worse (15 against 9).",
    ]
    assert found["plain"] == "cfg w=7.5, 20 steps"
    assert found["pictures"] == {found["plain"]: "Plain CFG", APG_7: "Recommended"}
    assert {one["verdict"] for one in found["verdicts"]} == {"worse"}
    assert len(found["verdicts"]) == 5


def test_the_cheapest_is_recommended_where_nothing_can_be_told(tmp_path):
    rows, facts, _ = made_up(tmp_path)
    found = answer(rows, facts | {"comparisons": made_up(tmp_path, half=5.8)[1]["comparisons"]})
    assert found["setting"] == "ag w=7.5, 20 steps"
    assert found["headline"] == "Use ag w=7.5: cheaper, and not clearly worse than the best."
    why, baselines = found["sentences"]
    assert why == (
        "apg w=7.5 has the lowest Fréchet distance (9 against 14.5), with 40 network evaluations a "
        "picture instead of 30.2, but 32 prompts cannot tell the two apart; about 90 would."
    )
    assert baselines == (
        "Plain CFG (cfg w=7.5) cannot be told from it (15 against 14.5; about 90 would); CFG with "
        "15 steps, which costs as much, cannot be told from it (18 against 14.5; about 90 would)."
    )
    assert list(found["pictures"].values()) == [
        *("Plain CFG", "Recommended", "Best figure", "CFG at this cost"),
    ]
    verdicts = {one["setting"]: one for one in found["verdicts"]}
    assert verdicts[APG_7]["difference"] == -5.5
    assert (verdicts[APG_7]["verdict"], verdicts[APG_7]["needed"]) == ("cannot tell", 90)


def test_a_clearly_worse_setting_is_not_recommended_for_its_cost(tmp_path):
    rows, facts, _ = made_up(tmp_path)
    assert changed(rows, facts, (12, 15, 13, 9, 14.5, 18), 5.4)["setting"] == APG_7


def test_of_nearly_equal_cost_the_better_one_is_recommended(tmp_path):
    """A fifth more evaluations decide nothing, half as many more do."""
    rows, facts, _ = made_up(tmp_path)
    for nfe, chosen in ((35.0, APG_7), (45.0, "ag w=7.5, 20 steps")):
        rows[3]["nfe"] = nfe
        assert changed(rows, facts, (12, 15, 13, 9, 14.5, 18), 50)["setting"] == chosen


def test_plain_cfg_may_be_the_answer(tmp_path):
    rows, facts, _ = made_up(tmp_path)
    found = changed(rows, facts, (2, 15, 13, 9, 14.5, 18), 3)
    assert found["setting"] == "cfg w=3, 20 steps" and found["plain"] is None
    assert found["trades"] == [] and len(found["sentences"]) == 1


def test_an_added_baseline_never_wins_but_is_told(tmp_path):
    rows, facts, _ = made_up(tmp_path)
    values = (12, 15, 13, 9, 14.5, 2)
    found = changed(rows, facts, values, 2)
    assert found["setting"] == APG_7
    assert found["sentences"][1].endswith(
        "; cfg w=7.5, 15 steps, added for comparison only, is clearly better (2) with 30 "
        "evaluations."
    )
    assert not any("added" in text for text in changed(rows, facts, values, 7.5)["sentences"])


def test_a_setting_as_strong_as_cfg_may_win_and_is_beside_it(tmp_path):
    rows, facts, _ = made_up(tmp_path)
    rows[2] |= {"kind": "matched", "matched_to": 7.5}
    found = changed(rows, facts, (12, 15, 2, 9, 14.5, 18), 3)
    assert (found["setting"], found["plain"]) == ("apg w=3, 20 steps", "cfg w=7.5, 20 steps")


def test_alignment_is_better_where_it_is_higher(tmp_path):
    rows, facts, _ = made_up(tmp_path, fd=False)
    for row, value in zip(rows, (1, 2, 3, 4, 9, 5), strict=True):
        row |= {"alignment": value, "alignment_interval": [0, 10]}
    values = {row["label"]: row["alignment"] for row in rows}
    facts["comparisons"] = paired(values, 0.5, "alignment")
    found = answer(rows, facts)
    assert found["setting"] == "ag w=7.5, 20 steps"
    assert found["sentences"][0].startswith("It has the highest alignment of the 5 settings")
    assert "costs as much, is clearly worse (5 against 9)" in found["sentences"][1]


def test_what_changes_beside_plain_cfg(tmp_path):
    rows, facts, _ = made_up(tmp_path)
    saturations = {row["label"]: row["saturation"] for row in rows}
    facts["comparisons"] += paired(saturations, 0.03, "saturation")
    trades = {one["name"]: one for one in answer(rows, facts)["trades"]}
    assert list(trades) == ["nfe", "seconds", "saturation", "ssim"]
    assert (trades["nfe"]["value"], trades["nfe"]["note"]) == (40.0, "as much")
    assert trades["saturation"]["note"] == "clearly higher"
    facts["comparisons"] += paired(saturations, 0.05, "saturation")
    rows[3]["nfe"] = 30.0
    trades = {one["name"]: one for one in answer(rows, facts)["trades"]}
    assert trades["saturation"]["note"] == "cannot tell" and trades["nfe"]["note"] == "25 % less"


def test_without_a_quality_there_is_no_winner(tmp_path):
    found = answer(*made_up(tmp_path, fd=False)[:2])
    assert found["setting"] is None and found["headline"].startswith("No recommendation: quality")
    assert "--reference" in found["sentences"][0]
    assert found["sentences"][1].startswith("ag w=7.5 needs the fewest network evaluations, 30.2 ")
    assert set(found["pictures"]) == {"cfg w=7.5, 20 steps", APG_7, "ag w=7.5, 20 steps"}


def test_without_resamples_there_is_no_winner(tmp_path):
    rows, facts, _ = made_up(tmp_path)
    found = answer(rows, facts | {"comparisons": []})
    assert found["setting"] is None and found["headline"] == "No recommendation: too few pictures."
    assert "any order may be chance" in found["sentences"][0]
    alone = answer(rows[:1], facts | {"comparisons": []})
    assert (
        alone["setting"] == rows[0]["label"] and "only setting asked for" in alone["sentences"][0]
    )


def test_equal_settings_few_prompts_and_one_prompt(tmp_path):
    rows, facts, _ = made_up(tmp_path)
    for one in facts["comparisons"]:
        one |= {"difference": 0.0, "interval": [0.0, 0.0], "needed": None}
    facts["resampled"] = {"unit": "prompts", "count": 4}
    found = answer(rows, facts)
    assert {one["verdict"] for one in found["verdicts"]} == {"the same"}
    assert "the two are the same in every resample" in found["sentences"][0]
    assert found["sentences"][-1].startswith("Only 4 prompts")
    facts["resampled"] = {"unit": "pictures", "count": 12}
    found = changed(rows, facts, (12, 15, 13, 9, 14.5, 18), 50, needed=None)
    assert "12 pictures of one prompt cannot tell the two apart." in found["sentences"][0]
    assert "say nothing about others" in found["sentences"][-1]


def test_the_sentences_are_few(tmp_path):
    """However many settings there are."""
    rows, facts, _ = made_up(tmp_path)
    for i in range(18):
        rows.append(rows[2] | {"label": f"mine {i}", "fd": 10.0 + i / 10})
        plain = {"label": f"cfg {i}", "kind": "equal nfe", "matches": [f"mine {i}"]}
        rows.append(rows[5] | plain | {"fd": 3 + i / 10, "nfe": 39.0})
    facts["resampled"] = {"unit": "prompts", "count": 4}
    for half in (2, 5, 50):
        found = changed(rows, facts, [row["fd"] for row in rows], half)["sentences"]
        assert len(found) <= 3 and max(map(len, found)) < 420


def test_short_labels():
    rows = [
        {"label": Setting("apg", 3.0, 20).label, "kind": "grid", "steps": 20},
        {"label": Setting("cfg", 3.0, 15).label, "kind": "equal nfe", "steps": 15},
    ]
    assert list(short_labels(rows).values()) == ["apg w=3", "cfg w=3, 15 steps"]
    rows.append({"label": Setting("apg", 3.0, 10).label, "kind": "grid", "steps": 10})
    assert list(short_labels(rows).values()) == [row["label"] for row in rows]


def test_numbers():
    given = (None, 0.0, 0.12345, 12.345, 123.45, 12345.6)
    assert [number(value) for value in given] == ["–", "0", "0.123", "12.3", "123", "12,346"]


@pytest.fixture(scope="module")
def pipe():
    return load_embedded()


def test_the_lines_to_copy_run(pipe):
    """The Python line on the pipeline; the command through the parser of `generate`."""
    plan = Plan(["a fox's tail"], [Setting("apg", 3.0, 2)], options={"negative_prompt": "a b"})
    lines = lines_to_copy(pipe, plan.settings[0], plan, ["--model", "my model"])
    assert lines["python"] == (
        'pipe(prompt, guidance="apg", guidance_scale=3, num_inference_steps=2, '
        "negative_prompt='a b')"
    )
    assert len(eval(lines["python"], {"pipe": pipe, "prompt": plan.prompts[0]}).images) == 1
    assert lines["command"] == (
        "pilotage generate -g apg -w 3 --steps 2 --negative 'a b' --model 'my model' "
        "'a fox'\"'\"'s tail'"
    )


def test_lines_of_an_object_and_of_nothing(pipe):
    setting = Setting(APG(eta=0.5), 3.0, 2)
    plan = Plan(["-p"], [setting, Setting("cfg", 2.0, 2)])
    lines = lines_to_copy(pipe, setting, plan, [])
    assert lines["command"] is None
    eval(lines["python"], {"pipe": pipe, "prompt": "a", "APG": APG})
    assert lines_to_copy(pipe, plan.settings[1], plan, [])["command"].endswith("--steps 2 -- -p")
    assert lines_to_copy(pipe, plan.settings[1], plan, None)["command"] is None
    assert lines_to_copy(pipe, None, plan, []) == {"command": None, "python": None}
