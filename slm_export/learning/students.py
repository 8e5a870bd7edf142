"""Where a student comes from, and whether it can learn from its teacher."""

from __future__ import annotations

from pathlib import Path

from slm_export.errors import InputError
from slm_export.learning.models import Model
from slm_export.tokenization.tokenizer import SourceTokenizer

_SAMPLE = "The parcel arrived a day early.\n\tdef f(x): return x ** 2  # 1234567 Größe 語"


def refuse_unlike(teacher: Model, student: Model) -> None:
    """Raise InputError where a student cannot be held against a teacher."""
    if teacher.task != student.task:
        raise InputError(
            f"{student.folder}: is for {student.task} ({type(student.module).__name__}), and its teacher "
            f"{teacher.folder} for {teacher.task} ({type(teacher.module).__name__}); give a student of the same kind"
        )
    why = _unlike(teacher.tokenizer, student.tokenizer)
    if why:
        raise InputError(
            f"{student.folder}: has another tokenizer than its teacher {teacher.folder} ({why}), so that their "
            "probabilities are of different tokens; distil needs one tokenizer: cut the student out of the teacher "
            "(--shrink), or teach it by text: let the teacher write, and give that to `slm-export adapt`"
        )


def _unlike(ours: SourceTokenizer, theirs: SourceTokenizer) -> str:
    """Return the first difference of two tokenizers, or nothing."""
    if ours.vocab_size != theirs.vocab_size:
        return f"{theirs.vocab_size:,} tokens, not {ours.vocab_size:,}"
    vocabularies = ours.backend.get_vocab(), theirs.backend.get_vocab()
    if vocabularies[0] != vocabularies[1]:
        token = min(
            token for token, number in vocabularies[0].items() if vocabularies[1].get(token) != number
        )
        return f"token {token!r} is {vocabularies[1].get(token, 'not there')}, not {vocabularies[0][token]}"
    if ours.encode_with_template(_SAMPLE) != theirs.encode_with_template(_SAMPLE):
        return "the same vocabulary, but it cuts text otherwise"
    return ""


def refuse_long(model: Model, length: int) -> None:
    """Raise InputError where windows are longer than a model has positions."""
    if model.positions is not None and length > model.positions:
        raise InputError(
            f"--length {length} is longer than the {model.positions} positions of {model.folder.name}"
        )


def same_folder(first: Path, second: Path) -> bool:
    """Whether two paths are one place."""
    return first.exists() and second.exists() and first.samefile(second)
