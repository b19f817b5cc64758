"""Malicious and damaged folders in the formats of Hugging Face and Meta.

Each input is a valid minuscule folder with one thing changed. It is imported, or refused in one
line. Nothing of it is executed, no link out of it is followed, and no partial files are left.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import mukv
from mukv.core.errors import BadInput
from mukv.hub import FAMILIES
from mukv.hub.base import pieces
from mukv.hub.settings import Given
from mukv.runs.exchange import import_model
from tests.hostile.harness import check_all
from tests.pairs import params

SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 32,
}
ROPE = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
CONFIGS = {
    "LlamaForCausalLM": {"rope_scaling": ROPE, "rms_norm_eps": 1e-5},
    "Qwen2ForCausalLM": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Gemma3ForCausalLM": {
        "query_pre_attn_scalar": 4,
        "final_logit_softcapping": 9.0,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": {"rope_theta": 1e4}},
    },
    "DeepseekV3ForCausalLM": {
        "num_key_value_heads": 2,
        "kv_lora_rank": 3,
        "q_lora_rank": 5,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 2,
        "v_head_dim": 3,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": 5,
        "routed_scaling_factor": 1.5,
        "rope_interleave": True,
        "rope_scaling": {**ROPE, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
}
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 10**12, 2**31, 2**63, -(2**70), 10**400, 0.0, -0.5, 1.5),
    *(float("nan"), float("inf"), -float("inf"), 1e-320, 1e308, "", "1", "x" * 2_000_000),
    *([], [1], [None] * 9, [[[[]]]], {}, {"a": {"b": [1]}}, {"rope_type": "yarn"}, [{}, "\ud800"]),
]
KEYS = (
    *SIZES,
    *("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings"),
    *("hidden_act", "hidden_activation", "attention_bias", "mlp_bias", "layer_types"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    *("rope_local_base_freq", "architectures", "model_type", "eos_token_id", "pad_token_id"),
    *("original_max_position_embeddings", "partial_rotary_factor", "quantization_config"),
)
INSIDE = ("rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings",
          "beta_fast", "beta_slow", "attention_factor", "mscale", "truncate")  # fmt: skip
Change = Callable[[Path], None]


def make(folder: Path, architecture: str) -> Path:
    """Make a valid folder."""
    config = {"architectures": [architecture], **SIZES, **CONFIGS[architecture]}
    family = FAMILIES[architecture]
    model = family.read(Given(config, "config"))
    draw = np.random.default_rng(0)
    tensors = {
        piece.theirs: draw.standard_normal(piece.shape).astype("f4")
        for piece in pieces(family.rules, model)
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    return folder


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("valid")
    return {name: make(root / name, name) for name in CONFIGS}


def check_changes(
    area: str, source: Path, changes: Iterator[tuple[str, Change]], tmp_path: Path, record: Any
) -> dict[str, int]:
    """Import a copy of the folder with each change; a refused import leaves no files."""
    there = {path: path.read_bytes() for path in source.iterdir()}

    def attempt(change: Change) -> None:
        folder, out = tmp_path / "folder", tmp_path / "out"
        for path in (folder, out):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(source, folder, symlinks=True)
        change(folder)
        try:
            import_model(str(folder), out)
        except BadInput:
            left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
            assert not left, left
            assert not out.exists()
            raise
        for path in out.rglob("*"):
            assert not path.is_symlink()
            assert b"secret" not in path.read_bytes() if path.is_file() else True

    calls = [(label, lambda change=change: attempt(change)) for label, change in changes]
    counts = check_all(area, calls, record)
    assert {path: path.read_bytes() for path in source.iterdir()} == there
    return counts


def write(name: str, content: str | bytes) -> Change:
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data)

    return change


def test_the_folders_are_valid(valid, tmp_path):
    for name, folder in valid.items():
        assert import_model(str(folder), tmp_path / name)["architecture"] == name


def configs(architecture: str) -> Iterator[tuple[str, Change]]:
    config = {"architectures": [architecture], **SIZES, **CONFIGS[architecture]}
    # Keys that all families read by the same code are tried with one family.
    step = 1 if architecture == "LlamaForCausalLM" else 3
    own = () if architecture != "DeepseekV3ForCausalLM" else CONFIGS[architecture]
    for number, key in enumerate(dict.fromkeys((*KEYS, *own))):
        for value in VALUES[number % step :: step]:
            text = json.dumps(config | {key: value})
            yield (
                f"{key}={str(value)[:60] if value != 10**400 else '10**400'}",
                write("config.json", text),
            )
    for holder in ("rope_scaling", "rope_parameters"):
        for key in INSIDE:
            for value in VALUES[: 22 if holder == "rope_scaling" else 12]:
                said = {**ROPE, key: value}
                if architecture.startswith("Gemma3") and holder == "rope_parameters":
                    said = {"sliding_attention": said, "full_attention": ROPE}
                yield f"{holder}.{key}", write("config.json", json.dumps(config | {holder: said}))


def texts() -> Iterator[tuple[str, Change]]:
    """Yield changes that write any text as config.json."""
    plain = json.dumps({"architectures": ["LlamaForCausalLM"], **SIZES})
    whole = [
        *("", "\x00", "null", "1", '"x"', "[]", "{}", "{", plain[:-1], plain + "x", plain * 2),
        *("\ufeff" + plain, "[" * 10**6, '{"a":' * 10**6, '{"a": ' + "9" * 10**5 + "}"),
        plain.replace('"vocab_size": 11', '"vocab_size": 11, "vocab_size": 12'),
        plain.replace('"vocab_size"', '"vocab_size\\ud800"'),
        '{"a": "' + "x" * (40 << 20) + '"}',
        "[" + "{}," * 10**6 + "{}]",
    ]
    for number, text in enumerate(whole):
        yield f"text {number}", write("config.json", text)
    yield "not UTF-8", write("config.json", b'{"a": "\xff"}')
    draw = random.Random(0)
    for number in range(60):
        bad = bytearray(plain.encode())
        for _ in range(draw.randint(1, 4)):
            bad[draw.randrange(len(bad))] = draw.randrange(256)
        yield f"bytes {number}", write("config.json", bytes(bad))


@pytest.mark.product
@pytest.mark.parametrize("every", params([4, 1], [4]))
@pytest.mark.parametrize("architecture", params(CONFIGS, [*CONFIGS][:1]))
def test_configs(valid, tmp_path, record_property, architecture, every):
    changes = itertools.islice(configs(architecture), None, None, every)
    counts = check_changes("configs", valid[architecture], changes, tmp_path, record_property)
    assert counts["refused"] > counts["accepted"] > 10 / every


def test_texts_of_configs(valid, tmp_path, record_property):
    folder = valid["LlamaForCausalLM"]
    check_changes("config texts", folder, texts(), tmp_path, record_property)


# Damaged files of tensors


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Return a change that writes the tensor file with another header over the same data."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        made = change(header)
        text = made if isinstance(made, bytes) else json.dumps(header).encode("utf-8", "replace")
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return apply


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def headers() -> Iterator[tuple[str, Change]]:
    def put(name: str, **fields: Any) -> Change:
        return rewritten(lambda header: header.setdefault(name, {}).update(fields))

    for metadata in (None, 1, [], {"a": 1}, {"a": None}, {"step": "x"}, {"a": {"b": "c"}}, "x"):
        yield f"metadata {metadata}", rewritten(lambda h, m=metadata: h.update(__metadata__=m))
    for shape in ([], [0], [-1], [2**63], [2**64], [2**32, 2**32], [1.5], None, "x", [10**400],
                  [2, 2, 2], [[8]], [8, 1], [1] * 1000):  # fmt: skip
        yield f"shape {str(shape)[:40]}", put(NORM, shape=shape)
    for dtype in ("F64", "BF16", "F16", "I64", "BOOL", "U8", "F8_E4M3", "C64", "x", None, 1, ""):
        yield f"dtype {dtype}", put(NORM, dtype=dtype)
    for place in ([0, 0], [8, 4], [-4, 28], [0, 2**63], [0, 10**30], [0], None, "x", [0, 32, 64]):
        yield f"offsets {place}", put(NORM, data_offsets=place)
    for name in (NORM + ".x", "model", "model.norm", "", ".", "..", "\x00", "a" * 10**5, "é", "/x",
                 "lm_head.weight.x", "model.layers.99999999999.x", "__metadata"):  # fmt: skip
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        yield f"name {name[:20]!r}", rewritten(lambda h, n=name, e=empty: h.update({n: e}))
        yield f"renamed {name[:20]!r}", rewritten(lambda h, n=name: h.update({n: h.pop(NORM)}))
    yield "no tensors", rewritten(lambda header: header.clear())
    yield "a list", rewritten(lambda _: b"[]")
    yield "deep", rewritten(lambda _: b'{"a":' * 10**5)
    yield "twice", rewritten(lambda h: json.dumps(h).encode().replace(b"k_proj", b"q_proj"))


def damaged() -> Iterator[tuple[str, Change]]:
    """Yield changes that truncate the tensor file, or change its header or one byte."""

    def at(place: int, byte: int) -> Change:
        def apply(folder: Path) -> None:
            data = bytearray((folder / "model.safetensors").read_bytes())
            data[place % min(len(data), 1500)] = byte
            (folder / "model.safetensors").write_bytes(data)

        return apply

    def cut(size: int) -> Change:
        return lambda folder: os.truncate(folder / "model.safetensors", size)

    for size in (0, 1, 7, 8, 9, 100, 1000, 3000, 1 << 20, 1 << 40):
        yield f"of {size} bytes", cut(size)
    for size in (0, 1, 2**32, 2**62, 2**64 - 1, 10**8, 10**8 + 1):
        yield f"header of {size}", write("model.safetensors", struct.pack("<Q", size) + b"{}")
    draw = random.Random(0)
    for number in range(120):
        yield f"byte {number}", at(draw.randrange(1500), draw.randrange(256))


@pytest.mark.product
def test_tensors(valid, tmp_path, record_property):
    changes = (change for made in (headers(), damaged()) for change in made)
    folder = valid["LlamaForCausalLM"]
    counts = check_changes("safetensors", folder, changes, tmp_path, record_property)
    assert counts["refused"] > 100


# Kinds of files, and links


def placed(name: str, kind: str, outside: Path) -> Change:
    """Return a change that replaces a file by a pipe, a folder, a link or the like."""

    def apply(folder: Path) -> None:
        path, at = folder / name, os.getcwd()
        kept = path.read_bytes() if path.exists() else b"{}"
        path.unlink(missing_ok=True)
        match kind:
            case "pipe":
                os.mkfifo(path)
            case "folder":
                path.mkdir()
            case "socket":
                os.chdir(folder)  # their names are short
                with socket.socket(socket.AF_UNIX) as made:
                    made.bind(name)
                os.chdir(at)
            case "a link out":
                target = outside / name
                target.write_bytes(kept if kept != b"{}" else b"secret")
                path.symlink_to(target)
            case "a link to itself":
                path.symlink_to(name)
            case _:
                path.symlink_to(kind)

    return apply


KINDS = ("pipe", "folder", "socket", "a link out", "a link to itself", "/nowhere", "/dev/zero",
         "/dev/tty", "/etc/passwd", "/proc/self/environ", "..")  # fmt: skip
FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
         "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
         "special_tokens_map.json", "tokenizer.model")  # fmt: skip


def test_kinds_of_files(valid, tmp_path, record_property):
    outside = tmp_path / "outside"
    outside.mkdir()
    changes = (
        (f"{name} is {kind}", placed(name, kind, outside)) for name in FILES for kind in KINDS
    )
    folder = valid["LlamaForCausalLM"]
    counts = check_changes("kinds of files", folder, changes, tmp_path, record_property)
    # A link to weights that the user keeps elsewhere, and nothing else.
    assert counts["accepted"] == 1


def index(places: Any, **more: Any) -> Change:
    text = json.dumps({"weight_map": places, **more})
    return write("model.safetensors.index.json", text)


def names_of(folder: Path) -> list[str]:
    data = (folder / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return [name for name in header if name != "__metadata__"]


def test_indices(valid, tmp_path, record_property):
    folder = valid["LlamaForCausalLM"]
    names = names_of(folder)
    outside = folder.parent / "Qwen2ForCausalLM" / "model.safetensors"

    def changes() -> Iterator[tuple[str, Change]]:
        places = ["../folder/model.safetensors", f"../../{outside}", str(outside), "", ".", "..",
                  "a/../model.safetensors", "config.json", "no", "x" * 5000, "a\x00b", "\ud800",
                  "/dev/zero", "~/model.safetensors", "//model.safetensors"]  # fmt: skip
        for place in [*places, None, 1, [], {}, True]:
            yield f"all in {place!r:.40}", index(dict.fromkeys(names, place))
            yield (
                f"one in {place!r:.40}",
                index(dict.fromkeys(names, "model.safetensors") | {names[0]: place}),
            )
        for given in (None, 1, "x", [], {}, [["a", "b"]], {"a": {"b": "c"}}):
            yield f"map {given}", index(given)
        yield "another tensor", index({"x": "model.safetensors"})
        yield "no map", write("model.safetensors.index.json", "{}")
        for text in ("", "[]", "null", "{", '{"weight_map": ' * 10**5, "\xff"):
            yield f"text {text[:9]}", write("model.safetensors.index.json", text)

    counts = check_changes("indices", folder, changes(), tmp_path, record_property)
    assert counts["accepted"] == 0


def test_a_cache_of_the_hub_is_all_links(valid, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/12ab"
    for path in (blobs, snapshot):
        path.mkdir(parents=True)
    for number, file in enumerate(sorted(valid["LlamaForCausalLM"].iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    import_model(str(snapshot), tmp_path / "out")
    (tmp_path / "near").symlink_to(snapshot)
    import_model(str(tmp_path / "near"), tmp_path / "again")
    copy = (tmp_path / "out/generation_config.json").resolve()
    assert copy.is_relative_to(tmp_path / "out")
    (snapshot / "tokenizer.model").symlink_to("/etc/passwd")
    with pytest.raises(BadInput, match=r"tokenizer\.model"):
        import_model(str(snapshot), tmp_path / "other")


@pytest.mark.parametrize("kind", ["a run", "a folder"])
def test_links_of_companions_do_not_leave(valid, tmp_path, trained, mukv, token_file, kind):
    """Import, export and training from the folder do not follow links out of it."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    start = tmp_path / "start"
    shutil.copytree(trained if kind == "a run" else valid["LlamaForCausalLM"], start)
    (start / "chat_template.jinja").symlink_to(secret)
    done = [mukv("export", start, "--out", tmp_path / "out")]
    if kind == "a run":
        given = ("train", start, f"train.start={start}", f"data.path={token_file}")
        done.append(mukv(*given, "train.steps=1", "--out", tmp_path / "tuned"))
    else:
        done.append(mukv("import", start, "--out", tmp_path / "run"))
    for each in done:
        assert each.returncode == 2, each.stderr
        assert "chat_template.jinja" in each.stderr
    for path in tmp_path.rglob("chat_template.jinja"):
        assert path.parent == start


IDS = [*VALUES, [1, 2], [1, "a"], [10**400], [True], -1, "<eos>", [[1]]]


def test_ids_of_special_tokens(valid, tmp_path, record_property):
    changes = (
        (f"{key}={number}", write("generation_config.json", json.dumps({key: value})))
        for key in ("eos_token_id", "pad_token_id")
        for number, value in enumerate(IDS)
    )
    folder = valid["LlamaForCausalLM"]
    counts = check_changes("special tokens", folder, changes, tmp_path, record_property)
    assert counts["accepted"] > 5


# Meta's folders

PARAMS = {"dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "multiple_of": 2,
          "rope_theta": 5e5, "norm_eps": 1e-5, "use_scaled_rope": True}  # fmt: skip
OUTPUT = "output.weight"


@pytest.fixture(scope="module")
def meta(tmp_path_factory) -> Path:
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("metas") / "valid" / "meta"
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(PARAMS))
    torch.save(meta_tensors(torch), folder / "consolidated.00.pth")
    return folder


def meta_tensors(torch: Any) -> dict[str, Any]:
    shapes = {"tok_embeddings.weight": (11, 8), "norm.weight": (8,), OUTPUT: (11, 8)}
    sizes = {"attention.wq": (8, 8), "attention.wk": (4, 8), "attention.wv": (4, 8)}
    sizes |= {"attention.wo": (8, 8), "feed_forward.w1": (22, 8), "feed_forward.w3": (22, 8)}
    sizes |= {"feed_forward.w2": (8, 22), "attention_norm": (8,), "ffn_norm": (8,)}
    shapes |= {f"layers.0.{name}.weight": shape for name, shape in sizes.items()}
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_a_tied_readout_may_be_left_out(meta, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = meta_tensors(torch)
    folders = {}
    for name in ("left out", "repeated"):
        folders[name] = Path(shutil.copytree(meta, tmp_path / name))
        given = {**tensors, OUTPUT: tensors["tok_embeddings.weight"]}
        if name == "left out":
            del given[OUTPUT]
        torch.save(given, folders[name] / "consolidated.00.pth")
    one, two = (mukv.load(folder) for folder in folders.values())
    assert one.network == two.network
    assert one.network.readout == "tied"
    assert mukv.load(meta).network.readout == "linear"


class Touch:
    """Pickle as an object that executes a command when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def meta_changes(torch: Any, marker: Path) -> Iterator[tuple[str, Change]]:
    def save(value: Any, **options: Any) -> Change:
        return lambda folder: torch.save(value, folder / "consolidated.00.pth", **options)

    for key in (*PARAMS, "ffn_dim_multiplier", "rope_scaling_factor", "vocab_size"):
        for value in VALUES:
            text = json.dumps(PARAMS | {key: value})
            yield (
                f"{key}={str(value)[:40] if value != 10**400 else '10**400'}",
                write("params.json", text),
            )
    for text in ("", "[]", "{}", "null", "{", '{"dim": 8, "dim": 9}', "[" * 10**5):
        yield f"params {text[:9]}", write("params.json", text)
    good = meta_tensors(torch)
    for value in ([], ["a"], list(good.values()), "x", 1, None, {}, {"a": 1}, {1: good[OUTPUT]},
                  {"model": good}, torch.ones(3), b"x"):  # fmt: skip
        yield f"a {type(value).__name__}", save(value)
    others = {
        "one-dimensional": torch.ones(8),
        "a scalar": torch.tensor(1.0),
        "three-dimensional": torch.ones(11, 8, 1),
        "empty": torch.ones(0, 8),
        "whole numbers": torch.ones(11, 8, dtype=torch.int64),
        "complex": torch.ones(11, 8, dtype=torch.complex64),
        "booleans": torch.ones(11, 8, dtype=torch.bool),
        "sparse": torch.eye(11, 8).to_sparse(),
        "without data": torch.ones(11, 8, device="meta"),
        "huge": torch.ones(1).expand(1 << 34, 8),
        "wide": torch.ones(1).expand(11, 1 << 34),
        "turned": torch.ones(8, 11).T,
        "a parameter": torch.nn.Parameter(torch.ones(11, 8)),
        "a number": 3.0,
        "a list": [1.0],
        "nothing": None,
        "infinite": torch.full((11, 8), float("inf")),
    }
    for name in ("tok_embeddings.weight", OUTPUT, "norm.weight", "layers.0.attention.wq.weight"):
        yield f"without {name}", save({key: value for key, value in good.items() if key != name})
        for words, value in others.items():
            yield f"{name} is {words}", save({**good, name: value})
    for name in ("x", "norm", "norm.weight.x", "layers.1.ffn_norm.weight", "", 3):
        yield f"also {name}", save({**good, name: torch.ones(8)})
    yield "a reference", save({**good, "rope.freqs": good})
    yield "the old format", save(good, _use_new_zipfile_serialization=False)
    yield "code", save({**good, "x": Touch(marker)})
    yield "code in the old format", save(Touch(marker), _use_new_zipfile_serialization=False)
    yield "a pickle", write("consolidated.00.pth", pickle.dumps(Touch(marker)))
    yield "another part", lambda f: torch.save({"x": torch.ones(1)}, f / "consolidated.01.pth")
    yield "the same part", lambda f: torch.save(good, f / "consolidated.01.pth")
    for kind in ("pipe", "folder", "/dev/zero", "/nowhere"):
        yield f"a part is {kind}", placed("consolidated.00.pth", kind, marker.parent)
        yield f"params are {kind}", placed("params.json", kind, marker.parent)
    yield "compressed", compressed

    def at(place: float, byte: int) -> Change:
        def apply(folder: Path) -> None:
            data = bytearray((folder / "consolidated.00.pth").read_bytes())
            data[int(place * len(data))] = byte
            (folder / "consolidated.00.pth").write_bytes(data)

        return apply

    draw = random.Random(0)
    for number in range(60):
        yield f"byte {number}", at(draw.random(), draw.randrange(256))
    for size in (0, 1, 100, 1000, 5000):
        yield f"{size} bytes", lambda f, n=size: os.truncate(f / "consolidated.00.pth", n)


def compressed(folder: Path) -> None:
    """Write a small file that decompresses to gigabytes."""
    path = folder / "consolidated.00.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        with made.open("archive/data.pkl", "w", force_zip64=True) as file:
            for _ in range(64):
                file.write(bytes(1 << 20))
        made.writestr("archive/version", "3")


@pytest.mark.product
def test_metas_folders(meta, tmp_path, record_property):
    torch = pytest.importorskip("torch")
    marker = tmp_path / "executed"
    changes = meta_changes(torch, marker)
    counts = check_changes("Meta's folders", meta, changes, tmp_path, record_property)
    assert counts["accepted"] > 10
    assert not marker.exists()
