"""Patterns read from text, such as a command line's, without running any of it."""

import ast
import inspect
import operator

from sparse_attn import patterns, recipes
from sparse_attn.checks import closest


def kinds():
    """The patterns of this package by name."""
    found = {**vars(patterns), **vars(recipes)}
    abstract = (patterns.Pattern, recipes.Recipe)
    return {
        name: kind
        for name, kind in found.items()
        if isinstance(kind, type) and issubclass(kind, patterns.Pattern) and kind not in abstract
    }


_NAMES = kinds()
MOST = 1024  # patterns in a list
_OPERATORS = {ast.BitAnd: operator.and_, ast.BitOr: operator.or_}


def parse_pattern(text):
    """The pattern that an expression describes.

    The text may hold the names of this package's patterns, literals, `&`, `|`,
    `~` and brackets. It is parsed and not evaluated: nothing in it is run.

    Args:
        text: a str, such as `"Causal() & (Local(64) | Atrous(64))"`.

    Returns:
        A `Pattern`.

    Raises:
        TypeError, ValueError: if the text is anything else; the message says
            what, and where a pattern's own argument is wrong, the pattern does.

    Example:

    >>> from sparse_attn import parse_pattern
    >>> parse_pattern("Causal() & Local(window=64)")
    Causal() & Local(64)
    """
    if not isinstance(text, str):
        raise TypeError(f"`text` must be a str. Received: text={text!r}")
    try:
        found = _pattern(ast.parse(text.strip(), mode="eval").body)
        hash(found), repr(found)  # as deep as what will be done with it
        return found
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"`text` must be a pattern. Received: text={text!r} ({error})") from None


def _pattern(node):
    match node:
        case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_pattern(left), _pattern(right))
        case ast.UnaryOp(ast.Invert(), operand):
            return ~_pattern(operand)
        case ast.Call(ast.Name(name)) if name in _NAMES:
            return _call(node)
        case ast.Name(name) if name in _NAMES:
            raise ValueError(f"A pattern is made by a call, {name}(...). Received: {name}")
        case ast.Name(name) | ast.Call(ast.Name(name)):
            raise ValueError(
                f"There is no pattern {name}. {_similar(name)} Received: {ast.unparse(node)}"
            )
        case ast.BoolOp() | ast.UnaryOp(ast.Not()):
            raise ValueError(
                "Patterns must be joined by `&`, `|` and `~`, not by `and`, `or` and `not`. "
                f"Received: {ast.unparse(node)}"
            )
    raise ValueError(
        "A pattern must be made of calls such as Local(64), joined by `&`, `|` and `~`. "
        f"Received: {ast.unparse(node)}"
    )


def _call(node):
    """The pattern that is made by a call of its name."""
    name, kind = node.func.id, _NAMES[node.func.id]
    keywords = {keyword.arg: _argument(keyword.value) for keyword in node.keywords}
    arguments = [_argument(argument) for argument in node.args]
    unknown, problem = keywords.keys() - inspect.signature(kind).parameters.keys(), None
    if None in keywords or len(keywords) < len(node.keywords):
        problem = "a keyword is repeated, or has no name"
    elif unknown:
        problem = f"it has no argument {min(unknown)!r}"
    else:
        try:
            inspect.signature(kind).bind(*arguments, **keywords)
        except TypeError as error:
            problem = str(error)
    if problem:
        told = f"{name} must be called as {_form(kind)}: {problem}."
        raise TypeError(f"{told} Received: {ast.unparse(node)}")
    return kind(*arguments, **keywords)


def _form(kind):
    """How a pattern is called, such as `Fixed(stride, summary=1)`."""
    parameters = inspect.signature(kind).parameters.values()
    names = [
        each.name if each.default is each.empty else f"{each.name}={each.default!r}"
        for each in parameters
    ]
    return f"{kind.__name__}({', '.join(names)})"


def _similar(name):
    """The patterns that may be meant by a name that is none of theirs."""
    if found := closest(name, _NAMES):
        return f"Did you mean {found}?"
    return f"There are {', '.join(sorted(_NAMES))}."


def _argument(node):
    """A literal, a pattern, or lists of patterns, as in `PerHead([Causal()] * 2 + [Local(3)])`."""
    if not any(isinstance(part, ast.Name) for part in ast.walk(node)):
        try:
            return ast.literal_eval(node)
        except ValueError:
            told = f"An argument must be a literal or a pattern. Received: {ast.unparse(node)}"
            raise ValueError(told) from None
    match node:
        case ast.List(elements) | ast.Tuple(elements):
            return [_argument(element) for element in elements]
        case ast.BinOp(left, ast.Add(), right):
            left, right = _argument(left), _argument(right)
            if isinstance(left, list) and isinstance(right, list):
                return _check_size(left + right)
        case ast.BinOp(left, ast.Mult(), ast.Constant(int(times))):
            left = _argument(left)
            if isinstance(left, list):
                return _check_size(left * min(times, MOST + 1))
    return _pattern(node)


def _check_size(items):
    if len(items) > MOST or any(isinstance(item, list) for item in items):
        told = f"A list must hold at most {MOST} patterns, and no lists."
        raise ValueError(f"{told} Received: {len(items)} items or more")
    return items
