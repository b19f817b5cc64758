"""Compute the figures of this page."""

from math import exp
from statistics import mean

from claims import percent, read, table

RESULTS, REAL = read(__file__), read(__file__, "real.json")
TRAINED, RANDOM = RESULTS["trained, 3 layers"], RESULTS["heads of Llama 3.2 1B, random weights"]
GIVEN = [
    "one of Llama 3.2 1B's heads and rotation in four layers with random weights",
    "entries for 80 % of the mass of either",
    "another model (heads of 16, another training)",
]


def over_layers(layers: list[dict], kind: str, key: str) -> float:
    return mean(layer[kind][key] for layer in layers)


def agreement(layers: list[dict], key: str) -> str:
    return " / ".join(f"{layer[key]:.2f}" for layer in layers)


TEXTS = ("code", "prose", "dialogue")
CHOICES = ("each head", "KV head", "layer", "first head", "latest")
SHARES = ("1/4", "1/8", "1/16")
NAMES = {"smollm2-135m-instruct": "SmolLM2 135M", "gemma-3-270m": "Gemma 3 270M"}


def added(found: dict, choice: str, share: str) -> float:
    """Return the loss that few reads add, in nats a token, as the mean over windows."""
    return mean(found[f"{choice}, {share}"]) - mean(found["all"])


def by_model(choice: str) -> dict[str, list[float]]:
    """Return the loss that a choice adds at every share, as the mean over texts, by model."""
    return {
        key: [mean(added(REAL[key][text], choice, share) for text in TEXTS) for share in SHARES]
        for key in NAMES
    }


def real() -> list[str]:
    """Return the figures of the pretrained models."""
    losses = table(
        ["nats a token more", *(f"{text}, {share}" for text in TEXTS for share in SHARES)],
        [
            [
                f"{name}: {choice}",
                *(f"{added(REAL[key][t], choice, share):+.3f}" for t in TEXTS for share in SHARES),
            ]
            for key, name in NAMES.items()
            for choice in CHOICES
        ],
    )
    rows = []
    for key, name in NAMES.items():
        for text in TEXTS:
            layers = REAL[key][text]["sparsity"]
            rows.append(
                [
                    f"{name}, {text}",
                    f"{exp(mean(REAL[key][text]['all'])):.2f}",
                    *(f"{mean(x[kind] for x in layers):.3f}" for kind in ("top 0.1", "error 0.1")),
                    *(f"{pick(x['top 0.1'] for x in layers):.3f}" for pick in (min, max)),
                    f"{mean(x['agreement'] for x in layers):.2f}",
                ]
            )
    own, kv, layer, first, latest = map(by_model, CHOICES)
    smol, gemma = NAMES
    of_layers = [[x["top 0.1"] for x in REAL[smol][text]["sparsity"]] for text in TEXTS]
    apart = max(
        abs(a - b)
        for text in TEXTS
        for choice in ("each head", "KV head")
        for a, b in [
            [
                few - all
                for few, all in zip(
                    REAL[gemma][text][f"{choice}, 1/4"], REAL[gemma][text]["all"], strict=True
                )
            ]
        ]
    )
    sentences = [
        f"costs SmolLM2 {own[smol][0]:.3f} nats on average over the texts and Gemma {own[gemma][0]:.3f}; "
        f"an eighth {own[smol][1]:.3f} and {own[gemma][1]:.3f}; "
        f"a sixteenth {own[smol][2]:.3f} and {own[gemma][2]:.3f}",
        "SmolLM2 loses {:.3f}, {:.3f} and {:.3f}. All nine".format(*kv[smol]),
        "of a layer lose {:.3f}, {:.3f} and {:.3f} with one choice".format(*layer[smol]),
        "first head SmolLM2 loses {:.3f}, {:.3f} and {:.3f}".format(*first[smol]),
        f"they lose {latest[smol][0]:.3f} and {latest[gemma][0]:.3f} at a quarter",
        f"its top tenth holds {percent(min(x[0] for x in of_layers))} to "
        f"{percent(max(x[0] for x in of_layers))} of the mass, that of every other layer at least "
        f"{percent(min(min(x[1:]) for x in of_layers))}",
        f"differ by up to {apart:.2f} nats in what they lose at a quarter",
    ]
    facts = ["", "perplexity", "mass of the top 10 %", "error", "least layer", "largest layer"]
    return [losses, table([*facts, "agreement of heads"], rows), *sentences]


def said() -> list[str]:
    texts = [
        *((f"trained, {name}", TRAINED[name]) for name in TRAINED),
        ("random, code", RANDOM["code"]),
    ]
    first, *later = TRAINED["code"]
    dialogue, prose = TRAINED["dialogue"], TRAINED["prose"]
    random_agreement = [layer["agreement"] for layers in RANDOM.values() for layer in layers]
    other = [layer["agreement_other_kv_heads"] for layers in TRAINED.values() for layer in layers]
    same = [layer["agreement_same_kv_head"] for layers in TRAINED.values() for layer in layers]
    return [
        *real(),
        table(
            ["", "entries for 80 %", "95 %", "99 %", "mass of the top 10 %", "error", "top 20 %", "error"],
            [
                [
                    name,
                    *(f"{over_layers(layers, 'needed', m):.1f}" for m in ("0.8", "0.95", "0.99")),
                    *(
                        cell
                        for share in ("0.1", "0.2")
                        for cell in (
                            f"{over_layers(layers, 'top', share):.3f}",
                            f"{over_layers(layers, 'error', share):.3f} "
                            f"({over_layers(layers, 'error_renormalised', share):.3f})",
                        )
                    ),
                ]
                for name, layers in texts
            ],
        ),
        table(
            ["of the entries that either needs, both need", "two heads of one KV head",
             "heads of different KV heads", "least and largest of all pairs"],
            [
                [
                    name,
                    agreement(layers, "agreement_same_kv_head"),
                    agreement(layers, "agreement_other_kv_heads"),
                    f"{min(x['least_agreement'] for x in layers):.2f} to "
                    f"{max(x['largest_agreement'] for x in layers):.2f}",
                ]
                for name, layers in texts
            ],
        ),
        f"the first layer of the trained model needs {first['needed']['0.8']:.0f} entries for 80 % of the "
        f"mass of code and loses {percent(first['error']['0.1'])} of its output at the top tenth, the two "
        f"later ones {later[0]['needed']['0.8']:.1f} and {later[1]['needed']['0.8']:.1f} entries and "
        f"{percent(max(x['error']['0.1'] for x in later))}",
        f"their top tenth holds {percent(over_layers(RANDOM['code'], 'top', '0.1'))} of the mass and leaves an "
        f"error of {percent(over_layers(RANDOM['code'], 'error', '0.1'))}",
        f"The top tenth holds {percent(over_layers(prose, 'top', '0.1'))} to "
        f"{percent(over_layers(TRAINED['code'], 'top', '0.1'))} of the mass of code and prose, "
        f"{percent(over_layers(dialogue, 'top', '0.1'))} of dialogue's, and the output loses "
        f"{percent(over_layers(TRAINED['code'], 'error', '0.1'))} to "
        f"{percent(over_layers(dialogue, 'error', '0.1'))}",
        f"two heads of one KV head share {percent(min(same))} to {percent(max(same))} of what either "
        f"needs, heads of different ones {percent(min(other))} to {percent(max(other))}; with random "
        f"weights any two share {percent(min(random_agreement))} to {percent(max(random_agreement))}",
    ]  # fmt: skip
