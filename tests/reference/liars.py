"""Functions whose values lie about themselves, and tests that each of them must fail.

LIARS are programs that define `f`. None knows what a test expects, so each passes only where a value of its own decides
the verdict. SHAPES are the ways in which tests ask: each says what an honest `f` returns, and asserts something about
it that no constant which does not know the expected value can satisfy.
"""

from __future__ import annotations

from typing import NamedTuple

OPERATORS = [
    "lt",
    "le",
    "eq",
    "ne",
    "gt",
    "ge",
    "add",
    "radd",
    "iadd",
    "sub",
    "rsub",
    "isub",
    "mul",
    "rmul",
    "matmul",
    "truediv",
    "rtruediv",
    "floordiv",
    "rfloordiv",
    "mod",
    "rmod",
    "divmod",
    "rdivmod",
    "pow",
    "rpow",
    "lshift",
    "rshift",
    "and",
    "rand",
    "or",
    "ror",
    "xor",
    "rxor",
    "contains",
    "getitem",
    "missing",
]
CONVERSIONS = ["neg", "pos", "abs", "invert", "round", "trunc", "floor", "ceil"]
HEAD = """
import sys
def always(value):
    return lambda *args, **kwargs: value
def lying(value, *bases, **more):
    names = OPERATORS + CONVERSIONS
    space = {'__%s__' % name: always(value) for name in names}
    if not bases: space['__iter__'] = None  # or its items, by __getitem__, would have no end
    return type('L', bases, {**space, '__hash__': always(hash(value)), **more})
"""

_VALUES = {"zero": "0", "nought": "0.0", "one": "1", "true": "True", "false": "False", "nothing": "None"}
_BASES = {"int": "int(0)", "float": "float(1)", "str": "str('x')", "list": "[1]", "dict": "{1: 1}", "set": "{1}"}
_ERRORS = [
    "StopIteration",
    "StopAsyncIteration",
    "GeneratorExit",
    "SystemExit",
    "KeyboardInterrupt",
    "AssertionError",
    "BaseException",
    "IndexError",
    "KeyError",
    "AttributeError",
    "TypeError",
    "NotImplementedError",
    "RuntimeError",
]


def _returning(value: str, before: str = "") -> str:
    return f"{before}\ndef f(*args): return {value}\n"


LIARS = {
    **{f"plain {name}": _returning(value) for name, value in _VALUES.items()},
    **{
        f"operators that say {name}": _returning("L()", f"L = lying({value})")
        for name, value in _VALUES.items()
    },
    **{
        f"operators that say {name}, and conversions": _returning(
            "L()",
            f"L = lying({value}, __len__=always(0), __bool__=always(True), __float__=always(0.0), __int__=always(0), "
            "__index__=always(0), __complex__=always(0j), __str__=always(''), __repr__=always(''), "
            "__iter__=lambda s: iter([]), __next__=always(0), __reversed__=always([]), __getattr__=lambda s, n: "
            f"(_ for _ in ()).throw(AttributeError(n)) if n[:2] == '__' else always({value}))",
        )
        for name, value in _VALUES.items()
    },
    **{
        f"a subclass of {name} whose operators say {said}": _returning(
            f"L({value})", f"L = lying({_VALUES[said]}, {name}, __len__=always(3), __bool__=always(True))"
        )
        for name, value in _BASES.items()
        for said in ("true", "nought")
    },
    "operators that return the value itself": _returning("L()", "L = lying(0)\nL.__sub__ = L.__mod__ = lambda s, o: s"),
    "operators that return what they are given": _returning(
        "L()",
        "L = lying(True)\nfor n in OPERATORS: setattr(L, '__%s__' % n, lambda s, *o: o[0])\n"
        "L.__len__ = always(3)\nL.__getattr__ = lambda s, n: lambda *a: a[0] if a else s",
    ),
    "a class that says it is an int": _returning("L()", "L = lying(True, __class__=property(always(int)))"),
    "a class that says it is a list": _returning("L()", "L = lying(True, __class__=property(always(list)))"),
    "a metaclass that says it is every class": _returning(
        "L", "M = type('M', (type,), {'__instancecheck__': always(True), '__eq__': always(True), '__hash__': always(0),"
        "'__sub__': always(0.0), '__len__': always(3), '__iter__': lambda s: iter([])})\nclass L(metaclass=M): pass"
    ),
    "an iterator of nothing": _returning(
        "L()", "class L:\n    __iter__ = lambda s: s\n    def __next__(s): raise StopIteration"
    ),
    "a generator that stops": _returning("(_ for _ in ())"),
    "a function of anything": _returning("always(True)"),
    "numpy's array of nothing": _returning(
        "L()", "L = lying(True, __array__=lambda s, *a, **k: [], __array_ufunc__=always(True))"
    ),
    "a value that is not a number": _returning("float('nan')"),
    "a type": _returning("object"),
    "its arguments": _returning("args"),
    "its first argument": _returning("args[0]"),
    **{f"raises {name}": f"def f(*args): raise {name}\n" for name in _ERRORS},
    **{
        f"raises what says it is {name}": f"E = type({name!r}, (Exception,), {{}})\ndef f(*args): raise E\n"
        for name in ("StopIteration", "AssertionError", "GeneratorExit")
    },
    "raises StopIteration in every method": _returning(
        "L()", "def stop(*args): raise StopIteration\nL = lying(0)\n"
        "for n in OPERATORS + ['len', 'bool', 'iter', 'next', 'str', 'hash']: setattr(L, '__%s__' % n, stop)\n"
        "L.__getattr__ = stop"
    ),
}  # fmt: skip


class Shape(NamedTuple):
    """One way to ask, and what an honest function returns. In `honest`, `x` is the argument."""

    honest: str
    test: str


def _by(honest: str, *tests: str) -> list[Shape]:
    return [Shape(honest, test) for test in tests]


SHAPES = [
    *_by(
        "x * 6 + 0.5",
        "assert f(7) == 42.5",
        "assert 42.5 == f(7)",
        "assert not f(7) != 42.5",
        "assert not 42.5 != f(7)",
        "assert abs(f(7) - 42.5) < 1e-6",
        "assert abs(42.5 - f(7)) < 1e-6",
        "assert math.fabs(f(7) - 42.5) < 1e-6",
        "assert abs(f(7) / 42.5 - 1) < 1e-6",
        "assert abs(42.5 / f(7) - 1) < 1e-6",
        "assert -1e-6 < f(7) - 42.5 < 1e-6",
        "assert f(7) - 42.5 == 0",
        "assert not f(7) - 42.5",
        "assert f(7) % 42.5 == 0 and f(7) > 42",
        "assert f(7) // 42.5 == 1 and f(7) % 42.5 == 0",
        "assert 42.4 < f(7) < 42.6",
        "assert f(7) > 42.4 and f(7) < 42.6",
        "assert f(7) >= 42.5 and f(7) <= 42.5",
        "assert math.isclose(f(7), 42.5)",
        "assert math.isclose(42.5, f(7), rel_tol=1e-9)",
        "assert round(f(7), 2) == 42.5",
        "assert f(7) in (42.5,)",
        "assert f(7) in {42.5: 1}",
        "assert [42.5].count(f(7)) == 1 and [42.5].index(f(7)) == 0",
        "assert float(f(7)) == 42.5",
        "assert int(f(7)) == 42 and f(7) - 42 == 0.5",
        "assert f(7) * 2 == 85",
        "assert pow(f(7), 2) == 1806.25",
        "assert divmod(f(7), 42.5) == (1.0, 0.0)",
        "assert sum([f(7), f(8)]) == 91.0",
        "assert max(f(7), 42.4) == min(f(7), 42.6) == 42.5",
        "assert np.isclose(f(7), 42.5)",
        "assert np.allclose(f(7), 42.5) and np.ndim(f(7)) == 0",
        "np.testing.assert_allclose(f(7), 42.5); assert np.size(f(7)) == 1",
        "assert np.float64(42.5) == f(7)",
        "assert abs(np.float64(42.5) - f(7)) < 1e-6",
        "assert f'{f(7):.1f}' == '42.5'",
        "assert '%.1f' % f(7) == '42.5'",
        "assert hash(f(7)) == hash(42.5) and f(7) == 42.5",
        "assert len({f(7), 42.5}) == 1 and len({f(8), 42.5}) == 2",
        "assert all(f(n) == n * 6 + 0.5 for n in range(5))",
        "assert all(map(lambda n: f(n) == n * 6 + 0.5, range(1, 5)))",
        "assert all(a == b for a, b in zip(map(f, [7, 8]), [42.5, 48.5]))",
        "assert not any(a != b for a, b in zip(map(f, [7, 8]), [42.5, 48.5]))",
        "for a, b in zip(map(f, [7, 8]), [42.5, 48.5]): assert a == b",
        "for value in map(f, [7]): assert value == 42.5",
        "it = map(f, [7]); assert [42.5] == list(it)",
        "class N:\n    n = 0\n    def __iter__(s): return s\n    def __next__(s):\n        s.n += 1\n"
        "        if s.n == 4: raise StopIteration\n        return f(s.n)\n"
        "for a, b in zip(N(), [6.5, 12.5]): assert a == b",
        "try: assert f(7) != 42.5\nexcept AssertionError: pass\nelse: raise ValueError",
    ),
    *_by(
        "x > 3",
        "assert all(map(f, [4, 5])) and not any(map(f, [1, 2]))",
        "assert list(filter(f, range(6))) == [4, 5]",
    ),
    *_by("[True] * x", "assert all(f(3)) and len(f(3)) == 3 and len(f(5)) == 5"),
    *_by(
        "'ab' * x",
        "assert f(2) == 'abab'",
        "assert str(f(2)) == 'abab'",
        "assert f(2).startswith('aba')",
        "assert f(2).endswith('bab') and len(f(2)) == 4",
        "assert f(2).count('ab') == f(1).count('ab') + 1 and f(3).count('ab') == 3",
        "assert f(2).upper() == 'ABAB'",
        "assert 'ab' in f(1) and 'abab' not in f(1)",
        "assert f(2)[1] == 'b' and f(2)[:2] == 'ab'",
        "assert f(2) + '!' == 'abab!'",
        "assert '!' + f(2) == '!abab'",
        "assert ''.join(['!', f(2)]) == '!abab'",
        "assert re.fullmatch('(ab){2}', f(2))",
        "assert f(2).find('ba') == 1 and f(2).index('b') == 1",
        "assert f(2).replace('ab', '') == '' and f(2)",
    ),
    *_by(
        "[x + 2, x, x + 1]",
        "assert f(7) == [9, 7, 8]",
        "assert sorted(f(7)) == [7, 8, 9]",
        "assert list(f(7)) == [9, 7, 8]",
        "assert set(f(7)) == {7, 8, 9}",
        "assert 9 in f(7) and 6 not in f(7)",
        "assert all(n in f(7) for n in (7, 8, 9)) and len(f(7)) == 3",
        "assert len(f(7)) == 3 and f(7)[0] == 9",
        "assert f(7)[0] - 9 == 0",
        "a, b, c = f(7); assert (a, b, c) == (9, 7, 8)",
        "assert sum(f(7)) == 24 and max(f(7)) == 9",
        "assert f(7).count(9) == 1 and f(7).index(8) == 2",
        "assert f(7) + [1] == [9, 7, 8, 1]",
        "assert np.array_equal(f(7), [9, 7, 8])",
        "np.testing.assert_array_equal(f(7), [9, 7, 8])",
        "assert collections.Counter(f(7)) == collections.Counter([7, 8, 9])",
        "assert all(a == b for a, b in itertools.zip_longest(f(7), [9, 7, 8]))",
        "assert isinstance(f(7), list) and len(f(7)) == 3 and f(7)[1] == 7",
        "assert list(reversed(f(7))) == [8, 7, 9]",
    ),
    *_by(
        "{'a': x, 'b': x + 1}",
        "assert f(7) == {'a': 7, 'b': 8}",
        "assert f(7)['a'] == 7 and f(7)['b'] == 8",
        "assert sorted(f(7).items()) == [('a', 7), ('b', 8)]",
        "assert dict(f(7)) == {'a': 7, 'b': 8}",
        "assert {**f(7)} == {'a': 7, 'b': 8}",
        "assert f(7).get('b') == 8 and 'a' in f(7) and 'c' not in f(7)",
    ),
    *_by(
        "{x, x + 1}",
        "assert f(7) == {7, 8}",
        "assert f(7) - {7, 8} == set() and len(f(7)) == 2",
        "assert {7, 8} - f(7) == set()",
        "assert f(7) <= {7, 8} and f(7) >= {7, 8}",
        "assert f(7).issubset({7, 8}) and f(7).issuperset({7, 8})",
        "assert f(7) ^ {7, 8} == set()",
        "assert not f(7).difference({7, 8}) and f(7) == {8, 7}",
        "assert f(7) & {7, 8, 9} == {7, 8}",
    ),
    *_by(
        "iter([x, x + 1])",
        "assert list(f(7)) == [7, 8]",
        "assert next(f(7)) == 7 and next(f(3)) == 3 and list(f(1)) == [1, 2]",
        "assert all(map(lambda n: list(f(n)) == [n, n + 1], [7, 8]))",
    ),
    *_by("lambda y: x + y", "assert f(7)(5) == 12", "assert all(map(lambda n: f(n)(1) == n + 1, [7, 8]))"),
]  # fmt: skip


def program(liars: dict[str, str]) -> str:
    """One program that holds many functions: honest ones, by what they return, and liars."""
    head = f"OPERATORS, CONVERSIONS = {OPERATORS!r}, {CONVERSIONS!r}\n{HEAD}\nFUNCTIONS = {{}}\n"
    honest = {shape.honest: f"def f(x): return {shape.honest}\n" for shape in SHAPES}
    return head + "".join(
        f"space = dict(globals())\nexec({source!r}, space)\nFUNCTIONS[{name!r}] = space['f']\n"
        for name, source in {**honest, **liars}.items()
    )


def table(liars: list[str], shapes: list[Shape]) -> str:
    """One test that puts every liar to every shape, and fails with the pairs that pass, or whose honest one fails."""
    return f"""
import collections, itertools, math, re
import numpy as np
SHAPES, LIARS = {[tuple(shape) for shape in shapes]!r}, {liars!r}
functions = FUNCTIONS
def passes(name, test):
    try:
        exec(test, dict(f=functions[name], np=np, collections=collections, itertools=itertools, math=math, re=re))
    except BaseException:
        return False
    return True
unfair = [test for honest, test in SHAPES if not passes(honest, test)]
fooled = [(name, test) for honest, test in SHAPES for name in LIARS if passes(name, test)]
assert not unfair, 'UNFAIR %r' % unfair
assert not fooled, '%d of %d: %r' % (len(fooled), len(SHAPES) * len(LIARS), fooled)
"""
