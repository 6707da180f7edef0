"""On PYTHONPATH, this hides the installed packages that a bare machine with a GPU lacks."""

import sys
from importlib.machinery import PathFinder

ASKED_FOR = {"torch", "triton", "numpy", "onnx", "safetensors"}
BROUGHT = {  # by those
    "_distutils_hack",
    "filelock",
    "fsspec",
    "functorch",
    "google",
    "jinja2",
    "markupsafe",
    "ml_dtypes",
    "mpmath",
    "networkx",
    "setuptools",
    "sympy",
    "torchgen",
    "typing_extensions",
}


class Bare(PathFinder):
    """Finds what the ordinary finder does, without other installed packages."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        """Return the spec of a module, or None."""
        spec = super().find_spec(fullname, path, target)
        if spec is None or fullname.partition(".")[0] in ASKED_FOR | BROUGHT:
            return spec
        places = [spec.origin or "", *(spec.submodule_search_locations or ())]
        return None if any("site-packages" in place for place in places) else spec


sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
