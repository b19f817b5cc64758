"""Compute the figures of this page."""

from statistics import mean

from claims import read, table

RESULTS = read(__file__)
GIVEN = ["Muon at 0.01 (one rate for all, no sweep)"]
LENGTHS = (256, 512, 1024, 2048, 4096)
ROW = {(row["task"], row["variant"], row["length"]): row for row in RESULTS}
VARIANTS = tuple(dict.fromkeys(row["variant"] for row in RESULTS))


def percents(shares: list[float]) -> str:
    return ", ".join("100" if share == 1 else f"{100 * share:.0f}" for share in shares)


def seeds(task: str, variant: str, length: int) -> list[float]:
    return [100 * share for share in ROW[task, variant, length]["by_seed"]]


def flip(variant: str, length: int) -> str:
    return f"{mean(seeds('flip_flop', variant, length)):.0f}"


def grid(task: str) -> str:
    def wrongness(name: str) -> str:
        ends = (ROW[task, name, length]["calibration_error"] for length in (256, 4096))
        return " / ".join(f"{error:.2f}" for error in ends)

    return table(
        ["exact match, % (seeds)", *(f"{n:,}" for n in LENGTHS), "calibration error at 256 / 4,096",
         "cache bytes/token at 4,096"],
        [
            [
                name,
                *(percents(ROW[task, name, length]["by_seed"]) for length in LENGTHS),
                wrongness(name),
                f"{ROW[task, name, 4096]['cache_bytes_per_token']:,.0f}",
            ]
            for name in VARIANTS
        ],
    )  # fmt: skip


def said() -> list[str]:
    cope = {length: seeds("flip_flop", "CoPE", length) for length in LENGTHS}
    lead = {length: max(range(3), key=lambda at: cope[length][at]) for length in (1024, 2048)}
    rest = {n: [x for at, x in enumerate(cope[n]) if at != lead[n]] for n in lead}
    nope = mean(seeds("counting", "NoPE", 512))
    nope_seeds = ", ".join(f"{share:.0f}" for share in seeds("counting", "NoPE", 512))
    learnt = min(
        mean(seeds("counting", name, 256)) for name in ("RoPE", "half RoPE", "CoPE", "NoPE")
    )
    errors = {
        name: [ROW["flip_flop", name, n]["calibration_error"] for n in (256, 4096)]
        for name in ("RoPE", "CoPE", "ALiBi")
    }
    return [
        grid("flip_flop"),
        grid("counting"),
        f"has fallen almost to the guess at 4,096 ({flip('RoPE', 4096)} %); ALiBi "
        f"({flip('ALiBi', 4096)} %)",
        f"it had learnt less ({flip('ALiBi', 256)} % at 256)",
        f"CoPE's mean is the best at 1,024 and 2,048 ({flip('CoPE', 1024)} and {flip('CoPE', 2048)} %, "
        f"RoPE {flip('RoPE', 1024)} and {flip('RoPE', 2048)}), but by one seed, which still answers "
        f"{max(cope[1024]):.0f} % at 1,024 and {max(cope[2048]):.0f} % at 2,048; its two other seeds, "
        f"{' and '.join(f'{x:.0f}' for x in rest[1024])} %, then {' and '.join(f'{x:.0f}' for x in rest[2048])} %",
        f"had not learnt the task fully either ({flip('RoPE in a window, then NoPE', 256)} %)",
        f"NoPE had reached only {flip('NoPE', 256)} % when its steps were over",
        f"learn it to {learnt:.0f} % and more",
        f"shows only as {nope:.0f} % at 512 tokens ({nope_seeds}), where RoPE has "
        f"{mean(seeds('counting', 'RoPE', 512)):.0f} %",
        f"RoPE's calibration error grows from {errors['RoPE'][0]:.2f} to {errors['RoPE'][1]:.2f} on "
        f"flip-flop (CoPE's to {errors['CoPE'][1]:.2f}, ALiBi's to {errors['ALiBi'][1]:.2f}), and to "
        f"{min(ROW['counting', name, 4096]['calibration_error'] for name in VARIANTS):.2f} and more for "
        "all on counting",
    ]
