"""A made-up comparison, for tests of the report: flat pictures, figures that are given."""

from itertools import combinations

from PIL import Image

from pilotage.eval.comparison.answer import answer
from pilotage.eval.comparison.plan import Samples, Setting

PROMPTS = ["a fox", "a key & a lock", '<script>alert("x")</script>']
SETTINGS = [
    ("cfg", 3.0, 20, "grid", (), 40.0, 12.0),
    ("cfg", 7.5, 20, "grid", (), 40.0, 15.0),
    ("apg", 3.0, 20, "grid", (), 40.0, 13.0),
    ("apg", 7.5, 20, "grid", (), 40.0, 9.0),
    ("ag", 7.5, 20, "grid", (), 30.2, 14.5),
    ("cfg", 7.5, 15, "equal nfe", ("ag w=7.5, 20 steps",), 30.0, 18.0),
]
FACTS = {
    "resampled": {"unit": "prompts", "count": 32},
    "prompts": PROMPTS,
    "real": {"saturation": 0.26, "contrast": 0.22, "colourfulness": 0.3, "n": 9},
    "extractor": "efficientnet-lite0",
    "alignment": "<b>score</b>",
    "pipeline": "StableDiffusionPipeline",
    "scheduler": "DPMSolverMultistepScheduler",
    "context": {
        "command": "python -m pilotage.eval compare -p '<img src=x onerror=alert(1)>'",
        "date": "2026-01-01",
        "machine": {"processor": "a", "cores": 2, "accelerator": None, "python": "3.11"},
        "versions": {"torch": "2"},
    },
}


def paired(values, half, metric="fd", needed=90):
    """Comparisons of all pairs of label -> value, every interval as far as `half` to both sides."""
    rows = []
    for (a, x), (b, y) in combinations(values.items(), 2):
        clear = abs(x - y) > half
        rows.append(
            {
                "metric": metric,
                "setting": a,
                "other": b,
                "difference": x - y,
                "interval": [x - y - half, x - y + half],
                "needed": None if clear else needed,
            }
        )
    return rows


def made_up(folder, fd=True, half=2.0, seeds=(0,), size=16):
    """Rows, facts, samples of six settings and three prompts; `fd=False`: without a reference.

    Distances further apart than `half` differ clearly. The colour of a picture tells which it is:
    red the setting, green the prompt, blue the seed.
    """
    rows, samples = [], []
    for i, (method, w, steps, kind, matches, nfe, distance) in enumerate(SETTINGS):
        setting = Setting(method, w, steps)
        paths = []
        for seed in seeds:
            for j in range(len(PROMPTS)):
                path = folder / "pictures" / setting.slug / f"{seed}-{j}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (size, size), (40 * i, 80 * j, 120 + seed)).save(path)
                paths.append(path)
        prompts = PROMPTS * len(seeds)
        samples.append(Samples(setting, paths, prompts, [int(nfe)] * len(prompts), None, 0.2))
        row = {
            "label": setting.label,
            "method": method,
            "guidance": f"{method}<settings>",
            "kind": kind,
            "matches": list(matches),
            "w": w,
            "steps": steps,
            "n": len(paths),
            "nfe": nfe,
            "nfe_range": [int(nfe), int(nfe) + 1],
            "seconds": 0.2,
            "effective_guidance": w if method == "cfg" else 1 + (w - 1) / 2,
            "folder": f"pictures/{setting.slug}",
            "saturation": 0.2 + i / 50,
            "saturation_interval": [0.19 + i / 50, 0.21 + i / 50],
            "ssim": None if kind == "grid" and method == "cfg" else 0.99 - i / 100,
            "ssim_interval": [0.9 - i / 100, 1.0],
        }
        if fd:
            row |= {"fd": distance, "fd_interval": [distance - 9, distance + 9]}
        rows.append(row)
    facts = FACTS if fd else FACTS | {"real": None, "extractor": None, "alignment": None}
    distances = {row["label"]: row["fd"] for row in rows} if fd else {}
    facts = facts | {"comparisons": paired(distances, half), "seeds": list(seeds)}
    lines = {"command": "pilotage generate -g apg 'a fox'", "python": "pipe(prompt)"}
    facts["recommendation"] = answer(rows, facts) | lines
    return rows, facts, samples
