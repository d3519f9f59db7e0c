"""The two programs inside a sandbox: `candidate`, which runs what a model wrote, and `judge`, which runs its test.

They are separate processes, each in its own sandbox, and exchange nothing but lines of JSON. The judge calls the
candidate's functions remotely and compares plain values in its own memory; no operator is ever carried out by the
candidate. So whatever the candidate does to its own interpreter, its own process and its end of the line, and whatever
methods its values have, it passes only if it answers what the test expects.

This file is run as a script, and uses the standard library alone.

    judge: python -s -S guest.py judge        candidate: python -s -S guest.py candidate
    first line in: {"limits": {...}, ...}      then questions in, answers out
    out: "." ready, "?" a question for the candidate, "!" the verdict
"""

from __future__ import annotations

import builtins
import importlib
import json
import numbers
import os
import resource
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from types import CodeType
from typing import Any, BinaryIO

MAX_REASON = 300
"""The most characters kept of the reason why a program failed."""

MAX_DEPTH = 200
"""The deepest nesting of a value that is passed from one process to the other."""

Hold = Callable[[Any], int]

Held = Callable[[int], Any]

KINDS = {kind.__name__: kind for kind in (list, tuple, set, frozenset, Counter, OrderedDict, dict)}
"""The containers that are copied. A subclass comes before its base, for a value is copied as the first that it is."""


def encode(value: Any, hold: Hold, depth: int = 0) -> Any:
    """Encode a value as JSON. A value that is not plain stays in its process; the number that `hold` gives it is sent.

    An instance of a subclass of a plain type becomes the plain type, with what that type keeps of it and not what its
    own methods say, and numbers of other libraries become Python's own.
    """
    if depth > MAX_DEPTH:
        raise RecursionError(f"a value is nested deeper than {MAX_DEPTH}")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, Remote):
        return {"is": "held", "of": hold(value)}
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        value = value.item()  # a scalar of numpy
    if isinstance(value, numbers.Integral):
        return int.__int__(value) if isinstance(value, int) else int(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    kind = next((kind for kind in KINDS.values() if isinstance(value, kind)), None)
    if kind is not None and issubclass(kind, dict):
        pairs = [[encode(key, hold, depth + 1), encode(item, hold, depth + 1)] for key, item in dict.items(value)]
        return {"is": kind.__name__, "of": pairs}
    if kind is not None:
        return {"is": kind.__name__, "of": [encode(item, hold, depth + 1) for item in kind.__iter__(value)]}
    if isinstance(value, deque):
        return {"is": "deque", "of": [encode(item, hold, depth + 1) for item in value], "maxlen": value.maxlen}
    if isinstance(value, (bytes, bytearray)):
        return {"is": "bytes", "of": bytes(value).hex()}
    if isinstance(value, complex):
        return {"is": "complex", "of": [value.real, value.imag]}
    if isinstance(value, Decimal):
        return {"is": "Decimal", "of": str(value)}
    if isinstance(value, Fraction):
        return {"is": "Fraction", "of": [value.numerator, value.denominator]}
    if isinstance(value, type) and value in vars(builtins).values():
        return {"is": "type", "of": value.__name__}
    if isinstance(value, range):
        return {"is": "range", "of": [value.start, value.stop, value.step]}
    return {"is": "held", "of": hold(value)}


def decode(message: Any, held: Held, depth: int = 0) -> Any:
    """Decode what `encode` made; a number that stands for a held value becomes what `held` returns for it.

    Raises:
        ValueError: for anything else.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"a value is nested deeper than {MAX_DEPTH}")
    if message is None or isinstance(message, (bool, int, float, str)):
        return message
    kind, of = message["is"], message["of"]
    if kind in KINDS and issubclass(KINDS[kind], dict):
        return KINDS[kind]({decode(key, held, depth + 1): decode(item, held, depth + 1) for key, item in of})
    if kind in KINDS:
        return KINDS[kind](decode(item, held, depth + 1) for item in of)
    if kind == "deque":
        return deque((decode(item, held, depth + 1) for item in of), message["maxlen"])
    if kind == "type":
        known = vars(builtins)[of]
        if not isinstance(known, type):
            raise ValueError(f"{of} is not a type")
        return known
    if kind == "held":
        return held(int(of))
    plain: dict[str, Callable[[], Any]] = {
        "bytes": lambda: bytes.fromhex(of),
        "complex": lambda: complex(*of),
        "range": lambda: range(*of),
        "Decimal": lambda: Decimal(of),
        "Fraction": lambda: Fraction(*of),
    }
    if kind not in plain:
        raise ValueError(f"there is no kind of value {kind!r}")
    return plain[kind]()


def reason(error: BaseException) -> str:
    """The reason why a program failed, as one short text without control characters."""
    try:
        return "".join(letter if letter.isprintable() else "?" for letter in str(error)[:MAX_REASON])
    except BaseException:  # its own __str__ fails
        return type(error).__name__


def raised(error: BaseException) -> dict[str, Any]:
    """An error as an answer: the names of its classes, the nearest first, and its text."""
    return {"raised": [[kind.__name__ for kind in type(error).__mro__], reason(error)]}


class Line:
    """The lines to and from the parent, on descriptors that the program's own printing cannot reach."""

    def __init__(self) -> None:
        self._input: BinaryIO = os.fdopen(os.dup(0), "rb")
        self._output: BinaryIO = os.fdopen(os.dup(1), "wb")
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)

    def read(self) -> Any:
        """Read the next message; exit if there is none."""
        line = self._input.readline()
        if not line:
            os._exit(1)
        return json.loads(line)

    def write(self, message: Any, mark: str = "") -> None:
        """Send one message."""
        self._output.write((mark + json.dumps(message) + "\n").encode())
        self._output.flush()


def limit(limits: dict[str, int]) -> None:
    """Let the kernel enforce limits on this process, which cannot be raised again.

    Args:
        limits: the limits by their names in `resource`, without RLIMIT_.
    """
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


# The candidate.


def candidate(line: Line, source: str) -> None:
    """Run a program, then answer the judge's questions about it until the judge ends."""
    held: list[Any] = []
    numbers_of: dict[int, int] = {}

    def hold(value: Any) -> int:
        if id(value) not in numbers_of:
            numbers_of[id(value)] = len(held)
            held.append(value)
        return numbers_of[id(value)]

    namespace: dict[str, Any] = {}
    try:
        exec(source, namespace)
        line.write({"value": {"is": "list", "of": [name for name in namespace if name != "__builtins__"]}})
    except BaseException as error:
        line.write(raised(error))
    while True:
        question = line.read()
        try:
            value = answer(question, namespace, held.__getitem__)
            line.write({"value": encode(value, hold)})
        except BaseException as error:
            line.write(raised(error))


BUILTINS: dict[str, Callable[[Any], Any]] = {"str": str, "repr": repr, "bool": bool, "len": len}


def answer(question: dict[str, Any], namespace: dict[str, Any], held: Held) -> Any:
    """The answer to one question: a name, a call, an attribute, a builtin of one value, or the items of a value."""
    do = question["do"]
    if do == "name":
        return namespace[question["name"]]
    target = held(question["of"])
    if do == "call":
        args, kwargs = decode(question["args"], held), decode(question["kwargs"], held)
        return target(*args, **kwargs)
    if do == "get":
        return getattr(target, question["name"])
    if do == "builtin":
        return BUILTINS[question["name"]](target)
    if do == "next":
        return next(target)
    if do == "set":
        return setattr(target, question["name"], decode(question["value"], held))
    return list(target)


# The judge.

LOOKS = ("name", "get", "builtin", "items")
"""Questions that change nothing. Asked twice with no other question between, they have one answer."""

STEERING = (StopIteration, StopAsyncIteration, AssertionError)
"""Errors that steer the judge itself: two end its loops, and the third is how a test finds its own values unequal."""

OTHER_NAMES = {"np": "numpy", "numpy": "numpy"}
"""Modules beside the standard library's that a test may use without importing them, and their names."""

VALUE_TYPES = (str, bytes, int, float, complex, tuple, frozenset, range)

VALUE_METHODS = {name for kind in VALUE_TYPES for name in dir(kind) if name[0] != "_" and callable(getattr(kind, name))}
"""The methods of plain values; a test that calls one with arguments, such as `startswith`, means a plain value."""


class Failed(Exception):
    """An error of the candidate that is not raised as its own class."""


class Remote:
    """A value that the candidate holds: it can be called, read, iterated over, and passed back as an argument.

    No operator is asked of the candidate, whatever special methods its value has: an operator would show it the value
    that the test expects, and let it say the result. As an object without such methods, it equals itself alone, and
    everything else raises a TypeError. No attribute with a special name is read from it either, because libraries in
    the judge act on those. Its items are copied, and `in` looks for a value among the copies.
    """

    _dylora: tuple[Callable[..., Any], int]

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        object.__setattr__(self, "_dylora", (ask, number))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ask, number = self._dylora
        return ask("call", of=number, args=list(args), kwargs=kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        ask, number = self._dylora
        value = ask("get", of=number, name=name)
        return _without_arguments(value, name) if isinstance(value, Remote) and name in VALUE_METHODS else value

    def __setattr__(self, name: str, value: Any) -> None:
        ask, number = self._dylora
        ask("set", of=number, name=name, value=value)

    def __iter__(self) -> Any:
        ask, number = self._dylora
        items = ask("items", of=number)
        if type(items) is not list:
            raise TypeError("the items of a value of the program are not a list")
        return iter(items)

    def _as(self, name: str, kind: type) -> Any:
        """The result of str, repr, bool or len on the value, which must have the type that Python requires."""
        ask, number = self._dylora
        value = ask("builtin", of=number, name=name)
        if type(value) is not kind:
            raise TypeError(f"{name} of a value of the program is not a {kind.__name__}")
        return value

    def __str__(self) -> str:
        return self._as("str", str)

    def __repr__(self) -> str:
        return self._as("repr", str)

    def __bool__(self) -> bool:
        return self._as("bool", bool)

    def __len__(self) -> int:
        return self._as("len", int)

    def __next__(self) -> Any:
        ask, number = self._dylora
        return ask("next", of=number)

    def __hash__(self) -> int:
        return hash(self._dylora[1])  # not its address, so that the order of a set is the same every time


Remote.__name__ = "value that the program keeps"  # as Python's own messages name it


def _without_arguments(method: Remote, name: str) -> Callable[..., Any]:
    """A method of a value that the candidate holds, which may not be given values of the test."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            raise TypeError(f"{name} is asked of a value that the program keeps, which is not plain")
        return method()

    return call


def judge(line: Line, test: str, setup: str, entry_point: str | None) -> None:
    """Run the test against the candidate, and send the verdict."""
    try:
        ask, defined = connect(line)
        namespace: dict[str, Any] = {}
        code = compile(test, "test", "exec")
        exec(setup, namespace)
        known = namespace.keys() | vars(builtins).keys()
        for name in names_in(code) - known:
            if name in sys.stdlib_module_names or name in OTHER_NAMES:
                namespace[name] = importlib.import_module(OTHER_NAMES.get(name, name))
            elif name in defined:
                namespace[name] = ask("name", name=name)
        if entry_point is not None:
            if entry_point not in defined:
                raise NameError(f"name {entry_point!r} is not defined")
            namespace[entry_point] = ask("name", name=entry_point)
        exec(code, namespace)
        if entry_point is not None and "check" in namespace:
            namespace["check"](namespace[entry_point])
        line.write({"passed": True, "result": "passed"}, "!")
    except BaseException as error:
        line.write({"passed": False, "result": f"failed: {reason(error)}"}, "!")


def connect(line: Line) -> tuple[Callable[..., Any], set[str]]:
    """The function that asks the candidate, and the names that it has defined."""
    seen: dict[tuple[Any, ...], Any] = {}

    def held(number: int) -> Remote:
        # A new one for each answer, or the candidate could say by a number that two of its values are the same.
        return Remote(ask, number)

    def hold(value: Any) -> int:
        if isinstance(value, Remote):
            return value._dylora[1]
        raise TypeError(f"a {type(value).__name__} of the test cannot be handed to the program")

    def ask(do: str, **question: Any) -> Any:
        look = (do, *question.values()) if do in LOOKS else None
        if look in seen:
            return seen[look]
        for name in ("args", "kwargs", "value"):
            if name in question:
                question[name] = encode(question[name], hold)
        line.write({"do": do, **question}, "?")
        value = received(line.read(), held)
        if look is None:
            seen.clear()
        else:
            seen[look] = value
        return value

    defined = received(line.read(), held)
    return ask, {name for name in defined if type(name) is str} if type(defined) is list else set()


def received(message: Any, held: Held) -> Any:
    """The value of an answer. An error of the candidate is raised as the nearest of its classes that Python has, unless
    that one steers the judge."""
    if "raised" not in message:
        return decode(message["value"], held)
    names, text = message["raised"]
    for name in names:
        known = vars(builtins).get(name)
        if isinstance(known, type) and issubclass(known, Exception) and not issubclass(known, STEERING):
            try:
                error = known(str(text)[:MAX_REASON])
            except TypeError:  # some classes need more than a text
                continue
            raise error
    raise Failed(str(text)[:MAX_REASON])


def names_in(code: CodeType) -> set[str]:
    """Every name that a piece of code looks up, including those in its functions."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= names_in(constant)
    return names


def main() -> None:
    """Report readiness, read the first message, and run as the judge or the candidate."""
    role, line = sys.argv[1], Line()
    sys.path = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))] + sys.argv[2:]
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    line.write("ready", ".")
    first = line.read()
    limit(first["limits"])
    if role == "judge":
        judge(line, first["test"], first["setup"], first["entry_point"])
    else:
        candidate(line, first["source"])


if __name__ == "__main__":
    main()
