"""What a bundle answers to a delegate: entries near to a text, confidence, bundles that are opened once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from delegating import delegates

from slm_export.delegates.config import Nearest, Sampling, load_delegates
from slm_export.delegates.local import Bundles
from slm_export.delegates.nearest import Entries
from slm_export.errors import InputError
from slm_export.opened import OpenBundle
from slm_export.runtime import DecoderSession
from slm_export.source.tasks import CLASSIFICATION, EMBEDDING, GENERATION
from slm_export.tokenization.tokenizer import SourceTokenizer
from slm_export.tomlfile import read_model

ENTRIES = """
[[entry]]
texts  = ["aaab", "aab"]
answer = "mostly a"

[[entry]]
texts  = ["bbba"]
answer = "mostly b"
"""
NOW = Sampling()


def letters(text: str) -> dict[str, Any]:
    """An embedding that counts letters."""
    counted = Counter(text)
    return {"embedding": [float(counted[letter]) for letter in "abc"]}


def bundles(task: str, answer: Any) -> tuple[Bundles, list[Path]]:
    opened = []

    def open_one(folder: Path, format: str | None) -> OpenBundle:
        opened.append(folder)
        made: Any = SimpleNamespace(
            manifest=SimpleNamespace(model=SimpleNamespace(task=task)),
            answer=answer,
            adapt=lambda name: None,
            close=lambda: None,
        )
        return made  # type: ignore[no-any-return]

    return Bundles(open_one), opened


def test_delegates_share_a_base_and_each_switches_to_its_adapter(tmp_path: Path) -> None:
    switched: list[str | None] = []

    def open_one(folder: Path, format: str | None) -> OpenBundle:
        made: Any = SimpleNamespace(
            manifest=SimpleNamespace(model=SimpleNamespace(task=EMBEDDING)),
            answer=lambda text: letters(text) | {"embedding": [float(len(switched))]},
            adapt=switched.append,
            close=lambda: None,
        )
        return made  # type: ignore[no-any-return]

    made = Bundles(open_one)
    for adapter in ("sorting", None, "law"):
        made.answer("b", None, "text", NOW, adapter=adapter)
    assert switched == ["sorting", None, "law"]
    with pytest.raises(InputError, match="adapter needs a bundle"):
        delegates(
            tmp_path,
            """
            [delegates.one]
            adapter = "law"
            where   = "remote"
            trigger = { every = "1m" }
            output  = { stdout = true }
            remote  = { url = "http://127.0.0.1:1/v1", model = "m" }
            """,
        )


def test_the_nearest_entry_answers(tmp_path: Path) -> None:
    file = tmp_path / "entries.toml"
    file.write_text(ENTRIES)
    made, opened = bundles(EMBEDDING, letters)

    def answer(prompt: str, **more: Any) -> tuple[str, float | None]:
        found = made.answer("b", None, prompt, NOW, Nearest(file=str(file), **more))
        return found.text, found.confidence

    assert answer("aab") == ("mostly a", pytest.approx(1))
    assert answer("bbbbbbaa")[0] == "mostly b"
    # 3 of a and 1 of b against c alone, and against the same with a c: cosines by hand.
    assert answer("c", least=0.1, otherwise="nothing") == ("nothing", 0)
    text, cosine = answer("aaabc", least=0.96)
    assert (text, cosine) == ("", pytest.approx(10 / (10 * 11) ** 0.5))
    assert opened == [Path("b")]
    # Another file is another answer, without a new start.
    file.write_text(ENTRIES.replace("mostly a", "many a"))
    import os

    os.utime(file, ns=(1, 1))
    assert answer("aab")[0] == "many a"


def test_entries_are_for_embeddings(tmp_path: Path) -> None:
    made, _ = bundles(CLASSIFICATION, letters)
    with pytest.raises(InputError, match=f"b is one for {CLASSIFICATION}"):
        made.answer("b", None, "x", NOW, Nearest(file="entries.toml"))
    file = tmp_path / "entries.toml"
    file.write_text("[[entry]]\ntext = 'x'\nanswer = 'y'\n")
    made, _ = bundles(EMBEDDING, letters)
    with pytest.raises(InputError, match=r"unknown key 'entry\[0\]\.text'; did you mean 'texts'\?"):
        made.answer("b", None, "x", NOW, Nearest(file=str(file)))


def test_a_classifier_is_as_sure_as_its_best_label() -> None:
    made, _ = bundles(CLASSIFICATION, lambda text: {"label": "x", "scores": {"x": 0.7, "y": 0.3}})
    found = made.answer("b", None, "text", NOW)
    assert (found.text, found.confidence) == ("x", 0.7)


def test_a_decoder_is_as_sure_as_its_likeliest_tokens(pycode: Path) -> None:
    tokenizer = SourceTokenizer.load(pycode)
    ids = tokenizer.encode("abcd")

    class Sure:
        context, prefill_chunk, stop_ids, bos_id, vocabulary = 64, 64, (), None, None
        steps = 0

        def logits(self, tokens: Sequence[int], start: int) -> torch.Tensor:
            # Of two tokens; the others are impossible. Probabilities 1/2 and 3/4 in turn.
            found = torch.full((tokenizer.vocab_size,), -torch.inf)
            found[ids[0]], found[ids[1]] = torch.log(torch.tensor([(1.0, 1.0), (3.0, 1.0)][self.steps % 2]))
            self.steps += 1
            return found

        def metadata(self) -> Mapping[str, Any]:
            return {}

        def close(self) -> None:
            pass

    session = Sure()
    assert isinstance(session, DecoderSession)
    manifest: Any = SimpleNamespace(model=SimpleNamespace(task=GENERATION), runtime={})
    made = Bundles(lambda *_: OpenBundle(manifest, session, tokenizer))
    pieces: list[str] = []
    found = made.answer("b", None, "x", Sampling(max_tokens=4), show=pieces.append)
    assert found.confidence == pytest.approx((0.5 + 0.75) / 2)
    assert len(pieces) > 1
    assert "".join(pieces) == found.text


def test_the_examples_are_right(tmp_path: Path) -> None:
    folder = ROOT / "examples" / "delegates"
    for path in folder.glob("*.toml"):
        if path.name != "delegates.toml":
            read_model(path, Entries)
    for name in ("minilm", "pycode", "watcher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "delegates.toml").write_text((folder / "delegates.toml").read_text())
    found = load_delegates(tmp_path / "delegates.toml").delegates
    assert set(found) == {"notes", "machine", "questions", "completion"}
    named = {Path(one.nearest.file).name for one in found.values() if one.nearest}
    assert named == {path.name for path in folder.glob("*.toml")} - {"delegates.toml"}


def test_entries_need_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nearest needs a bundle"):
        delegates(
            tmp_path,
            '[delegates.d]\nwhere = "remote"\nremote = { url = "https://x/v1", model = "m" }\n'
            'nearest = { file = "f" }\ntrigger = { stdin = true }\noutput = { stdout = true }\n',
        )
