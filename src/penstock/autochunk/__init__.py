"""AutoChunk: a module's activations within a budget, by computing parts in slices. Knows nothing of language models.

`penstock.autochunk(module, args, budget)` is `api.autochunk`. Function and folder have one name, so the package itself
can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """See `penstock.autochunk.api.autochunk`."""
        from penstock.autochunk.api import autochunk

        return autochunk(*args, **options)


sys.modules[__name__].__class__ = _CallablePackage
