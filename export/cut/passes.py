"""Rules of operations that look at the whole plane: norms, means, sums, products, attention.

Statistics over the plane become `reduce`, which is computed over the tiles of a map in a first
pass, and elementwise operations that use its result. The keys and values of attention become
`gather`: every tile of queries sees all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fvae_deploy.export.cut.axes import (
    Axes,
    broadcast,
    by_size,
    constant,
    layout,
    padded,
    size,
    spatial,
)
from fvae_deploy.export.cut.lower import Lowering, NotLocal, Op, packet_name, rule
from fvae_deploy.export.cut.trace import Node, Ref, aten
from fvae_deploy.export.cut.views import is_plain, made


def reduce(
    state: Lowering, node: Node, x: Ref, dims: Sequence[int], kind: str, groups: int = 1
) -> Ref:
    """Append a pass over a map that reduces axes `dims`, all of the plane among them.

    With `groups`, the axis after the first is split into groups, of which each is reduced. Its
    result has the remaining axes, and that of the groups in place of the channels.
    """
    axes = state.axes(x)
    if not state.ops[x.name].data:
        raise NotLocal("it reduces a table that covers the plane")
    if padded(axes):
        raise NotLocal("it reduces elements beyond the plane")
    kept = [axis for i, axis in enumerate(axes) if i not in dims]
    if spatial(kept):
        raise NotLocal("it reduces rows or columns alone")
    atoms = [i for i, axis in enumerate(axes) for _ in axis]
    inside = [number for number, i in enumerate(atoms) if i in dims]
    split = atoms.index(1) if groups > 1 else -1
    if groups > 1 and len(axes[1]) != 1:
        raise NotLocal("its channels are not an axis of their own")
    if groups > 1:
        kept[1] = constant(groups)
    base, order = _origin(state, x)
    left = [order[i] for i in range(len(atoms)) if i not in inside]
    if left == sorted(left):
        x, inside = base, sorted(order[i] for i in inside)
        split = order[split] if groups > 1 else -1
    args = (x, kind, inside, split, groups)
    return state.add(f"{node.name}_{kind}", "reduce", args, tuple(kept))


def _origin(state: Lowering, x: Ref) -> tuple[Ref, list[int]]:
    """Return the map that x is a view of, and which of its stored axes each of x's is."""
    steps, op = [], state.ops[x.name]
    while packet_name(op.target) in ("view", "transpose", "permute", "_unsafe_view", "clone"):
        before = state.axes(op.args[0])
        if packet_name(op.target) in ("view", "_unsafe_view", "clone"):
            if layout(op.axes[0]) != layout(before):
                break
        else:
            numbers = iter(range(len(layout(before))))
            groups = [[next(numbers) for _ in axis] for axis in before]
            if packet_name(op.target) == "permute":
                groups = [groups[d] for d in op.args[1]]
            else:
                a, b = op.args[1:3]
                groups[a], groups[b] = groups[b], groups[a]
            steps.append([n for group in groups for n in group])
        x = op.args[0]
        op = state.ops[x.name]
    order = list(range(len(layout(op.axes[0]))))
    for step in reversed(steps):
        order = [order[n] for n in step]
    return x, order


def first_of(state: Lowering, node: Node, axes: Axes) -> list[Any]:
    """Append a norm that is local as it is; only the first of its results is ever used."""
    others = tuple(by_size(shape) or () for shape in node.shapes[1:])
    facts: Any = {"several": True, "cheap": True, "kwargs": node.kwargs}
    op = state.make(node.name, node.target, node.args, (axes, *others), **facts)
    item = state.add(f"{node.name}_item", "item", (state.append(op), 0), axes, cheap=True)
    return [item, *[None] * len(others)]


def view(state: Lowering, node: Node, x: Ref, axes: Axes) -> Ref:
    """Append a reshape of a small tensor."""
    return state.add(f"{node.name}_view", aten.view.default, (x, None), axes, cheap=True)


def combine(state: Lowering, node: Node, target: Any, *args: Any) -> Ref:
    """Append an elementwise operation."""
    axes = broadcast([state.axes(a) for a in args if isinstance(a, Ref)])
    assert axes is not None
    return state.add(node.name, target, args, axes, cheap=True)


def standardised(
    state: Lowering, node: Node, x: Ref, mean: Ref, variance: Ref, eps: float, weight: Ref | None,
    bias: Ref | None,
) -> Op:  # fmt: skip
    """Return (x - mean) / deviation * weight + bias; all but x are small and fit its axes."""
    deviation = combine(state, node, aten.add.Scalar, variance, eps)
    scale = combine(state, node, aten.rsqrt.default, deviation)
    if weight is not None:
        scale = combine(state, node, aten.mul.Tensor, scale, weight)
    x = combine(state, node, aten.sub.Tensor, x, mean)
    axes = state.axes(x)
    if bias is None:
        return state.make(node.name, aten.mul.Tensor, (x, scale), axes, cheap=True)
    x = combine(state, node, aten.mul.Tensor, x, scale)
    return state.make(node.name, aten.add.Tensor, (x, bias), axes, cheap=True)


@rule("native_group_norm")
def group_norm(state: Lowering, node: Node) -> Any:
    """Normalise groups of channels, by statistics over the plane if the plane is among the rest."""
    x, weight, bias, _, channels, _, groups, eps = node.args
    axes = state.axes(x)
    if not spatial(axes[2:]):
        if spatial(axes[1:]):
            raise NotLocal("its channels are rows or columns")
        return first_of(state, node, axes)
    dims = range(2, len(axes))
    ones: Axes = ((),) * (len(axes) - 2)
    small: Axes = (axes[0], constant(channels), *ones)
    statistics = []
    for kind in ("mean", "variance"):
        grouped = reduce(state, node, x, [1, *dims] if groups == 1 else dims, kind, groups)
        if groups == 1 or groups == channels:
            shape: Axes = (axes[0], constant(groups), *ones)
            statistics.append(view(state, node, grouped, shape))
            continue
        each = constant(channels // groups)
        grouped = view(state, node, grouped, (axes[0], constant(groups), ()))
        spread = (axes[0], constant(groups), each)
        repeated = state.add(
            f"{node.name}_expand", aten.expand.default, (grouped, None), spread, cheap=True
        )
        statistics.append(view(state, node, repeated, small))
    fit = (constant(channels), *ones)
    weight, bias = (None if t is None else view(state, node, t, fit) for t in (weight, bias))
    mean, variance = statistics
    op = standardised(state, node, x, mean, variance, eps, weight, bias)
    return [state.append(op), None, None]


@rule("native_layer_norm")
def layer_norm(state: Lowering, node: Node) -> Any:
    """Normalise the last axes."""
    x, normalised, *_ = node.args
    axes = state.axes(x)
    if spatial(axes[len(axes) - len(normalised) :]):
        raise NotLocal("its weights belong to places of the plane")
    return first_of(state, node, axes)


@rule("_fused_rms_norm", "rms_norm")
def rms_norm(state: Lowering, node: Node) -> Any:
    """Normalise the last axes."""
    return layer_norm(state, node)


@rule("_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "native_batch_norm")
@rule("cudnn_batch_norm")
def batch_norm(state: Lowering, node: Node) -> Any:
    """Normalise channels, by saved statistics, or by those of this input (instance norms)."""
    name = str(node.target)
    x, weight, bias = node.args[:3]
    axes = state.axes(x)
    if not is_plain(axes[1]):
        raise NotLocal("its channels are rows or columns")
    training = "no_training" not in name and ("no_stats" in name or node.args[5])
    if not training or not spatial(axes):
        return first_of(state, node, axes)
    dims = [0, *range(2, len(axes))]
    ones: Axes = ((),) * (len(axes) - 2)
    small: Axes = ((), axes[1], *ones)
    mean, variance = (
        view(state, node, reduce(state, node, x, dims, kind), small)
        for kind in ("mean", "variance")
    )
    weight, bias = (None if t is None else view(state, node, t, small) for t in (weight, bias))
    eps = node.args[5] if "no_stats" in name else node.args[7]
    return [
        state.append(standardised(state, node, x, mean, variance, eps, weight, bias)),
        None,
        None,
    ]


@rule("mean", "sum", "amax", "amin", "var", "linalg_vector_norm", "std")
def statistic(state: Lowering, node: Node) -> Any:
    """Reduce axes: constant ones in place, the plane in a pass over it."""
    name = str(node.target).split(".")[1]
    x, *rest = node.args
    axes = state.axes(x)
    given, keep = _reduced(node, 2 if name == "linalg_vector_norm" else 1)
    dims = [d % len(axes) for d in given or range(len(axes))]
    left = tuple(
        (() if i in dims else axis) for i, axis in enumerate(axes) if keep or i not in dims
    )
    if not spatial([axes[d] for d in dims]):
        return made(state, node, left, cheap=True)
    if name in ("linalg_vector_norm", "std"):
        raise NotLocal("it has no pass over the plane")
    if name == "var" and (node.kwargs.get("correction", 1) or len(rest) > 1):
        raise NotLocal("only a variance without correction has a pass over the plane")
    kind = {"var": "variance", "amax": "max", "amin": "min"}.get(name, name)
    return state.ops[view(state, node, reduce(state, node, x, dims, kind), left).name]


def _reduced(node: Node, position: int) -> tuple[list[int] | None, bool]:
    """Return the axes that are reduced, None for all, and whether they stay as axes of one."""
    rest = node.args[position:]
    dims = rest[0] if rest else node.kwargs.get("dim")
    keep = rest[1] if len(rest) > 1 else node.kwargs.get("keepdim", False)
    return ([dims] if isinstance(dims, int) else dims), bool(keep)


@rule("var_mean")
def var_mean(state: Lowering, node: Node) -> Any:
    """Return variance and mean."""
    x = node.args[0]
    axes = state.axes(x)
    given, keep = _reduced(node, 1)
    dims = [d % len(axes) for d in given or range(len(axes))]
    left = tuple(
        (() if i in dims else axis) for i, axis in enumerate(axes) if keep or i not in dims
    )
    if not spatial([axes[d] for d in dims]):
        facts: Any = {"several": True, "kwargs": node.kwargs}
        return state.make(node.name, node.target, node.args, (left, left), **facts)
    if node.kwargs.get("correction", 1):
        raise NotLocal("only a variance without correction has a pass over the plane")
    return [
        view(state, node, reduce(state, node, x, dims, kind), left) for kind in ("variance", "mean")
    ]


@rule("_softmax", "_safe_softmax")
def softmax(state: Lowering, node: Node) -> Op:
    """Normalise along one axis; along the plane by its largest value and its sum."""
    x, dim = node.args[:2]
    axes = state.axes(x)
    if not spatial([axes[dim]]):
        return made(state, node, axes)
    dim %= len(axes)
    left = tuple(() if i == dim else axis for i, axis in enumerate(axes))
    most = view(state, node, reduce(state, node, x, [dim], "max"), left)
    x = combine(state, node, aten.sub.Tensor, x, most)
    x = combine(state, node, aten.exp.default, x)
    total = view(state, node, reduce(state, node, x, [dim], "sum"), left)
    return state.make(node.name, aten.div.Tensor, (x, total), axes, cheap=True)


def summed_product(state: Lowering, node: Node, a: Ref, b: Ref) -> Ref:
    """Append a pass that multiplies matrices and sums over the plane."""
    left, right = state.axes(a), state.axes(b)
    if left[-1] != right[-2] or left[:-2] != right[:-2] or spatial([*left[:-1], right[-1]]):
        raise NotLocal("it sums over rows and columns of different places")
    if padded(left) or padded(right):
        raise NotLocal("it sums elements beyond the plane")
    if not (state.ops[a.name].data and state.ops[b.name].data):
        raise NotLocal("it sums over a table that covers the plane")
    # Copies, so that one segment returns both.
    a, b = (state.add(node.name, aten.clone.default, (x,), state.axes(x)) for x in (a, b))
    batch = sum(len(axis) for axis in left[:-2])
    shared = [batch, len(left[-2])]
    axes = (*left[:-1], right[-1])
    return state.add(f"{node.name}_product", "reduce", (a, "product", shared, -1, 1, b), axes)


@rule("mm", "bmm", "addmm", "baddbmm")
def product(state: Lowering, node: Node) -> Op:
    """Multiply matrices; where both hold the plane, one of them is seen as a whole."""
    first = 1 if "add" in str(node.target) else 0
    a, b = node.args[first : first + 2]
    if spatial([state.axes(a)[-1]]) and spatial([state.axes(b)[-2]]):
        if first:
            raise NotLocal("it sums over rows and columns, and adds")
        return state.ops[summed_product(state, node, a, b).name]
    if spatial([state.axes(a)[-1]]):  # the other is already whole
        a = state.whole(a)
    elif spatial([state.axes(b)[-2]]) or (
        spatial([state.axes(b)[-1]]) and spatial([state.axes(a)[-2]])
    ):
        b = state.whole(b)
    left, right = state.axes(a), state.axes(b)
    if size(left[-1]) != size(right[-2]) or left[-1] != right[-2] or spatial([left[-1]]):
        raise NotLocal("it sums over rows and columns")
    if left[:-2] != right[:-2]:
        raise NotLocal("it multiplies maps of different places")
    axes = (*left[:-1], right[-1])
    if first and broadcast([state.axes(node.args[0]), axes]) != axes:
        raise NotLocal("it adds a map of other places")
    matrix = _weight(state, b)
    if not first and matrix is not None:  # the weight itself, not a copy of another shape
        return state.make(node.name, aten.matmul.default, (a, matrix), axes)
    args = (*node.args[:first], a, b, *node.args[first + 2 :])
    return state.make(node.name, node.target, args, axes, kwargs=node.kwargs)


def _weight(state: Lowering, ref: Ref) -> Ref | None:
    """Return the matrix of weights that an operand repeats for every item of a batch."""
    op = state.ops[ref.name]
    rows = op.axes[0][-2:]
    while packet_name(op.target) in ("expand", "view", "_unsafe_view"):
        op = state.ops[op.args[0].name]
    return Ref(op.name) if op.target == "weight" and op.axes[0] == rows else None


@rule("_scaled_dot_product_flash_attention_for_cpu")
def attention(state: Lowering, node: Node) -> Any:
    """Attend from every query to all keys."""
    query, key, value, *rest = node.args
    options = dict(zip(("dropout_p", "is_causal"), rest, strict=False)) | dict(node.kwargs)
    mask = options.pop("attn_mask", None)
    if spatial([state.axes(key)[-2]]):
        if options.get("is_causal"):
            raise NotLocal("its mask orders the cells of the plane")
        key, value = state.whole(key), state.whole(value)
        mask = state.whole_last(mask) if mask is not None else None
    q, k, v = (state.axes(each) for each in (query, key, value))
    if spatial([q[-1], v[-1], k[-2]]):
        raise NotLocal("its channels are rows or columns")
    scores = (*q[:-1], k[-2])
    if mask is not None and broadcast([state.axes(mask), scores]) != scores:
        raise NotLocal("its mask is of other places")
    if not q[:-2] == k[:-2] == v[:-2]:
        raise NotLocal("its queries and keys are of different places")
    args = (query, key, value, mask)
    target = aten.scaled_dot_product_attention.default
    op = state.make(node.name, target, args, (*q[:-1], v[-1]), kwargs=options)
    return [state.append(op), None]
