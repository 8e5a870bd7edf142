"""A ``.pte`` open in ExecuTorch's own runtime."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.adapter_matrices import Places, read_adapter
from slm_export.exporters.executorch_places import METHOD, places_of
from slm_export.foreign import reading
from slm_export.runtime import Session
from slm_export.source.tasks import GENERATION

_KERNELS = {
    "executorch.extension.llm.custom_ops": "libcustom_ops_aot_lib.*",
    "executorch.kernels.quantized": "libquantized_ops_aot_lib.*",
}


@functools.cache
def load_runtime() -> Any:
    """Return the runtime's module, with its kernels: XNNPACK, the LLM operators, the quantized operators.

    Libraries are loaded by their files: the Python modules around them import the compiler, which takes seconds
    and hundreds of megabytes that running a program does not need.
    """
    runtime = importlib.import_module("executorch.extension.pybindings._portable_lib")
    for package, pattern in _KERNELS.items():
        spec = importlib.util.find_spec(package)
        folders = spec.submodule_search_locations if spec else None
        found = [file for folder in folders or () for file in Path(folder).glob(pattern)]
        if len(found) != 1:
            raise ImportError(f"{package} has {len(found)} files {pattern}", name=package)
        torch.ops.load_library(found[0])  # type: ignore[no-untyped-call]
    return runtime


def open_session(path: Path, task: str) -> Session:
    """Open a program; InputError where it is not one, or not a program of ours."""
    runtime = load_runtime()
    with reading(path, "ExecuTorch cannot load it"):
        program = runtime._load_program(
            str(path), program_verification=runtime.Verification.InternalConsistency
        )
        names = {program.get_method_name(i) for i in range(program.num_methods())}
        if "forward" not in names:
            raise InputError(f"{path}: has no method 'forward'; export the model again")
        constants = sorted(names - {"forward", METHOD})
        metadata = {name: _plain(program.load_method(name)([])) for name in constants}
        method = program.load_method("forward")
    if task != GENERATION:
        return _Encoder(program, method, metadata)
    places = places_of(path) if METHOD in names else Places(0, {})
    return _Decoder(program, method, metadata, places, path)


class _Program:
    def __init__(self, program: Any, method: Any, metadata: Mapping[str, Any]) -> None:
        self._program, self._method, self._metadata = program, method, metadata

    def metadata(self) -> Mapping[str, Any]:
        """Return the constant methods and their values."""
        return self._metadata

    def close(self) -> None:
        """Let go of the program."""
        del self._method, self._program

    def _run(self, *inputs: Tensor) -> Tensor:
        # Without the batch; copied, because the runtime reuses the memory of its outputs at the next call.
        try:
            output: Tensor = self._method(list(inputs))[0][0].clone()
        except RuntimeError as error:
            raise InputError(f"ExecuTorch cannot run the program: {error}; export the model again") from error
        return output


class _Decoder(_Program):
    def __init__(
        self, program: Any, method: Any, metadata: Mapping[str, Any], places: Places, path: Path
    ) -> None:
        super().__init__(program, method, metadata)
        self._path, self._places = path, places
        self.places = frozenset(places.shapes)
        self._forward, self._adapted = method, None
        self._given: list[Tensor] = []
        self.context = int(self._metadata["get_max_context_len"])
        self.prefill_chunk = int(self._metadata["get_max_seq_len"])
        named = self._metadata.get("get_eos_ids", [])
        self.stop_ids = tuple(named) if isinstance(named, (list, tuple)) else (named,)
        self.bos_id: int | None = self._metadata.get("get_bos_id")
        self.vocabulary: int | None = self._metadata.get("get_vocab_size")

    def logits(self, tokens: Sequence[int], start: int) -> Tensor:
        """Feed tokens at position ``start``; return float32 (vocabulary,) after the last of them."""
        if not tokens or start + len(tokens) > self.context:
            raise ValueError(f"{len(tokens)} tokens at {start} do not fit a context of {self.context}")
        for at in range(0, len(tokens), self.prefill_chunk):
            part = torch.tensor([tokens[at : at + self.prefill_chunk]], dtype=torch.int64)
            result = self._run(part, torch.tensor([start + at], dtype=torch.int64), *self._given)
        return result

    def adapt(self, adapter: Path | None) -> None:
        """Turn an adapter file on, or with None whichever is on off; the program stays loaded.

        The method with places has caches of its own: begin again at position 0.

        Raises:
            InputError: it is no adapter file, or not one for this program.
        """
        if adapter is None:
            self._method, self._given = self._forward, []
            return
        given = read_adapter(adapter, self._path, self._places)
        if self._adapted is None:
            self._adapted = self._program.load_method(METHOD)
        self._method, self._given = self._adapted, given

    def adapted(self, adapter: Path, tokens: Sequence[int]) -> Tensor:
        """Return the logits after some tokens, of the program loaded anew, in one call."""
        given = read_adapter(adapter, self._path, self._places)
        method = load_runtime()._load_program(str(self._path)).load_method(METHOD)
        inputs = [torch.tensor([tokens]), torch.zeros(1, dtype=torch.int64), *given]
        result: Tensor = method(inputs)[0][0].clone()
        return result

    def close(self) -> None:
        """Let go of the program."""
        del self._forward, self._adapted
        super().close()


class _Encoder(_Program):
    def __init__(self, program: Any, method: Any, metadata: Mapping[str, Any]) -> None:
        super().__init__(program, method, metadata)
        self.context = int(self._metadata["get_max_seq_len"])
        self._least = int(self._metadata["get_min_seq_len"])

    def outputs(self, tokens: Sequence[int], mask: Sequence[int], types: Sequence[int] = ()) -> Tensor:
        """Return float32: an embedding (width,), or scores of the shape of the task, without batch."""
        if not tokens or len(tokens) > self.context:
            raise ValueError(f"{len(tokens)} tokens do not fit a longest input of {self.context}")
        inputs = [tokens, mask]
        if self._metadata["takes_token_types"]:
            inputs.append(types or [0] * len(tokens))
        missing = [0] * max(0, self._least - len(tokens))
        return self._run(*(torch.tensor([[*values, *missing]]) for values in inputs))


def _plain(values: Sequence[Any]) -> Any:
    """Return a constant method's value: a number, or a list of them."""
    items = [value.tolist() if isinstance(value, Tensor) else value for value in values]
    return items[0] if len(items) == 1 else items


def run_text_llm_runner(path: Path, tokenizer: Path, prompt: str, tokens: int, bos: int) -> str:
    """Return ``tokens`` greedy tokens as text, from ExecuTorch's own generation loop.

    ``bos``: how many opening tokens the runner is to put before the prompt.
    """
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    parts: list[str] = []
    runner = TextLLMRunner(str(path), str(tokenizer))
    config = GenerationConfig(temperature=0.0, echo=False, max_new_tokens=tokens, num_bos=bos)
    runner.generate(prompt, config, parts.append)
    return "".join(parts)
