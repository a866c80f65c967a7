"""Seeded mutations of settings, of JSON and of bytes, for the tests of faults."""

import copy
import math

TEXTS = (
    "",
    " ",
    "~",
    "null",
    "no",
    "a\nb",
    "a\0b",
    "\x1b[31m",
    "\ud800",
    "\u202eabc",
    "Ünïcödé ✓",
    "../../etc/passwd",
    "/proc/self/mem",
    "/dev/null",
    "/nowhere/at/all",
    "hub:",
    "hub:a/b:c:d",
    "${oc.env:HOME}",
    "${teacher}",
    "{{ 7 * 7 }}",
    "%s%n",
    "x" * 5000,
    "1e9",
    "600k",
    "-5M",
    "1_0",
    "9" * 5000,
    "(((((a+)+)+)+)+$",
    "[",
)
NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    2**15,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**30,
    10**400,
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e308,
    -1e308,
    math.inf,
    -math.inf,
    math.nan,
)
OTHERS = (None, True, False, [], {}, [[]], [None], [1, "a"], {"": 1}, {"a": {"b": {}}}, [1] * 300, {1: 2}, {None: 1})


def any_value(rng):
    """A value that is seldom right."""
    return copy.deepcopy(rng.choice(rng.choice((TEXTS, NUMBERS, OTHERS))))


def places(tree, path=()):
    """The paths of all values in a tree of mappings and lists."""
    found = []
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        found += [(*path, key), *places(value, (*path, key))]
    return found


def mutated_tree(rng, tree, times):
    """A copy of a tree with some of its values replaced, removed, moved, or beside ones that nobody knows."""
    tree = copy.deepcopy(tree)
    for _ in range(times):
        known = places(tree)
        if not known:
            return tree
        *above, key = rng.choice(known)
        parent = tree
        for step in above:
            parent = parent[step]
        change = rng.choice(
            ("replace", "replace", "replace", "remove", "unknown", "misspell", "wrap", "double", "swap")
        )
        value = parent[key]
        if change == "replace":
            parent[key] = any_value(rng)
        elif change == "remove":
            del parent[key]
        elif change == "wrap":
            parent[key] = rng.choice(([value], {"value": value}, str(value)))
        elif change == "swap":
            parent[key] = at(tree, rng.choice(known))
        elif change == "double" and isinstance(value, int | float | str | list) and not isinstance(value, bool):
            parent[key] = value * rng.choice((2, 3, 1000)) if sized(value) < 1000 else value
        elif isinstance(parent, dict):
            name = str(key)
            cut = rng.randrange(len(name) + 1)
            new = rng.choice(TEXTS) if change == "unknown" else name[:cut] + rng.choice("xé. ") + name[cut + 1 :]
            parent[new] = parent.pop(key) if change == "misspell" else any_value(rng)
    return tree


def at(tree, path):
    """A copy of the value at a path."""
    for step in path:
        tree = tree[step]
    return copy.deepcopy(tree)


def sized(value):
    return 0 if isinstance(value, int | float) else len(value)


def mutated_bytes(rng, content, times):
    """Bytes with some flipped, cut off, left out, said twice or put in."""
    content = bytearray(content)
    for _ in range(times):
        first, second = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        change = rng.choice(("flip", "flip", "cut", "behead", "remove", "repeat", "insert", "zero"))
        if change == "flip" and first < len(content):
            content[first] ^= 1 << rng.randrange(8)
        elif change == "cut":
            del content[second:]
        elif change == "behead":
            del content[:first]
        elif change == "remove":
            del content[first : min(second, first + 40)]
        elif change == "repeat":
            content[first:first] = content[first : first + 60]
        elif change == "insert":
            piece = rng.choice(
                (b"\0", b"\n", b"\r", b'"', b"{", b"[" * 3000, b"\xff\xfe", b"\xef\xbb\xbf", rng.randbytes(9))
            )
            content[first:first] = piece
        elif change == "zero":
            content[first : first + 16] = bytes(len(content[first : first + 16]))
    return bytes(content)
