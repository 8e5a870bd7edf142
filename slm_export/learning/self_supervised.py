"""Plain text as its own teacher: the next token for decoders, hidden tokens for encoders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_export.errors import InputError
from slm_export.learning.evaluation import batches, documents_of, perplexity
from slm_export.learning.heads import with_head
from slm_export.learning.held_out import Split
from slm_export.learning.measures import Interval, mean
from slm_export.learning.models import Model
from slm_export.learning.trainer import IGNORED, Batch, Example, Loss, causal_loss
from slm_export.learning.windows import sentences, windows
from slm_export.source.tasks import FILLING

_COPIES = 8
"""Ways in which an example is masked before the first comes again."""


class Causal:
    """The next token; see `objectives.Objective`."""

    loss: Loss = staticmethod(causal_loss)
    whole: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __init__(self, model: Model, parts: Split, length: int) -> None:
        self.start = model
        self.training: Sequence[Example] = windows(parts.training, model.tokenizer, length)
        self.held_out: Sequence[Example] = windows(parts.held_out, model.tokenizer, length)

    def figures(self, model: Model) -> Mapping[str, Interval]:
        """Return the perplexity."""
        return {"perplexity": perplexity(model.module, self.held_out, model.tokenizer.pad_id)}

    def result(self, model: Model) -> Model:
        """Keep it as it is."""
        return model


class Masked:
    """Hidden tokens; see `objectives.Objective`.

    A model without the head for that, such as one for embeddings, gets a new one, which is taken off again.
    """

    def __init__(self, model: Model, parts: Split, length: int, share: float, seed: int) -> None:
        """Raise InputError where the model is a decoder, or its tokenizer has no mask."""
        self._source = model
        self.start = with_head(model, FILLING, seed)
        self.is_new = self.start is not model
        self.whole = new_parts(self.start.module) if self.is_new else ()
        hide = Hiding(model, share, seed)
        self.training: Sequence[Example] = MaskedExamples(
            sentences(parts.training, model.tokenizer, length), hide
        )
        plain = sentences(parts.held_out, model.tokenizer, length)
        self.held_out: Sequence[Example] = [hide(example, -1 - index) for index, example in enumerate(plain)]
        self.loss: Loss = masked_loss
        self.notes: tuple[str, ...] = ()
        if self.is_new:
            self.notes = ("the head that fills in hidden words was new, and was taken off again",)

    def figures(self, model: Model) -> Mapping[str, Interval]:
        """Return the perplexity of hidden tokens."""
        sums, counts = [], []
        with torch.no_grad():
            for batch in batches(self.held_out, model.tokenizer.pad_id):
                nats, seen = _nats(model.module, {k: v.to(model.device) for k, v in batch.items()})
                sums += nats.sum(1).tolist()
                counts += seen.sum(1).tolist()
        return {"masked_perplexity": mean(sums, counts, documents_of(self.held_out)).through(math.exp)}

    def result(self, model: Model) -> Model:
        """Keep the body alone, where the head was new."""
        if not self.is_new:
            return model
        own = self._source.module
        kept = model.module.base_model.state_dict(keep_vars=True)
        names = set(own.base_model.state_dict())
        # The same tensors, so that what is done to the one is seen in the figures of the other.
        own.base_model.load_state_dict({name: kept[name] for name in names}, assign=True)
        return replace(self._source, module=own.eval())


class Hiding:
    """Hides tokens of an example: of those chosen 80% become the mask, 10% another token, 10% stay (BERT)."""

    def __init__(self, model: Model, share: float, seed: int) -> None:
        backend = model.tokenizer.backend
        if backend.mask_token_id is None:
            raise InputError(
                f"{model.folder}: its tokenizer has no mask token to hide words; give another encoder"
            )
        self._mask, self._share, self._seed = int(backend.mask_token_id), share, seed
        self._special = {int(token) for token in backend.all_special_ids}
        self._vocabulary = len(backend)

    def __call__(self, example: Example, number: int) -> Example:
        """Return the example with ``labels``; the same for the same number. At least one token is hidden."""
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + number) % (1 << 62))
        ids = list(example["input_ids"])
        open_to = [at for at, token in enumerate(ids) if token not in self._special]
        order = torch.randperm(len(open_to), generator=generator).tolist()
        chosen = [open_to[at] for at in order[: max(1, round(self._share * len(open_to)))]]
        labels = [IGNORED] * len(ids)
        for at, luck in zip(chosen, torch.rand(len(chosen), generator=generator).tolist(), strict=False):
            labels[at] = ids[at]
            if luck < 0.8:
                ids[at] = self._mask
            elif luck < 0.9:
                ids[at] = int(torch.randint(self._vocabulary, (1,), generator=generator))
        return {**example, "input_ids": ids, "labels": labels}


class MaskedExamples(Sequence[Example]):
    """Examples, each masked in several ways; which one comes follows from its number alone."""

    def __init__(self, plain: Sequence[Example], hide: Hiding) -> None:
        self._plain, self._hide = plain, hide

    def __len__(self) -> int:
        return len(self._plain) * _COPIES

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # nobody slices it
        return self._hide(self._plain[index % len(self._plain)], index)


def masked_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross entropy of the hidden tokens, in nats."""
    nats, seen = _nats(module, batch)
    return nats.sum() / seen.sum().clamp_min(1)


def _nats(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return -ln p of every hidden token, 0 elsewhere, and 1 where one is hidden; float32 (examples, tokens)."""
    logits = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    labels = batch["labels"]
    nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return nats.view(labels.shape), (labels != IGNORED).float()


def new_parts(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parts with weights that are not a model's body, and of a pooler in it."""
    prefix = str(getattr(module, "base_model_prefix", ""))
    heads = [
        name
        for name, part in module.named_children()
        if name != prefix and any(True for _ in part.parameters())
    ]
    return (
        *heads,
        *(["pooler"] if any(name.endswith(".pooler") for name, _ in module.named_modules()) else []),
    )
