"""From logits to tokens in named stages.

    pipe = LogitsPipe([Temperature(), Softmax(), TopP(), Sample()])
    tokens = pipe(logits, temperature=0.8, top_p=0.9, seed=7)      # i32 [batch]

A stage takes logits or probabilities and gives logits, probabilities or tokens; an order that does
not fit is refused when the pipe is made. What leads to a token becomes one call of qkv.sample or
qkv.argmax as far as its order is theirs; stages before that, and all of a pipe that ends early, run
in the array's own framework (torch or NumPy), in f32. compile=False runs every stage by itself.
"""

import contextlib
import enum
import math
import sys
from typing import Any, Sequence

import qkv

Array = Any  # of torch, NumPy, ...

__all__ = [
    "TensorType", "LogitsProcessor", "Temperature", "Softmax", "TopK", "TopP", "MinP", "Sample",
    "Greedy", "LogitsPipe",
]


class TensorType(enum.Enum):
    """What flows between two stages, [batch, vocab] each, tokens [batch]."""

    LOGITS = "logits"
    PROBS = "probs"
    INDICES = "tokens"


LOGITS, PROBS, INDICES = TensorType


# ---- the array's framework -----------------------------------------------------------------------


def _is_torch(x):
    return type(x).__module__.partition(".")[0] == "torch"


def _framework(x):
    """The module whose functions work on x."""
    name = type(x).__module__.partition(".")[0]
    if name not in ("torch", "numpy"):
        raise NotImplementedError(
            f"logits: the stages that are not fused are offered for torch and NumPy, got {type(x)}"
        )
    return sys.modules[name]


def _f32(x):
    return x.float() if _is_torch(x) else x.astype("float32", copy=False)


def _largest(x):
    return x.amax(-1, keepdim=True) if _is_torch(x) else x.max(-1, keepdims=True)


def _descending(x):
    """The order of each row by value, descending, equals by index: the one of qkv_sample."""
    if _is_torch(x):
        return x.argsort(dim=-1, descending=True, stable=True)
    return (-x).argsort(-1, kind="stable")


def _mask_of_prefix(order, prefix):
    """[batch, vocab] bool: prefix says it of the tokens in that order."""
    if _is_torch(order):
        return prefix.new_zeros(order.shape).scatter_(-1, order, prefix)
    xp = _framework(order)
    mask = xp.zeros(order.shape, dtype=bool)
    xp.put_along_axis(mask, order, prefix, -1)
    return mask


def _renormalised(x):
    total = x.sum(-1)[:, None]
    return x / _framework(x).where(total > 0, total, 1)


def _check_range(name, values, low, high, open_low):
    for row, v in enumerate(values):
        if not (low < v if open_low else low <= v) or not v <= high or v == math.inf:
            above = f"above {low:g}" if open_low else f"{low:g} or more"
            upto = "" if high == math.inf else f", at most {high:g}"
            raise ValueError(f"{name}[{row}]: expected {above}{upto}, got {v:g}")


def _column(x, name, value, dtype, low, high=math.inf, open_low=False):
    """A parameter, one for all rows or one a row, as dtype [batch or 1, 1] beside x. Values are
    checked where they are on the host."""
    is_number = not hasattr(value, "__len__") and not hasattr(value, "shape")
    if is_number or not (_is_torch(value) and value.device.type != "cpu"):
        values = value.tolist() if hasattr(value, "tolist") else value
        many = isinstance(values, (list, tuple))
        _check_range(name, values if many else [values], low, high, open_low)
    if _is_torch(x):
        torch = sys.modules["torch"]
        options = {"dtype": getattr(torch, dtype), "device": x.device}
        # full() rather than a copy from the host, which a stream under capture would refuse.
        if is_number:
            column = torch.full((), value, **options)
        else:
            column = torch.as_tensor(value, **options)
    else:
        column = _framework(x).asarray(value, dtype=dtype)
    batch = x.shape[0]
    if tuple(column.shape) not in ((), (batch,)):
        raise ValueError(
            f"{name}: expected a number or one a row, [{batch}], got {tuple(column.shape)}"
        )
    return column.reshape(-1, 1)


def _seeds(x, seed):
    """One seed for all rows would give all of them the same random number: each row gets a stream
    of its own, the first that of the seed."""
    batch = x.shape[0]
    if not hasattr(seed, "__index__") or hasattr(seed, "shape") or batch == 1:
        return seed
    step, size = 0x9E3779B97F4A7C15, 1 << 64  # odd, so that streams differ; 2^64 / golden ratio
    if not _is_torch(x):
        return [(seed + row * step) % size for row in range(batch)]
    torch = sys.modules["torch"]
    rows = torch.arange(batch, dtype=torch.int64, device=x.device)
    first = (seed + size // 2) % size - size // 2
    return rows * (step - size) + first


# ---- stages --------------------------------------------------------------------------------------


class LogitsProcessor:
    """One stage. A class of your own says what it takes and gives in `moves`, names its parameters
    in `parameters`, and computes in `apply`; it then runs in the framework, before what is fused.

    moves       {TensorType: TensorType} input to output
    parameters  names; each must have a value at the call of the pipe, or here
    """

    moves: dict = {}
    parameters: tuple = ()

    def __init__(self, **values: Any):
        unknown = sorted(values.keys() - set(self.parameters))
        if unknown:
            raise ValueError(f"{unknown[0]}: {type(self).__name__} has no such parameter")
        self.values = {name: v for name, v in values.items() if v is not None}

    def apply(self, x: Array, kind: TensorType, **values: Any) -> Array:
        """x, [batch, vocab] f32 and of this kind, to the stage's output."""
        raise NotImplementedError(f"{type(self).__name__}.apply")

    def __repr__(self):
        values = ", ".join(f"{name}={v!r}" for name, v in self.values.items())
        return f"{type(self).__name__}({values})"


class Temperature(LogitsProcessor):
    """logits / temperature; 0 leaves the largest one alone, the first among equals."""

    moves = {LOGITS: LOGITS}
    parameters = ("temperature",)

    def __init__(self, temperature: float | Array | None = None):
        super().__init__(temperature=temperature)

    def apply(self, x, kind, temperature):
        xp = _framework(x)
        t = _column(x, "temperature", temperature, "float32", 0)
        is_largest = x == _largest(x)
        first = is_largest & (is_largest.cumsum(-1) == 1)
        return xp.where(t == 0, xp.where(first, 0.0, -math.inf), x / xp.where(t == 0, 1, t))


class Softmax(LogitsProcessor):
    """Logits to probabilities. A row of nothing but -inf gives zeros."""

    moves = {LOGITS: PROBS}

    def __init__(self):
        super().__init__()

    def apply(self, x, kind):
        xp = _framework(x)
        largest = _largest(x)
        p = xp.where(x == largest, 1, xp.exp(x - largest))  # also where that is inf - inf
        return _renormalised(xp.where(x == -math.inf, 0, p))


class TopK(LogitsProcessor):
    """Keeps the top_k largest, the first among equals; 0 or >= vocab keeps all. Other logits become
    -inf; other probabilities 0, and the rest is renormalised."""

    moves = {LOGITS: LOGITS, PROBS: PROBS}
    parameters = ("top_k",)

    def __init__(self, top_k: int | Array | None = None):
        super().__init__(top_k=top_k)

    def apply(self, x, kind, top_k):
        xp = _framework(x)
        k = _column(x, "top_k", top_k, "int64", 0)
        order = _descending(x)
        place = xp.ones_like(order).cumsum(-1)
        keep = _mask_of_prefix(order, (place <= k) | (k == 0))
        if kind is LOGITS:
            return xp.where(keep, x, -math.inf)
        return _renormalised(xp.where(keep, x, 0))


class TopP(LogitsProcessor):
    """Keeps the smallest set of largest probabilities whose sum reaches top_p, in (0, 1], and
    renormalises."""

    moves = {PROBS: PROBS}
    parameters = ("top_p",)

    def __init__(self, top_p: float | Array | None = None):
        super().__init__(top_p=top_p)

    def apply(self, x, kind, top_p):
        xp = _framework(x)
        limit = _column(x, "top_p", top_p, "float32", 0, 1, open_low=True)
        order = _descending(x)
        sorted_p = x.gather(-1, order) if _is_torch(x) else xp.take_along_axis(x, order, -1)
        sums = sorted_p.cumsum(-1, dtype=xp.float64)
        prefix = (sums - sorted_p < limit * sums[:, -1:]) | (limit >= 1)
        return _renormalised(xp.where(_mask_of_prefix(order, prefix), x, 0))


class MinP(LogitsProcessor):
    """Keeps the probabilities of at least min_p, in [0, 1], times the largest, and renormalises."""

    moves = {PROBS: PROBS}
    parameters = ("min_p",)

    def __init__(self, min_p: float | Array | None = None):
        super().__init__(min_p=min_p)

    def apply(self, x, kind, min_p):
        limit = _column(x, "min_p", min_p, "float32", 0, 1)
        return _renormalised(_framework(x).where(x >= limit * _largest(x), x, 0))


class Sample(LogitsProcessor):
    """One token a row, drawn by qkv.sample: seed, and offset, the number of the draw in the seed's
    stream (0 if not given)."""

    moves = {LOGITS: INDICES, PROBS: INDICES}
    parameters = ("seed", "offset")

    def __init__(self, seed: int | Array | None = None, offset: int | Array | None = None):
        super().__init__(seed=seed, offset=offset)


class Greedy(LogitsProcessor):
    """The largest one's token, by qkv.argmax; the first among equals."""

    moves = {LOGITS: INDICES, PROBS: INDICES}

    def __init__(self):
        super().__init__()


# ---- the pipe ------------------------------------------------------------------------------------


def _kinds(stages, first):
    """What goes into each stage, and what comes out at the end."""
    kinds = [first]
    for i, stage in enumerate(stages):
        if kinds[-1] not in stage.moves:
            takes = " or ".join(kind.value for kind in stage.moves)
            got = f"{kinds[-1].value} from {stages[i - 1]!r}" if i else kinds[-1].value
            raise ValueError(f"stages[{i}]: {stage!r} takes {takes}, got {got}")
        kinds.append(stage.moves[kinds[-1]])
    return kinds


def _infer_kinds(stages, input_type):
    """As _kinds, from the first input that fits where it is not said."""
    if input_type is not None:
        return _kinds(stages, TensorType(input_type))
    fits, errors = [], []
    for first in (LOGITS, PROBS):
        try:
            fits.append(_kinds(stages, first))
        except ValueError as error:
            errors.append((int(first in stages[0].moves), error))
    if not fits:
        raise max(errors, key=lambda e: e[0])[1]
    if len(fits) == 2:
        raise ValueError(f"input_type: expected 'logits' or 'probs', since {stages} takes either")
    return fits[0]


_FUSED = (Temperature, Softmax, TopK, TopP, MinP)


def _first_fused(stages):
    """From which stage on all are what the last one's operator does in one call."""
    first = len(stages) - 1
    later = set()
    while first > 0 and type(stages[first - 1]) in _FUSED:
        kind = type(stages[first - 1])
        # qkv_sample keeps the top_k, of those top_p, of those min_p. Only top_p depends on what was
        # dropped before it: the others may change places with each other. argmax does not depend on
        # any.
        if type(stages[-1]) is Sample and (
            (kind is TopP and TopK in later) or (kind is MinP and TopP in later)
        ):
            break
        later.add(kind)
        first -= 1
    return first


class LogitsPipe:
    """Stages, one after the other.

    stages      stages, each with what it takes fixed by the one before
    compile     False: each stage by itself, for comparison. The same tokens but for rounding
    input_type  "logits" or "probs" (or a TensorType), where the stages take either
    """

    def __init__(
        self, stages: Sequence[LogitsProcessor], *, compile: bool = True,
        input_type: TensorType | str | None = None,
    ):
        self.stages = list(stages)
        if not self.stages:
            raise ValueError("stages: expected one or more, got none")
        owner = {}
        for i, stage in enumerate(self.stages):
            if not isinstance(stage, LogitsProcessor):
                raise ValueError(f"stages[{i}]: expected a stage like TopK(), got {stage!r}")
            for name in stage.parameters:
                if name in owner:
                    raise ValueError(f"stages[{i}]: {name} is a parameter of {owner[name]!r} too")
                owner[name] = stage
        self._owner = owner
        self._kinds = _infer_kinds(self.stages, input_type)
        ends = isinstance(self.stages[-1], (Sample, Greedy))
        count = len(self.stages)
        self._first = count if not ends else _first_fused(self.stages) if compile else count - 1
        fused = self.stages[self._first :]
        self._is_greedy = bool(fused) and isinstance(fused[-1], Greedy)
        self._fused_names = [name for stage in fused for name in stage.parameters]

    def __repr__(self):
        parts = [repr(stage) for stage in self.stages[: self._first]]
        fused = self.stages[self._first :]
        if fused:
            name = "argmax" if isinstance(fused[-1], Greedy) else "sample"
            parts.append(f"qkv.{name}[{', '.join(map(repr, fused))}]")
        return f"LogitsPipe({' -> '.join(parts)})"

    def __call__(
        self, logits: Array, *, out: Array | None = None, ctx: "qkv.Context | None" = None,
        stream: int | None = None, **values: Any,
    ) -> Array:
        """Runs the stages.

        logits  [batch, vocab] f32, f16 or bf16: logits, or probabilities if the pipe takes those
        values  temperature, top_k, top_p, min_p, seed, offset, by name, each a number or one a row
                ([batch]); they win over those given to the stage. One seed for all rows is the
                first row's; those of the others follow from it
        out     i32 [batch], of a pipe that ends in a token

        Returns tokens, i32 [batch], or what the last stage gives, f32 [batch, vocab].
        """
        self._complete(values)
        if len(logits.shape) != 2:
            raise ValueError(f"logits: expected [batch, vocab], got {tuple(logits.shape)}")
        if str(logits.dtype).rpartition(".")[2] not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"logits: expected f32, f16 or bf16, got {logits.dtype}")
        ends = self._first < len(self.stages)  # in a token
        if out is not None and not ends:
            raise ValueError("out: expected None, since the pipe does not end in a token")
        x = logits
        if self._first > 0:
            x = self._run_stages(x, values)
        if not ends:
            return x
        if self._is_greedy:
            return qkv.argmax(x, out=out, ctx=ctx, stream=stream)
        if self._kinds[self._first] is PROBS:
            with _quiet(x):
                x = _framework(x).log(_f32(x))
        arguments = {name: values[name] for name in self._fused_names if name in values}
        arguments["seed"] = _seeds(x, arguments["seed"])
        return qkv.sample(x, out=out, ctx=ctx, stream=stream, **arguments)

    def _complete(self, values):
        """Adds the stages' own to the call's values, so that every parameter has one."""
        for name in values:
            if name not in self._owner:
                raise ValueError(f"{name}: no stage of {self!r} has this parameter")
        for name, stage in self._owner.items():
            if values.get(name) is None:
                if name in stage.values:
                    values[name] = stage.values[name]
                elif name != "offset":
                    raise ValueError(
                        f"{name}: expected a value here or in {type(stage).__name__}(...)"
                    )

    def _run_stages(self, x, values):
        """The stages that are not fused."""
        xp = _framework(x)
        with _quiet(x):
            x = _f32(x)
            x = xp.where(xp.isnan(x), -math.inf if self._kinds[0] is LOGITS else 0, x)
            for stage, kind in zip(self.stages[: self._first], self._kinds):
                x = _f32(stage.apply(x, kind, **{n: values[n] for n in stage.parameters}))
        return x


def _quiet(x):
    """log 0 and inf - inf are meant."""
    return contextlib.nullcontext() if _is_torch(x) else _framework(x).errstate(all="ignore")
