"""Every guard of the seam, entered: by calls of made-up networks, by loops that go astray."""

import functools
import re

import diffusers as df
import pytest
import torch
from torch import nn

from pilotage.guidance import (
    APG,
    CFG,
    AdaptiveGuidance,
    Decision,
    Interval,
    NonFinitePredictionError,
    Policy,
    PolicyState,
    Schedule,
    Weights,
    prediction,
    resolve,
)
from pilotage.pipelines import LayoutError, guided
from pilotage.pipelines.seam import driver, patterns
from pilotage.pipelines.seam.calls import Call, RowsError
from pilotage.pipelines.seam.hooks import check_caches
from pilotage.pipelines.seam.layouts import Layout
from pilotage.pipelines.seam.patterns import Pattern
from pilotage.pipelines.seam.support import denoisers_of

from ...families import FAMILIES
from ..checks import Rows, equal, latents
from .homemade import HomemadePipeline, SoftenedPipeline, Watching, own_family, stock_like
from .test_faults import cached_pipe

# Rows of one call


class Network(nn.Module):
    """Returns its inputs, as it was given them."""

    def forward(self, sample, timestep, text=None, sizes=None, fps=None, txt_ids=None):
        self.given = {"timestep": timestep, "text": text, "sizes": sizes, "fps": fps}
        self.given["txt_ids"] = txt_ids
        return sample


def rows_of(rows, each=1, width=2):
    """A tensor whose rows tell which they are, `each` for every sample."""
    return torch.arange(rows * each).float().repeat_interleave(width).view(rows * each, width)


@pytest.mark.parametrize("keep", [[0], [2], [0, 1], [1, 2], [0, 2], [2, 0]])
def test_rows_of_every_kind_of_input(keep):
    """Text once a frame, times, lists of numbers; what is shared stays whole."""
    network, x = Network(), rows_of(3)
    frames = rows_of(3, each=2).unsqueeze(1)
    ids, sizes = rows_of(3), (8, 9, 10)
    given = {"text": frames, "sizes": sizes, "fps": [7, 8, 9], "txt_ids": ids}
    found = Call(network, (x, torch.tensor([5.0, 6.0, 7.0])), given)(keep)
    assert torch.equal(found, x[keep])
    assert network.given["timestep"].tolist() == [[5.0, 6.0, 7.0][row] for row in keep]
    places = [2 * row + i for row in keep for i in (0, 1)]
    assert torch.equal(network.given["text"], frames[places])
    assert network.given["fps"] == [[7, 8, 9][row] for row in keep]
    assert network.given["sizes"] == sizes and network.given["txt_ids"] is ids


def test_inputs_that_hold_no_samples_stay_whole():
    network, x = Network(), rows_of(3)
    table = rows_of(6)  # two a sample, but neither text nor frames: a table
    for value in (torch.tensor(7.0), rows_of(2), rows_of(4), table, "text", 3, None, [1, 2]):
        Call(network, (x, value), {})([0, 2])
        assert network.given["timestep"] is value


def test_other_rows_than_were_asked_for():
    def forgetful(sample, timestep):
        return sample[:1]

    call = Call(forgetful, (rows_of(3), 1.0), {})
    with pytest.raises(RowsError, match="1 rows came back where 2 of 3 were asked"):
        call([0, 2])
    assert len(call([1])) == 1 and len(call()) == 1


def test_a_list_that_may_be_of_samples_or_not():
    call = Call(Network(), (rows_of(3), 1.0), {"sizes": [1, 2, 3]})
    with pytest.raises(RowsError, match="whether the list 'sizes' has an item a sample"):
        call([0, 2])


def test_a_forward_that_names_nothing():
    class Hidden(nn.Module):
        def forward(self, *args, **kwargs):
            return args[0]

    with pytest.raises(TypeError, match="the forward of Hidden names none of its inputs"):
        Call(Hidden(), (), {"sample": rows_of(2)})
    outer = Hidden()
    outer.inner = Network()  # what it passes on to, if that is one
    assert Call(outer, (), {"sample": rows_of(2)}).rows == 2
    outer.other = Network()
    with pytest.raises(TypeError, match="names none"):
        Call(outer, (), {"sample": rows_of(2)})


# Loops


class AstrayPipeline(HomemadePipeline):
    """Two calls, the conditional branch first; from the step `at` on something else happens."""

    at = 1
    low = 0.5

    def predicted(self, x, t, cond, uncond, scale):
        """See the base."""
        step = self.scheduler.timesteps.tolist().index(float(t))
        text = cond, uncond
        return self.go(x, t, *text, scale) if step >= self.at else self.plain(x, t, *text, scale)

    def plain(self, x, t, cond, uncond, scale):
        """As ever."""
        c, u = self.network(x, t, cond), self.network(x, t, uncond)
        return u + scale * (c - u)


class ThricePipeline(AstrayPipeline):
    """A third call."""

    def go(self, x, t, cond, uncond, scale):
        """See the base."""
        self.network(x, t, cond)
        return self.plain(x, t, cond, uncond, scale)


class UncondFirstPipeline(AstrayPipeline):
    """One call, of the branch that comes first."""

    def plain(self, x, t, cond, uncond, scale):
        """See the base."""
        u, c = self.network(x, t, uncond), self.network(x, t, cond)
        return u + scale * (c - u)

    def go(self, x, t, cond, uncond, scale):
        """See the base."""
        return self.network(x, t, uncond)


class ThreePipeline(AstrayPipeline):
    """A third branch."""

    def go(self, x, t, cond, uncond, scale):
        """See the base."""
        c, u, e = (self.network(x, t, text) for text in (cond, uncond, cond.flip(1)))
        return c + (scale - 1) * (c - u) + 2.0 * (c - e)


class TogetherPipeline(AstrayPipeline):
    """Both branches in one call."""

    def go(self, x, t, cond, uncond, scale):
        """See the base."""
        c, u = self.network(torch.cat([x, x]), t, torch.cat([cond, uncond])).chunk(2)
        return u + scale * (c - u)


class LatePipeline(HomemadePipeline):
    """Begins after some of the scheduler's steps, and does not tell how many it makes."""

    def __call__(self, prompt, guidance_scale=5.0, num_inference_steps=5, **kwargs):
        """See the base."""
        cond, uncond = self.encode_prompt(prompt, "cpu", 1, True, [""] * len(prompt))
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.ones(len(prompt), 4, 8, 8)
        for t in self.scheduler.timesteps[2:]:
            u, c = self.network(torch.cat([x, x]), t, torch.cat([uncond, cond])).chunk(2)
            x = self.scheduler.step(u + guidance_scale * (c - u), t, x).prev_sample
        return (x,)


class LowPipeline(AstrayPipeline):
    """The scale falls below 1."""

    def go(self, x, t, cond, uncond, scale):
        """See the base."""
        return self.plain(x, t, cond, uncond, self.low)


class CurvedPipeline(AstrayPipeline):
    """The combination is no sum of the branches."""

    def go(self, x, t, cond, uncond, scale):
        """See the base."""
        return self.plain(x, t, cond, uncond, scale).tanh()


class EndlessPipeline(AstrayPipeline):
    """So many calls that there is no step in sight."""

    at = 0

    def go(self, x, t, cond, uncond, scale):
        """See the base."""
        for _ in range(driver.MANY_CALLS):
            self.network(x, t, cond)
        return self.plain(x, t, cond, uncond, scale)


class IdlePipeline(AstrayPipeline):
    """The network is never asked."""

    at = 0

    def go(self, x, t, cond, uncond, scale):
        """See the base."""
        return 0.1 * x


class FewerPipeline(AstrayPipeline):
    """Fewer samples than before."""

    def go(self, x, t, cond, uncond, scale):
        """See the base."""
        return self.plain(x[:1], t, cond[:1], uncond[:1], scale)


def loop_of(cls, **settings):
    """A pipeline of one of these classes, and a call of three samples."""
    family = own_family(cls, "calls: cond uncond")
    pipe = guided(family.build())
    for name, value in settings.items():
        setattr(pipe, name, value)
    return pipe, lambda guidance=None: pipe(**family.call(3, True), guidance=guidance)[0]


# Evaluates the conditional branch alone from the second step on, wherever values are read.
DROPS = AdaptiveGuidance(-1.0, lag=0)
NEUTRAL = APG(eta=1.0, norm_threshold=0.0, momentum=0.0)


@pytest.fixture(params=["at once", "a step later"])
def read(request, monkeypatch):
    """When the scale and what is left over are read: a step later on devices other than the CPU."""
    if request.param == "a step later":
        for module in (driver, patterns, prediction):
            monkeypatch.setattr(module, "on_host", lambda device: False)


@pytest.mark.parametrize("at", [1, 2])  # the last step's is read at the end
@pytest.mark.parametrize(
    ("cls", "guidance", "message"),
    [
        (CurvedPipeline, "apg", "changed the way it combines its branches at step {at}"),
        (LowPipeline, "apg", "used the guidance scale 0.5 at step {at}; below 1, 'apg'"),
        (ThricePipeline, DROPS, "evaluates 3 rows in call 3 at step {at}, otherwise than before"),
        (UncondFirstPipeline, DROPS, r"evaluates \(1,\) branches, not \(1, 1\) at step {at}"),
        (UncondFirstPipeline, "apg", r"evaluates \(1,\) branches, not \(1, 1\) at step {at}"),
        (FewerPipeline, "apg", "steps 1 samples at step .*, otherwise than before"),
    ],
)
def test_a_loop_that_goes_astray_is_refused(cls, guidance, message, at, read):
    pipe, call = loop_of(cls, at=9)
    settled = call(guidance)
    assert settled.isfinite().all()
    pipe.at = at
    with pytest.raises(LayoutError, match=message.format(at=at)):
        call(guidance)
    pipe.at = 9
    assert equal(settled, call(guidance))


@pytest.mark.parametrize("at", [1, 2])
def test_a_branch_that_comes_later_is_learned(at, read):
    pipe, call = loop_of(ThreePipeline, at=at)
    stock = call()
    torch.testing.assert_close(call(NEUTRAL), stock, rtol=1e-4, atol=1e-4)
    assert pipe.guidance_trace.nfe == [2 * at + 3 * (3 - at)] * 3
    assert not torch.allclose(call("apg"), stock, rtol=1e-3, atol=1e-3)
    # Where rows are left out by then, it is too late.
    with pytest.raises(LayoutError, match=f"evaluates 3 rows in call 3 at step {at}"):
        call(DROPS)


@pytest.mark.parametrize("guidance", ["cfg", APG(space="native")], ids=str)
def test_the_length_of_a_run_that_begins_later(guidance):
    """As far as the pipeline does not tell it: what is left from its first timestep on."""
    pipe = guided(own_family(LatePipeline, "batch: uncond cond").build())
    call = {"prompt": ["a red cat"] * 2, "guidance": guidance}
    assert pipe(**call)[0].isfinite().all()
    assert len(pipe.guidance_trace.steps) == 3
    pipe.unet.register_forward_hook(lambda module, args, output: (output[0] * float("nan"),))
    with pytest.raises(NonFinitePredictionError, match="at step 0 of 3"):
        pipe(**call)


@pytest.mark.parametrize("cls", [df.DDIMScheduler, df.EulerDiscreteScheduler])
def test_a_loop_that_changes_how_it_calls_its_network(cls, read):
    """The same branches in other calls: the same pictures, and denoised images of the same step."""
    found = []
    for at in (9, 1, 2):
        pipe, call = loop_of(TogetherPipeline, at=at)
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        stock = call()
        found.append(call(APG(eta=0.2, norm_threshold=2.0, threshold_unit="l2")))
        torch.testing.assert_close(call(NEUTRAL), stock, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found[-1], stock, rtol=1e-3, atol=1e-3)
        assert pipe.guidance_trace.nfe == [6] * 3
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low", [1.0, 0.995, 0.5])
def test_a_scale_at_and_below_one(low, read):
    """1 but for a hundredth is no guidance; below that, rules that move elsewhere are refused."""
    pipe, call = loop_of(LowPipeline, low=low)
    stock = call()
    assert equal(stock, call("cfg"))
    if low > 0.99:
        torch.testing.assert_close(call(NEUTRAL), stock, rtol=1e-4, atol=1e-4)


def test_a_branch_that_is_no_longer_evaluated(read):
    """Where it is the other one, the pipeline goes on without guidance, as it would."""

    class OnePipeline(AstrayPipeline):
        def go(self, x, t, cond, uncond, scale):
            return self.network(x, t, cond)

    pipe, call = loop_of(OnePipeline)
    stock = call()
    for guidance in ("cfg", NEUTRAL):
        torch.testing.assert_close(call(guidance), stock, rtol=1e-4, atol=1e-4)
        assert pipe.guidance_trace.nfe == [2 + 1 + 1] * 3
    # What is dropped at the second step is dropped there anyway.
    assert equal(call(DROPS), stock)


@pytest.mark.parametrize("guidance", ["apg", "ag", "forecast"])
def test_loops_in_which_guidance_has_no_place(guidance):
    for cls, message in (
        (IdlePipeline, "found nothing to guide: IdlePipeline has stepped"),
        (EndlessPipeline, f"{driver.MANY_CALLS} times without a step"),
    ):
        _, call = loop_of(cls)
        with pytest.raises(LayoutError, match=message):
            call(guidance)


@pytest.mark.parametrize("read_late", [False, True])
def test_what_is_read_a_step_later_guides_alike(read_late, monkeypatch):
    """The scale is the same, whether it comes as a number or stays on the device."""
    scales = []
    if read_late:
        for module in (driver, patterns, prediction):
            monkeypatch.setattr(module, "on_host", lambda device: False)
    for name in ("sd", "flux", "z_image", "qwen_image", "sd_pag"):
        rule, family = Watching(), FAMILIES[name]
        pipe = guided(family.build())
        for batch in (1, 3):
            found = latents(pipe, name, batch, guidance=rule)
            torch.testing.assert_close(found, latents(pipe, name, batch), rtol=1e-4, atol=1e-4)
        scales += rule.scales
        w = family.w(family.call(1, True)[family.scale_name])
        if name != "sd_pag":  # whose scale holds that of perturbed attention, too
            assert rule.scales == pytest.approx([w] * len(rule.scales), rel=1e-4)
    assert scales


class SomeSkip(Policy):
    """The first sample is guided throughout, the others are skipped at odd steps."""

    name = "some-skip"

    def start(self, batch, total, on_cpu):
        """See `Policy`."""
        return SomeSkipState(batch)


class SomeSkipState(PolicyState):
    def __init__(self, batch):
        self.batch = batch

    def decide(self, step):
        held = Decision((), reuse=Weights(guided={step.index - 1: 1.0}))
        return [held if row and step.index % 2 else Decision() for row in range(self.batch)]

    def keep_until(self, kind, step):
        return step + 1 if kind == "guided" else -1


def test_a_network_that_needs_the_rows_of_all_samples():
    """It cannot skip steps of some, and says so before it has made one of them."""
    pipe = guided(FAMILIES["z_image_controlnet"].build())
    with (
        Rows(pipe, "z_image_controlnet") as rows,
        pytest.raises(LayoutError, match="needs the rows of all samples.*one at a time"),
    ):
        latents(pipe, "z_image_controlnet", guidance=SomeSkip())
    assert rows.calls == [6]
    alone = latents(pipe, "z_image_controlnet", 1, guidance=SomeSkip())
    assert alone.isfinite().all()


@pytest.mark.parametrize("name", ["sd", "flux"])
@pytest.mark.parametrize("rule", [CFG(), APG(space="native")], ids=str)
def test_some_samples_are_skipped_while_branches_are_equal(name, rule):
    """The others go on as the pipeline does, as where none is skipped."""
    family = FAMILIES[name]

    def call():
        arguments = family.call(3, True)
        return arguments | {"negative_prompt": arguments["prompt"], "num_inference_steps": 4}

    pipe, stock, outputs = guided(family.build()), family.build(), []
    with Rows(pipe, name) as rows:
        found = pipe(**call(), guidance=rule | SomeSkip())[0]
    step = stock.scheduler.step

    @functools.wraps(step)
    def held(output, *args, **kwargs):
        skips = len(outputs) % 2
        outputs.append(torch.cat([output[:1], (outputs[-1] if skips else output)[1:]]))
        return step(outputs[-1], *args, **kwargs)

    stock.scheduler.step = held
    torch.testing.assert_close(found, stock(**call())[0], rtol=1e-4, atol=1e-4)
    trace = pipe.guidance_trace
    assert sum(rows.calls) == sum(trace.nfe) and trace.nfe[0] == 2 * len(trace.steps)
    assert [step.skipped for step in trace.steps[:3]] == [[], [1, 2], []]


def test_a_scheduler_whose_step_takes_something_else():
    pipe = guided(FAMILIES["sd"].build())

    def step(self, output, timestep, latents, return_dict=True):
        return (latents,)

    pipe.scheduler.__class__ = type("Odd", (type(pipe.scheduler),), {"step": step})
    with pytest.raises(LayoutError, match="step of Odd takes no model_output and sample"):
        latents(pipe, "sd", guidance=APG(space="native"))


def test_a_pipeline_without_a_network():
    with pytest.raises(LayoutError, match="no network is found that the loop of Bare evaluates"):
        denoisers_of(type("Bare", (), {"unet": None})(), Layout())
    assert denoisers_of(type("One", (), {"transformer": 1, "unet": 2})(), Layout()) == (
        "unet",
        "transformer",
    )
    assert denoisers_of(type("Two", (), {"decoder": 1, "prior": 2})(), Layout()) == ("prior",)


# Caches


@pytest.mark.parametrize(
    ("guidance", "calls", "batch", "comparing", "counting"),
    [  # whether a cache that compares can stand it, and one that counts steps
        ("apg", (2,), 3, True, True),
        ("ag", (2,), 1, False, False),
        ("ag", (1, 1), 1, True, True),
        ("ag", (1, 1), 3, False, False),
        ("hold", (1, 1), 3, True, False),
        ("hold", (2,), 1, False, False),
        ("forecast", (2,), 3, True, False),
        ("forecast", (1, 1), 3, True, False),
        (CFG() | Interval(0, 2), (1, 1), 3, True, False),
        (CFG() | Interval(0, 2), (2,), 3, False, False),
        (CFG() | SomeSkip(), (1, 1), 3, True, False),  # which does not tell beforehand
        (CFG() | SomeSkip(), (2,), 3, False, False),
    ],
)
def test_what_caches_can_stand(guidance, calls, batch, comparing, counting):
    """Those that compare need all rows of a call; those that count need the call as well."""
    guidance = resolve(guidance) if isinstance(guidance, str) else guidance
    decisions = guidance.policy.decisions(6)
    for cache, stands in (
        (None, True),
        ("FirstBlockCache", comparing),
        ("MagCache", counting),
        ("TaylorSeerCache", counting),
    ):
        network = cached_pipe("flux", cache, True).transformer if cache else Network()
        given = [Network(), network], guidance, "mine", Pattern(calls), batch, decisions
        if stands:
            check_caches(*given)
        else:
            with pytest.raises(LayoutError, match=f"{cache}.*disable it, or leave out 'mine'"):
                check_caches(*given)


@pytest.mark.parametrize(
    "guidance",
    ["hold", CFG() | Schedule(("both",) * 4, (2.0,) * 4), "forecast", "ag", "cfg", "apg"],
    ids=str,
)
def test_a_combination_that_is_changed_afterwards(guidance):
    """Refused where guidance takes its place, by whatever name it was changed."""
    pipe = guided(stock_like(SoftenedPipeline, "sd"))
    stock = latents(pipe, "sd", softened=0.7)
    assert not equal(stock, latents(pipe, "sd"))
    if guidance in ("ag", "cfg", "forecast"):  # whose combinations are the pipeline's own
        found = latents(pipe, "sd", guidance=guidance, softened=0.7)
        assert guidance != "cfg" or equal(stock, found)
    else:
        with pytest.raises(LayoutError, match=re.escape(f"'{guidance}' cannot guide")):
            latents(pipe, "sd", guidance=guidance, softened=0.7)
