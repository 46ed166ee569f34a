"""Measure personalization on the embedded model: ``eval/results/personalization.json``.

    python -m examples.emoji.data prepare && python -m examples.studies.personalize

Eight concepts that were held out of the model's training, each drawn in six or seven styles: two
styles are held out of the personalization, the others are learned from. Every method begins at the
same known word and sees the same pictures:

* ``zoodip``, ``ours``: the presets, on the int8 network, far fewer steps than 30,000; both are
  judged equally often, ours takes a third of zoodip's forwards,
* ``backprop``: exact textual inversion (Adam on the token's gradient) in full precision,
* ``backprop_int8_checkpoint``: the same on the int8 network with gradient checkpointing,
* ``initial``: the known word.

What is learned is judged on the network in full precision. Each subject's result is kept in
``cache/personalization``, so that an interrupted run continues.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from examples.emoji import data as emoji
from examples.studies.personalize.checks import agreement, memory
from pilotage.eval.embedded import load_embedded
from pilotage.eval.metrics.extractors import EfficientNetLite0
from pilotage.eval.metrics.images import to_tensor
from pilotage.eval.record import write_figures, write_json
from pilotage.pipelines.personalization.inputs import TokenData, extended, load_images, prompt_ids
from pilotage.pipelines.personalization.personalizer import Personalizer
from pilotage.pipelines.personalization.recipes import recipe
from pilotage.pipelines.quantization.quantize import quantize

WORD = "<x>"
# Held-out concept -> known word of one token. Those that the preset was developed on (see
# `pilotage.pipelines.personalization.recipes`) are not among them.
SUBJECTS = {
    "deer": "horse",
    "tractor": "bus",
    "derelict house": "house",
    "telephone": "camera",
    "t-shirt": "dress",
    "wind chime": "bell",
    "hibiscus": "star",
    "cloud with snow": "cloud",
}
METHODS = ("zoodip", "ours", "backprop", "backprop_int8_checkpoint", "initial")
HELD_OUT_STYLES = 2
HELD_OUT_ROWS = 16
JUDGE_ROWS = 32
BATCH = 4
EVALUATIONS = 15
SAMPLING_STEPS = 10
GUIDANCE_SCALE = 3.0


class Subject:
    """Pictures of one concept, split by style, and where every method begins."""

    def __init__(self, concept: str, archive: Path) -> None:
        drawings = [d for d in emoji.load(archive) if d.split == "concept" and d.concept == concept]
        self.concept, self.word = concept, SUBJECTS[concept]
        self.pictures = list(emoji.pictures(archive, drawings))
        self.styles = [d.style for d in drawings]
        self.prompts = [f"{style} style {{}}" for style in self.styles]
        self.train = slice(HELD_OUT_STYLES, None)
        self.held_out = slice(0, HELD_OUT_STYLES)
        # Two styles that were held out and two that were not.
        self.drawn = list(range(2 * HELD_OUT_STYLES))

    def source(self, pipe: Any, part: slice) -> tuple[Tensor, tuple[Tensor, ...], bool]:
        """Pictures and prompts as the personalizer's data take them."""
        tokenizer = extended(pipe.tokenizer, WORD, 1)
        ids = prompt_ids(tokenizer, self.prompts[part], WORD, 1)
        return load_images(self.pictures[part], 64), (ids,), True


def zeroth_order(
    personalizer: Personalizer, subject: Subject, preset: str, steps: int
) -> tuple[Tensor, dict[str, Any]]:
    """The token of a preset, and what it took; every preset is judged equally often.

    `last` of the record is the token of the last step: the one returned was the best on held-out
    rows, which flatters methods that move about a lot.
    """
    last = []
    token = personalizer.fit(
        subject.pictures[subject.train],
        WORD,
        subject.word,
        preset=preset,
        steps=steps,
        prompts=subject.prompts[subject.train],
        held_out=subject.pictures[subject.held_out],
        held_out_prompts=subject.prompts[subject.held_out],
        held_out_rows=HELD_OUT_ROWS,
        evaluate_every=max(1, steps // EVALUATIONS),
        progress=False,
        callback=lambda trainer: last.append(trainer.vectors) if trainer.step == steps else None,
    )
    record = {"forwards": token.forwards, "evaluations": token.evaluations, "last": last[0]}
    return token.vectors, record


def backprop(
    personalizer: Personalizer, subject: Subject, steps: int, every: int, rate: float = 5e-3
) -> tuple[Tensor, dict[str, Any]]:
    """Exact textual inversion: Adam on the gradient; the token of the lowest held-out loss."""
    networks = personalizer.networks
    source = subject.source(personalizer.pipe, subject.train)
    plan = recipe(
        "ours", batch=BATCH, pool=BATCH * 12, timesteps_low=0, timesteps_high=1000, steps=steps
    )
    data = TokenData(networks, source, plan, seed=0)
    held = subject.source(personalizer.pipe, subject.held_out)
    judge = TokenData(networks, held, plan, seed=0).held_out(HELD_OUT_ROWS)
    token = personalizer.initial_embeddings(subject.word, 1).requires_grad_()
    optimizer = torch.optim.Adam([token], lr=rate)
    best, least, evaluations = token.detach().clone(), float("inf"), []
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            with torch.no_grad():
                value = networks(token.detach()[None], judge).item()
            evaluations.append((step, step * BATCH, value))
            if value < least:
                best, least = token.detach().clone(), value
        if step < steps:
            optimizer.zero_grad()
            networks(token[None], data.batch(step)).sum().backward()
            optimizer.step()
    return best, {"forwards": steps * BATCH, "evaluations": evaluations}


@torch.no_grad()
def unseen_loss(personalizer: Personalizer, subject: Subject, token: Tensor) -> float:
    """Held-out loss on rows that no method has seen."""
    networks = personalizer.networks
    held = subject.source(personalizer.pipe, subject.held_out)
    rows = TokenData(networks, held, recipe("ours"), seed=1).held_out(JUDGE_ROWS)
    return networks(token[None], rows).item()


@torch.no_grad()
def judge(personalizer: Personalizer, subject: Subject, token: Tensor) -> tuple[float, Tensor]:
    """Its `unseen_loss`, and pictures in four styles (4, 3, 64, 64)."""
    loss = unseen_loss(personalizer, subject, token)
    with personalizer.speaking(WORD, token) as pipe:
        images = pipe(
            [subject.prompts[i].format(WORD) for i in subject.drawn],
            guidance="cfg",
            guidance_scale=GUIDANCE_SCALE,
            num_inference_steps=SAMPLING_STEPS,
            generator=[torch.Generator().manual_seed(i) for i in subject.drawn],
        ).images
    return loss, to_tensor(images)


def finished(path: Path, name: str, args: argparse.Namespace) -> bool:
    """Whether a method's result is there, of a run as long as asked for."""
    rows = {
        "zoodip": args.zoodip_steps * recipe("zoodip").evaluations,
        "ours": args.ours_steps * recipe("ours").evaluations,
        "backprop": args.backprop_steps * BATCH,
        "backprop_int8_checkpoint": args.backprop_steps * BATCH,
        "initial": 0,
    }
    return path.is_file() and json.loads(path.read_text())["forwards"] == rows[name]


def run(args: argparse.Namespace) -> None:
    """Every method on every subject; what is already there is kept."""
    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", "text_encoder"):
        getattr(pipe, name).requires_grad_(False)
    small = copy.deepcopy(pipe)
    small.set_progress_bar_config(disable=True)
    quantize(small, backend="pilotage", gradients=True)
    full, int8 = Personalizer(pipe), Personalizer(small)

    def with_checkpointing(subject: Subject) -> tuple[Tensor, dict[str, Any]]:
        small.unet.enable_gradient_checkpointing()
        result = backprop(int8, subject, args.backprop_steps, args.backprop_steps // 4)
        small.unet.disable_gradient_checkpointing()
        return result

    methods: dict[str, Callable[[Subject], tuple[Tensor, dict[str, Any]]]] = {
        "zoodip": lambda s: zeroth_order(int8, s, "zoodip", args.zoodip_steps),
        "ours": lambda s: zeroth_order(int8, s, "ours", args.ours_steps),
        "backprop": lambda s: backprop(full, s, args.backprop_steps, args.backprop_steps // 4),
        "backprop_int8_checkpoint": with_checkpointing,
        "initial": lambda s: (
            full.initial_embeddings(s.word, 1),
            {"forwards": 0, "evaluations": []},
        ),
    }
    extractor = EfficientNetLite0()
    args.folder.mkdir(parents=True, exist_ok=True)
    chosen = list(SUBJECTS)[: args.subjects]
    for concept in tqdm(chosen, unit="subject"):
        subject = Subject(concept, args.archive)
        real = extractor(to_tensor(subject.pictures))
        for name, method in methods.items():
            path = args.folder / concept.replace(" ", "-") / f"{name}.json"
            if finished(path, name, args):
                continue
            began = time.process_time()
            token, record = method(subject)
            record["seconds"] = time.process_time() - began
            record["heldout_loss"], images = judge(full, subject, token)
            if "last" in record:
                record["last"] = unseen_loss(full, subject, record["last"])
            features = extractor(images)
            record["similarity"] = (
                torch.nn.functional.cosine_similarity(features[:, None], real[None], dim=2)
                .mean()
                .item()
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {"token": token.contiguous(), "images": images.contiguous()}
            save_file(tensors, path.with_suffix(".safetensors"))
            write_json(path, record)
    subject = Subject(chosen[0], args.archive)
    if not (path := args.folder / "memory.json").is_file():
        write_json(path, memory(full, int8, subject, BATCH))
    if not (path := args.folder / "agreement.json").is_file():
        write_json(path, agreement(subject))


def alignment(args: argparse.Namespace, concepts: list[str]) -> dict[str, float]:
    """Mean score of each method's pictures and the concept's name, by a map of our own.

    A ridge map from picture features to sentence vectors, fitted on the pictures the model was
    trained on: weaker than CLIP and not comparable with its figures.
    """
    from pilotage.eval.metrics.alignment import RidgeAlignment

    trained = [d for d in emoji.load(args.archive, everyday=True) if d.split == "train"]
    pictures = to_tensor(emoji.pictures(args.archive, trained))
    scorer = RidgeAlignment.fit(pictures, [d.concept for d in trained])
    means = {}
    for name in METHODS:
        scores = []
        for concept in concepts:
            path = args.folder / concept.replace(" ", "-") / f"{name}.safetensors"
            images = load_file(path)["images"]
            scores.append(scorer.score(images, [concept] * len(images)).mean().item())
        means[name] = round(statistics.mean(scores), 4)
    return means


def reached(evaluations: list, target: float) -> int | None:
    """Forwards after which a held-out loss was at most `target`."""
    return next((rows for _, rows, value in evaluations if value <= target), None)


def ratio(of: dict[str, dict], target: float, forwards: int) -> float | None:
    """Forwards in which ours reaches `target`, over `forwards`; None if it does not."""
    rows = reached(of["ours"]["evaluations"], target)
    return None if rows is None else round(rows / max(forwards, 1), 4)


def improved(of: dict[str, dict]) -> bool:
    """Whether the zoodip preset ended below the held-out loss of the initial token."""
    losses = [value for _, _, value in of["zoodip"]["evaluations"]]
    return losses[-1] < losses[0]


def median(ratios: Iterable[float | None]) -> float | None:
    """Median over subjects, one that was not reached as infinite; None if it is or none is."""
    values = [float("inf") if r is None else r for r in ratios]
    value = statistics.median_high(values) if values else float("inf")
    return None if value == float("inf") else value


def figures(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of all subjects on which every method has run."""
    records: dict[str, dict[str, dict]] = {}
    for concept in SUBJECTS:
        folder = args.folder / concept.replace(" ", "-")
        if all(finished(folder / f"{name}.json", name, args) for name in METHODS):
            records[concept] = {
                name: json.loads((folder / f"{name}.json").read_text()) for name in METHODS
            }
    if not records:
        raise ValueError(f"no subject is complete in {args.folder}")
    methods: dict[str, dict] = {}
    for name in METHODS:
        rows = [r[name] for r in records.values()]
        methods[name] = {
            key: round(statistics.mean(row[key] for row in rows), 4)
            for key in ("similarity", "heldout_loss", "forwards", "seconds")
        }
    if importlib.util.find_spec("pilotage.eval.metrics.alignment") is not None:
        for name, value in alignment(args, list(records)).items():
            methods[name]["alignment"] = value
    peaks = json.loads((args.folder / "memory.json").read_text())
    for name in METHODS:
        methods[name]["peak_mb_over_weights"] = peaks.get(name, 0.0)
    final, best, losses = {}, {}, {}
    for concept, of in records.items():
        curve = [value for _, _, value in of["zoodip"]["evaluations"]]
        forwards = of["zoodip"]["forwards"]
        final[concept] = ratio(of, curve[-1], forwards)
        best[concept] = ratio(of, min(curve), reached(of["zoodip"]["evaluations"], min(curve)))
        mine = [value for _, _, value in of["ours"]["evaluations"]]
        losses[concept] = {
            "initial": round(curve[0], 4),
            "zoodip_final": round(curve[-1], 4),
            "zoodip_best": round(min(curve), 4),
            "ours_final": round(mine[-1], 4),
            "ours_best": round(min(mine), 4),
        }
    learned = [concept for concept, of in records.items() if improved(of)]
    backprop_similarity = methods["backprop"]["similarity"]
    return {
        "subjects": list(records),
        "styles_held_out": HELD_OUT_STYLES,
        "steps": {
            "zoodip": args.zoodip_steps,
            "zoodip_published": 30_000,
            "ours": args.ours_steps,
            "backprop": args.backprop_steps,
        },
        "seconds_are": "processor seconds of one thread, learning only, held-out losses included",
        "methods": methods,
        "selection_loss_by_subject": losses,
        "unseen_loss_by_subject": {
            concept: {
                "zoodip_last": round(of["zoodip"]["last"], 4),
                "zoodip_kept": round(of["zoodip"]["heldout_loss"], 4),
                "ours_last": round(of["ours"]["last"], 4),
                "ours_kept": round(of["ours"]["heldout_loss"], 4),
            }
            for concept, of in records.items()
        },
        "zoodip_ended_below_initial": learned,
        "forwards_ratio_to_reach_zoodip_is": "median over the subjects on which zoodip ended below "
        "the initial token; null: not within ours' forwards",
        "forwards_ratio_to_reach_zoodip": median(final[c] for c in learned),
        "forwards_ratio_to_reach_zoodip_by_subject": final,
        "forwards_ratio_to_reach_zoodip_best": median(best[c] for c in learned)
        if learned
        else None,
        "forwards_ratio_to_reach_zoodip_best_by_subject": best,
        "memory_ratio_to_inference": round(peaks["ours"] / peaks["inference"], 4),
        "memory_ratio_to_inference_two_rows": round(peaks["ours_two_rows"] / peaks["inference"], 4),
        **json.loads((args.folder / "agreement.json").read_text()),
        "similarity_to_backprop": round(methods["ours"]["similarity"] / backprop_similarity, 4),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, default=emoji.DEFAULT_ARCHIVE)
    parser.add_argument("--folder", type=Path, default=Path("cache/personalization"))
    parser.add_argument("--subjects", type=int, default=len(SUBJECTS))
    parser.add_argument("--zoodip-steps", type=int, default=600)
    parser.add_argument("--ours-steps", type=int, default=75)
    parser.add_argument("--backprop-steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("eval/results/personalization.json")
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run(args)
    write_figures(args.output, figures(args))
    print(args.output.read_text())


if __name__ == "__main__":
    main()
