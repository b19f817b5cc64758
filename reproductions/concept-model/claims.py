"""Compute the figures of this page."""

from claims import percent, read, table

FLOPS, FLOPS_LATER = read(__file__, "equal-flops.json"), read(__file__, "equal-flops-1200.json")
CACHE, CACHE_LATER = read(__file__, "equal-cache.json"), read(__file__, "equal-cache-1200.json")
DESIGN, ABLATION = read(__file__, "design.json"), read(__file__, "ablation.json")
DECODE, RECALL = read(__file__, "decode.json"), read(__file__, "recall.json")
GIVEN = [
    "The text is prose, 2.4 MB of the Python standard library's docstrings and help",
    "Rates 0.02 to 0.08 (0.014 to 0.04 for 1,200 steps) with the first seed",
    "equal FLOPs, rate 0.04, 400 steps, the first seed alone, so that differences below 0.02 say little",
    "All within 1 % of the same FLOPs, rate 0.04, two seeds, 400 steps",
    "again, with 1,200 steps at 0.028",
    "steps of 2,048 bytes, rate 0.02, two seeds",
    "did not learn the task in 800 steps either (16 %, seen once by hand)",
    "all four are within 0.02 of words",
    "differences of 0.02 are no larger than those between seeds",
]
WINDOWS = ("windows, last global", "windows, last 400", "windows, last 128", "windows")
NAMES = {
    "MLA": "MLA, rank 16",
    "windows, last global": "windows of 16, the last layer global",
    "windows, last 400": "windows of 16, the last 400",
    "windows, last 128": "windows of 16, the last 128",
    "windows": "windows of 16",
    "cross": "cross attention",
    "lag": "lag of a chunk",
    "bag of bytes": "bag of bytes, no encoder",
    "leak": "leak (in training)",
    "all": "lag, no skip, bag and leak",
}
CONTEXTS = ("4096", "8192", "16384", "32768")


def bits(row: dict) -> str:
    return f"{row['bits_per_byte']:.3f} ({', '.join(f'{x:.3f}' for x in row['by_seed'])})"


def weights(row: dict) -> str:
    return f"{row['parameters']:,}"


def front(results: dict) -> str:
    rows = sorted(results.items(), key=lambda pair: -pair[1]["row_bytes"])
    return table(
        ["", "bits per byte (seeds)", "weights", "cache of a row, KiB"],
        [
            [NAMES.get(name, name), bits(row), weights(row), f"{row['row_bytes'] / 1024:.0f}"]
            for name, row in rows
        ],
    )


def design(*names: str) -> str:
    return "; ".join(f"{DESIGN[name]['bits_per_byte']:.3f}" for name in names)


def faster(than: str, context: str = "32768") -> float:
    return (
        DECODE["words"][context]["tokens_per_second"] / DECODE[than][context]["tokens_per_second"]
    )


def said() -> list[str]:
    words, later = FLOPS["words"], FLOPS_LATER["words"]
    plain = FLOPS["bytes"]
    recall = {(row["variant"], row["length"]): row for row in RECALL}
    lengths = (64, 128, 256, 512)
    sound = ABLATION["sound"]["bits_per_byte"]
    worse = {name: row["bits_per_byte"] - sound for name, row in ABLATION.items()}
    reuse, gqa = CACHE["words, reuse"], CACHE["GQA"]
    pairs = (("words", "windows, last 400"), ("words, reuse", "windows, last 128"))
    behind = [CACHE[a]["bits_per_byte"] - CACHE[b]["bits_per_byte"] for a, b in pairs]
    behind_later = [
        CACHE_LATER[a]["bits_per_byte"] - CACHE_LATER[b]["bits_per_byte"] for a, b in pairs
    ]
    spread = [row["deviation"] for row in CACHE_LATER.values()]
    best = min(CACHE[name]["bits_per_byte"] for name in WINDOWS)
    grown = words["cache_bytes_per_token"]
    small, large = (f([CACHE[name]["parameters"] for name in WINDOWS]) for f in (min, max))
    recall_rows = [
        [
            name,
            *(f"{100 * recall[name, length]['exact_match']:.1f}" for length in lengths),
            f"{recall[name, 512]['cache_bytes_per_token']:,.0f}",
        ]
        for name in dict.fromkeys(row["variant"] for row in RECALL)
    ]
    return [
        table(
            ["bits per byte (by seed)", "weights", "rate", "400 steps", "rate", "1,200 steps", "FLOPs per byte"],
            [
                [
                    name,
                    weights(row),
                    f"{row['learning_rate']:g}",
                    bits(row),
                    *(
                        [f"{FLOPS_LATER[name]['learning_rate']:g}", bits(FLOPS_LATER[name])]
                        if name in FLOPS_LATER
                        else ["", ""]
                    ),
                    f"{row['flops_per_token']:,}",
                ]
                for name, row in FLOPS.items()
            ],
        ),
        table(
            ["one seed", "bits per byte"],
            [
                ["words, cross: 1 + 6 + 1", f"{FLOPS['words, cross']['by_rate']['0.04']:.3f}"],
                ["2 + 4 + 1; 2 + 2 + 2", design("2 + 4 + 1 layers", "2 + 2 + 2 layers")],
                ["wide", design("wide")],
                ["wide, MQA", design("wide, MQA")],
                ["wide, windows of 16 instead of 32", design("wide, windows of 16")],
                ["wide, residual; one prefix, instead of cross attention", design("wide, residual", "wide, one prefix")],
                ["wide, MQA, windows of 16, 16 and 40, one prefix: words", design("words")],
                ["the same with two prefixes, the last window 24", design("words, two prefixes")],
            ],
        ),
        front(CACHE),
        front(CACHE_LATER),
        table(
            ["bytes per second after", *(f"{int(n) // 1024}k" for n in CONTEXTS), "cache at 32k, MB",
             "words are faster at 32k by"],
            [
                [
                    NAMES.get(name, name),
                    *(f"{rows[n]['tokens_per_second']:,.0f}" for n in CONTEXTS),
                    f"{rows['32768']['cache_bytes'] / 1e6:.2f}",
                    "" if name == "words" else f"{faster(name):.1f} x",
                ]
                for name, rows in DECODE.items()
            ],
        ),
        table(["exact match, %", *map(str, lengths), "cache bytes/token at 512"], recall_rows),
        table(
            ["", "bits per byte (seeds)", "against sound chunks of four"],
            [
                [NAMES.get(name, name), bits(row), "" if name == "sound" else f"{worse[name]:+.3f}"]
                for name, row in ABLATION.items()
            ],
        ),
        f"{words['parameters']:,} weights, {percent(1 - words['flops_per_token'] / plain['flops_per_token'], 1)} fewer FLOPs",
        f"{FLOPS['words, cross']['parameters']:,} weights, "
        f"{percent(1 - FLOPS['words, cross']['flops_per_token'] / plain['flops_per_token'])} fewer FLOPs",
        f"Words lead by {plain['bits_per_byte'] - words['bits_per_byte']:.3f} bits per byte after 1.6 MB and by "
        f"{FLOPS_LATER['bytes']['bits_per_byte'] - later['bits_per_byte']:.3f} after 4.9 MB (two epochs), where "
        f"three seeds of one model deviate by {min(x['deviation'] for r in (FLOPS, FLOPS_LATER) for x in r.values()):.3f} "
        f"to {max(x['deviation'] for r in (FLOPS, FLOPS_LATER) for x in r.values()):.3f}",
        f"The growing part of their cache is a {round(plain['cache_bytes_per_token'] / grown)}th of that of bytes, and a "
        f"{round(CACHE['MQA']['cache_bytes_per_token'] / grown)}th of that of bytes with MQA",
        f"with {small:,} to {large:,} weights instead of {words['parameters']:,} they have "
        f"{min(CACHE[n]['bits_per_byte'] for n in WINDOWS):.3f} to {max(CACHE[n]['bits_per_byte'] for n in WINDOWS):.3f} "
        f"bits per byte after 400 steps, words {CACHE['words']['bits_per_byte']:.3f} in the same two seeds; after 1,200 "
        f"the two that were run have {CACHE_LATER['windows, last 400']['bits_per_byte']:.3f} and "
        f"{CACHE_LATER['windows, last 128']['bits_per_byte']:.3f}, words {CACHE_LATER['words']['bits_per_byte']:.3f}",
        f'"words, reuse" is {gqa["bits_per_byte"] - reuse["bits_per_byte"]:.3f} bits per byte better than GQA, the '
        f"best of them, at a {round(gqa['row_bytes'] / reuse['row_bytes'])}rd of its bytes",
        f"it is {min(behind):.3f} to {max(behind):.3f} behind at equal bytes after 400 steps, and "
        f"{max(behind_later):.3f} after 1,200, where two seeds deviate by {min(spread):.3f} "
        f"to {max(spread):.3f}",
        f"four windows of 16, 8 KiB, are within {CACHE['windows']['bits_per_byte'] - best:.3f} of the best",
        f"at 32k words read {faster('bytes'):.0f} times the bytes per second of bytes with GQA and "
        f"{faster('bytes, MQA'):.0f} times those of bytes with MQA",
        f"they are {faster('windows, last 400'):.1f} times as fast as the byte decoder with windows of equal cache at 512 bytes",
    ]  # fmt: skip
