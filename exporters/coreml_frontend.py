"""What coremltools' torch front end lacks: our own operators, and what transformers' modules use beyond its list.

Everything is written once for both precisions: the front end works in float32 and a later pass turns what it can
into float16, so the parts here state theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from slm_export.exporters.coreml_dialect import NAMESPACE, query_factor

KEYS, VALUES = "keyCache", "valueCache"
"""The states' names: swift-transformers looks for them."""

_lowering: ContextVar[_Lowering] = ContextVar("lowering")


class _Lowering:
    """What the operators of one function share."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.ends: tuple[Any, Any] | None = None
        """Where the call's tokens begin and end."""
        self.columns: Any = None
        """How many positions are attended to: those before the end or, for a mask of fixed width, all there are."""
        self.masks: dict[tuple[int, int], Any] = {}
        self.caches: dict[str, Any] = {}
        """What a state holds after its last update."""


@contextmanager
def lowering(dtype: str) -> Iterator[None]:
    """Convert one function, in this block, that computes in ``dtype``: fp16 or fp32."""
    register()
    token = _lowering.set(_Lowering(dtype))
    try:
        yield
    finally:
        _lowering.reset(token)


@cache
def register() -> None:
    """Teach the front end our operators, once in a process."""
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op

    for function in (
        coreml_linear,
        coreml_embedding,
        coreml_positions,
        coreml_table,
        coreml_rms_norm,
        coreml_attention,
    ):
        register_torch_op(function, torch_alias=[f"{NAMESPACE}::{function.__name__}"])
    register_torch_op(alias)
    register_torch_op(gelu, override=True)


def alias(context: Any, node: Any) -> None:
    """The same values under another name."""
    context.add(context[node.inputs[0]], torch_name=node.name)


def gelu(context: Any, node: Any) -> None:
    """The front end's own does not look at keywords, and takes the approximation by tanh for the exact function."""
    from coremltools.converters.mil import Builder as mb

    keywords = node.kwinputs or {}
    approximate = _value(context, next(iter(keywords.get("approximate", ("none",)))))
    mode = {"none": "EXACT", "tanh": "TANH_APPROXIMATION"}[str(approximate)]
    context.add(mb.gelu(x=context[node.inputs[0]], mode=mode, name=node.name))


def coreml_linear(context: Any, node: Any) -> None:
    """A matrix product by an input; the package's writer makes ``linear`` by a constant of it."""
    from coremltools.converters.mil import Builder as mb

    x, weight, bias = (None if name is None else context[name] for name in _arguments(node, 3))
    y = mb.matmul(x=_typed(x), y=_typed(weight), transpose_y=True)
    if bias is not None:
        y = mb.add(x=y, y=_typed(bias))
    _return(context, node, y)


def coreml_embedding(context: Any, node: Any) -> None:
    """Rows of a table that is an input."""
    from coremltools.converters.mil import Builder as mb

    table, ids = (context[name] for name in node.inputs)
    _return(context, node, mb.gather(x=_typed(table), indices=ids, axis=0, validate_indices=False))


def coreml_table(context: Any, node: Any) -> None:
    """Rows of a constant."""
    from coremltools.converters.mil import Builder as mb

    table, at = (context[name] for name in node.inputs)
    _return(context, node, mb.gather(x=_typed(table), indices=at, axis=0, validate_indices=False))


def coreml_positions(context: Any, node: Any) -> None:
    """Where the call's tokens stand, by its mask.

    A mask of any width ends with the last token. One of a fixed width shows in its first row what the first token
    sees: all before it, and itself.
    """
    import numpy as np
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil.types.symbolic import is_symbolic

    lowering = _lowering.get()
    ids, mask = (context[name] for name in node.inputs)
    mask = _source(mask)
    tokens = mb.gather(x=mb.shape(x=ids), indices=1, axis=0)
    if is_symbolic(mask.shape[3]):
        end = mb.gather(x=mb.shape(x=mask), indices=3, axis=0)
        start = mb.sub(x=end, y=tokens)
        lowering.columns = end
    else:
        row = mb.slice_by_size(x=mask, begin=[0, 0, 0, 0], size=[1, 1, 1, int(mask.shape[3])])
        seen = mb.cast(x=mb.greater_equal(x=row, y=np.float16(-1)), dtype="int32")
        start = mb.sub(x=mb.reduce_sum(x=seen, axes=[0, 1, 2, 3], keep_dims=False), y=1)
        end = mb.add(x=start, y=tokens)
        lowering.columns = int(mask.shape[3])
    lowering.ends = (start, end)
    places = mb.range_1d(start=start, end=end, step=1)
    context.add(mb.expand_dims(x=places, axes=[0], name=node.name))


def coreml_rms_norm(context: Any, node: Any) -> None:
    """X / max|x| in place of x: the squares stay below 1, and the quotient is the same."""
    import numpy as np
    from coremltools.converters.mil import Builder as mb

    x, weight = (_typed(context[name]) for name in node.inputs[:2])
    eps = float(_value(context, node.inputs[2]))
    kind = np.float16 if _lowering.get().dtype == "fp16" else np.float32
    # The smallest normal number keeps a row of zeros from dividing by zero.
    tiny = np.finfo(np.float16).tiny
    largest = mb.maximum(x=mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True), y=kind(tiny))
    scaled = mb.real_div(x=x, y=largest)
    # mean(x^2) + eps over max|x|^2: eps is divided twice, so that its square never stands in float16.
    root_eps = mb.real_div(x=kind(np.sqrt(eps)), y=largest)
    mean = mb.add(x=mb.reduce_mean(x=mb.square(x=scaled), axes=[-1], keep_dims=True), y=mb.square(x=root_eps))
    normed = mb.mul(x=scaled, y=mb.rsqrt(x=mean, epsilon=kind(0)))
    _return(context, node, mb.mul(x=normed, y=weight))


def coreml_attention(context: Any, node: Any) -> None:
    """Update both states in place, read what is stored, and attend."""
    import numpy as np
    from coremltools.converters.mil import Builder as mb

    names = node.inputs
    query, key, value = (_typed(context[name]) for name in names[:3])
    layer, scaling, window, softcap = (_value(context, name) for name in names[6:10])
    # The front end loses sizes that follow from a split; the states' and the traced graph's stand.
    _, _, kv_heads, _, width = context[KEYS].shape
    groups = int(node.meta["val"][0].shape[2]) // kv_heads
    kind = np.float16 if _lowering.get().dtype == "fp16" else np.float32
    caches = [_stored(context, name, new, layer) for name, new in ((KEYS, key), (VALUES, value))]
    keys, values = (_held(cache, layer) for cache in caches)
    mask = _mask(_source(context[names[3]]), window, groups)
    # Query heads of one key-value head stand below each other: keys and values are never repeated.
    query = mb.reshape(x=query, shape=[1, kv_heads, -1, width])
    if (factor := query_factor(scaling, width, softcap)) != 1:
        query = mb.mul(x=query, y=kind(factor))
    if softcap:
        # A soft cap is a whole number, which float16 holds; its reciprocal it does not.
        scores = mb.real_div(x=mb.matmul(x=query, y=keys, transpose_y=True), y=kind(softcap))
        scores = mb.mul(x=mb.tanh(x=scores), y=kind(softcap))
        weights = mb.softmax(x=mb.add(x=scores, y=mask), axis=-1)
        attended = mb.matmul(x=weights, y=values)
    else:
        attended = mb.scaled_dot_product_attention(query=query, key=keys, value=values, attn_mask=mask)
    heads = mb.reshape(x=attended, shape=[1, kv_heads * groups, -1, width])
    result = mb.cast(x=mb.transpose(x=heads, perm=[0, 2, 1, 3]), dtype="fp32")
    # The caches are the states themselves; what stands for them in the traced graph only leads to its end.
    context.add((result, *(mb.cast(x=cache, dtype="fp32") for cache in caches)), torch_name=node.name)


def _stored(context: Any, name: str, new: Any, layer: int) -> Any:
    """Write new (1, heads, tokens, width) into a state (layers, 1, heads, context, width), and return it whole."""
    from coremltools.converters.mil import Builder as mb

    lowering, state = _lowering.get(), context[name]
    start, end = _ends()
    _, _, heads, _, width = state.shape
    # Reading the state anew would not do: reads look alike to coremltools, which makes one of them all.
    held = lowering.caches.get(name)
    cache = mb.slice_update(
        x=mb.read_state(input=state) if held is None else held,
        update=mb.expand_dims(x=mb.cast(x=new, dtype="fp16"), axes=[0]),
        begin=mb.concat(values=[[layer, 0, 0], start, [0]], axis=0),
        end=mb.concat(values=[[layer + 1, 1, heads], end, [width]], axis=0),
    )
    made = mb.coreml_update_state(state=state, value=cache, name=f"{name}_after_layer_{layer}")
    lowering.caches[name] = made
    return lowering.caches[name]


def _held(cache: Any, layer: int) -> Any:
    """Return what a layer of a cache holds, (1, heads, end, width)."""
    from coremltools.converters.mil import Builder as mb

    columns = _lowering.get().columns
    _, _, heads, _, width = cache.shape
    end: Any = [layer + 1, 1, heads, columns, width]
    if not isinstance(columns, int):
        end = mb.concat(values=[end[:3], mb.expand_dims(x=columns, axes=[0]), [width]], axis=0)
    held = mb.slice_by_index(
        x=cache,
        begin=[layer, 0, 0, 0, 0],
        end=end,
        squeeze_mask=[True, False, False, False, False],
    )
    return mb.cast(x=held, dtype=_lowering.get().dtype)


def _ends() -> tuple[Any, Any]:
    """Return where the call's tokens begin and end, each int32 (1,)."""
    from coremltools.converters.mil import Builder as mb

    ends = _lowering.get().ends
    assert ends is not None, "attention before any position was asked for"
    return mb.expand_dims(x=ends[0], axes=[0]), mb.expand_dims(x=ends[1], axes=[0])


def _mask(given: Any, window: int, groups: int) -> Any:
    """Return what is added to the scores, (1, 1, groups * tokens, end), once per function."""
    import numpy as np
    from coremltools.converters.mil import Builder as mb

    lowering = _lowering.get()
    key = (window, groups)
    if key in lowering.masks:
        return lowering.masks[key]
    assert lowering.ends is not None
    start, end = lowering.ends
    rows = mb.expand_dims(x=mb.range_1d(start=start, end=end, step=1), axes=[1])
    columns = mb.expand_dims(x=mb.range_1d(start=0, end=lowering.columns, step=1), axes=[0])
    # Some callers hand in a mask of zeros: that a token does not see later ones never depends on them.
    seen = mb.less_equal(x=columns, y=rows)
    if window:
        seen = mb.logical_and(x=seen, y=mb.greater(x=columns, y=mb.sub(x=rows, y=window)))
    kind = np.float16 if lowering.dtype == "fp16" else np.float32
    # Not `select` of two scalars: coremltools declares its result a scalar. The largest number hides as well as -inf.
    hidden = mb.sub(x=mb.cast(x=seen, dtype=lowering.dtype), y=kind(1))
    own = mb.mul(x=hidden, y=kind(np.finfo(np.float16).max))
    mask = mb.add(x=mb.cast(x=given, dtype=lowering.dtype), y=own)
    lowering.masks[key] = mb.tile(x=mask, reps=[1, 1, groups, 1]) if groups > 1 else mask
    return lowering.masks[key]


def _arguments(node: Any, count: int) -> list[Any]:
    return [*node.inputs, *[None] * (count - len(node.inputs))]


def _value(context: Any, name: Any) -> Any:
    """Return a constant argument: a number as it is, text where no value goes by that name."""
    return context[name].val if isinstance(name, str) and name in context else name


def _source(var: Any) -> Any:
    """Return what a front-end cast was made of: inputs arrive in float32, whatever they are."""
    return var.op.x if var.op is not None and var.op.op_type == "cast" else var


def _typed(var: Any) -> Any:
    """Return a variable in the precision of the program."""
    from coremltools.converters.mil import Builder as mb

    return mb.cast(x=_source(var), dtype=_lowering.get().dtype)


def _return(context: Any, node: Any, var: Any) -> None:
    from coremltools.converters.mil import Builder as mb

    context.add(mb.cast(x=var, dtype="fp32", name=node.name))
