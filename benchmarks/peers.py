"""Run the peers' side of the speed comparisons, plain torch and transformers, as a worker process.

It needs only torch and transformers (nothing of mukv, no JAX). There are two ways to run it:
- `python peers.py '{"op": "setup", ...}'`: one job, `rounds` rounds, one JSON line out.
- `python peers.py`: one JSON request per line of stdin, one JSON answer per line of stdout, so that
  a benchmark can alternate rounds with a warm peer. `answer` describes the protocol. Weights and
  tokens are random: only speed is measured.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn


@dataclass(frozen=True)
class Job:
    """One measurement: the keys of a `setup` request.

    task: `train` (forward, backward, clipping, AdamW) or `decode` (greedy, one token at a time)
    peer: `plain` (a GPT-2-class decoder in bare torch; trains only) or `transformers` (Llama)
    precision: `float32`, or `bfloat16`: autocast in training, bfloat16 weights in decoding
    compile: whether to use torch.compile; the first round then includes compilation, see `warmup`
    length: tokens per row in training; tokens of the prompt in decoding
    hidden: hidden units of Llama's MLP; None means the usual number for its class of model
    new_tokens: tokens decoded per round
    cache: `dynamic` or `static`; decoding only
    threads: torch's number of threads; None means its default
    tied: whether the embedding is also the readout
    folder: pretrained model that decodes; None for the sizes above
    """

    task: str = "train"
    peer: str = "plain"
    precision: str = "float32"
    compile: bool = False
    d_model: int = 384
    layers: int = 6
    heads: int = 6
    kv_heads: int | None = None
    hidden: int | None = None
    vocab_size: int = 256
    batch: int = 16
    length: int = 256
    new_tokens: int = 32
    cache: str = "static"
    threads: int | None = None
    warmup: int = 2
    seed: int = 0
    tied: bool = False
    folder: str | None = None

    def __post_init__(self) -> None:
        allowed = {
            "task": ("train", "decode"),
            "peer": ("plain", "transformers"),
            "precision": ("float32", "bfloat16"),
            "cache": ("dynamic", "static"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: {getattr(self, name)!r}; allowed: {', '.join(values)}")
        if self.task == "decode" and self.peer == "plain":
            raise ValueError("peer: 'plain' has no cache; decode with 'transformers'")
        if self.peer == "plain" and self.kv_heads not in (None, self.heads):
            raise ValueError(f"kv_heads: {self.kv_heads}; 'plain' has as many as heads")

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def amp(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16")

    def now(self) -> float:
        """Return the time in seconds, after waiting for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class PlainBlock(nn.Module):
    """Layer norm, causal self-attention, layer norm, GELU; no biases."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.hidden_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        joined = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = joined.permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(read.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.hidden_norm(x))))


class PlainDecoder(nn.Module):
    """Decoder with learned positions, as in GPT-2: the class of model that nanoGPT trains.

    The readout has its own weights, so that all sides have the same number.
    """

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.embedding = nn.Embedding(job.vocab_size, job.d_model)
        self.position = nn.Embedding(job.length, job.d_model)
        # This MLP has two matrices where Llama's has three: 1.5 times the hidden units give as many
        # weights.
        hidden = job.hidden * 3 // 2 if job.hidden else 4 * job.d_model
        self.blocks = nn.ModuleList(
            PlainBlock(job.d_model, job.heads, hidden) for _ in range(job.layers)
        )
        self.norm = nn.LayerNorm(job.d_model, bias=False)
        self.readout = nn.Linear(job.d_model, job.vocab_size, bias=False)
        for weight in (self.embedding.weight, self.position.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.readout(self.norm(x))


def llama(job: Job) -> transformers.LlamaForCausalLM:
    hidden = job.hidden or 64 * round(8 * job.d_model / 3 / 64)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=job.vocab_size,
            hidden_size=job.d_model,
            intermediate_size=hidden,
            num_hidden_layers=job.layers,
            num_attention_heads=job.heads,
            num_key_value_heads=job.kv_heads or job.heads,
            max_position_embeddings=1 << 20,
            tie_word_embeddings=job.tied,
        )
    )


def pretrained(folder: str) -> Any:
    """Load a model in Hugging Face's format, as float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


Round = Callable[[], dict[str, float]]


def training(job: Job) -> tuple[nn.Module, Round]:
    """Set up training. A round is one step with fused AdamW and clipping at norm 1,
    loss included.
    """
    model = (PlainDecoder(job) if job.peer == "plain" else llama(job)).to(job.device)
    run: Any = torch.compile(model) if job.compile else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens = torch.randint(job.vocab_size, (job.batch, job.length + 1), device=job.device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()

    def step() -> dict[str, float]:
        start = job.now()
        with job.amp:
            logits = run(inputs) if job.peer == "plain" else run(inputs, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        return {"seconds": job.now() - start}

    return model, step


def decoding(job: Job) -> tuple[nn.Module, Round]:
    """Set up decoding. A round prefills `length` tokens per row into an empty cache and decodes
    `new_tokens`.
    """
    model: Any = pretrained(job.folder) if job.folder else llama(job)
    model = model.to(job.device).eval()
    if job.precision == "bfloat16":
        model = model.bfloat16()
    run: Any = torch.compile(model) if job.compile else model
    prompt = torch.randint(model.config.vocab_size, (job.batch, job.length), device=job.device)
    static = transformers.StaticCache(
        config=model.config, max_cache_len=job.length + job.new_tokens
    )

    @torch.inference_mode()
    def decode() -> dict[str, float]:
        static.reset()
        dynamic = transformers.DynamicCache(config=model.config)
        cache: Any = static if job.cache == "static" else dynamic

        def feed(tokens: Tensor) -> Tensor:
            logits = run(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            return logits[:, -1:].argmax(-1)

        start = job.now()
        token = feed(prompt)
        filled = job.now()
        for _ in range(job.new_tokens):
            token = feed(token)
        return {"seconds": job.now() - filled, "prefill_seconds": filled - start}

    return model, decode


class Worker:
    """Hold one job at a time, and answer requests about it."""

    def __init__(self) -> None:
        self.step: Round | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request.

            {"op": "setup", **Job fields} -> {"parameters", "tokens", "torch", "transformers",
                "threads", "warmup_seconds"}: builds, warms up. `tokens`: per round, all rows.
            {"op": "round"} -> {"seconds"}: one training step, or `new_tokens` decoded per row; in
                decoding also "prefill_seconds".

        Any failure gives {"error": "one line"}, and the worker continues. It ends with its input.
        """
        request = dict(request)
        op = request.pop("op", None)
        if op == "setup":
            return self.setup(request)
        if op == "round":
            if self.step is None:
                raise ValueError("round: nothing is set up; send a setup first")
            return self.step()
        raise ValueError(f"op: {op!r}; allowed: setup, round")

    def setup(self, request: dict[str, Any]) -> dict[str, Any]:
        names = [field.name for field in fields(Job)]
        for name in request:
            if name not in names:
                raise ValueError(f"setup: no field {name!r}; allowed: {', '.join(names)}")
        self.step = None
        torch.compiler.reset()
        job = Job(**request)
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        torch.manual_seed(job.seed)
        start = time.perf_counter()
        model, step = training(job) if job.task == "train" else decoding(job)
        for _ in range(job.warmup):
            step()
        self.step = step
        return {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "tokens": job.batch * (job.length if job.task == "train" else job.new_tokens),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "warmup_seconds": time.perf_counter() - start,
        }


def serve() -> None:
    """Answer requests until the input ends; only answers go to stdout."""
    out, sys.stdout = sys.stdout, sys.stderr
    worker = Worker()
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            reply = worker.answer(json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}".replace("\n", " ")}
        print(json.dumps(reply), file=out, flush=True)


def once(request: dict[str, Any]) -> dict[str, Any]:
    """Set up, time `rounds` rounds (5 by default), and return the results."""
    worker, rounds = Worker(), int(request.pop("rounds", 5))
    told = worker.answer({"op": "setup", **request})
    seconds = [worker.answer({"op": "round"})["seconds"] for _ in range(rounds)]
    speed = told["tokens"] / statistics.median(seconds)
    return {**told, "seconds": seconds, "tokens_per_second": speed}


def main() -> int:
    if len(sys.argv) == 1:
        serve()
        return 0
    try:
        request = json.loads(sys.argv[1])
        request.pop("op", None)
        print(json.dumps(once(request)))
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " "), file=sys.stderr)
        return 2 if isinstance(error, (ValueError, TypeError)) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
