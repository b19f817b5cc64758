"""Compute the figures of this page."""

from statistics import mean

import numpy as np
from claims import percent, read, table

from mukv.core.statistics import of_mean

RESULTS, REAL = read(__file__), read(__file__, "real.json")
SPARSE = read(__file__, "../sparse-v/results.json")
TRAINED, RANDOM = RESULTS["trained, 3 layers"], RESULTS["heads of Llama 3.2 1B, random weights"]
GIVEN = [
    "Means over windows, with 95 % intervals over windows",
    "the entries that hold 80 % of the query's mass",
    "for Llama 3.2 1B's heads with random weights in four layers",
]
KINDS = {"keys": "keys", "queries": "queries", "means": "mean keys", "aligned": "aligned"}
BUDGETS = (1, 2, 3)
"""Indices of 1/16, 1/8 and 1/4 among the fractions that are read."""


def at(row: dict, name: str = "captured") -> list[str]:
    return [f"{row[name][place]:.3f}" for place in BUDGETS]


def random_row(kind: str) -> str:
    return ", ".join(at(RANDOM[f"{kind}, after rotation"]))


LENGTH, SHARES = "1024", ("1/4", "1/8", "1/16")
TEXTS = ("code", "prose", "dialogue")
NAMES = {"gemma-3-270m": "Gemma 3 270M", "smollm2-135m-instruct": "SmolLM2 135M"}
FIXED = ("latest", "pages", "clusters of the prompt")
CALIBRATED = tuple(f"{kind} {when} rotation" for kind in KINDS for when in ("after", "before"))


def texts(model: str) -> list[str]:
    """Return the texts on which all policies were measured."""
    found, count = REAL[model][LENGTH], 1 + len(SHARES) * len(FIXED + CALIBRATED)
    return [text for text in TEXTS if len(found.get(text, {})) == count]


def lost(model: str, policy: str, share: str) -> np.ndarray:
    """Return the loss that a policy adds in every window, in nats a token."""
    found = REAL[model][LENGTH]
    rows = [(found[text][f"{policy}, {share}"], found[text]["full"]) for text in texts(model)]
    return np.concatenate([np.subtract(*row) for row in rows])


def between(values: np.ndarray) -> str:
    """Format a mean over windows with its 95 % interval."""
    low, high = of_mean(values) or (0.0, 0.0)
    return f"{values.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def bounds(model: str) -> float:
    """Return the bytes of the pages' bounds that a step reads, as a share of the bytes that a
    quarter of the entries has."""
    read = REAL[model][LENGTH]["bytes read"]
    quarter, eighth = (read[f"latest, {share}"] for share in SHARES[:2])
    return (read["pages, 1/4"] - quarter) / (2 * (quarter - eighth))


def real() -> list[str]:
    """Return the figures of the pretrained models."""
    made = []
    for model, name in NAMES.items():
        best = min(CALIBRATED, key=lambda one: lost(model, one, "1/4").mean())
        rows = [
            [one, *(between(lost(model, one, share)) for share in SHARES)]
            for one in FIXED + CALIBRATED
        ]
        ahead = [lost(model, best, s) - lost(model, FIXED[2], s) for s in SHARES]
        found = REAL[model][LENGTH]
        perplexity = np.exp([mean(found[text]["full"]) for text in texts(model)])
        seen = ", ".join(f"{x:.2f} ({t})" for x, t in zip(perplexity, texts(model), strict=True))
        near = [lost(model, "latest", s) - lost(model, best, s) for s in SHARES]
        made += [
            table([f"{name}: nats a token more", *SHARES], rows),
            f"{name}: {len(ahead[0])} windows, perplexity with all entries {seen}",
            f"the best calibrated centres at a quarter ({best}) lose {between(ahead[0])}, "
            f"{between(ahead[1])} and {between(ahead[2])} more than clusters of the prompt",
            f"the latest entries lose {between(near[0])}, {between(near[1])} and "
            f"{between(near[2])} more than these centres",
            f"pages at a sixteenth lose {between(lost(model, 'pages', '1/16') - lost(model, FIXED[2], '1/4'))} "
            "more than clusters of the prompt at a quarter",
        ]
    shares = {f"{bounds(model):.2f}" for model in NAMES}
    assert len(shares) == 1
    made.append(
        f"The bounds of the pages take {shares.pop()} times the bytes of a quarter of the entries"
    )
    return made


def said() -> list[str]:
    keys, means = TRAINED["keys, after rotation"], TRAINED["means, after rotation"]
    first = RANDOM["keys, after rotation"]
    rows = [
        [
            f"{label}, {when}",
            *at(row),
            *(f"{row[name][2]:.3f}" for name in ("precision", "recall", "f1")),
            percent(row["largest_cluster"]),
        ]
        for kind, label in KINDS.items()
        for when in ("after", "before")
        for row in [TRAINED[f"{kind}, {when} rotation"]]
    ]
    bounds = [[f"the {name}", *at(keys, key), "", "", "", ""] for name, key in
              (("largest weights", "largest"), ("latest entries", "latest"))]  # fmt: skip
    gain = [100 * (keys["captured"][place] - keys["latest"][place]) for place in (1, 2, 3)]
    random_gain = 100 * (first["captured"][2] - first["latest"][2])
    apart = [100 * abs(keys["captured"][p] - means["captured"][p]) for p in range(5)]
    near = mean(layer["near"] for layer in SPARSE["trained, 3 layers"]["code"])
    before = TRAINED["keys, before rotation"]
    lost = 1 - before["captured"][2] / keys["captured"][2]
    return [
        *real(),
        table(
            ["trained", "mass at 1/16", "1/8", "1/4", "precision at 1/8", "recall", "F1",
             "largest cluster"],
            [*rows, *bounds],
        ),
        f"With random weights: keys after rotation {random_row('keys')} (the best; largest "
        f"{', '.join(at(first, 'largest'))}; latest {', '.join(at(first, 'latest'))}), mean keys "
        f"{random_row('means')}, aligned {random_row('aligned')}, queries {random_row('queries')}",
        f"the two differ by {min(apart):.1f} to {max(apart):.1f} points of mass",
        f"loses {percent(lost)} of the captured mass at an eighth",
        f"{percent(near)} of the mass of code lies on the last 16 entries",
        f"{gain[0]:.1f} points at a sixteenth, {gain[1]:.1f} at an eighth and {gain[2]:.1f} at a quarter "
        f"with keys, against {random_gain:.1f} points at an eighth in the random model",
    ]  # fmt: skip
