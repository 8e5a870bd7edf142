"""``.litertlm``: a decoder with its tokenizer and what a runner must know, in the one file that LiteRT-LM opens.

write_container   model.tflite + tokenizer.json + metadata -> model.litertlm
Container         the sections of such a file, by offset
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from slm_export.foreign import reading
from slm_export.runtime import ExportOptions

_NAME = "model.tflite"
_HEADER_BYTES = 4096
_CHUNK = 1 << 20
_MOST_SECTIONS = 256
_UNREPEATABLE = (
    rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00",
    rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
)


@dataclass(frozen=True)
class Container:
    """What a ``.litertlm`` holds."""

    path: Path
    model: tuple[int, int]
    """Where the flatbuffer begins and ends, in bytes."""
    metadata: Any
    """LlmMetadata."""

    @classmethod
    def read(cls, path: Path) -> Container:
        """Read the header; InputError where this is not such a file."""
        with reading(path, "LiteRT-LM cannot open it"):
            size = path.stat().st_size
            found = {s.DataType(): (s.BeginOffset(), s.EndOffset()) for s in _sections(_header(path))}
            if outside := [place for place in found.values() if not 0 <= place[0] <= place[1] <= size]:
                raise ValueError(f"a section at {outside[0]} in a file of {size:,} bytes")
            kinds = _schema().AnySectionDataType
            begin, end = found[kinds.LlmMetadataProto]
            with open(path, "rb") as file:
                file.seek(begin)
                metadata = _proto("llm_metadata").LlmMetadata.FromString(file.read(end - begin))
            return cls(path, found[kinds.TFLiteModel], metadata)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens at which LiteRT-LM stops."""
        return tuple(i for union in self.metadata.stop_tokens for i in union.token_ids.ids)

    @property
    def bos_id(self) -> int | None:
        """The token that LiteRT-LM puts before a prompt; None: none."""
        return next(iter(self.metadata.start_token.token_ids.ids), None)

    @contextmanager
    def extracted(self) -> Iterator[Path]:
        """Yield the flatbuffer as a file of its own: LiteRT maps whole files only."""
        begin, end = self.model
        with TemporaryDirectory(prefix="slm-export-") as folder:
            copy = Path(folder) / _NAME
            with open(self.path, "rb") as source, open(copy, "wb") as target:
                source.seek(begin)
                for done in range(0, end - begin, _CHUNK):
                    target.write(source.read(min(_CHUNK, end - begin - done)))
            yield copy


def write_container(model: Path, options: ExportOptions, path: Path) -> None:
    """Pack a decoder's flatbuffer with the tokenizer of ``options``."""
    assert options.tokenizer is not None
    builder_module = importlib.import_module("litert_lm_builder.litertlm_builder")
    tokenizer = options.tokenizer / "tokenizer.json"
    with TemporaryDirectory(prefix="slm-export-") as folder:
        metadata = Path(folder) / "metadata.pb"
        metadata.write_bytes(_metadata(options).SerializeToString(deterministic=True))
        builder = builder_module.LitertLmFileBuilder()
        builder.add_llm_metadata(str(metadata))
        builder.add_hf_tokenizer(str(tokenizer))
        builder.add_tflite_model(str(model), builder_module.TfLiteModelType.PREFILL_DECODE)
        with open(path, "w+b") as file:
            builder.build(file)
            _make_repeatable(file)


def _make_repeatable(file: BinaryIO) -> None:
    """Overwrite the time and the random number that the packer puts in: the same model gives the same bytes."""
    file.seek(0)
    header = file.read(_HEADER_BYTES)
    for pattern in _UNREPEATABLE:
        header = re.sub(pattern, lambda found: re.sub(rb"[0-9a-f]", b"0", found[0]), header)
    file.seek(0)
    file.write(header)


def _metadata(options: ExportOptions) -> Any:
    """Return what LiteRT-LM must know: context, opening and stop tokens, chat template, sampling."""
    assert options.tokenizer is not None
    made = _proto("llm_metadata").LlmMetadata()
    made.max_num_tokens = options.context
    made.llm_model_type.generic_model.SetInParent()
    if options.adds_bos and options.bos_id is not None:
        made.start_token.token_ids.ids.append(options.bos_id)
    for token in options.stop_ids:
        made.stop_tokens.add().token_ids.ids.append(token)
    made.pad_token.token_ids.ids.append(options.pad_id)
    if options.chat_template is not None:
        made.jinja_prompt_template = options.chat_template
    _sample(made, _generation(options.tokenizer))
    return made


def _sample(made: Any, generation: dict[str, Any]) -> None:
    """Set the sampler as generation_config.json has it; greedy where that asks for no sampling."""
    kinds, params = _proto("sampler_params").SamplerParameters, made.sampler_params
    if not generation.get("do_sample"):
        # The runner has no sampler that is greedy by name, nor one of top-k alone.
        params.type, params.k, params.p, params.temperature = kinds.TOP_P, 1, 1.0, 1.0
        return
    params.type = kinds.TOP_P
    params.k = int(generation.get("top_k", 50))
    params.p = float(generation.get("top_p", 1.0))
    params.temperature = float(generation.get("temperature", 1.0))


def _generation(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _header(path: Path) -> Any:
    core = importlib.import_module("litert_lm_builder.litertlm_core")
    with open(path, "rb") as file:
        start = file.read(core.HEADER_BEGIN_BYTE_OFFSET)
        if not start.startswith(core.HEADER_MAGIC_BYTES):
            raise ValueError("not a .litertlm file")
        at = core.HEADER_END_LOCATION_BYTE_OFFSET
        end = int.from_bytes(start[at : at + 8], "little")
        if not len(start) < end <= path.stat().st_size:
            raise ValueError(f"a header that ends at byte {end}")
        return _schema().LiteRTLMMetaData.GetRootAs(file.read(end - len(start)), 0)


def _sections(header: Any) -> Iterator[Any]:
    listed = header.SectionMetadata()
    if listed is None or listed.ObjectsLength() > _MOST_SECTIONS:
        raise ValueError("no list of sections")
    for index in range(listed.ObjectsLength()):
        yield listed.Objects(index)


def _schema() -> Any:
    return importlib.import_module("litert_lm_builder.litertlm_header_schema_py_generated")


def _proto(name: str) -> Any:
    return importlib.import_module(f"litert_lm_builder.runtime.proto.{name}_pb2")
