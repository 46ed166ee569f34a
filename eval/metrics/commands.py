"""The metric commands, on folders of pictures or files of their features.

What each measures, and with what its figures compare, is said in the module it calls. That is
imported when the command runs, so that ``pilotage --help`` stays fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import (
    DEFAULT_EXTRACTOR,
    Background,
    BatchSize,
    Device,
    Dreamsim,
    Extractor,
    Fake,
    Folder,
    Json,
    Lpips,
    MadeBy,
    Real,
    Recursive,
    Resize,
    check_target,
    report,
)
from ..prompts import read_prompts
from ..terminal import note

if TYPE_CHECKING:
    from ..pictures import Pictures, Reading
    from .features import Features

Prompts = Annotated[
    Path | None,
    typer.Option(
        help="Text file, a line a picture in the order of names; default: from the pictures of "
        "Pilotage, A1111 or ComfyUI."
    ),
]
CMMD_EXTRACTOR = "clip:openai/clip-vit-large-patch14-336"


def _sources(real: Features, fake: Features) -> dict[str, Any]:
    found: dict[str, Any] = {"extractor": real.extractor}
    if real.preprocessing != fake.preprocessing:  # a file of another tool
        found["preprocessing"] = [real.preprocessing, fake.preprocessing]
    return found | {"n_real": real.count, "n_fake": fake.count}


def read_folder(folder: Path, reading: Reading) -> Pictures:
    """The pictures of a folder, checked; what is there is told on the standard error."""
    from ..pictures import Pictures

    pictures = Pictures.of(folder, reading)
    note(pictures.found())
    return pictures.check()


def texts_of(prompts: Path | None, pictures: Pictures) -> list[str]:
    """A prompt a picture: the lines of a file, else what the pictures carry."""
    from ..metadata import prompt_of

    files = pictures.files
    texts = read_prompts(prompts) if prompts is not None else [prompt_of(file) for file in files]
    if len(texts) != len(files):
        raise ValueError(f"{prompts} has {len(texts)} prompts for {len(files)} pictures")
    return texts


def fid(
    real: Real,
    fake: Fake,
    extractor: Extractor = DEFAULT_EXTRACTOR,
    resamples: Annotated[
        int, typer.Option(min=0, help="Draws for a bootstrap interval; 0: none. Slow.")
    ] = 0,
    batch_size: BatchSize = 32,
    resize: Resize = None,
    recursive: Recursive = False,
    background: Background = "white",
    made_by: MadeBy = None,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Fréchet distance between two sets of pictures (FID with --extractor inception)."""
    from ..pictures import Reading
    from .bootstrap import check_resampling
    from .features import load_pair
    from .frechet import frechet_distance, frechet_interval

    if resamples:
        check_resampling(resamples)
    settings = real, fake, extractor, device, batch_size, Reading(recursive, resize, background)
    pair = load_pair(*settings, rows=(False, resamples > 0), made_by=made_by)
    # Kept features spare small sets the eigenvectors of a D x D matrix.
    one, two = (x if x.values is None else x.values for x in pair)
    name = "fid" if extractor.partition(":")[0] == "inception" else "fd"
    values = {name: frechet_distance(one, two), **_sources(*pair)}
    if resamples:
        values["interval"] = list(frechet_interval(one, pair[1].rows(), resamples=resamples))
    report(values, json, *(features.pictures for features in pair))


def kid(
    real: Real,
    fake: Fake,
    extractor: Extractor = DEFAULT_EXTRACTOR,
    subsets: Annotated[
        int, typer.Option(min=0, help="Random subsets to average over; 0: all pictures at once.")
    ] = 0,
    subset_size: Annotated[int, typer.Option(min=2, help="Pictures in a subset.")] = 1000,
    batch_size: BatchSize = 32,
    resize: Resize = None,
    recursive: Recursive = False,
    background: Background = "white",
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Kernel distance between two sets of pictures (KID with --extractor inception)."""
    from ..pictures import Reading
    from .blocks import on_device
    from .features import load_pair
    from .kid import kernel_distance

    count = subset_size if subsets else 2
    least = (count, count)
    settings = real, fake, extractor, device, batch_size, Reading(recursive, resize, background)
    one, two = load_pair(*settings, least=least)
    real_rows, fake_rows = (on_device(x.rows(), device) for x in (one, two))
    found = kernel_distance(real_rows, fake_rows, subsets or None, subset_size)
    std = {} if found.std is None else {"std": found.std}
    values = {"kid": found.value, **std, **_sources(one, two)}
    report(values, json, one.pictures, two.pictures)


def cmmd(
    real: Real,
    fake: Fake,
    extractor: Extractor = CMMD_EXTRACTOR,
    batch_size: BatchSize = 32,
    resize: Resize = None,
    recursive: Recursive = False,
    background: Background = "white",
    device: Device = "auto",
    json: Json = None,
) -> None:
    """CMMD between two sets of pictures, on CLIP embeddings."""
    from ..pictures import Reading
    from .blocks import on_device
    from .cmmd import cmmd as distance
    from .features import load_pair

    settings = real, fake, extractor, device, batch_size, Reading(recursive, resize, background)
    one, two = load_pair(*settings)
    real_rows, fake_rows = (on_device(x.rows(), device) for x in (one, two))
    values = {"cmmd": distance(real_rows, fake_rows), **_sources(one, two)}
    report(values, json, one.pictures, two.pictures)


def precision_recall(
    real: Real,
    fake: Fake,
    extractor: Extractor = DEFAULT_EXTRACTOR,
    k: Annotated[int, typer.Option(min=1, help="Nearest neighbour for precision and recall.")] = 3,
    k_coverage: Annotated[
        int, typer.Option(min=1, help="Nearest neighbour for density and coverage.")
    ] = 5,
    batch_size: BatchSize = 32,
    resize: Resize = None,
    recursive: Recursive = False,
    background: Background = "white",
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Precision, recall, density and coverage of generated pictures."""
    from ..pictures import Reading
    from .blocks import on_device
    from .features import load_pair
    from .precision_recall import neighbour_metrics

    least = (max(k, k_coverage) + 1, k + 1)
    settings = real, fake, extractor, device, batch_size, Reading(recursive, resize, background)
    pair = load_pair(*settings, least=least)
    real_rows, fake_rows = (on_device(x.rows(), device) for x in pair)
    shares, wide = neighbour_metrics(real_rows, fake_rows, k, k_coverage)
    assert shares is not None and wide is not None
    values = shares._asdict() | wide._asdict()
    report(values | _sources(*pair), json, *(features.pictures for features in pair))


def saturation(
    folder: Folder,
    reference: Annotated[
        Path | None, typer.Option(help="Folder of real pictures, for the distance of chroma.")
    ] = None,
    batch_size: BatchSize = 32,
    resize: Resize = None,
    recursive: Recursive = False,
    background: Background = "white",
    json: Json = None,
) -> None:
    """Saturation, contrast, colourfulness, chroma, clipped pixels, with 95 % intervals.

    High guidance scales raise them, the first not always; the same pictures without guidance, or
    real ones, say how much is right.
    """
    from ..pictures import Reading
    from .chroma import chroma_distance
    from .per_picture import PER_PICTURE, means, measure

    reading = Reading(recursive, resize, background)
    folders = [read_folder(place, reading) for place in (folder, reference) if place is not None]
    values, *others = (measure(pictures, batch_size=batch_size) for pictures in folders)
    found = means(values, PER_PICTURE)
    for real in others:
        shares = (x["chroma_shares"].mean(0) for x in (real, values))
        found["chroma_distance"] = float(chroma_distance(*shares))
        found |= {f"{name}_of_reference": float(real[name].mean()) for name in PER_PICTURE}
    report(found, json, *folders)


def similarity(
    folder: Folder,
    baseline: Annotated[Path, typer.Argument(help="Folder of pictures with the same names.")],
    lpips: Lpips = None,
    dreamsim: Dreamsim = None,
    batch_size: BatchSize = 32,
    resize: Resize = None,
    recursive: Recursive = False,
    background: Background = "white",
    device: Device = "auto",
    json: Json = None,
) -> None:
    """SSIM, PSNR, MS-SSIM (from 176 pixels on), LPIPS, DreamSim to pictures of the same name."""
    from ..pictures import Reading
    from .distances import load_distances
    from .per_picture import similarity as compared

    distances = load_distances(device, lpips=lpips, dreamsim=dreamsim)
    reading = Reading(recursive, resize, background)
    pair = [read_folder(each, reading) for each in (folder, baseline)]
    report(compared(pair[0], pair[1], batch_size, distances), json, *pair)


def alignment(
    folder: Folder,
    prompts: Prompts = None,
    clip: Annotated[str | None, typer.Option(help="CLIP folder or hub name.")] = None,
    ridge: Annotated[Path | None, typer.Option(help="A map made with --fit.")] = None,
    fit: Annotated[Path | None, typer.Option(help="Fit a map and write it here.")] = None,
    batch_size: BatchSize = 32,
    resize: Resize = None,
    recursive: Recursive = False,
    background: Background = "white",
    device: Device = "auto",
    json: Json = None,
) -> None:
    """How well pictures show what their prompts say: CLIP score, or a weaker map without a hub."""
    if sum(option is not None for option in (clip, ridge, fit)) != 1:
        raise ValueError("name one of --clip, --ridge and --fit")
    if fit is not None:
        check_target(fit)

    from ..pictures import Reading
    from .alignment import load_scorer
    from .extractors import load_extractor
    from .per_picture import mean_and_interval, measure
    from .ridge import RidgeAlignment

    pictures = read_folder(folder, Reading(recursive, resize, background))
    texts = texts_of(prompts, pictures)
    if fit is not None:
        network = load_extractor(DEFAULT_EXTRACTOR, device)
        found = measure(pictures, extractor=network, batch_size=batch_size)
        RidgeAlignment.fit(found["features"], texts, extractor=network).save(fit)
        report({"fitted": str(fit), "n": len(texts)}, json, pictures)
        return
    scorer = load_scorer(clip, ridge).to(device)
    named = {"alignment": scorer}
    scores = measure(pictures, None, texts, named, None, batch_size)["alignment"]
    mean, ends = mean_and_interval(scores)
    values = {"alignment": mean, "by": scorer.name, "n": len(scores), "interval": ends}
    report(values, json, pictures)


def statistics(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npz to write.")],
    extractor: Extractor = DEFAULT_EXTRACTOR,
    features: Annotated[bool, typer.Option(help="Keep the features too.")] = False,
    batch_size: BatchSize = 32,
    resize: Resize = None,
    recursive: Recursive = False,
    background: Background = "white",
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Keep mean and covariance of a folder's features in a file, for later comparisons."""
    check_target(output, ".npz")

    from ..pictures import Reading
    from .extractors import load_extractor
    from .features import folder_features

    pictures = read_folder(folder, Reading(recursive, resize, background))
    network = load_extractor(extractor, device=device)
    found = folder_features(pictures, network, batch_size, features)
    found.save(output)
    values = {"statistics": str(output), "extractor": found.extractor, "n": found.count}
    report(values, json, pictures)
