"""Measure personalization on the embedded model: ``eval/results/personalization.json``.

    python -m examples.emoji.data prepare && python -m examples.studies.personalize

Subjects are those of `subjects`. Every method begins at the same known word and sees the same
pictures:

* ``zoodip``, ``ours``: the presets, on the int8 network, far fewer steps than 30,000; both are
  looked at equally often, ours takes a third of zoodip's forwards,
* ``zoodip_swept``: zoodip as its published script has it, at the best of four rates on development
  subjects,
* ``backprop``: exact textual inversion (Adam on the token's gradient) in full precision,
* ``backprop_int8_checkpoint``: the same on the int8 network with gradient checkpointing (on
  held-out concepts only),
* ``initial``: the known word; ``name`` (subjects in reach): the nearest name of the model.

What is learned is judged on the network in full precision. Each result is kept in
``cache/personalization``, so that an interrupted run continues. ``--recount`` counts the intervals
of the file again, from what it has of each subject.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from examples.emoji import data as emoji
from examples.studies.personalize import figures as counting
from examples.studies.personalize import subjects as chosen
from examples.studies.personalize.checks import agreement, costs
from examples.studies.personalize.methods import (
    BATCH,
    HELD_OUT_ROWS,
    NOISES,
    UNSEEN_ROWS,
    Judge,
    backprop,
    script,
    together,
    zeroth_order,
)
from examples.studies.personalize.subjects import Subject
from pilotage.eval.embedded import load_embedded
from pilotage.eval.metrics.alignment import RidgeAlignment
from pilotage.eval.metrics.efficientnet import EfficientNetLite
from pilotage.eval.metrics.images import to_tensor
from pilotage.eval.record import figures_context, write_figures, write_json
from pilotage.pipelines.personalization.personalizer import Personalizer
from pilotage.pipelines.personalization.recipes import recipe
from pilotage.pipelines.quantization.quantize import quantize

RATES = (2e-3, 5e-3, 1e-2, 2e-2)
ZOODIP_STEPS, OURS_STEPS, BACKPROP_STEPS = 600, 75, 60
LEARNING = ("zoodip", "zoodip_swept", "ours", "backprop")
HELD_OUT_METHODS = ("initial", *LEARNING, "backprop_int8_checkpoint")
IN_REACH_METHODS = ("initial", *LEARNING, "name")
# Columns of the sheet of pictures.
SHEET = {"initial": "known word", "ours": "ours", "backprop": "backprop"}


class Study:
    """The networks, and every method's result on every subject, kept in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pipe = load_embedded()
        for name in ("unet", "vae", "text_encoder"):
            getattr(pipe, name).requires_grad_(False)
        small = copy.deepcopy(pipe)
        quantize(small, backend="pilotage", gradients=True)
        for one in (pipe, small):
            one.set_progress_bar_config(disable=True)
        self.full, self.int8 = Personalizer(pipe), Personalizer(small)
        self.width = sum(self.full.networks.widths)
        self.extractor = EfficientNetLite("efficientnet-lite0")

    def sweep(self) -> dict[str, Any]:
        """The script's zoodip at every rate on the development subjects, and the best rate.

        The best one has the lowest mean unseen loss of the tokens that are kept.
        """
        subjects = [*chosen.DEVELOPMENT_HELD_OUT, *chosen.DEVELOPMENT_IN_REACH]
        plans = [script(rate, ZOODIP_STEPS, self.width) for rate in RATES]
        losses: dict[str, list] = {}
        for subject in tqdm(subjects, desc="sweep", unit="subject"):
            path = self.folder / "sweep" / f"{_slug(subject)}.json"
            asked = [dataclasses.asdict(plan) for plan in plans]
            if (found := self._found(path, asked)) is None:
                judge = Judge(self.full, subject)
                rows = [
                    {"kept": judge.loss(kept), "last": judge.loss(last)}
                    for kept, last, _ in together(self.int8, subject, plans)
                ]
                found = {"settings": asked, "unseen": rows}
                _write(path, found)
            losses[subject.concept] = found["unseen"]
        rates = {
            f"{rate:g}": {
                which: round(sum(rows[i][which] for rows in losses.values()) / len(losses), 4)
                for which in ("kept", "last")
            }
            for i, rate in enumerate(RATES)
        }
        means = [sum(rows[i]["kept"] for rows in losses.values()) for i in range(len(RATES))]
        return {
            "subjects": list(losses),
            "unseen_loss_by_rate": rates,
            "best": RATES[means.index(min(means))],
        }

    def plans(self, rate: float) -> dict[str, Any]:
        """Settings of each method; a result of others is made anew."""
        return {
            "zoodip": recipe("zoodip", steps=ZOODIP_STEPS),
            "zoodip_swept": script(rate, ZOODIP_STEPS, self.width),
            "ours": recipe("ours", steps=OURS_STEPS),
        }

    def asked(self, method: str, rate: float) -> Any:
        """What a record of a method must agree with."""
        plan = self.plans(rate).get(method, BACKPROP_STEPS if "backprop" in method else 0)
        return dataclasses.asdict(plan) if dataclasses.is_dataclass(plan) else plan

    def learn(
        self, subject: Subject, methods: list[str], rate: float
    ) -> dict[str, tuple[Tensor, Tensor, dict[str, Any]]]:
        """Tokens of methods on a subject: kept, last, and what it took."""
        plans, result = self.plans(rate), {}
        calls: dict[str, Callable[[], Any]] = {
            "ours": lambda: zeroth_order(self.int8, subject, plans["ours"]),
            "backprop": lambda: backprop(self.full, subject, BACKPROP_STEPS),
            "backprop_int8_checkpoint": lambda: self._checkpointed(subject),
        }
        if several := [name for name in methods if name.startswith("zoodip")]:
            tokens = together(self.int8, subject, [plans[name] for name in several])
            result |= dict(zip(several, tokens, strict=True))
        result |= {name: calls[name]() for name in methods if name in calls}
        if "initial" in methods:
            known = self.full.initial_embeddings(subject.word, 1)
            result["initial"] = known, known, {"forwards": 0, "looks": 0, "evaluations": []}
        return result

    def _checkpointed(self, subject: Subject) -> tuple[Tensor, Tensor, dict[str, Any]]:
        unet = self.int8.pipe.unet
        unet.enable_gradient_checkpointing()
        result = backprop(self.int8, subject, BACKPROP_STEPS)
        unet.disable_gradient_checkpointing()
        return result

    def subject(self, subject: Subject, methods: tuple[str, ...], rate: float) -> None:
        """Every method on a subject; what is already there is kept."""
        folder = self.folder / _slug(subject)
        paths = {name: folder / f"{name}.json" for name in methods}
        missing = [n for n in methods if self._found(paths[n], self.asked(n, rate)) is None]
        if not missing:
            return
        judge = Judge(self.full, subject)
        real = self.extractor(to_tensor(subject.pictures)).repeat(NOISES, 1)

        def keep(name: str, images: Tensor, record: dict[str, Any], **tensors: Tensor) -> None:
            cosine = torch.cosine_similarity(self.extractor(images), real, dim=1)
            record |= {"settings": self.asked(name, rate), "similarity": cosine.tolist()}
            path = paths[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {key: value.clone() for key, value in tensors.items()}
            save_file({"images": images.contiguous(), **tensors}, path.with_suffix(".safetensors"))
            _write(path, record)

        for name, (kept, last, record) in self.learn(subject, missing, rate).items():
            record["unseen"] = {"kept": judge.loss(kept), "last": judge.loss(last)}
            keep(name, judge.pictures(kept), record, kept=kept, last=last)
        if "name" in missing:
            keep("name", judge.pictures(None, chosen.FAMILIES[subject.word]), {})

    def _found(self, path: Path, asked: Any) -> dict[str, Any] | None:
        """A result, unless it is missing or of other settings."""
        if not path.is_file():
            return None
        record = json.loads(path.read_text())
        return record if record["settings"] == json.loads(json.dumps(asked)) else None

    def records(
        self, subjects: list[Subject], methods: tuple[str, ...]
    ) -> dict[str, dict[str, dict[str, Any]]]:
        """Subject -> method -> record, with alignment scored by a ridge map of our own.

        The map from picture features to sentence vectors is fitted on the pictures the model was
        trained on: weaker than CLIP and not comparable with its figures.
        """
        trained = [d for d in emoji.load(everyday=True) if d.split == "train"]
        pictures = to_tensor(list(emoji.pictures(emoji.DEFAULT_ARCHIVE, trained)))
        scorer = RidgeAlignment.fit(pictures, [d.concept for d in trained])
        result: dict[str, dict[str, dict[str, Any]]] = {}
        for subject in subjects:
            result[subject.concept] = {}
            for name in methods:
                path = self.folder / _slug(subject) / f"{name}.json"
                record = json.loads(path.read_text())
                images = load_file(path.with_suffix(".safetensors"))["images"]
                concepts = [subject.concept] * len(images)
                record["alignment"] = scorer.score(images, concepts).tolist()
                result[subject.concept][name] = record
        return result

    def once(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A result that is no subject's."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            _write(path, measure())
        return json.loads(path.read_text())

    def sheet(self, path: Path) -> None:
        """A row for each subject in reach: drawing, known word, ours, backpropagation, twice."""
        images, labels = [], []
        for subject in chosen.IN_REACH_SUBJECTS:
            folder = self.folder / _slug(subject)
            drawn = {name: load_file(folder / f"{name}.safetensors")["images"] for name in SHEET}
            for i in range(chosen.HELD_OUT):
                images.append(subject.pictures[i])
                images += [_picture(drawn[name][i]) for name in SHEET]
                labels += [subject.concept.split()[0], *SHEET.values()]
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet = emoji.contact_sheet(images, 4 * (1 + len(SHEET)), labels)
        sheet.quantize(256).save(path, optimize=True)  # a third of the size


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


def _slug(subject: Subject) -> str:
    return subject.concept.replace(" ", "-")


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def figures(study: Study, swept: dict[str, Any]) -> dict[str, Any]:
    """All figures; every subject must be complete."""
    held_out = study.records(chosen.HELD_OUT_SUBJECTS, HELD_OUT_METHODS)
    reach = study.records(chosen.IN_REACH_SUBJECTS, IN_REACH_METHODS)
    first = chosen.HELD_OUT_SUBJECTS[0]
    cost = study.once("costs", lambda: costs(study.full, study.int8, first, BATCH))
    agrees = study.once("agreement", lambda: agreement(first))
    steps = {
        "zoodip": ZOODIP_STEPS,
        "zoodip_swept": ZOODIP_STEPS,
        "ours": OURS_STEPS,
        "backprop": BACKPROP_STEPS,
        "backprop_int8_checkpoint": BACKPROP_STEPS,
    }
    families = {subject.concept: subject.word for subject in chosen.IN_REACH_SUBJECTS}
    return {
        "steps": steps | {"zoodip_published": 30_000},
        "rows": {"look": HELD_OUT_ROWS, "unseen": UNSEEN_ROWS},
        "pictures_held_out": chosen.HELD_OUT,
        "similarity_is": "cosine of EfficientNet-Lite0 features of a picture and of the subject's "
        "drawing in the style of the same prompt",
        "seconds_are": "processor seconds of the steps alone, from one step's median, in turn",
        "intervals_are": counting.INTERVALS_ARE,
        "rate_sweep": swept,
        **counting.held_out(held_out, steps, cost),
        "subjects_in_reach": counting.in_reach(reach, families, LEARNING),
        "unseen_compared_on_all_subjects": counting.compared(
            held_out | reach, "ours", counting.OTHERS
        ),
        **agrees,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("cache/personalization"))
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("eval/results/personalization.json")
    )
    parser.add_argument("--sheet", type=Path, default=Path("docs/pictures/personalization.png"))
    parser.add_argument(
        "--recount", action="store_true", help="only count the file's intervals again"
    )
    args = parser.parse_args()
    if args.recount:
        found = counting.recounted(json.loads(args.output.read_text()))
        write_json(args.output, found | {"recounted": figures_context()})
        return
    torch.set_num_threads(1)
    study = Study(args.folder)
    swept = study.sweep()
    sets = (
        (chosen.IN_REACH_SUBJECTS, IN_REACH_METHODS),
        (chosen.HELD_OUT_SUBJECTS, HELD_OUT_METHODS),
    )
    for subjects, methods in sets:
        for subject in tqdm(subjects, unit="subject"):
            study.subject(subject, methods, swept["best"])
    write_figures(args.output, figures(study, swept))
    study.sheet(args.sheet)
    print(args.output.read_text())


if __name__ == "__main__":
    main()
