"""Where a MODEL argument leads: a folder, or a model on the Hugging Face hub.

Only what an export reads is downloaded: configuration, safetensors, tokenizer, model card, licence. Nothing is
executed. ``HF_HUB_OFFLINE`` (which ``--offline`` sets), ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_TOKEN`` are honoured, as
by every tool on that hub.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from slm_export.errors import InputError, MachineError
from slm_export.machine import machine_errors
from slm_export.source.adapters import base_of, is_adapter, merged
from slm_export.source.licences import PATTERNS

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# The card names author and licence; the licence's texts go into every bundle.
_WANTED = [
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
    "*.jinja",
    "*_Pooling/*",
    "*_Dense/*",
    "README.md",
    *PATTERNS,
]
# Weights of other frameworks' folders, and demo inputs, are of no use here.
_UNWANTED = ["onnx/*", "openvino/*", "original/*", "coreml/*"]


def find_model(model: str, revision: str | None = None) -> Path:
    """Return the folder of a model: the path itself, the local copy of a hub repository, or a merged adapter.

    Raises:
        InputError: there is no such folder, and no such model on the hub; or a revision was given for a folder; or an
            adapter that does not fit its base.
        MachineError: the hub cannot be reached.
    """
    folder = find_folder(model, revision)
    return merged(folder, base_of(folder, find_folder)) if is_adapter(folder) else folder


def find_shapes(model: str, revision: str | None = None) -> Path:
    """Return a folder with the shapes of a model: as `find_model`, but an adapter's base stands for both."""
    folder = find_folder(model, revision)
    return base_of(folder, find_folder) if is_adapter(folder) else folder


def find_folder(model: str, revision: str | None = None) -> Path:
    """Return the folder that is meant, whatever it holds; raises as `find_model` does."""
    # os.path answers where pathlib raises: a name too long, "~" of a user that is not there
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):
        if revision is not None:
            raise InputError(f"--revision {revision} has no meaning for {model}, which is a folder")
        return path
    if os.path.exists(path):
        raise InputError(f"{model}: a file; give the model's folder, the one with config.json")
    if "/" not in model or not _HUB_NAME.fullmatch(model):
        raise InputError(f"{model}: no such folder; give a model folder, or a hub name such as org/name")
    return _download(model, revision)


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import errors as hub

    offline = (
        constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") == "1"
    )  # set by --offline, perhaps late
    at = f" at revision {revision}" if revision else ""
    try:
        with machine_errors(f"download {model}", Path(constants.HF_HUB_CACHE)):
            folder = snapshot_download(
                model,
                revision=revision,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
                local_files_only=offline,
            )
    except hub.GatedRepoError:
        raise InputError(
            f"{model}: access is gated; accept its terms on the hub, then log in with `hf auth login`"
        ) from None
    except hub.RevisionNotFoundError:
        raise InputError(f"{model}: the hub has no revision '{revision}' of it") from None
    except (hub.RepositoryNotFoundError, hub.HFValidationError):
        raise InputError(
            f"{model}: no such folder here, and no such model on the hub (or it is private)"
        ) from None
    except hub.LocalEntryNotFoundError as error:
        why = "offline mode is on (--offline, or HF_HUB_OFFLINE)" if offline else "the hub cannot be reached"
        message = f"{model}: no such folder, not downloaded before{at}, and {why}"
        raise (InputError if offline else MachineError)(message) from error
    except OSError as error:
        raise MachineError(f"{model}: no such folder here, and the hub fails: {error}") from error
    return Path(folder)
