"""FlashDecoding for GPUs: a step of decoding reads each bag once, in its stored form.

Many programs share the slots of a head (Dao et al. 2023, Flash-Decoding); each returns a softmax
over its own slots, and these are joined. All query heads of a KV head are computed together, so
that an entry is read and decoded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mukv.attention.cores.base import UNKNOWN, Demand, KernelCore, Out, Part, Scores, finite
from mukv.attention.recalled import Query
from mukv.attention.stored import StoredForm
from mukv.core.compute import Compute, Platform
from mukv.core.partition import by_shard
from mukv.core.typing import Array

NARROWEST = 16
"""Smallest side of an operand of Triton's matrix products; all sides are powers of two."""
PROGRAMS = 264
"""Programs that a step is divided into, where its bags have so many blocks: two for each of the 132
processors of an H100."""
NUMBERS = 8192
"""Numbers of a tensor that a program decodes at once."""
LONGEST = 512
"""Largest number of slots of a run."""
MOST = 16384
"""Largest number of float32 sums that a program holds."""


@dataclass(frozen=True)
class FlashDecode(KernelCore):
    """Core for steps of decoding on a GPU, which reads caches in their stored form."""

    platforms: ClassVar[tuple[Platform, ...] | None] = ("gpu",)
    steps: ClassVar[bool | None] = True

    @classmethod
    def supports(cls, demand: Demand, compute: Compute) -> str | None:
        if not compute.fused:
            return "compute.fused is false"
        if not demand.step:
            return "it reads a cache, for one query per row"
        if demand.position.biases:
            return f"{demand.position.kind} adds a bias to the logits"
        if demand.shows is not None:
            return f"all logits are needed: {demand.shows}"
        return demand.unread

    def apply(self, query: Query, parts: Sequence[Part], scores: Scores) -> Out:
        from mukv.attention.cores.flash_decode_kernel import BagArrays, BagBlocks, Kernel

        kind, (batch, kv_heads, group, _, _) = query[0].dtype, query[0].shape
        forms = [_form(part) for part in parts]
        heads = _heads(forms)
        rows = kv_heads * group // heads
        power = _power(rows)

        def by_head(piece: Array) -> Array:
            piece = piece.reshape(batch, heads, rows, -1).astype(self.operands or kind)
            return jnp.pad(piece, ((0, 0), (0, 0), (0, power - rows), (0, 0)))

        cuts, bags = [], []
        for form, part in zip(forms, parts, strict=True):
            position, mask, tensors = _position(form, part), None, form.tensors
            if position is None:
                # Bytes, which have an address each.
                mask = part.shown(scores.query_position).visible[:, :, 0].astype(jnp.int8)
            widest = max(tensor.width for tensor in tensors)
            cuts.append(
                BagBlocks(
                    slots=form.value.slots,
                    places=form.places,
                    run=None if form.runs is None else form.length,
                    block=_block(form, widest),
                    decoders=tuple(tensor.decode for tensor in tensors),
                    keys=tuple(map(tensors.index, form.keys)),
                    value=tensors.index(form.value),
                    window=part.mask.window,
                )
            )
            stored = tuple(tensor.parts for tensor in tensors)
            bags.append(BagArrays(position, mask, form.runs, stored))
        width = forms[0].value.width
        at = scores.query_position[:, None]
        arrays, tree = jax.tree.flatten(([by_head(piece) for piece in query], at, bags))

        def attend(*arrays: Array) -> tuple[Array, ...]:
            kernel = Kernel(tuple(cuts), tree, power, width, scores.softcap, self.interpret)
            return kernel.call(arrays, PROGRAMS)

        by = ("batch", "kv_heads")
        mixed, top, total = by_shard(attend, (by,) * len(arrays), (by,) * 3)(*arrays)
        # [batch heads split row] to [batch heads row split].
        top, total = (x[..., :rows] for x in (top, total))
        high, sinks = jnp.max(top, axis=2), None
        if scores.sinks is not None:
            sinks = scores.sinks.astype(jnp.float32).reshape(1, heads, rows)
            high = jnp.maximum(high, sinks)
        high = finite(high)
        share = jnp.exp(top - high[:, :, None])
        whole = jnp.sum(share * total, axis=2)
        if sinks is not None:
            whole = whole + jnp.exp(sinks - high)
        out = jnp.sum(share[..., None] * mixed[..., :rows, :], axis=2)
        out = out / jnp.where(whole > 0, whole, 1.0)[..., None]
        return out.reshape(batch, kv_heads, group, 1, width).astype(kind)


def unread(shape: tuple[int, ...], parts: Sequence[Part], compute: Compute) -> str | None:
    """Return why the kernel can't read these bags in their stored form; None if it can.

    shape: of the queries
    """
    if shape[3] > 1 or compute.platform not in (FlashDecode.platforms or ()):
        return UNKNOWN
    forms: list[StoredForm] = []
    for part in parts:
        form = part.recalled.stored()
        if isinstance(form, str):
            return form
        forms.append(form)
    heads = _heads(forms)
    for form, part in zip(forms, parts, strict=True):
        for width in (tensor.width for tensor in form.tensors):
            if width != _power(width):
                return f"the widths of keys and values must be 16, 32, 64, ..., not {width}"
        if form.runs is not None and (form.length & (form.length - 1) or form.length > LONGEST):
            return f"runs of {form.length} slots; they must be powers of two up to {LONGEST}"
        if part.entries.position.shape[1] > heads:
            return "heads share their slots"
    rows = _power(shape[1] * shape[2] // heads)
    if rows * max(form.value.width for form in forms) > MOST:
        return f"{rows} query heads of one KV head do not fit into a program"
    return None


def _form(part: Part) -> StoredForm:
    """Return the stored form of a part that has one."""
    form = part.recalled.stored()
    assert not isinstance(form, str), form
    return form


def _position(form: StoredForm, part: Part) -> Array | None:
    """Return the stored positions, if they alone decide what the query sees. The kernel then
    compares them itself, so that no kernel before it computes a mask."""
    entries = part.entries
    others = entries.segment, entries.until, part.mask.chosen
    alone = entries.position is form.position and all(each is None for each in others)
    return form.position if alone else None


def _heads(forms: Sequence[StoredForm]) -> int:
    """Return the largest number of heads of any tensor; those with fewer share them."""
    return max(tensor.heads for form in forms for tensor in form.tensors)


def _block(form: StoredForm, widest: int) -> int:
    """Return how many slots of a bag a program decodes at once."""
    least = _power(form.length if form.runs is not None else 1)
    return min(max(NUMBERS // widest, least), _power(form.places))


def _power(number: int) -> int:
    """Return the smallest power of two that is at least `number` and `NARROWEST`."""
    return max(NARROWEST, 1 << (number - 1).bit_length())
