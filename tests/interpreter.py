"""Triton's interpreter in 40% of its time, with the same bits (tests/kernels/test_interpreter.py).

A training step of the smoke test: 3.3 s before, 1.3 s after. What it leaves out, in Triton 3.6 to
3.9, is work whose result nobody sees: every call of a device function wraps the whole language anew
though the launch has wrapped it; every integer sum is checked for overflow in int64, and the check
is thrown away unless `debug` is set; every value makes its type, shape and a table of dtypes anew.
Run by path, for test processes have no package in common.
"""

import dataclasses
import math
from types import ModuleType
from typing import Any


def shorten(interpreter: ModuleType) -> dict[str, Any]:
    """Changes the module `triton.runtime.interpreter`; what it replaced there, by name."""
    core, options = interpreter.tl.core, interpreter.interpreter_builder.options
    assert not options.debug
    numpy_dtype, patch_lang = interpreter._get_np_dtype, interpreter._patch_lang
    block_type_init = core.block_type.__init__
    numpy_dtypes: dict[str, Any] = {}
    shapes: dict[tuple[int, ...], Any] = {}
    blocks: dict[tuple[Any, ...], Any] = {}
    wrapped: set[str] = set()  # modules of the language, by the launch that is under way

    def get_np_dtype(type: Any) -> Any:
        name = type.scalar.name
        if name not in numpy_dtypes:
            numpy_dtypes[name] = numpy_dtype(type)
        return numpy_dtypes[name]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        shape = type.shape if type.is_block() else ()
        if shape not in shapes:
            sizes = core.tuple([core.constexpr(size) for size in shape])
            shapes[shape] = core.constexpr(math.prod(shape)), sizes
        self.numel, self.shape = shapes[shape]

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in blocks:
            block_type_init(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def wrap(fn: Any) -> Any:
        names = {
            value.__name__
            for value in fn.__globals__.values()
            if value is interpreter.tl or value is core
        }
        if names and names <= wrapped:
            return interpreter._LangPatchScope()
        scope = patch_lang(fn)
        if not wrapped:  # a launch: only it restores what it has wrapped
            scope.set_attr(core.tensor, "__init__", tensor)
            scope.set_attr(core.block_type, "__init__", block_type)
            restore = scope.restore

            def end() -> None:
                restore()
                wrapped.clear()

            scope.restore = end
        wrapped.update(names)
        return scope

    interpreter._get_np_dtype, interpreter._patch_lang = get_np_dtype, wrap
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    return {"_get_np_dtype": numpy_dtype, "_patch_lang": patch_lang, "options": options}
