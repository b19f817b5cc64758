"""Compute the figures of this page."""

import numpy as np
from claims import percent, read, table

RESULTS = read(__file__)
ROWS, TOKENS = RESULTS["variants"], np.array(RESULTS["held_out_tokens"])
SETTINGS = RESULTS["settings"]
GIVEN = ["with 5 % of the tokens that it was trained on"]
RESAMPLED = 10_000


def nats(name: str, when: str) -> np.ndarray:
    return np.array(ROWS[name][f"nats_{when}"])


def perplexity(name: str, when: str) -> float:
    return float(np.exp(nats(name, when).sum() / TOKENS.sum()))


def beyond(name: str, when: str, other: str, other_when: str) -> tuple[float, float, float]:
    """Compute by which share the perplexity is higher than another one, with the 95 % interval of
    resampled documents.
    """
    apart = nats(name, when) - nats(other, other_when)
    drawn = np.random.default_rng(0).integers(len(TOKENS), size=(RESAMPLED, len(TOKENS)))
    ratios = np.exp(apart[drawn].sum(axis=1) / TOKENS[drawn].sum(axis=1)) - 1
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(np.exp(apart.sum() / TOKENS.sum()) - 1), float(low), float(high)


def shown(value: float) -> str:
    return f"{value:,.1f}"


def more(name: str) -> str:
    """Format the perplexity after training beyond that of the original trained likewise."""
    middle, low, high = (100 * each for each in beyond(name, "after", "original", "after"))
    return f"{middle:+.0f} % ({low:+.0f} to {high:+.0f})"


def closed(name: str) -> float:
    """Return how much of the loss beyond that of the original, trained likewise, training removed."""
    before, after = nats(name, "before").sum(), nats(name, "after").sum()
    return float((before - after) / (before - nats("original", "after").sum()))


def said() -> list[str]:
    original = ROWS["original"]
    rows = [
        [
            name,
            f"{row['parameters'] / 1e6:.1f}M",
            f"{row['bytes_per_token']:,}",
            f"{100 * row['bytes_per_token'] / original['bytes_per_token']:.0f} %",
            shown(perplexity(name, "before")),
            shown(perplexity(name, "after")),
            "" if row is original else more(name),
        ]
        for name, row in ROWS.items()
    ]
    head = ["", "parameters", "bytes per token", "of the original's", "perplexity, converted",
            "trained again", "beyond the original, trained likewise"]  # fmt: skip
    names = [name for name in ROWS if name != "original"]
    shares = [f"{percent(closed(name))} ({name})" for name in names]
    return [
        table(head, rows),
        f"{SETTINGS['steps']} steps remove {', '.join(shares)} of the loss that the conversion added",
        f"The original itself goes from {shown(perplexity('original', 'before'))} to "
        f"{shown(perplexity('original', 'after'))} on this text",
    ]
