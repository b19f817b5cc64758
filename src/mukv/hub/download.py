"""Download a model's files from the Hugging Face hub, through its own client and cache."""

from __future__ import annotations

from pathlib import Path

from mukv.core.errors import BadInput, Failed

WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model"]
LEFT_OUT = ["original/*", "*.bin", "onnx/*"]


def download(source: str) -> Path:
    """Fetch a hub id ("owner/name", or "owner/name@revision") and return its folder.

    Raises BadInput if the client is missing or the name is unknown or gated, Failed if the hub
    can't be reached.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    except ImportError:
        allowed = "needs `pip install 'mukv[hub]'`; or give a folder"
        raise BadInput("SOURCE", source, allowed) from None
    name, _, revision = source.partition("@")
    by_hand = (
        f"to fetch it by hand: `hf download {name} --local-dir DIR` where there is a network, "
        "then give DIR"
    )
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=WANTED,
                ignore_patterns=LEFT_OUT,
            )
        )
    except GatedRepoError:
        raise BadInput(
            "SOURCE",
            source,
            f"a gated model: accept its licence at https://huggingface.co/{name} and log in with "
            f"`hf auth login`; {by_hand}",
        ) from None
    except RepositoryNotFoundError:
        allowed = "a folder or a model of the hub: there is none of this name, or it is private"
        raise BadInput("SOURCE", source, f"{allowed}; {by_hand}") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        problem = f"{source}: no such folder, and the hub can't be reached ({reason})"
        raise Failed(f"{problem}; {by_hand}") from error
