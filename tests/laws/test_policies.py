"""Laws 2, 4 and 7 for cache policies; the entries that they choose equal formulas in numpy."""

from __future__ import annotations

import dataclasses
from itertools import pairwise, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.attention import Grouped
from mukv.cache import Policy, Reader
from mukv.cache.clusters import Clusters
from mukv.cache.kept import Kept, empty
from mukv.cache.merge import Nearest
from mukv.cache.reads import bytes_read
from mukv.cache.values import CAPPED
from mukv.core.errors import BadInput
from mukv.core.params import map_params
from mukv.core.tap import capture
from mukv.model import Stage
from mukv.model.counting import cache_bytes
from mukv.position import RoPE
from tests.laws import matrix
from tests.laws.matrix import EXACT
from tests.pairs import params

LENGTH, PROMPT, TAIL = 40, 30, 4
COUNT = np.array([30, 21])
KEEPERS = ("streaming", "snapkv", "h2o", "tova", "knorm", "keydiff", "expected", "random")
SELECTORS = ("topk", "topp:1", "sparq", "pages", "clusters")
COMPOSED = ("snapkv+adaptive", "h2o+pyramid", "tova+pages", "keydiff+clusters", "expected+topk")
PAIRS = [
    *(("gqa", "rope", name) for name in (*KEEPERS, *SELECTORS, *COMPOSED)),
    ("gqa-dressed", "rope-yarn", "expected+clusters"),
    ("shared-kv-normed", "p-rope", "keydiff+pages"),
    ("latent", "rope", "snapkv+critical+sparq"),
    ("tied", "rope", "expected+clusters"),
    ("tensor-product", "rope", "h2o+topk"),
    ("tensor-product", "rope", "cur+pages"),
    ("mqa", "alibi", "h2o+sparq"),
    ("gqa", "rope", "tova+chunk(size=4)+critical+adaptive"),
    ("gqa", "rope", "lagkv(lag=4)+pages"),
    ("gqa-dressed", "rope-yarn", "leverage(sketch=4)"),
    ("gqa", "cope", "topk"),
    ("gqa", "rope", "h2o+adaptive+hold"),
    ("gqa", "rope", "compactor+adaptive"),
    ("gqa", "rope", "snapkv+threshold(window=4)+adaptive"),
    ("gqa", "rope", "tova+merge+pages"),
    ("gqa-dressed", "rope-yarn", "think(ratio=0)"),
]


def model_of(attention, position):
    """Make a model of one layer."""
    return dataclasses.replace(matrix.build(attention, position, "plain"), plan=(Stage(),))


def decode(model, policy, centres=None):
    """Return logits from the last token of the prompt on, over three tails, and the cache."""

    @jax.jit
    def run(weights, ids):
        cache = model.empty_cache(2, LENGTH, TAIL, EXACT.type, policy, centres)
        rows, count = jnp.arange(2), jnp.asarray(COUNT)
        scores, cache = model.prefill(weights, cache, ids[:, :PROMPT], count, compute=EXACT)

        def tail(carry, _):
            cache, count = carry

            def step(carry, _):
                cache, count = carry
                scores, cache = model.step(weights, cache, ids[rows, count], compute=EXACT)
                return (cache, count + 1), scores

            (cache, count), found = jax.lax.scan(step, (cache, count), length=TAIL)
            return (model.fold(weights, cache), count), found

        (cache, _), found = jax.lax.scan(tail, (cache, count), length=2)
        return jnp.concatenate([scores[None], found.reshape(-1, *scores.shape)]), cache

    weights = model.unstack(matrix.weights(model))
    return run(weights, matrix.tokens(2, LENGTH))


@pytest.fixture(scope="module")
def whole():
    """Return a function that returns the logits of one forward pass."""
    known = {}

    def of(model):
        if model not in known:
            ids = matrix.tokens(2, LENGTH)
            place = np.tile(np.arange(LENGTH), (2, 1))
            run = matrix.logits(model)
            known[model] = np.asarray(run(matrix.weights(model), ids, place, np.zeros_like(ids)))
        return known[model]

    return of


@pytest.mark.parametrize("case", params(PAIRS, PAIRS[::6], "-".join))
def test_full_budget_is_full_attention(case, whole):
    """Law 7; and law 4: the cache has the same bytes during decoding."""
    attention, position, name = case
    model, policy = model_of(attention, position), Policy.parse(name)
    if name.startswith("topp"):
        policy = dataclasses.replace(policy, select=dataclasses.replace(policy.select, mass=1.0))
    found, cache = decode(model, policy)
    for row, start in enumerate(COUNT):
        expected = whole(model)[row, start - 1 : start + 2 * TAIL]
        np.testing.assert_allclose(found[:, row], expected, atol=3e-5)
    assert cache.nbytes() == cache_bytes(model, 2, LENGTH, TAIL, EXACT.type, policy)


@pytest.mark.product
@pytest.mark.parametrize(
    "attention", ["shared-kv", "shared-kv-normed", "latent", "tied", "tensor-product"]
)
def test_calibrated_centres_fit_or_are_refused(attention, whole):
    """Law 7 if every head has its own entries; otherwise the error says why centres do not fit."""
    model, policy = model_of(attention, "rope"), Policy.parse("clusters")
    policy = dataclasses.replace(policy, select=Clusters(calibrated="keys"))
    layer = model.attention
    if attention in ("latent", "tied", "tensor-product"):
        with pytest.raises(BadInput, match="one set of entries for all heads"):
            model.empty_cache(1, LENGTH, TAIL, EXACT.type, policy)
        return
    random = np.random.default_rng(3)
    drawn = random.standard_normal((layer.key_heads, 5, layer.query_dim)).astype(np.float32)
    found, _ = decode(model, policy, {0: {"key": jnp.asarray(drawn)}})
    for row, start in enumerate(COUNT):
        expected = whole(model)[row, start - 1 : start + 2 * TAIL]
        np.testing.assert_allclose(found[:, row], expected, atol=3e-5)


class One:
    """One layer with random entries and queries, as JAX and numpy arrays."""

    def __init__(self, prompt=32, more=6, count=(32, 21)):
        self.attention = Grouped(heads=4, kv_heads=2, head_dim=8, position=RoPE(base=100.0))
        random = np.random.default_rng(0)

        def draw(param):
            return random.standard_normal(param.shape).astype(np.float32) / 4

        self.write = map_params(draw, self.attention.write_params(16))
        self.read = map_params(draw, self.attention.read_params(16))
        self.count, self.length = np.array(count), prompt
        self.x = x = random.standard_normal((2, prompt + more, 16)).astype(np.float32)
        # The newest tokens follow the last of each row.
        self.place = np.concatenate(
            [np.tile(np.arange(prompt), (2, 1)), self.count[:, None] + np.arange(more)], axis=1
        )
        place = jnp.asarray(self.place)
        self.new = self.attention.write(self.write, jnp.asarray(x), place)
        self.queries = self.attention.query(self.read, jnp.asarray(x), place)
        self.key, self.value = (np.asarray(self.new[name]) for name in ("key", "value"))

    def body(self, name, budget, slots=None, centres=None, noted=None):
        """Return the body after the prompt, and after the newest tokens."""
        policy = Policy.parse(name, budget)
        length = self.x.shape[1]
        slots = slots or (policy.keep.budget.of(length) if policy.keep.evicts else length)
        runs = any(part in name for part in ("int4", "int8", "pages"))
        slots = -(-slots // 32) * 32 if runs else slots
        select, given = policy.select.sized(slots), {}
        if centres is not None:
            select, given = dataclasses.replace(select, calibrated="keys"), {"key": centres}
        parts = (policy.keep, policy.store, select)
        given = *parts, given
        body = empty(self.attention, 16, 2, slots, jnp.dtype("float32"), *given, noted=noted)

        @jax.jit
        def grown(body):
            cut = self.length
            first = {name: x[:, :, :cut] for name, x in self.new.items()}
            last = {name: x[:, :, cut:] for name, x in self.new.items()}
            early = Reader(self.attention, self.read, self.queries[:, :, :, :cut])
            late = Reader(self.attention, self.read, self.queries[:, :, :, cut:])
            count, more = jnp.asarray(self.count), self.x.shape[1] - cut
            one = body.extended(first, jnp.zeros(2, jnp.int32), count, early, fresh=True)
            return one, one.extended(last, count, jnp.full(2, more), late)

        return grown(body)

    def rows(self, row):
        """Return the places of the row's tokens in the arrays, in order."""
        return [*range(self.count[row]), *range(self.length, self.x.shape[1])]

    def weights(self, row, queries, keys):
        """Compute causal softmax(q k / sqrt(d)) of places: [kv head, group, query, key]."""
        q = np.asarray(self.queries)[row][:, :, queries]
        logits = np.einsum("hgqd,hkd->hgqk", q, self.key[row][:, keys]) / 8**0.5
        seen = self.place[row][keys] <= self.place[row][queries][:, None]
        weights = np.exp(np.where(seen, logits, -np.inf))
        return weights / weights.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def one():
    return One()


def positions(body: Kept, row: int, head: int) -> list[int]:
    held = np.asarray(body.shelf.position)[row]
    return sorted(p for p in held[min(head, len(held) - 1)].tolist() if p >= 0)


def newest_stays(score):
    return np.append(score[:-1], np.inf)


def best_of(score, number):
    """Return the entries with the highest scores; of two equal ones the newer."""
    return sorted(np.lexsort((-np.arange(len(score)), -score))[:number].tolist())


def by_score(one, row, head, name, places, number):
    """Compute the score of each place by the formula, in float64 if the sum is long."""
    key = one.key[row, head][places]
    last = places[-1]
    if name == "knorm":
        return newest_stays(-np.linalg.norm(key, axis=-1))
    if name == "keydiff":
        unit = key / np.linalg.norm(key, axis=-1, keepdims=True)
        mean = unit.mean(0)
        return newest_stays(-(unit @ mean) / np.linalg.norm(mean))
    if name == "tova":
        return newest_stays(one.weights(row, [last], places)[:, :, 0].mean((0, 1)))
    if name == "snapkv":
        window = min(32, number // 2, len(places))
        weights = one.weights(row, places[-window:], places)[head].mean(1)
        weights[:, -window:] = 0
        smooth = np.stack([np.convolve(w, np.ones(5) / 5, "same") for w in weights]).mean(0)
        smooth[-window:] = np.inf
        return smooth
    if name == "cur":
        score = np.ones(len(places))
        for x in (key, one.value[row, head][places]):
            square = (x**2).sum(-1)
            score *= square / np.repeat(np.add.reduceat(square, range(0, len(x), 16)), 16)[: len(x)]
        score[:4] = np.inf
        return newest_stays(score)
    if name == "lagkv(lag=8)":
        complete = (len(places) - 4) // 8
        score = np.ones(len(places))
        for part in range(complete - 1):
            shares = []
            for x in (key, one.value[row, head][places]):
                this, after = x[4 + 8 * part :][:8], x[12 + 8 * part :][:8]
                low, high = after.min(0), after.max(0)
                spread = np.exp(np.std((this - low) / (high - low), axis=-1, ddof=1))
                shares.append(spread / spread.sum())
            score[4 + 8 * part :][:8] = np.argsort(np.argsort(sum(shares))) / 8
        score[:4] = np.inf
        return newest_stays(score)
    if name == "leverage(sketch=6)":
        # Rotated back by the complex form of RoPE.
        turn = np.array(places)[:, None] * 100.0 ** -(np.arange(4) / 4)
        still = (key[:, :4] + 1j * key[:, 4:]) * np.exp(-1j * turn)
        still = np.concatenate([still.real, still.imag], axis=-1)
        draw = np.asarray(jax.random.normal(jax.random.key(0), (8, 6)))
        x = np.float64(still - still.mean(0)) @ draw / 6**0.5
        return newest_stays(
            np.einsum("ks,st,kt->k", x, np.linalg.inv(x.T @ x + 0.01 * np.eye(6)), x)
        )
    if name == "h2o":
        score = one.weights(row, places, places)[head].sum(1).mean(0)
        score[len(places) - number // 2 :] = np.inf
        return score
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    [
        *("knorm", "keydiff", "tova", "snapkv", "h2o", "streaming"),
        *("cur", "lagkv(lag=8)", "leverage(sketch=6)"),
    ],
)
def test_what_is_kept(one, name):
    """After a prompt, the kept entries equal a formula; a budget is a fraction of each row's
    tokens."""
    body, _ = one.body(name, 0.4)
    for row, count in enumerate(one.count):
        number = int(count * 0.4)
        for head in range(2):
            if name == "streaming":
                expected = [*range(4), *range(count - number + 4, count)]
            else:
                score = by_score(one, row, head, name, list(range(count)), number)
                expected = best_of(score, number)
            assert positions(body, row, head) == expected


@pytest.mark.product
@pytest.mark.parametrize("name", ["knorm", "tova", "snapkv"])
def test_what_is_kept_while_decoding(one, name):
    """After a fold, a formula over the entries kept before and the newest ones gives the kept
    entries."""
    body, later = one.body(name, 12.0)
    for row in range(2):
        for head in range(2):
            kept = positions(body, row, head)
            newest = range(one.length, one.x.shape[1])
            places = [*kept, *newest]
            number, score = 12, None
            if name == "snapkv":
                window = 6
                weights = one.weights(row, [*newest], places)[head].mean(1)
                weights[:, -window:] = 0
                score = np.stack([np.convolve(w, np.ones(5) / 5, "same") for w in weights]).mean(0)
                score[-window:] = np.inf
            elif name == "tova":
                # Softmax is over a head's own entries, means are over the entries of all heads.
                per_head = [
                    one.weights(row, [places[-1]], places)[h, :, 0].mean(0) for h in range(2)
                ]
                if positions(body, row, 0) != positions(body, row, 1):
                    pytest.fail("TOVA keeps the same entries for all heads")
                score = np.mean(per_head, 0)
                score[-1] = np.inf
            else:
                score = -np.linalg.norm(one.key[row, head][places], axis=-1)
                score[-1] = np.inf
            best = np.argsort(-score, kind="stable")[:number]
            expected = sorted(one.place[row][places][best].tolist())
            assert positions(later, row, head) == expected


@pytest.mark.product
@pytest.mark.parametrize(
    ("options", "epsilon", "covariance", "vnorm"),
    [
        ("", 0.0, True, True),
        ("(epsilon=0.01)", 0.01, True, True),
        ("(covariance=false)", 0.0, False, True),
        ("(vnorm=false)", 0.0, True, False),
    ],
)
def test_expected_attention(one, options, epsilon, covariance, vnorm):
    """Scores equal those of means and covariances over explicit rotations."""
    body, _ = one.body("expected" + options, 12.0)
    rope, width = one.attention.position, 8

    def turn(x, place):
        place = jnp.full((1, 1, len(x)), place)
        return np.asarray(rope.rotate(jnp.asarray(x, jnp.float32)[None, None], place))[0, 0]

    for row, count in enumerate(one.count):
        ahead = np.mean([turn(np.eye(width), count + t).T for t in range(512)], axis=0)
        for head in range(2):
            key, value = one.key[row, head, :count], one.value[row, head, :count]
            total = np.zeros(count - 4)
            for group in range(2):
                query = np.asarray(one.queries)[row, head, group, 4:count]
                still = np.stack([turn(q[None], -p)[0] for p, q in enumerate(query, 4)])
                mean, spread = ahead @ still.mean(0), ahead @ np.cov(still.T, bias=True) @ ahead.T
                logits = key[4:] @ mean / 8**0.5
                logits += covariance * np.einsum("kd,de,ke->k", key[4:], spread, key[4:]) / 16
                weights = np.exp(logits - logits.max())
                total += weights / weights.sum() / 2
            score = (total + epsilon) * np.linalg.norm(value[4:], axis=-1) ** vnorm
            score = np.concatenate([np.full(4, np.inf), score])
            score[-1] = np.inf
            expected = sorted(np.argsort(-score, kind="stable")[:12].tolist())
            assert positions(body, row, head) == expected


def hashed(x):
    """Apply the finaliser of MurmurHash3."""
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return x ^ (x >> 16)


def test_random(one):
    """Each head and layer drops other entries, drawn as independent hashes."""
    body, _ = one.body("random(seed=3)", 0.5)
    kept = {}
    for (row, count), head in product(enumerate(one.count), range(2)):
        draws = [hashed((hashed(hashed(3) + head) + p) % 2**32) >> 8 for p in range(count)]
        best = np.argsort(-newest_stays(np.float32(draws)), kind="stable")[: count // 2]
        kept[row, head] = sorted(best.tolist())
        assert positions(body, row, head) == kept[row, head]
    assert kept[0, 0] != kept[0, 1]
    layers = [Policy.parse("random(seed=3)").keep.of_layer(place, 4, 64) for place in range(4)]
    assert len({layer.seed for layer in layers}) == 4


def by_head(body, row):
    """Return the positions that each head keeps in a shared pool."""
    place, owner = (np.asarray(x)[row, 0] for x in (body.shelf.position, body.shelf.owner))
    return [sorted(place[(owner == head) & (place >= 0)].tolist()) for head in range(2)]


@pytest.mark.parametrize("floor", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["knorm", "keydiff", "snapkv(window=4)"])
def test_adaptive(one, name, floor):
    """Each head keeps the floor of its best entries and those that must be kept; the best of all
    heads fill the pool. With a floor of 1 every head keeps what the uniform budget keeps."""
    body, later = one.body(f"{name}+adaptive(floor={floor})", 12.0)
    uniform, _ = one.body(name, 12.0)
    for row, count in enumerate(one.count):
        scores = []
        for head in range(2):
            if name.startswith("snapkv"):
                weights = one.weights(row, range(count - 4, count), range(count))[head].mean(1)
                weights[:, -4:] = 0
                score = np.mean([np.convolve(w, np.ones(5) / 5, "same") for w in weights], axis=0)
                score[-4:] = np.inf
            else:
                score = by_score(one, row, head, name, list(range(count)), 12)
            scores.append(score)
        pool = np.array(scores)
        for score, rank in zip(scores, pool, strict=True):
            rank[best_of(score, max(int(floor * 12), 1) if floor else 0)] = np.inf
        best = np.argsort(-pool.ravel(), kind="stable")[:24]
        expected = [sorted((best[best // count == head] % count).tolist()) for head in range(2)]
        assert by_head(body, row) == expected
        if floor == 1:
            assert by_head(body, row) == [positions(uniform, row, head) for head in range(2)]
        for held in (body, later):
            kept = by_head(held, row)
            assert sum(map(len, kept)) == 24
            assert all(len(each) >= max(int(floor * 12), floor > 0) for each in kept)


def refined_by_output(one, row, head, score, places, number, epsilon=1e-4, first=0.5):
    """Compute the scores of CriticalKV: infinite for the best entries of the first stage; for the
    others the score times the norm of what they add to the output."""
    output = np.asarray(one.read["output"])[2 * head : 2 * head + 2]
    added = np.einsum("kv,gve->gke", one.value[row, head][places], output)
    finite = np.where(np.isinf(score), 0.0, score)
    new = np.where(np.isinf(score), np.inf, (finite + epsilon) * np.abs(added).sum(-1).mean(0))
    new[best_of(score, max(int(first * number), 1) if first else 0)] = np.inf
    return new


@pytest.mark.product
@pytest.mark.parametrize("first", params([0.5, 0.0, 1.0], [0.5]))
@pytest.mark.parametrize("name", ["snapkv", "cur"])
def test_critical(one, name, first):
    """`critical` chooses within each head, and with `adaptive` within the number that scores give
    the head. If the first stage takes the whole budget, it changes nothing."""
    step = f"{name}+critical(first={first})"
    alone, shared, plain = (one.body(n, 12.0)[0] for n in (step, step + "+adaptive", name))
    for row, count in enumerate(one.count):
        places = list(range(count))
        scores = [by_score(one, row, head, name, places, 12) for head in range(2)]
        pool = np.array(scores)
        for score, rank in zip(scores, pool, strict=True):
            rank[best_of(score, 2)] = np.inf
        owners = np.argsort(-pool.ravel(), kind="stable")[:24] // count
        for head, score in enumerate(scores):
            own = int((owners == head).sum())
            new, within = (
                refined_by_output(one, row, head, score, places, n, first=first) for n in (12, own)
            )
            assert positions(alone, row, head) == best_of(new, 12)
            assert by_head(shared, row)[head] == best_of(within, own)
            if first == 1:
                assert positions(alone, row, head) == positions(plain, row, head)


def test_chunks(one):
    """`chunk` keeps whole chunks, equal in both heads, by the mean score of both, and the newest
    entries of the last chunk that fits."""
    body, _ = one.body("cur+chunk(size=5)", 14.0)
    for row, count in enumerate(one.count):
        places = np.arange(count)
        scores = np.array([by_score(one, row, head, "cur", places, 14) for head in range(2)])
        means = np.full(count, np.inf)
        for chunk in range(-(-count // 5)):
            inside = scores[:, places // 5 == chunk]
            finite = inside[np.isfinite(inside)]
            means[places // 5 == chunk] = finite.mean() if finite.size else np.inf
        means[np.isinf(scores[0])] = np.inf
        for head in range(2):
            assert positions(body, row, head) == best_of(means, 14)


@pytest.mark.parametrize(
    ("name", "quantile"),
    [("knorm", 0.6), ("knorm+adaptive(floor=0.3)", 0.6), ("tova", 0.5), ("knorm", 2)],
)
def test_threshold(one, name, quantile):
    """Of the entries whose score reaches the threshold the best ones, at most the budget, and those
    of the window. Above all scores the window is left; a higher threshold keeps none besides."""
    number, window, found = 12, 3, []
    scorer = name.split("+")[0]
    scores = [
        by_score(one, row, head, scorer, list(range(count)), number)
        for row, count in enumerate(one.count)
        for head in range(2)
    ]
    finite = np.sort(np.concatenate([score[np.isfinite(score)] for score in scores]))
    for more in (0.0, 0.2):
        at = int(len(finite) * (quantile + more))
        high = 1e3 if quantile > 1 else finite[at : at + 2].mean()
        body, _ = one.body(f"{name}+threshold(least={high:.9f},window={window})", float(number))
        kept = {}
        for row, count in enumerate(one.count):
            pair = [score.copy() for score in scores[2 * row : 2 * row + 2]]
            for score in pair:
                score[count - window :] = np.inf
                score[score < round(high, 9)] = -np.inf
            if "adaptive" in name:
                pool = np.array(pair)
                for score, rank in zip(pair, pool, strict=True):
                    safe = np.array(best_of(score, 3))
                    rank[safe[score[safe] > -np.inf]] = np.inf
                order = best_of(pool.ravel(), 2 * number)
                best = [[i % count for i in order if i // count == head] for head in range(2)]
                own = by_head(body, row)
            else:
                best = [best_of(score, number) for score in pair]
                own = [positions(body, row, head) for head in range(2)]
            for head in range(2):
                expected = [i for i in best[head] if pair[head][i] > -np.inf]
                assert own[head] == expected
                kept[row, head] = set(own[head])
                newest = set(range(count - window, count))
                assert newest <= kept[row, head]
                assert quantile < 1 or kept[row, head] == newest
        found.append(kept)
    assert all(found[1][at] <= found[0][at] for at in found[0])
    assert any(len(found[1][at]) < number for at in found[0])


def merged(key, value, kept, lost, similarity):
    """Merge values into those of the kept entries with the most similar keys: [kept, width]."""
    unit = key / np.linalg.norm(key, axis=-1, keepdims=True)
    size = np.linalg.norm(value, axis=-1)
    total, weights = value[kept].copy(), np.ones(len(kept))
    for i in lost:
        cosine = unit[kept] @ unit[i]
        into = int(np.argmax(cosine))
        if cosine[into] >= similarity:
            j = kept[into]
            weight = max(cosine[into], 0) * size[i] / (size[i] + size[j] + 1e-6)
            total[into] += weight * value[i]
            weights[into] += weight
    return total / weights[:, None]


@pytest.mark.parametrize("name", ["knorm", "knorm+adaptive", "streaming"])
@pytest.mark.parametrize("similarity", [0.0, 0.3, 1.0])
def test_merge(one, name, similarity, monkeypatch):
    """The same entries and keys as without; values are weighted means, within a head. No two keys
    have a cosine of 1, at which nothing changes."""
    monkeypatch.setattr("mukv.cache.merge.CHUNK", 8)  # several chunks
    plain = one.body(name, 12.0)[0].shelf
    body = one.body(f"{name}+merge(similarity={similarity})", 12.0)[0].shelf
    np.testing.assert_array_equal(body.position, plain.position)
    np.testing.assert_array_equal(body.stored["key"]["exact"], plain.stored["key"]["exact"])
    found = np.asarray(body.stored["value"]["exact"])
    changed = np.abs(found - np.asarray(plain.stored["value"]["exact"])).max() > 1e-3
    assert changed == (similarity < 1)
    for (row, count), head in product(enumerate(one.count), range(2)):
        there, place = np.asarray(body.there())[row, head], np.asarray(body.position)[row]
        place = place[min(head, len(place) - 1)][there]
        lost = sorted(set(range(count)) - set(place.tolist()))
        key, value = (np.float64(x[row, head]) for x in (one.key, one.value))
        expected = merged(key, value, place, lost, similarity)
        own = found[row, min(head, found.shape[1] - 1)][there]
        np.testing.assert_allclose(own, expected, atol=1e-5)


def test_merging_equal_values_changes_none():
    """Law 7 of merging: a weighted mean of equal values is that value."""
    random = np.random.default_rng(1)
    key = jnp.asarray(random.standard_normal((1, 1, 9, 4)), jnp.float32)
    value = jnp.full((1, 1, 9, 3), 0.7)
    index, kept = jnp.array([[[1, 4, 8]]]), jnp.array([[[True, True, False]]])
    found = Nearest().values(key, value, jnp.ones((1, 1, 9), bool), None, index, kept)
    np.testing.assert_allclose(found[0, 0, :2], 0.7, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "budget", "length", "beta"),
    [
        ("snapkv(window=64)", 0.5, 1536, 20),
        ("snapkv(window=64)", 0.25, 1536, 20),
        ("snapkv(window=64)", 0.25, 8192, 8),
        ("knorm", 0.6, 200, 20),
        ("knorm", 400.0, 2000, 4),
    ],
)
def test_pyramid(name, budget, length, beta):
    """Budgets are linear in the layer, as in kvpress, with the given mean. They are uniform if a
    layer had less than the window."""
    keep = Policy.parse(f"{name}+pyramid(beta={beta})", budget).keep
    layers = 6
    window = 64 if "snapkv" in name else keep.minimum
    mean = budget * length if budget <= 1 else budget
    low, high = mean / beta, 2 * mean - mean / beta
    if high >= length - window:
        low, high = 2 * mean - (length - window), length - window
    flat = not length >= high >= low >= window
    assert flat == (name.startswith("snapkv") and length == 1536 and budget == 0.25)
    for place in range(layers):
        found = keep.of_layer(place, layers, length).budget.of(length)
        wanted = mean if flat else high - place * (high - low) / (layers - 1)
        # Budgets are stored as fractions with denominators of at most 1,000.
        assert abs(found - wanted) <= 1 + (length > 1000) * (budget <= 1) * length / 2000


def retrieve(one, body, row_query=-1):
    """Return the address of the newest query, the retrieved entries, and their positions."""
    query = one.queries[:, :, :, row_query:]
    address = one.attention.address(one.read, query / 8**0.5)
    recalled, entries = body.retrieve(address, lambda e: one.attention.recall(one.read, e))
    held = np.broadcast_to(np.asarray(entries.position), (2, 2, entries.position.shape[-1]))
    return address[0], recalled, held


def test_pages(one):
    body, _ = one.body("pages", 20.0, slots=64)
    query, _, held = retrieve(one, body)
    for row, count in enumerate(one.count):
        bound = np.full((2, 2, 16), -np.inf)
        for head in range(2):
            for page in range(-(-count // 4)):
                key = one.key[row, head, page * 4 : min(page * 4 + 4, count)]
                q = np.asarray(query)[row, head, :, 0]
                bound[head, :, page] = np.maximum(q * key.min(0), q * key.max(0)).sum(-1)
        share = np.exp(bound - bound.max(-1, keepdims=True))
        share = (share / share.sum(-1, keepdims=True)).sum(1)
        share[:, 0] = np.inf
        share[:, (count - 8) // 4 : -(-count // 4)] = np.inf
        for head in range(2):
            pages = np.sort(np.argsort(-share[head], kind="stable")[:5])
            expected = [p for page in pages for p in range(page * 4, page * 4 + 4) if p < count]
            assert [p for p in held[row, head].tolist() if p >= 0] == expected


@pytest.mark.product
def test_clusters(one):
    """The entries that are read are those of the clusters with the highest scores, up to the
    budget."""
    body, _ = one.body("clusters", 16.0)
    query, _, held = retrieve(one, body)
    start, centres = np.asarray(body.index["start"]), np.asarray(body.index["key"])
    for row, count in enumerate(one.count):
        for head in range(2):
            order = np.asarray(body.shelf.position)[row, head]
            distance = ((one.key[row, head, :count, None] - centres[row, head]) ** 2).sum(-1)
            label = np.argmin(distance, axis=-1) + 1
            label[:4] = label[count - 8 :] = 0
            assert label[order[:count]].tolist() == sorted(label)
            logits = np.asarray(query)[row, head, :, 0] @ centres[row, head].T
            size = np.diff(start[row, head])
            logits = np.where(size[1:] > 0, logits, -np.inf)
            share = np.exp(logits - logits.max(-1, keepdims=True))
            share = (share / share.sum(-1, keepdims=True)).sum(0)
            expected = order[: start[row, head, 1]].tolist()
            for cluster in np.argsort(-share, kind="stable"):
                expected += order[start[row, head, cluster + 1] :][: size[cluster + 1]].tolist()
            assert held[row, head].tolist() == expected[:16]


def test_calibrated_centres(one):
    """Calibrated centres label entries, new ones too; the cache has a copy, since its arrays are
    donated."""
    centres = jnp.asarray(np.random.default_rng(2).standard_normal((2, 5, 8)), jnp.float32)
    for body, rows in zip(one.body("clusters", 16.0, centres=centres), (32, 38), strict=True):
        assert body.index["key"] is not centres
        np.testing.assert_array_equal(body.index["key"], centres)
        held = np.asarray(body.shelf.position)[0]
        key = one.key[0][:, :rows]
        for head in range(2):
            distance = np.sum((key[head, :, None] - np.asarray(centres)[head]) ** 2, axis=-1)
            label = np.argmin(distance, axis=-1) + 1
            label[:4] = label[-8:] = 0
            assert label[held[head, :rows]].tolist() == sorted(label)


@pytest.mark.product
def test_sparse_values(one):
    """Values are read for the largest weights, summed over a group; top-p stops at the mass. The
    weight of the others is shared among them in each query head."""
    capped = []
    for name, limit, whole in (
        ("topk", None, True),
        ("topp", 0.95, True),
        ("topk(renormalise=false)", None, False),
        ("topp(mass=0.9,renormalise=false)", 0.9, False),
    ):
        body, _ = one.body(name, 5.0)
        _, recalled, held = retrieve(one, body)
        weights = np.random.default_rng(1).random((2, 2, 2, 1, held.shape[-1]))
        weights **= np.array([6, 60]).reshape(2, 1, 1, 1, 1)
        weights *= (held >= 0)[:, :, None, None]
        with capture() as taps:
            found = np.asarray(recalled.mixture(jnp.asarray(weights, jnp.float32)))
        for row, head in np.ndindex(2, 2):
            total = weights[row, head].sum(0)[0]
            best = np.argsort(-total, kind="stable")[:5]
            if limit:
                before = np.cumsum(total[best]) - total[best]
                reached = total[best].sum() >= limit * total.sum()
                capped.append(not reached)
                assert taps[CAPPED][row, head] == capped[-1]
                best = best[before < limit * total.sum()]
            kept = np.isin(np.arange(len(total)), best)
            value = one.value[row, head, np.maximum(held[row, head], 0)]
            share = weights[row, head] * kept
            if whole:
                share *= weights[row, head].sum(-1, keepdims=True) / share.sum(-1, keepdims=True)
            expected = np.einsum("gqk,kd->gqd", share, value)
            np.testing.assert_allclose(found[row, head], expected, atol=1e-5)
    assert {True, False} == set(capped)


@pytest.mark.product
def test_sparq(one):
    """Entries are chosen by the query's largest components; the mean of all values gets the weight
    of the others."""
    body, _ = one.body("sparq", 16.0)
    query, recalled, held = retrieve(one, body)
    products = np.asarray(recalled.products((query,)))
    for (row, count), head in product(enumerate(one.count), range(2)):
        q = np.asarray(query)[row, head, :, 0]
        largest = np.argsort(-np.abs(q).sum(0), kind="stable")[:2]
        logits = q[:, largest] @ one.key[row, head, :count, largest]
        logits /= np.sqrt(np.abs(q[:, largest]).sum(-1) / np.abs(q).sum(-1))[:, None]
        share = np.exp(logits - logits.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        wanted = share.sum(0)
        wanted[:4] = wanted[count - 8 :] = np.inf
        best = np.sort(np.argsort(-wanted, kind="stable")[:16])
        assert held[row, head, :16].tolist() == best.tolist()
        read = share[:, best].sum(-1)
        exact = np.exp(q @ one.key[row, head, best].T).sum(-1)
        mass = np.exp(products[row, head, :, 0, -1])
        np.testing.assert_allclose(mass, exact * (1 - read) / read, rtol=1e-4, atol=1e-6)


@pytest.mark.product
@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
def test_stores(one, name, bits):
    """No number has an error above half a step of its group; bytes follow from the bits."""
    body, later = one.body(name, 1.0, slots=64)
    for row in range(2):
        exact = np.asarray(one.key)[row][:, one.rows(row)]
        found = np.asarray(later.shelf.entries().tensors["key"])[row][:, : exact.shape[1]]
        step = np.abs(exact).max() * 2 / (2**bits - 2)
        # The last tokens of the prompt were stored twice.
        assert np.abs(found - exact).max() < 1.2 * step
    parts = body.shelf.stored["value"]
    assert parts["number"].nbytes == 2 * 2 * 64 * 8 * bits // 8
    # A bfloat16 step for each token and head, and with 4 bits a float32 minimum.
    factors = sum(array.nbytes for part, array in parts.items() if part != "number")
    assert factors == 2 * 2 * 64 * (2 if bits == 8 else 6)
    # Keys have both for each channel of 32 tokens.
    parts = body.shelf.stored["key"]
    factors = sum(array.nbytes for part, array in parts.items() if part != "number")
    assert factors == 2 * 2 * (64 // 32) * 8 * 6


@pytest.mark.parametrize("name", ["tova", "snapkv+int8", "knorm+pages", "snapkv+adaptive"])
def test_smaller_budgets_weigh_less(name):
    """Law 7: allocated bytes shrink with the budget."""
    model = model_of("gqa", "rope")
    room = 2, 512, TAIL, EXACT.type
    policies = [Policy.parse(name, budget) for budget in (1.0, 0.5, 0.25)]
    sizes = [cache_bytes(model, *room, policy) for policy in policies]
    full = cache_bytes(model, *room)
    assert all(2 * small < 1.25 * large for large, small in pairwise(sizes))
    assert sizes[-1] < 0.5 * full


@pytest.mark.parametrize("budget", params([1.0, 0.5], [0.5]))
@pytest.mark.parametrize(
    "name",
    [
        *("streaming", "knorm", "h2o", "snapkv", "tova", "expected", "random", "keydiff"),
        *("expected(covariance=false)", "snapkv+adaptive", "topk", "topp", "pages", "sparq"),
        *("cur", "lagkv", "leverage", "compactor", "snapkv+chunk+critical"),
        *("clusters", "clusters(clusters=3)", "int8", "int4", "int4(group=8)"),
    ],
)
def test_bytes_are_those_of_the_parts(name, budget):
    """Law 4: bytes of one layer with 2 KV heads of 8 in float32 equal a formula for each policy."""
    model, policy = model_of("gqa", "rope"), Policy.parse(name, budget)
    slots = int(LENGTH * budget) if policy.keep.evicts else LENGTH
    if name.startswith("int"):
        slots = {"int8": 64, "int4": 64, "int4(group=8)": 40}[name]  # whole groups
    entry = 2 * 2 * 8 * 4  # keys and values
    places = 2 * slots * 4  # a position for each head
    query = 4 * 8 * 4
    asked = TAIL * query  # queries in the tail
    mean = 4 + 4 * 8 * 4  # number and sum of the queries of 4 heads
    extra = {
        "h2o": 2 * slots * 4 + asked,  # a score for each entry
        "snapkv": asked,  # no more than its window
        "compactor": 2 * slots * 4 + asked,  # the attention of each entry
        "snapkv+chunk+critical": asked,
        "tova": query,  # the last one of the tail
        "expected(covariance=false)": asked + mean,
        "expected": asked + mean + 4 * (8 * 9 // 2) * 4,  # a triangular matrix
        "snapkv+adaptive": asked + 2 * slots * 4,  # the head that an entry belongs to
        "pages": 2 * (slots // 4) * (2 * 8 * 4 + 2),  # bounds, and flags: always read, if at all
        "sparq": 2 * (slots * (8 * 4 + 1) + 8 * 4),  # keys by component, and a mean of the values
        # Centres, and the borders of clusters; entries that are always read are one more cluster.
        "clusters": 2 * (6 * 8 * 4 + (6 + 2) * 4),
        "clusters(clusters=3)": 2 * (3 * 8 * 4 + (3 + 2) * 4),
    }
    if name.startswith("int"):
        # Keys have a minimum (float32) and a step (bfloat16) per channel and group of tokens,
        # values per token and 8 channels. Values in 8 bits have a step only.
        bits, group = int(name[3]), 8 if "group" in name else 32
        body = 2 * (slots * 2 * 8 * bits // 8 + slots // group * 8 * 6)
        body += 2 * slots * (2 if bits == 8 else 6)
        # A store without a choice of entries has one position for all heads.
        row = body + TAIL * entry + slots * 4
    else:
        row = (slots + TAIL) * entry + places + extra.get(name, 0)
    cache = model.empty_cache(3, LENGTH, TAIL, EXACT.type, policy)
    assert cache.nbytes() == 3 * row + 4 * (3 + 1)  # lengths, and where the tail ends
    assert cache_bytes(model, 3, LENGTH, TAIL, EXACT.type, policy) == cache.nbytes()


def test_reads_are_fewer():
    """Law 7: a decoding step's program slices a part of the cache, where a mask would read all of
    it."""
    model = model_of("gqa", "rope")
    weights = jax.eval_shape(lambda: model.unstack(matrix.weights(model)))

    def read(name, budget):
        policy = Policy.parse(name, budget)
        cache = jax.eval_shape(lambda: model.empty_cache(1, 2048, TAIL, EXACT.type, policy))

        def step(cache, weights):
            scores, cache = model.step(weights, cache, jnp.zeros(1, jnp.int32), compute=EXACT)
            return scores, cache.split()[1]

        return bytes_read(step, cache, weights), cache.nbytes()

    full, size = read("full", 1.0)
    assert size - 8 <= full <= size
    keys = values = 2048 * 2 * 8 * 4
    for name, index in (("pages", keys / 8), ("clusters", 2 * 46 * 8 * 4), ("topk", keys)):
        found, _ = read(name, 1 / 16)
        entries = (keys * (name != "topk") + values) / 16
        assert index + entries < found < index + entries + full / 12
    assert read("int8", 1.0)[0] < 0.36 * full


@pytest.mark.parametrize(
    ("attention", "position", "name", "budget", "words"),
    [
        ("gqa", "cope", "snapkv", 0.5, "cope, which depends on all entries between"),
        ("gqa", "cope", "pages", 0.5, "no entry may be dropped or skipped"),
        ("latent", "rope", "topk", 0.5, "keys and values of the same numbers (latent)"),
        ("mqa", "rope", "snapkv+adaptive", 0.5, "one set of entries for all heads"),
        ("gqa", "rope", "snapkv+adaptive+pages", 0.5, "adaptive is read whole"),
        ("gqa", "rope", "knorm+critical", 0.5, "scores are at least 0, like snapkv, not knorm"),
        ("gqa", "rope", "snapkv+threshold+every", 0.5, "threshold without every"),
        ("tensor-product", "rope", "snapkv+merge", 0.5, "does not store one key and one value"),
        ("tensor-product", "rope", "think", 0.5, "no think: layer 0 does not store one key"),
        ("gqa", "rope", "streaming", 4.0, "at least 5 entries; this is 4 of 40"),
        ("gqa", "rope", "sparq", 0.2, "at least 13 entries; this is 8 of 40"),
    ],
)
def test_refused(attention, position, name, budget, words):
    if attention == "mqa":
        attention = "latent"
    model = model_of(attention, position)
    with pytest.raises(BadInput) as error:
        model.empty_cache(1, LENGTH, TAIL, EXACT.type, Policy.parse(name, budget))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "budget", "words"),
    [
        ("snapvk", 0.5, "did you mean 'snapkv'?"),
        ("snapkv+h2o", 0.5, "at most one part that says what to keep"),
        ("int8+pyramid", 0.5, "pyramid needs a policy that drops entries"),
        ("int8+merge", 0.5, "merge needs a policy that drops entries"),
        ("int8+hold", 0.5, "hold needs a policy that drops entries"),
        ("snapkv+hold+every", 0.5, "at most one part that says when to choose entries"),
        ("pages+critical", 0.5, "critical needs a policy that drops entries"),
        ("snapkv+critical+chunk+critical", 0.5, "critical once"),
        ("int8:0.5", 0.5, "int8 has no budget"),
        ("snapkv:x", 0.5, "a number behind the colon"),
        ("full:0.5", 0.5, "full has no budget"),
        ("snapkv", 0.0, "a share above 0 and at most 1, or a whole number"),
        ("snapkv", 2.5, "a share above 0 and at most 1, or a whole number"),
        ("", 0.5, "allowed: "),
    ],
)
def test_bad_names_and_budgets(name, budget, words):
    with pytest.raises(BadInput) as error:
        Policy.parse(name, budget)
    assert words in str(error.value)


def test_windows_are_left_alone():
    model = matrix.build("gqa", "rope", "local-global")
    rings = [matrix.build("gqa", "rope", "local-global").empty_cache(1, 64, 4, EXACT.type)]
    rings.append(model.empty_cache(1, 64, 4, EXACT.type, Policy.parse("knorm", 0.25)))
    plain, kept = rings
    for layer, before, after in zip(model.writers, plain.slots, kept.slots, strict=True):
        same = jax.tree.structure(before) == jax.tree.structure(after)
        assert same == (layer.window is not None)
    with pytest.raises(BadInput, match="each layer has a window"):
        matrix.build("gqa", "rope", "window").empty_cache(
            1, 64, 4, EXACT.type, Policy.parse("knorm", 0.5)
        )
