"""A small model that retrieves, and what of it is left under each cache policy.

    python reproductions/retrieval/run.py [--steps 1600]

Trains on the Python library's own source with facts to be recalled between its lines.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from corpus import write_documents

from mukv import config, launch, runs
from mukv.data.build import build_tokens, default_corpus
from mukv.launch import cache_folder

LENGTH = 256
DOCUMENTS = 30_000
MODEL = (
    "model.d_model=64",
    "model.attention={heads: 4, kv_heads: 2, head_dim: 16}",
    "model.mlp.hidden=192",
    "model.plan=[{repeats: 3}]",
    "train.batch=16",
    f"train.length={LENGTH}",
    "train.learning_rate=0.005",
    "train.schedule={kind: wsd, warmup: 50}",
    "train.checkpoint_every=100",
    "train.evaluate_every=200",
    "train.validation_batches=8",
)


def corpus(root: Path) -> Path:
    """The token file to train on, made once."""
    out = root / "tokens"
    if not out.exists():
        text = default_corpus(cache_folder()).split("train").tokens
        source = bytes(text[text < 256].astype("uint8"))
        write_documents(source, root / "documents.jsonl", DOCUMENTS, LENGTH - 12)
        build_tokens([str(root / "documents.jsonl")], out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--root", type=Path, default=Path("runs/retrieval"))
    given = parser.parse_args()
    launch.prepare()
    overrides = [*MODEL, f"train.steps={given.steps}", f"data.path={corpus(given.root)}"]
    run = config.load("tiny", overrides)
    runs.train(run, runs.RunDirectory(given.root / "model"), title="retrieval")


if __name__ == "__main__":
    main()
