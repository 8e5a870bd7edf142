"""Does an exporter write the model that it was given, rounding apart?

Rounding of activations to 8 bits hides small mistakes of a graph: another epsilon, another approximation of an
activation, a window one position too long. So the exporter also writes a `miniature` of the model, in 32 bits. The
vendor's runtime executes that beside transformers' own module: a prompt, another behind it, then token by token up
to the last place of the KV cache. What remains is the order of float operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint
from slm_export.fidelity.localise import located
from slm_export.fidelity.miniature import miniature
from slm_export.graph.model import build_reference
from slm_export.results import Check
from slm_export.runtime import DecoderSession, EncoderSession, Exporter, ExportOptions

LIMIT = 1e-5
"""Largest difference, as a share of the range of the scores."""
_CONTEXT = 64
_PROMPTS = (19, 14)
"""Tokens that are read at once, before single ones."""
_LENGTHS = (5, 31)
"""Of an encoder's inputs."""


_WORDS = (
    "in 32 bits, a miniature of the model gives the scores of its source, but for this share of their range"
)


@torch.no_grad()
def judge_exact(exporter: Exporter, checkpoint: Checkpoint, tokenizer: Path) -> Check:
    """Write a miniature of the checkpoint in an exporter's format, and compare what its runtime makes of it.

    Given   tokenizer: a folder with the tokenizer's files, for formats that pack them
    """
    exporter.ready()  # who verifies an older artifact has not asked for what writes one
    small = miniature(checkpoint)
    far, where = _distance(exporter, small, tokenizer)
    if far <= LIMIT:
        return Check("exact_graph", True, _WORDS, far, LIMIT)
    place = located(small, lambda model: _distance(exporter, model, tokenizer)[0] <= LIMIT)
    return Check("exact_graph", False, f"{_WORDS}; they part {where}, and {place}", far, LIMIT)


def _distance(exporter: Exporter, small: Checkpoint, tokenizer: Path) -> tuple[float, str]:
    """Return the largest difference as a share of the range, and where the first is that counts."""
    context = min(_CONTEXT, small.positions or _CONTEXT)
    options = ExportOptions(context=context, stop_ids=(1,), bos_id=0, tokenizer=tokenizer)
    with TemporaryDirectory(prefix="slm-export-") as folder:
        path = Path(folder) / exporter.file(small.task)
        path.parent.mkdir(parents=True)
        exporter.write(small, options, path)
        session = exporter.open(path, small.task)
        try:
            compare = _decoder if isinstance(session, DecoderSession) else _encoder
            compared = compare(session, small)  # type: ignore[arg-type]
        finally:
            session.close()
    return furthest(compared)


def furthest(compared: Compared) -> tuple[float, str]:
    """Return the largest difference as a share of the range, and where the first is that counts."""
    got, expected, places = compared
    apart = torch.stack([(one - other).abs().max() for one, other in zip(got, expected, strict=True)])
    lowest, highest = min(row.min() for row in expected), max(row.max() for row in expected)
    shares = apart / (highest - lowest)
    first = next(
        (place for place, share in zip(places, shares, strict=True) if not share <= LIMIT), "nowhere"
    )
    return float(shares.max()), first


Compared = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[str]]
"""Scores of an artifact, of its source, and what they are of."""


def _decoder(session: DecoderSession, small: Checkpoint) -> Compared:
    return compared_decoder(session, build_reference(small), small)


def compared_decoder(session: DecoderSession, model: nn.Module, small: Checkpoint) -> Compared:
    """Return the scores after two prompts and after every token behind them.

    Given   model: what a miniature's artifact is compared with
    """
    ids = _some_tokens(small, session.context)
    expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    ends = [end for end in accumulate(_PROMPTS) if end < len(ids)]
    ends += range(max(ends, default=0) + 1, len(ids) + 1)
    starts = [0, *ends[:-1]]
    got = [session.logits(ids[start:end], start) for start, end in zip(starts, ends, strict=True)]
    return got, [expected[end - 1] for end in ends], [f"after {end} tokens" for end in ends]


def _encoder(session: EncoderSession, small: Checkpoint) -> Compared:
    """Return the outputs for a short and a longer input."""
    model = build_reference(small)
    got, expected = [], []
    lengths = [min(length, session.context) for length in _LENGTHS]
    for length in lengths:
        ids = _some_tokens(small, length)
        given = torch.tensor([ids])
        output = session.outputs(ids, [1] * length)
        made = model(given, torch.ones_like(given))[0]
        got.append(output[tuple(slice(size) for size in made.shape)])
        expected.append(made)
    return got, expected, [f"on {length} tokens" for length in lengths]


def _some_tokens(small: Checkpoint, count: int) -> Sequence[int]:
    rows = small.config.get_text_config().vocab_size
    # The first ids are padding and other marks, of which some families make something else.
    ids: list[int] = torch.randint(8, rows, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    return ids
