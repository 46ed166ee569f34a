"""Branches shared out among processes: as in one process, and errors where they disagree."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from pilotage.guidance import APG
from pilotage.pipelines import LayoutError, guided
from pilotage.pipelines.seam.parallel import ParallelDriver, shared_out

from ...families import FAMILIES
from ..checks import replaced
from .together import CALLS, NEARLY, call, made, pipeline, start


def finished(processes):
    """The processes' status and what they printed, at their end."""
    printed = [process.communicate()[1] for process in processes]
    return [process.returncode for process in processes], printed


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Latents, and what else was told, of both of two processes."""
    folder = tmp_path_factory.mktemp("together")
    codes, printed = finished(start(2, "everything", folder))
    assert codes == [0, 0], printed
    latents = [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]
    return latents, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def in_turn(network, size=2):
    """Have a network evaluate the rows of every call in `size` groups, one after the other."""
    forward = network.forward

    def part(value, rows, i):
        if isinstance(value, torch.Tensor) and value.ndim and len(value) % rows == 0:
            by_row = value.unflatten(0, (rows, -1))  # of a video, text comes once a frame
            return by_row.tensor_split(size)[i].flatten(0, 1)
        if isinstance(value, dict):
            return {k: part(v, rows, i) for k, v in value.items()}
        return value

    def split(*args, **kwargs):
        rows = len(args[0] if args else kwargs["hidden_states"])
        outputs = [
            forward(*(part(a, rows, i) for a in args), **part(kwargs, rows, i))
            for i in range(min(size, rows))
        ]
        return replaced(outputs[0], torch.cat([output[0] for output in outputs]))

    network.forward = split


def expected(given, size=2):
    """Latents of one process that evaluates the rows of a call in turn, and its evaluations."""
    name, guidance, batch, more = given
    pipe = pipeline(name, **more)
    if FAMILIES[name].layout.startswith("batch") and not name.startswith("ltx2"):
        in_turn(getattr(pipe, FAMILIES[name].denoisers[0]), size)
    return call(pipe, name, guidance, batch, **more)


@pytest.mark.parametrize("name", CALLS)
def test_equals_branches_in_turn(together, name):
    latents, told = together
    alone, nfe = expected(CALLS[name])
    assert told[0]["nfe"][name] == told[1]["nfe"][name] == nfe
    if name == "ltx2 apg":
        torch.testing.assert_close(latents[0][name], alone)
    else:
        assert torch.equal(latents[0][name], alone)


def test_processes_have_the_same_bits(together):
    first, second = together[0]
    assert first.keys() == second.keys() and len(first) > len(CALLS)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_samples_that_stop_at_different_steps(together):
    """Or the case above says nothing: some of them, and never all at once."""
    nfe = together[1][0]["nfe"]["sd mixed ag"]
    assert len(set(nfe)) > 1


@pytest.mark.parametrize("name", NEARLY)
def test_equals_one_process_to_rounding(together, name):
    alone, nfe = made(name, NEARLY[name])
    assert together[1][0]["nfe"][name] == nfe
    torch.testing.assert_close(together[0][0][name], alone)


def test_a_first_step_that_is_known(together):
    """A later call of a pipeline shares out its first step as well."""
    for name in ("sd apg", "wan apg"):
        torch.testing.assert_close(together[0][0][f"{name} again"], together[0][0][name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prompt", "ProcessesError: process 1 differs from process 0 in: argument prompt"),
        ("seed", "ProcessesError: process 1 differs from process 0 in: argument generator"),
        ("no seed", "ProcessesError: process 1 differs from process 0 in: the network's input"),
        ("steps", "ProcessesError: process 1 differs from process 0 in: steps"),
        ("guidance", "ProcessesError: process 1 differs from process 0 in: guidance"),
        ("weights", "ProcessesError: process 1 differs from process 0 in: weights of unet"),
        ("noise", "ProcessesError: the processes have different latents at step 1"),
        ("callback", "ProcessesError: the processes have different latents at step 2"),
        ("cache", "LayoutError: a cache is enabled in the network (FirstBlockCache)"),
        ("one branch", "ValueError: 2 processes cannot share the 1 branch that StableDiffusionPip"),
        ("perturbed", "LayoutError: perturbed attention takes the rows of a call"),
    ],
)
def test_mistakes_are_told_to_all(together, name, message):
    errors = [told["errors"].get(name, "none") for told in together[1]]
    assert errors[0] == errors[1] and errors[0].startswith(message)


def test_errors_leave_the_processes_connected(together):
    assert torch.equal(together[0][0]["at last"], together[0][0]["sd apg"])


def test_three_processes(tmp_path):
    codes, printed = finished(start(3, "three", tmp_path))
    assert codes == [0, 0, 0], printed
    alone, _ = expected(CALLS["pix2pix apg"], size=3)
    for rank in range(3):
        found = load_file(tmp_path / f"{rank}.safetensors")["pix2pix"]
        assert torch.equal(found, alone)


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_lost_process_ends_the_others(tmp_path, how):
    """A process waits as long as `InitProcessGroupKwargs` says, here three seconds."""
    first, second = start(2, "lost", tmp_path, how)
    _, printed = first.communicate()
    (tmp_path / "over").touch()
    second.communicate()
    assert first.returncode == 1 and second.returncode == (3 if how == "hangs" else -9)
    assert "ProcessesError: process 0 of 2 has lost another one" in printed


def test_one_process_is_told():
    pipe = guided(FAMILIES["sd"].build())
    with pytest.raises(ValueError, match="this is the only one: start it with 'accelerate launch"):
        call(pipe, "sd", APG(), 1, parallel="branches")
    with pytest.raises(ValueError, match="parallel is 'branches' or None, got 'rows'"):
        call(pipe, "sd", APG(), 1, parallel="rows")
    with pytest.raises(ValueError, match="need guidance="):
        pipe("a cat", parallel="branches")


def test_rows_are_shared_out_evenly():
    units = [[0], [1], [2], [3], [4]]
    assert shared_out(units, 2) == [[0, 1, 2], [3, 4]]
    assert shared_out(units[:1], 3) == [[0], [], []]
    assert shared_out([[0, 1], [2, 3], [4, 5]], 2) == [[0, 1, 2, 3], [4, 5]]


def test_what_a_network_says_of_rows_alone_is_told():
    """Its errors on a whole call are its own; on a share of one, all processes hear of them."""
    told = []

    def tell(value):
        told.append(value)
        return ["another's reason" if value is None else None, value]

    def alone(keep):
        raise ValueError("an odd number of rows")

    def evaluated(own, splits=(), alone=alone):
        driver = SimpleNamespace(
            splits=set(splits),
            exchange=SimpleNamespace(tell=tell),
            indivisible=lambda call, cause: f"cannot be shared: {cause}",
        )
        call = SimpleNamespace(rows=2, alone=alone)
        return ParallelDriver.evaluated(driver, call, own, (2, 1, 1))

    with pytest.raises(ValueError, match="^an odd number of rows$"):
        evaluated([0, 1])
    with pytest.raises(ValueError, match="^an odd number of rows$"):
        evaluated([0], [(2, 1, 1)])  # it did so once: this is another error
    assert not told
    with pytest.raises(LayoutError, match="^cannot be shared: an odd number of rows$"):
        evaluated([0])
    with pytest.raises(LayoutError, match="^cannot be shared: another's reason$"):
        evaluated([0], alone=lambda keep: torch.zeros(1))
    assert told == ["an odd number of rows", None]
