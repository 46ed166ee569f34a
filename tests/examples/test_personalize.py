"""How the figures of personalization are counted."""

from examples.studies.personalize.__main__ import improved, median, ratio, reached

RUN = [(0, 0, 0.5), (10, 40, 0.4), (20, 80, 0.45), (30, 120, 0.3)]


def test_forwards_to_reach_a_loss():
    assert [reached(RUN, target) for target in (0.5, 0.42, 0.4, 0.3, 0.2)] == [0, 40, 40, 120, None]
    of = {"ours": {"evaluations": RUN}}
    assert ratio(of, 0.4, 400) == 0.1
    assert ratio(of, 0.1, 400) is None


def test_a_subject_that_was_not_reached_counts_as_infinite():
    assert median([0.1, None, 0.3]) == 0.3
    assert median([None, None, 0.3]) is None
    assert median([0.1, 0.2]) == 0.2
    assert median([]) is None


def test_a_preset_that_ends_above_the_initial_token_has_not_improved():
    assert improved({"zoodip": {"evaluations": RUN}})
    assert not improved({"zoodip": {"evaluations": [(0, 0, 0.3), (10, 30, 0.2), (20, 60, 0.3)]}})
