"""The study of CFG and APG over the scale: which paired differences it keeps."""

from itertools import combinations

from examples.studies.evaluate import SCALES, claims
from pilotage.eval.comparison.comparison import grid
from pilotage.eval.comparison.plan import Setting


def test_claims_are_the_differences_that_the_page_speaks_of():
    settings = [*grid(["cfg", "apg"], SCALES), Setting("ag", 7.5), Setting("cfg", 7.5, 15)]
    every = [
        {"metric": metric, "setting": one.label, "other": other.label}
        for metric in ("fd", "alignment")
        for one, other in combinations(settings, 2)
    ]
    kept = [(c["setting"], c["other"]) for c in claims(every) if c["metric"] == "fd"]
    assert len(claims(every)) == 2 * len(kept) == 2 * (len(SCALES) + 3)
    assert ("cfg w=15, 20 steps", "apg w=15, 20 steps") in kept
    assert ("cfg w=3, 20 steps", "apg w=7.5, 20 steps") in kept  # of equal effective guidance
    assert ("ag w=7.5, 20 steps", "cfg w=7.5, 15 steps") in kept
