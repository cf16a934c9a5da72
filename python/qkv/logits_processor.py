"""From logits to tokens in named stages.

    pipe = LogitsPipe([Temperature(), Softmax(), TopP(), Sample()])
    tokens = pipe(logits, temperature=0.8, top_p=0.9, seed=7)      # i32 [batch]

A stage takes logits or probabilities and gives logits, probabilities or tokens; an order that does
not fit is refused when the pipe is made. The stages of this module, one after the other, are one
kernel, whatever they are (qkv_logits_pipe of qkv/sampling.h); compile=False gives each a kernel of
its own, for the same tokens. A class of your own may stand anywhere among them.
"""

import enum
import itertools
import sys
from typing import Any, Sequence

import qkv
from qkv import _native

Array = Any  # of torch, NumPy, ...

__all__ = [
    "TensorType", "LogitsProcessor", "Repetition", "Frequency", "Presence", "Bias", "Bitmask",
    "UserStage", "Temperature", "TopNSigma", "Softmax", "TopK", "TopP", "MinP", "TypicalP", "Sample",
    "Greedy", "LogitsPipe",
]


class TensorType(enum.Enum):
    """What flows between two stages, [batch, vocab] each, tokens [batch]."""

    LOGITS = "logits"
    PROBS = "probs"
    INDICES = "tokens"


LOGITS, PROBS, INDICES = TensorType


def _is_number(value):
    return not hasattr(value, "__len__") and not hasattr(value, "shape")


# ---- stages --------------------------------------------------------------------------------------


class LogitsProcessor:
    """One stage. A class of your own says what it takes and gives in `moves`, names its parameters
    in `parameters`, and computes in `apply`, in the array's framework.

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


class _Native(LogitsProcessor):
    """A stage of the library: `kind` is its name there, and that of its value if it has one."""

    kind = ""
    has_value = True

    def native(self):
        """As qkv._native.LogitsPipe takes it. A number given here is the stage's own."""
        default = self.values.get(self.kind) if self.has_value else None
        return self.kind, default if _is_number(default) else None, None, None, None

    def given(self):
        """What else was given here, which goes with every call."""
        own = self.kind if self.has_value else None
        return {n: v for n, v in self.values.items() if n != own or not _is_number(v)}


class _OnLogits(_Native):
    moves = {LOGITS: LOGITS}


class _OnProbs(_Native):
    moves = {PROBS: PROBS}


class Repetition(_OnLogits):
    """l > 0 ? l / repetition : l * repetition for tokens that prompt (i32 [batch, ceil(vocab / 32)],
    a bit each, the lowest first) or counts (i32 [batch, vocab], of the output so far) have; either
    or both are given."""

    kind = "repetition"
    parameters = ("repetition", "counts", "prompt")

    def __init__(self, repetition: float | Array | None = None):
        super().__init__(repetition=repetition)


class Frequency(_OnLogits):
    """l -= frequency * counts, i32 [batch, vocab]."""

    kind = "frequency"
    parameters = ("frequency", "counts")

    def __init__(self, frequency: float | Array | None = None):
        super().__init__(frequency=frequency)


class Presence(_OnLogits):
    """l -= presence for tokens whose count, of counts i32 [batch, vocab], is above 0."""

    kind = "presence"
    parameters = ("presence", "counts")

    def __init__(self, presence: float | Array | None = None):
        super().__init__(presence=presence)


class Bias(_OnLogits):
    """l += bias, f32, f16 or bf16 [batch or 1, vocab]."""

    kind = "bias"
    has_value = False
    parameters = ("bias",)

    def __init__(self, bias: Array | None = None):
        super().__init__(bias=bias)


class Bitmask(_OnLogits):
    """-inf for tokens whose bit of bitmask, i32 [batch or 1, ceil(vocab / 32)], is 0."""

    kind = "bitmask"
    has_value = False
    parameters = ("bitmask",)

    def __init__(self, bitmask: Array | None = None):
        super().__init__(bitmask=bitmask)


class UserStage(_OnLogits):
    """A stage in a few lines of C, which are compiled into the kernel, for the CPU and GPUs alike:

        UserStage("QI_FN float logits_stage(float logit, float value, float element, int token, "
                  "int request) { return logit - value * element; }", value="strength", tensor="cost")

    source   in the common subset of C11 and C++17, with the functions of qkv/variant.h
    value    the name by which a call gives value, a number or one a row; None = without, 0
    tensor   that of the array [batch or 1, vocab] whose element it is; None = without, 0
    default  of the value
    """

    kind = "user"

    def __init__(
        self, source: str, *, value: str | None = None, tensor: str | None = None,
        default: float | None = None,
    ):
        self.source, self.value, self.tensor, self.default = source, value, tensor, default
        self.parameters = tuple(name for name in (value, tensor) if name is not None)
        super().__init__()

    def native(self):
        return self.kind, self.default, self.source, self.value, self.tensor

    def __repr__(self):
        return f"UserStage({', '.join(self.parameters)})"


class Temperature(_OnLogits):
    """logits / temperature; 0 leaves the largest one alone, the first among equals."""

    kind = "temperature"
    parameters = ("temperature",)

    def __init__(self, temperature: float | Array | None = None):
        super().__init__(temperature=temperature)


class TopNSigma(_OnLogits):
    """Keeps the logits within top_n_sigma standard deviations of the largest."""

    kind = "top_n_sigma"
    parameters = ("top_n_sigma",)

    def __init__(self, top_n_sigma: float | Array | None = None):
        super().__init__(top_n_sigma=top_n_sigma)


class Softmax(_Native):
    """Logits to probabilities. A row of nothing but -inf gives zeros."""

    kind = "softmax"
    has_value = False
    moves = {LOGITS: PROBS}

    def __init__(self):
        super().__init__()


class TopK(_Native):
    """Keeps the top_k largest, the first among equals; 0 or >= vocab keeps all. Other logits become
    -inf; other probabilities 0, and the rest is renormalised."""

    kind = "top_k"
    moves = {LOGITS: LOGITS, PROBS: PROBS}
    parameters = ("top_k",)

    def __init__(self, top_k: int | Array | None = None):
        super().__init__(top_k=top_k)


class TopP(_OnProbs):
    """Keeps the smallest set of largest probabilities whose sum reaches top_p, in (0, 1], and
    renormalises."""

    kind = "top_p"
    parameters = ("top_p",)

    def __init__(self, top_p: float | Array | None = None):
        super().__init__(top_p=top_p)


class MinP(_OnProbs):
    """Keeps the probabilities of at least min_p, in [0, 1], times the largest, and renormalises."""

    kind = "min_p"
    parameters = ("min_p",)

    def __init__(self, min_p: float | Array | None = None):
        super().__init__(min_p=min_p)


class TypicalP(_OnProbs):
    """Keeps the tokens whose surprise is nearest to the entropy until their sum reaches typical_p,
    in (0, 1], and renormalises."""

    kind = "typical_p"
    parameters = ("typical_p",)

    def __init__(self, typical_p: float | Array | None = None):
        super().__init__(typical_p=typical_p)


class Sample(_Native):
    """One token a row: seed, and offset, the number of the draw in the seed's stream (0 if not
    given). One seed for all rows is the first row's; those of the others follow from it."""

    kind = "sample"
    has_value = False
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


def _row_seeds(x, seed, batch):
    """One seed for all rows would give all of them the same random number: each row gets a stream
    of its own, the first that of the seed."""
    step, size = 0x9E3779B97F4A7C15, 1 << 64  # odd, so that streams differ; 2^64 / golden ratio
    if type(x).__module__.partition(".")[0] != "torch":
        return [(seed + row * step) % size for row in range(batch)]
    torch = sys.modules["torch"]
    rows = torch.arange(batch, dtype=torch.int64, device=x.device)
    first = (seed + size // 2) % size - size // 2
    return rows * (step - size) + first


class _Fused:
    """Stages of the library in a row."""

    def __init__(self, stages, kind, unfused):
        self.stages = stages
        self.names = {name for stage in stages for name in stage.parameters}
        self._given = {name: v for stage in stages for name, v in stage.given().items()}
        self._pipe = _native.LogitsPipe(
            [stage.native() for stage in stages], kind=kind.value, unfused=unfused
        )

    def __repr__(self):
        return f"qkv[{', '.join(map(repr, self.stages))}]"

    def run(self, x, values, indices, valid, out, ctx, stream):
        if self._given:
            values = {**self._given, **{name: v for name, v in values.items() if v is not None}}
        seed = values.get("seed")
        if isinstance(seed, int):
            batch = len(x if indices is None else indices)
            if batch > 1:
                values = {**values, "seed": _row_seeds(x, seed, batch)}
        if indices is not None or valid is not None:
            values = {**values, "indices": indices, "valid": valid}
        return self._pipe.run(x, values, out=out, ctx=ctx, stream=stream)


class _InFramework:
    """A stage of the user's own class."""

    def __init__(self, stage, kind):
        self.stage = stage
        self.names = set(stage.parameters)
        self._kind = kind

    def __repr__(self):
        return repr(self.stage)

    def run(self, x, values, *options):
        values = {**self.stage.values, **{name: v for name, v in values.items() if v is not None}}
        for name in self.stage.parameters:
            if name not in values:
                raise ValueError(
                    f"{name}: expected a value here or in {type(self.stage).__name__}(...)"
                )
        x = x.float() if hasattr(x, "float") else x.astype("float32")
        return self.stage.apply(x, self._kind, **values)


def _parts(stages, kinds, unfused):
    """Stages of the library in a row are one part, each other one is a part of its own."""
    parts = []
    for is_native, group in itertools.groupby(zip(stages, kinds), lambda s: isinstance(s[0], _Native)):
        group = list(group)
        if is_native:
            parts.append(_Fused([stage for stage, _ in group], group[0][1], unfused))
        else:
            parts += [_InFramework(stage, kind) for stage, kind in group]
    return parts


# What keeps the largest where it is: the argmax may as well be taken before it.
_MONOTONE = (Temperature, TopNSigma, Softmax, TopK, TopP, MinP)


def _before_argmax(stages, kinds):
    """The stages that a Greedy at the end needs, with what they take, and whether argmax follows:
    the largest of what the library has at hand is drawn there, as the only one of a top-1."""
    stages, kinds = stages[:-1], kinds[:-1]
    while stages and type(stages[-1]) in _MONOTONE:
        stages, kinds = stages[:-1], kinds[:-1]
    if not stages or not isinstance(stages[-1], _Native) or any(type(s) is TopK for s in stages):
        return stages, kinds, True
    only, draw = TopK(1), Sample(seed=[0])
    only.parameters = draw.parameters = ()  # not for calls
    return [*stages, only, draw], [*kinds, kinds[-1]], False


class LogitsPipe:
    """Stages, one after the other.

    stages      stages, each with what it takes fixed by the one before
    compile     False: a kernel for each stage, for comparison. The same tokens
    input_type  "logits" or "probs" (or a TensorType), where the stages take either

    A CUDA graph that was captured with a pipe needs it to live; run it once before the capture.
    """

    def __init__(
        self, stages: Sequence[LogitsProcessor], *, compile: bool = True,
        input_type: TensorType | str | None = None,
    ):
        self.stages = list(stages)
        if not self.stages:
            raise ValueError("stages: expected one or more, got none")
        for i, stage in enumerate(self.stages):
            if not isinstance(stage, LogitsProcessor):
                raise ValueError(f"stages[{i}]: expected a stage like TopK(), got {stage!r}")
        self._names = {name for stage in self.stages for name in stage.parameters}
        needed, kinds, self._argmax = self.stages, _infer_kinds(self.stages, input_type), False
        if isinstance(self.stages[-1], Greedy):
            needed, kinds, self._argmax = _before_argmax(needed, kinds)
        self._parts = _parts(needed, kinds, not compile)
        is_fused = [isinstance(part, _Fused) for part in self._parts]
        self._is_one_kernel = is_fused == [True] and not self._argmax
        self._takes_out = self._argmax or is_fused[-1]

    def __repr__(self):
        return f"LogitsPipe({' -> '.join([*map(repr, self._parts), *['qkv.argmax'] * self._argmax])})"

    def __call__(
        self, logits: Array, *, out: Array | None = None, indices: Array | None = None,
        valid: Any = None, ctx: "qkv.Context | None" = None, stream: int | None = None,
        **values: Any,
    ) -> Any:
        """Runs the stages.

        logits   [batch, vocab] f32, f16 or bf16: logits, or probabilities if the pipe takes those
        values   temperature, top_k, counts, seed, ... by name, a value being a number or one a row
                 ([batch]); they win over those given to a stage. Stages of one name share it
        out      i32 [batch] of a pipe that ends in a token, else f32, f16 or bf16 [batch, vocab]
        indices, valid  as of qkv.sample, of a pipe that is one kernel

        Returns out, i32 [batch] or f32 [batch, vocab] if it was made here; (out, valid) if valid is
        wanted.
        """
        if not values.keys() <= self._names:
            unknown = min(values.keys() - self._names)
            raise ValueError(f"{unknown}: no stage of {self!r} has this parameter")
        if self._is_one_kernel:
            only = self._parts[0]
            if len(only.names) < len(self._names):  # others are of stages that an argmax needs not
                values = {name: v for name, v in values.items() if name in only.names}
            return only.run(logits, values, indices, valid, out, ctx, stream)
        for name, value in (("indices", indices), ("valid", valid)):
            if value is not None:
                raise ValueError(f"{name}: expected a pipe that is one kernel, got {self!r}")
        if out is not None and not self._takes_out:
            raise ValueError(f"out: expected None, since {self._parts[-1]!r} makes its own")
        x = logits
        for i, part in enumerate(self._parts):
            own = {name: values[name] for name in values.keys() & part.names}
            is_last = i + 1 == len(self._parts) and not self._argmax
            x = part.run(x, own, None, None, out if is_last else None, ctx, stream)
        return qkv.argmax(x, out=out, ctx=ctx, stream=stream) if self._argmax else x
