"""The text of ``pipelines/SUPPORT.md``, of what ``python -m tests.seam_report`` stores."""

from .counts import values

TEXT = """\
# Pipelines that take `guidance=`

Made by `python -m tests.seam_report`, which runs every family of the tests (a tiny real pipeline
with random weights); do not edit.

diffusers {diffusers} has {with_guidance} pipeline classes, not counting deprecated ones, whose call
takes a guidance scale or which have a guider. Of these {works} were run here{shared}, {one_branch}
evaluate one branch, and {refused} are refused, each with its reason.

## Tested

- *layout*: what was learned at the first step: how a pipeline evaluates its branches (in one batch
  or in several calls, in the order given), whether it negates them, and whether it changes the
  norms of what it makes of them.
- *CFG*: `guidance="cfg"` equals the stock pipeline bit for bit (batch 1 and 3, as far as a call
  takes so many, with and without negative prompts).
- *APG*: relative error against the paper's Algorithm 1 in float64 in the stock loop.
- *AG*: the rows counted at the network are those that Adaptive Guidance promises.
- *forecast*: error of a run in which every other step is skipped and reuses the last guided
  prediction, against the stock loop with a scheduler that does so, in units of what that changes;
  rows counted likewise, also where every sample rests at its own pace; *together*: all samples of
  a call have to. *refused*: nothing can stand in for what the network was not asked for.

| pipeline | layout | tested as | CFG | APG | AG | forecast |
|---|---|---|---|---|---|---|
{tested}

## One branch

Guidance is built into these networks: rules have nothing to act on and say so, policies that skip
steps work, and *rows* are those that they promise.

| pipeline | tested as | CFG | rows |
|---|---|---|---|
{one_rows}

## With the loop of a tested class

| pipeline | loop of |
|---|---|
{loops}

## Refused

Where a call is named, other calls of the same pipeline are not refused.

| pipeline | call | reason |
|---|---|---|
{reasons}

## Modular pipelines

A `Guider` takes the place of their guider component: {modular_works} of their workflows were run,
with the same figures, {modular_refused} are refused. *APG*: as above, or why not.

| pipeline and workflow | APG |
|---|---|
{modular_rows}

## Schedulers

Denoised images that are made by noise levels equal those of the schedulers' own arithmetic:
{agreeing}.
"""


def page(stored: dict) -> str:
    """The whole page."""
    names = stored["classes"]["names"]
    one_branch = {found["class"] for found in stored["one_branch"].values()}
    reasons = [
        (name, "", reason) for name, reason in names["refused"].items() if name not in one_branch
    ]
    reasons += [
        (found["class"], name, found["refused"])
        for name, found in stored["refusals"].items()
        if found["class"] in names["works"]
    ]
    agreeing = ", ".join(name for name, found in stored["schedulers"].items() if found["ok"])
    return TEXT.format(
        **values(stored),
        tested=rows(map(guided_row, *by_class(stored["families"]))),
        one_rows=rows(map(one_branch_row, *by_class(stored["one_branch"]))),
        loops=rows(names["inferred"].items()),
        reasons=rows(sorted(reasons)),
        modular_works=stored["modular"]["works"],
        modular_refused=stored["modular"]["refused"],
        modular_rows=rows(
            (name, error(found["apg_error"]) if found["ok"] else found["reason"])
            for name, found in stored["modular"]["names"].items()
        ),
        agreeing=agreeing,
    )


def by_class(families: dict[str, dict]) -> tuple[list[str], list[dict]]:
    """Names of families and what was found, in the order of their classes."""
    names = sorted(families, key=lambda name: (families[name]["class"], name))
    return names, [families[name] for name in names]


def guided_row(name: str, found: dict) -> tuple[str, ...]:
    """The cells of a family of which rules have branches to act on."""
    forecast, resting = "refused", {True: "", False: ", rows WRONG", None: ", together"}
    if "forecast_error" in found:
        forecast = f"{error(found['forecast_error'])}{resting[found.get('resting_rows_ok')]}"
    return (
        *(found["class"], found["layout"], name, equal(found)),
        *(error(found["apg_max_rel_error"]), "ok" if found["ag_rows_ok"] else "WRONG", forecast),
    )


def one_branch_row(name: str, found: dict) -> tuple[str, ...]:
    """The cells of a family of one branch."""
    return found["class"], name, equal(found), "ok" if found["one_branch_ok"] else "WRONG"


def error(value: float) -> str:
    """One digit of a relative error."""
    return f"{value:.0e}" if value else "0"


def equal(found: dict) -> str:
    """Whether plain guidance is the stock pipeline's."""
    return "equal" if found["cfg_bit_equal"] else "DIFFERS"


def rows(cells) -> str:
    """Lines of a table; texts may have several lines themselves."""
    lines = (
        " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) for line in cells
    )
    return "\n".join(f"| {line} |" for line in lines)
