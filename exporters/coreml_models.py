"""Decoders and encoders as Core ML packages: their functions, the shapes they take, and what they say of themselves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_export.bundles.checksums import sha256_file
from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.exporters import coreml_metadata as keys
from slm_export.exporters.coreml_graph import (
    DECODE,
    IDS,
    LOGITS,
    MASK,
    PREFILL,
    convert,
    program_dtype,
    trace_decoder,
    trace_encoder,
)
from slm_export.exporters.coreml_writer import PackageWriter
from slm_export.results import Signature
from slm_export.runtime import ExportOptions
from slm_export.source.licences import licence_of
from slm_export.source.provenance import author_of
from slm_export.source.tasks import CLASSIFICATION, TOKENS, output_shape
from slm_export.weights import Palettized, Quantized

_LONGEST = 256
"""Tokens of one call that our sessions and apps use where any number will do: it returns the logits of all of them."""
_LENGTHS = (32, 128, 512)
_DTYPES = {"fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class _Sizes:
    """What the functions of a decoder take.

    Any number of tokens, with a mask that ends with the last of them; or fixed numbers, as the Neural Engine wants
    them, with a mask as wide as the cache.
    """

    context: int
    lengths: tuple[int, ...] | None
    """Of ``prefill``; None for any."""

    @staticmethod
    def of(options: ExportOptions) -> _Sizes:
        """Return the sizes that a device profile asks for."""
        asked = options.coreml.query_lengths
        if asked == "dynamic":
            return _Sizes(options.context, None)
        lengths = tuple(length for length in asked if length > 1)
        if not lengths or lengths[-1] > options.context:
            raise InputError(
                f"coreml.query_lengths {list(asked)}: a prompt needs a length of more than 1 token, and none may be "
                f"longer than the context of {options.context}"
            )
        return _Sizes(options.context, lengths)

    @property
    def longest(self) -> int:
        """The most tokens that a call should take."""
        return min(_LONGEST, self.context) if self.lengths is None else self.lengths[-1]

    def tokens(self, function: str) -> str:
        """Return how many tokens a function takes, in words."""
        if function == DECODE:
            return "1"
        return "tokens" if self.lengths is None else "|".join(map(str, self.lengths))

    @property
    def width(self) -> str:
        """The columns of a mask, in words."""
        return "end" if self.lengths is None else str(self.context)

    def inputs(self, function: str) -> list[Any]:
        """Return coremltools' types of ids and mask."""
        import coremltools as ct
        import numpy as np

        lengths = (1,) if function == DECODE else self.lengths
        if self.lengths is None or lengths is None:
            tokens = 1 if lengths else ct.RangeDim(1, self.context)
            ids, mask = (1, tokens), (1, 1, tokens, ct.RangeDim(1, self.context))
        elif len(lengths) == 1:
            ids, mask = (1, lengths[0]), (1, 1, lengths[0], self.context)
        else:
            ids = ct.EnumeratedShapes([(1, length) for length in lengths])
            mask = ct.EnumeratedShapes([(1, 1, length, self.context) for length in lengths])
        return [
            ct.TensorType(name=IDS, shape=ids, dtype=np.int32),
            ct.TensorType(name=MASK, shape=mask, dtype=np.float16),
        ]


def write_decoder(checkpoint: Checkpoint, options: ExportOptions, path: Path) -> tuple[Signature, ...]:
    """Write a decoder: ``prefill`` and ``decode``, which share weights and states.

    Raises:
        InputError: iOS 17, which has no states, or query lengths that cannot be.
    """
    import coremltools as ct

    if options.coreml.ios < 18:
        raise InputError(
            f"{checkpoint.name}: a decoder keeps its KV cache in states, which Core ML has from iOS 18 on; leave out "
            "coreml.ios = 17 in the device profile, or choose --format executorch"
        )
    sizes = _Sizes.of(options)
    dtype = program_dtype(checkpoint)
    traced = trace_decoder(checkpoint, options.context)
    functions = {
        name: convert(traced, sizes.inputs(name), LOGITS, dtype, ct.target.iOS18)
        for name in (PREFILL, DECODE)
    }
    metadata = _metadata(checkpoint, options) | {
        keys.PREFILL: str(sizes.longest),
        keys.STOP_IDS: json.dumps(options.stop_ids),
    }
    if options.bos_id is not None:
        metadata[keys.BOS_ID] = str(options.bos_id)
    PackageWriter(checkpoint, dtype, path).write(functions, PREFILL, metadata, **_facts(checkpoint))
    vocabulary = checkpoint.config.get_text_config().vocab_size
    return tuple(
        Signature(
            name,
            {
                IDS: f"int32[1, {sizes.tokens(name)}]",
                MASK: f"float16[1, 1, {sizes.tokens(name)}, {sizes.width}]",
            },
            {LOGITS: f"{_DTYPES[dtype]}[1, {sizes.tokens(name)}, {vocabulary}]"},
        )
        for name in functions
    )


def write_encoder(checkpoint: Checkpoint, options: ExportOptions, path: Path) -> tuple[Signature, ...]:
    """Write an encoder, for inputs of a few lengths.

    Raises:
        InputError: iOS 17, and matrices of 4 bits.
    """
    import coremltools as ct
    import numpy as np

    if options.coreml.ios < 18:
        _refuse_groups(checkpoint)
    dtype = program_dtype(checkpoint)
    traced, names = trace_encoder(checkpoint, options.context)
    lengths = (*(length for length in _LENGTHS if length < options.context), options.context)
    shape: Any = ct.EnumeratedShapes([(1, length) for length in lengths])
    if options.coreml.ios < 18:
        # Before iOS 18 one input alone may list its shapes.
        shape = (1, ct.RangeDim(lengths[0], lengths[-1], default=lengths[0]))
    inputs = [ct.TensorType(name=name, shape=shape, dtype=np.int32) for name in names]
    output, described = output_shape(checkpoint.task, checkpoint.config)
    target = ct.target.iOS18 if options.coreml.ios >= 18 else ct.target.iOS17
    function = convert(traced, inputs, output, dtype, target)
    metadata = _metadata(checkpoint, options) | {keys.LENGTHS: json.dumps(lengths)}
    PackageWriter(checkpoint, dtype, path).write({"main": function}, "main", metadata, **_facts(checkpoint))
    takes = dict.fromkeys(names, f"int32[1, {'|'.join(map(str, lengths))}]")
    return (Signature("main", takes, {output: described.replace("float32", _DTYPES[dtype])}),)


def _refuse_groups(checkpoint: Checkpoint) -> None:
    for name, weight in checkpoint.weights.items():
        if isinstance(weight, Palettized) and weight.group != weight.shape[0]:
            raise InputError(
                f"{name}: a table per {weight.group} rows needs iOS 18; give group_channels = 0 to palettize, or leave "
                "out coreml.ios = 17 in the device profile"
            )
        if isinstance(weight, Quantized) and weight.bits != 8:
            raise InputError(
                f"{name}: {weight.bits} bits with a scale per group need iOS 18; give --bits 8, or leave out "
                "coreml.ios = 17 in the device profile"
            )


def _metadata(checkpoint: Checkpoint, options: ExportOptions) -> dict[str, str]:
    """Return what every package says of itself to an app."""
    said = {keys.TASK: checkpoint.task, keys.CONTEXT: str(options.context)}
    if checkpoint.task in (CLASSIFICATION, TOKENS):
        labels = checkpoint.config.id2label
        said[keys.LABELS] = json.dumps([labels[index] for index in sorted(labels)])
    if options.tokenizer is not None:
        said[keys.TOKENIZER] = sha256_file(options.tokenizer)
    return said


def _facts(checkpoint: Checkpoint) -> dict[str, str]:
    """Return what Xcode shows of a model."""
    facts = {"shortDescription": f"{checkpoint.name} ({checkpoint.task})", "versionString": "1"}
    known = {"author": author_of(checkpoint), "license": licence_of(checkpoint.folder)}
    return facts | {key: value for key, value in known.items() if value}
