"""What one sees while waiting: the time it takes, lines, files."""

import json
import random
import re

import pytest
import torch
from PIL import Image

from pilotage.pipelines.personalization import (
    Personalizer,
    TokenBatch,
    personalizer,
    recipe,
    schedule,
)
from pilotage.pipelines.personalization.curve import curve
from pilotage.pipelines.personalization.schedule import Schedule, duration
from pilotage.pipelines.personalization.training import TokenTrainer

from .tiny import SHORT, build, fit, word


@pytest.fixture(scope="module")
def pipe():
    return build()


def falling(embeddings, _batch):
    return (embeddings - 1).square().sum((1, 2))


@pytest.mark.parametrize("every", [None, 4])
def test_a_schedule_counts_the_rows_that_a_run_takes(every):
    pipe, rows = build(), 0

    def count(_module, args):
        nonlocal rows
        rows += len(args[0])

    pipe.unet.register_forward_pre_hook(count)
    fit(pipe, steps=7, evaluate_every=every, patience=0)
    assert rows == Schedule(8, SHORT["held_out_rows"], 0, every).forwards(7)


def test_the_most_steps_that_fit_into_a_time():
    draw = random.Random(0)
    for _ in range(300):
        every = draw.choice([None, draw.randint(1, 50)])
        schedule = Schedule(draw.randint(1, 64), draw.randint(0, 64), draw.choice([0, 40]), every)
        seconds, one = draw.uniform(1, 1e5), draw.uniform(1e-2, 10)
        steps = schedule.steps_within(seconds, one)
        assert schedule.forwards(steps) * one <= seconds or steps == 0
        assert schedule.forwards(steps + 1) * one > seconds


def test_held_out_losses_take_a_quarter_at_most():
    for steps in (1, 20, 75, 1000, 30_000):
        every = Schedule(8, 32, 40).evaluation_interval(steps)
        assert 32 / (8 * every) <= 0.25 and steps / every <= 20


def test_seconds_are_those_of_one_pass(pipe, monkeypatch):
    """By a clock that goes on by a quarter of a second for each row, more for the first call."""
    clock, seen = [0.0], []

    def loss(embeddings, batch):
        clock[0] += 0.25 * len(embeddings) * len(batch) + (0 if seen else 100)
        seen.append(len(embeddings) * len(batch))
        return falling(embeddings, batch)

    plan = recipe("ours", batch=2, pool=8, words=0)
    search = plan.build(
        Personalizer(pipe).initial_embeddings(word(pipe), 1), [torch.ones(1, 16)], 0
    )
    rows = TokenBatch(*(torch.zeros(2) for _ in range(3)), (torch.zeros(2, 77),))
    trainer = TokenTrainer(loss, search, (1, 16), 0, {})
    monkeypatch.setattr(schedule.time, "perf_counter", lambda: clock[0])
    assert schedule.seconds_a_pass(trainer, search.ask(), rows) == 0.25
    assert seen == [1, 16]


def test_minutes_are_the_steps_that_fit(pipe, monkeypatch, capsys):
    monkeypatch.setattr(personalizer, "seconds_a_pass", lambda *_: 0.5)
    run = {"steps": None, "held_out_rows": 0, "evaluate_every": None}
    token = fit(pipe, falling, minutes=2, **run)  # 120 s, steps of 4 s
    assert token.steps == 30
    fit(pipe, falling, minutes=1, **(run | {"progress": True}))
    assert "15 steps of 8 forward passes of 0.5 s each" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"0.05 minutes are 0 steps of .*: give 1 minutes"):
        fit(pipe, falling, minutes=0.05, **run)
    words = {"words": 14}  # two steps of words, twice two, six, and one of the descent
    with pytest.raises(ValueError, match=r"are 7 steps of .* takes 13 at least"):
        fit(pipe, falling, minutes=0.5, **(run | words))


def test_a_run_that_goes_on_takes_the_minutes_from_there(pipe, monkeypatch, tmp_path):
    monkeypatch.setattr(personalizer, "seconds_a_pass", lambda *_: 0.5)
    run = {"held_out_rows": 0, "evaluate_every": None, "output": tmp_path}
    fit(pipe, falling, **(run | {"steps": 4}))
    assert fit(pipe, falling, minutes=1, **(run | {"steps": None})).steps == 4 + 15


def test_a_long_run_is_announced_and_a_shorter_one_offered(pipe, monkeypatch, capsys):
    monkeypatch.setattr(personalizer, "seconds_a_pass", lambda *_: 3.5)
    run = {"steps": 1000, "progress": True, "evaluate_every": None, "held_out_rows": 32}

    def stop(_trainer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(pipe, falling, callback=stop, **run)
    error = capsys.readouterr().err
    announced = re.search(r"about (.*); minutes=(\d+) \(--minutes \2\) would be (\d+) steps", error)
    # 8000 passes and 21 times 32, of 3.5 s
    assert announced[1] == duration(8672 * 3.5) == "8 h 26 min"
    assert announced[2] == "63" and 60 * 63 / 3.5 / 8 > int(announced[3]) > 90


def test_lines_name_phases_words_and_the_best(pipe, capsys):
    """The loss is the distance to a known word, which must lead."""
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    start = Personalizer(pipe).initial_embeddings(word(pipe), 1)[0]
    known = table[: len(pipe.tokenizer)]
    index = int((known - start).norm(dim=1).argsort()[5])
    best = pipe.tokenizer.convert_ids_to_tokens(index)
    best = best.removesuffix("</w>") if best.endswith("</w>") else f"{best}…"
    leading = []

    def loss(embeddings, _batch):
        return (embeddings - table[index]).square().sum((1, 2))

    token = fit(
        pipe,
        loss,
        **(SHORT | {"words": len(table), "steps": 400, "evaluate_every": 100, "progress": True}),
        callback=lambda trainer: leading.append(trainer.leading()),
    )
    error = capsys.readouterr().err
    said = re.search(r"mean of the given word and (\S+) \((\S+)\)", error)
    # In brackets, the difference in loss to the given word.
    expected = -(start - table[index]).square().sum().item()
    assert said[1] == best and float(said[2]) == pytest.approx(expected, abs=6e-5)
    assert leading[-1][0][0] == best
    # While they are compared, the bar names those that lead.
    shown = set(re.findall(r"comparing known words, leading: ([^:]*):", error))
    assert shown <= {", ".join(name for name, _ in words) for words in leading}
    assert any(names.split(", ")[0] == best for names in shown)
    for phase in ("encoding", "comparing known words", "descent", "held-out loss"):
        assert phase in error
    for number, (step, forwards, value) in enumerate(token.evaluations):
        least = min(token.evaluations[: number + 1], key=lambda e: e[2])
        line = f"step {step}: held-out loss {value:.4f}, best {least[2]:.4f} of step {least[0]}; "
        assert line + f"{forwards} forward passes" in error
    assert f"held out={value:.4f}, best={least[2]:.4f}" in error and "loss=" not in error


def test_no_known_word_is_better(pipe, capsys):
    start = Personalizer(pipe).initial_embeddings(word(pipe), 1)[0]

    def loss(embeddings, _batch):
        return (embeddings - start).square().sum((1, 2))

    fit(pipe, loss, words=7, steps=12, progress=True)
    assert "no known word is better than the given one" in capsys.readouterr().err


def test_the_words_that_are_named_are_those_the_descent_begins_at(pipe):
    """Not words that did well on the first batch alone and are no longer compared."""
    named, others = [], []

    def loss(embeddings, batch):
        draw = torch.Generator().manual_seed(int(batch.timesteps[0]))
        noise = embeddings[:, 0] @ torch.randn(16, generator=draw)
        return falling(embeddings, batch) + 9 * noise

    def note(trainer):
        if not trainer.comparing_words and not named:
            named.append(([name for name, _ in trainer.leading()], trainer.vectors))
            means = {word: total / count for word, (total, count) in trainer.words.items()}
            others.extend(sorted(means, key=lambda word: means[word])[:3])

    fit(pipe, loss, words=200, steps=45, callback=note)
    ((names, vectors),) = named
    # Pieces of words end in an ellipsis; the table has more rows than the vocabulary.
    known = pipe.tokenizer.get_vocab().items()
    vocabulary = {(w[:-4] if w.endswith("</w>") else f"{w}…"): i for w, i in known}
    ids = [vocabulary[n] if n in vocabulary else int(n.strip("[row ]")) for n in names]
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    assert len(ids) == 3
    start = Personalizer(pipe).initial_embeddings(word(pipe), 1)  # the given word takes part, too
    torch.testing.assert_close(torch.cat([start, table[ids]]).mean(0), vectors[0])
    assert set(others) != set(names)


def test_words_that_lead_are_known_after_a_resume(pipe, tmp_path):
    leads = []

    def note(trainer):
        leads.append((trainer.step, trainer.leading()))

    options = {"words": 14, "steps": 10, "output": tmp_path, "callback": note}
    fit(pipe, falling, **(options | {"output": tmp_path / "whole"}))
    whole = dict(leads)
    leads.clear()
    fit(pipe, falling, **(options | {"steps": 3}))
    fit(pipe, falling, **options)
    assert len(leads) == 10 and dict(leads) == whole and whole[10]


def test_files_hold_what_was_measured(pipe, tmp_path):
    token = fit(pipe, falling, output=tmp_path, steps=9)
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10))
    assert [line["loss"] for line in lines[1:]] == token.losses
    found = [(x["step"], x["forwards"], x["held_out"]) for x in lines if "held_out" in x]
    assert found == token.evaluations
    with Image.open(tmp_path / "curve.png") as image:
        image.load()
        assert image.size == (640, 400)


def pixels(image, colour):
    array = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(
        image.height, image.width, 3
    )
    return (array == torch.tensor(colour, dtype=torch.uint8)).all(2)[28:].nonzero().float()


def test_the_curve_marks_the_best_point():
    """Its mark moves as the best point does; a point that is not finite is no point."""
    places = {}
    for best in (10, 30):
        points = [(0, 1.0), (10, 0.9), (20, float("inf")), (30, 0.8), (40, 0.95)]
        points = [(s, 0.5 if s == best else loss) for s, loss in points]
        marks = pixels(curve(points), (214, 39, 40))
        places[best] = (marks + torch.tensor([28.0, 0.0])).mean(0)
    # The axes lie between 70 and 620 (step 0 to 40) and 30 and 360 pixels.
    for best, (y, x) in places.items():
        assert x == pytest.approx(70 + 550 * best / 40, abs=1.5)
        assert y == pytest.approx(360 - 330 * 0.05 / 1.1, abs=1.5)
    curve([(0, 0.5)])


def test_patience_is_on_by_default(pipe):
    flat = lambda embeddings, _batch: torch.ones(len(embeddings))  # noqa: E731
    token = fit(pipe, flat, steps=100, evaluate_every=None, held_out_rows=2)
    assert token.steps == 5 * 5 and not token.learned
    assert fit(pipe, flat, steps=30, evaluate_every=1, held_out_rows=2).steps == 30


def test_durations():
    assert [duration(s) for s in (4.2, 89, 90, 600, 5399, 29_400)] == [
        "4 s",
        "89 s",
        "2 min",
        "10 min",
        "1 h 30 min",
        "8 h 10 min",
    ]
