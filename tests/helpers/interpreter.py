"""Triton's interpreter, quicker than it comes."""

import dataclasses
import functools

from triton.runtime import interpreter


def make_quick() -> None:
    """Leave out what the interpreter repeats or throws away; results are the same bit for bit.

    A process that interprets compiles nothing, so that Triton's functions can stay patched for as long as it lives; the
    interpreter patches them again with every launch and every call of a function within a kernel, which takes four
    tenths of the time of our kernels. It also computes every sum and product of int32 a second time in int64, for a
    check of overflows that only asserts in its debug mode, and makes a table of all types for every look into it.
    """
    patch, scope = interpreter._patch_lang, interpreter._LangPatchScope()  # with nothing to restore
    builder, patched = interpreter.interpreter_builder, set()

    @functools.cache
    def patch_once(fn):
        languages = (interpreter.tl, interpreter.tl.core)
        seen = frozenset(id(value) for value in fn.__globals__.values() if any(value is each for each in languages))
        if seen not in patched:
            patched.add(seen)
            patch(fn)
        return scope

    look_up = interpreter._get_np_dtype
    number = functools.cache(look_up)

    def numpy_type(kind):
        element = kind.element_ty if isinstance(kind, interpreter.tl.block_type) else kind
        return look_up(element) if isinstance(element, interpreter.tl.pointer_type) else number(element)

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, numpy_type
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
