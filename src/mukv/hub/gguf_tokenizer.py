"""Convert the tokenizer of a GGUF file to the files of a Hugging Face folder.

A GGUF file has the vocabulary, scores or merges, the type of each token, and the names of two
algorithms: `tokenizer.ggml.model` (byte-level BPE or SentencePiece) and `tokenizer.ggml.pre`
(pre-tokenizer of byte-level BPE). All parts of a tokenizer.json follow from these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from mukv.core.errors import BadInput, unknown_name
from mukv.data.tokenizer import byte_alphabet

SPACE = "▁"
"""SentencePiece's character for a space."""
CONTROL, USER_DEFINED = 3, 4
"""Types of tokens that are never split: special tokens, and words such as `<think>`."""
GEMMA = ("gemma", "gemma2", "gemma3")

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_ENDINGS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_ENDINGS}|{_LETTERS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> Any:
    """Split a text by a regular expression, then encode its bytes."""
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_])


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "gpt2", "default"), _gpt2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _digits),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), lambda: _split(LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), lambda: _split(QWEN2)),
    "tekken": lambda: _split(TEKKEN),
}
"""Pre-tokenizers, which split a text before merges are applied, by `tokenizer.ggml.pre`."""


def tokenizer_files(values: Mapping[str, Any], architecture: str, where: str) -> dict[str, str]:
    """Make the texts of tokenizer.json and tokenizer_config.json, by name; empty if the file has no
    tokenizer.

    values: all metadata
    where: name of the file in errors

    Raises BadInput for an unknown algorithm, and if parts are missing or don't match.
    """
    data = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in values.items()
        if key.startswith("tokenizer.ggml.")
    }
    kind, tokens = data.get("model"), data.get("tokens")
    if kind in (None, "none", "no_vocab") or not tokens:
        return {}
    makers = {"gpt2": _byte_level, "llama": _gemma if architecture in GEMMA else _sentence_piece}
    if kind not in makers:
        raise unknown_name(f"{where}: tokenizer.ggml.model", str(kind), makers)
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise BadInput(f"{where}: tokenizer.ggml.tokens", type(tokens).__name__, "a list of texts")
    if len(set(tokens)) != len(tokens):
        twice = next(token for n, token in enumerate(tokens) if token in tokens[:n])
        raise BadInput(f"{where}: tokenizer.ggml.tokens", twice, "each token once")
    kinds = data.get("token_type") or [1] * len(tokens)
    if not isinstance(kinds, list):
        raise BadInput(f"{where}: tokenizer.ggml.token_type", kinds, "a list of numbers")
    if len(kinds) != len(tokens):
        given = f"{len(kinds)} types of {len(tokens)} tokens"
        raise BadInput(f"{where}: tokenizer.ggml.token_type", given, "one for each token")
    try:
        inner: Tokenizer = makers[kind](data, where)
        for type_, special in ((CONTROL, True), (USER_DEFINED, False)):
            found = [
                AddedToken(token, normalized=False, special=special)
                for token, each in zip(tokens, kinds, strict=True)
                if each == type_ and inner.token_to_id(token) is not None
            ]
            (inner.add_special_tokens if special else inner.add_tokens)(found)
    except BadInput:
        raise
    except BaseException as error:  # panics of the library are no Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        given = f"parts that do not fit ({str(error)[:200]})"
        raise BadInput(f"{where}: tokenizer.ggml", given, "a vocabulary with its merges") from None
    names = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    named = {name: _token(tokens, data.get(key), key, where) for name, key in names.items()}
    begins = data.get("add_bos_token", kind == "llama") and named["bos_token"]
    if begins:
        ids = [(begins, inner.token_to_id(begins))]
        inner.post_processor = processors.TemplateProcessing(
            single=f"{begins} $A", pair=f"{begins} $A {begins} $B", special_tokens=ids
        )
    settings = {name: token for name, token in named.items() if token is not None}
    template = values.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    return {
        "tokenizer.json": inner.to_str(),
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2),
    }


def _token(tokens: Sequence[str], number: Any, key: str, where: str) -> str | None:
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise BadInput(f"{where}: tokenizer.ggml.{key}", number, f"0 to {len(tokens) - 1}")
    return tokens[number]


def _byte_level(data: Mapping[str, Any], where: str) -> Tokenizer:
    """Make byte-level BPE (GPT-2). Other characters are rewritten in the byte alphabet."""
    alphabet = byte_alphabet()
    letters = set(alphabet)
    vocab = {
        token if set(token) <= letters else "".join(alphabet[b] for b in token.encode()): number
        for number, token in enumerate(data["tokens"])
    }
    pre = data.get("pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise unknown_name(f"{where}: tokenizer.ggml.pre", str(pre), PRE_TOKENIZERS)
    inner = Tokenizer(models.BPE(vocab=vocab, merges=_given_merges(data, where)))
    inner.pre_tokenizer = PRE_TOKENIZERS[pre]()
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentence_piece(data: Mapping[str, Any], where: str) -> Tokenizer:
    """Make SentencePiece's BPE with byte fallback (Llama 2). Texts get a space at the beginning
    unless `add_space_prefix` is false.
    """
    tokens = data["tokens"]
    inner = _with_byte_fallback(data, tokens, _scores(data, where), where)
    prefix = bool(data.get("add_space_prefix", True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE, prepend_scheme="first" if prefix else "never", split=False
    )
    spaces = [decoders.Strip(content=" ", left=1)] if prefix else []
    inner.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *spaces]
    )
    return inner


def _gemma(data: Mapping[str, Any], where: str) -> Tokenizer:
    """Make Gemma's tokenizer: runs of spaces are tokens, which the file stores as spaces, and
    merges are in the order of the tokens.
    """
    tokens = [
        SPACE * len(token) if " " in token and not token.strip() else token
        for token in data["tokens"]
    ]
    inner = _with_byte_fallback(data, tokens, [-n for n in range(len(tokens))], where)
    inner.normalizer = normalizers.Replace(" ", SPACE)
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    inner.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return inner


def _with_byte_fallback(
    data: Mapping[str, Any], tokens: Sequence[str], scores: Sequence[float], where: str
) -> Tokenizer:
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = _given_merges(data, where) if "merges" in data else _merges(tokens, scores)
    unknown = _token(tokens, data.get("unknown_token_id"), "unknown_token_id", where)
    options = {"unk_token": unknown} if unknown else {}
    return Tokenizer(
        models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, **options)
    )


def _scores(data: Mapping[str, Any], where: str) -> Sequence[float]:
    scores = data.get("scores")
    if not isinstance(scores, list) or len(scores) != len(data["tokens"]):
        allowed = "a number for each token, the order of its merge"
        raise BadInput(f"{where}: tokenizer.ggml.scores", "missing or of other length", allowed)
    return scores


def _given_merges(data: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    found = data.get("merges")
    if not isinstance(found, list):
        raise BadInput(f"{where}: tokenizer.ggml.merges", "missing", "the merges of its BPE")
    pairs = [tuple(merge.split(" ")) for merge in found]
    wrong = next((merge for merge, pair in zip(found, pairs, strict=True) if len(pair) != 2), None)
    if wrong is not None:
        raise BadInput(f"{where}: tokenizer.ggml.merges", wrong, "two tokens and a space")
    return pairs  # pyright: ignore[reportReturnType]


def _merges(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return the merges that SentencePiece's BPE implies: all pairs of tokens that form a token.

    Merges are ordered by falling score, and for equal scores by falling length of the first part.
    """
    numbers = {token: number for number, token in enumerate(tokens)}
    found: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        cuts = ((token[:place], token[place:]) for place in range(1, len(token)))
        pairs = [pair for pair in cuts if pair[0] in numbers and pair[1] in numbers]
        pairs.sort(key=lambda pair: (numbers[pair[0]], numbers[pair[1]]))
        found += ((score, len(left), len(right), left, right) for left, right in pairs)
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in found]
