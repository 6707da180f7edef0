"""Networks that turn pictures or clips into features: TorchScript files, factories, and Inception.

TorchScript is code: a file is run, as a program is. Load files from sources you trust; the report
has their SHA-256. A factory, "package.module:function", is Python code of yours, called without
arguments. Nothing is ever downloaded.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import warnings
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import BundleError, EngineError
from fvae_deploy.optional import require

INCEPTION = "inception"
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
)
RAW = ("rescale", "resize")  # arguments of StyleGAN's I3D that must be off, by name
BATCH = 8

Features = NDArray[np.float64]  # [n, d]


class FeatureNetwork:
    """A network in torch that maps pictures [n, 3, h, w] or clips [n, 3, t, h, w] to features."""

    def __init__(self, name: str, network: Any, sha256: str | None, **keywords: Any) -> None:
        self.name, self.sha256 = name, sha256
        self._network, self._keywords = network, keywords
        self._size: int | None = None

    def features(self, pictures: NDArray[np.float32]) -> Features:
        """Return the features [n, d] of pictures or clips; maps are averaged over their places.

        Raises EngineError for what is no array of n finite vectors of one length.
        """
        import torch

        found = []
        try:
            with torch.no_grad():
                for start in range(0, len(pictures), BATCH):
                    batch = torch.from_numpy(np.ascontiguousarray(pictures[start : start + BATCH]))
                    found.append(_array(self._network(batch, **self._keywords)))
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise EngineError(
                f"expected {self.name} to take an array of shape {list(pictures.shape)}, found: "
                f"{reason[0][:200]}: give a network with such an input"
            ) from error
        return self._checked(np.concatenate(found), len(pictures))

    def _checked(self, values: NDArray[Any], count: int) -> Features:
        values = values.reshape(*values.shape[:2], -1).mean(axis=2) if values.ndim > 2 else values
        if values.ndim != 2 or len(values) != count:
            raise EngineError(
                f"expected features [{count}, d] from {self.name}, found an array of shape "
                f"{list(values.shape)}: give a network that returns one vector for each input"
            )
        if self._size not in (None, values.shape[1]):
            raise EngineError(
                f"expected {self._size} features from {self.name} as before, found "
                f"{values.shape[1]}: give one whose features do not depend on the input's size"
            )
        if not np.isfinite(values).all():
            raise EngineError(
                f"expected finite features from {self.name}, found NaN or infinity: check its "
                "weights and the range of its input"
            )
        self._size = values.shape[1]
        return values.astype(np.float64)


def _array(output: Any) -> NDArray[Any]:
    """Return a network's output as an array; a list of one tensor is that tensor."""
    import torch

    if isinstance(output, list | tuple) and len(output) == 1:
        output = output[0]
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"it returned a {type(output).__name__}, not a tensor")
    return output.detach().cpu().float().numpy()


def open_i3d(path: Path) -> FeatureNetwork:
    """Load an I3D network in TorchScript for FVD; clips [n, 3, 17, 224, 224] in -1 to 1.

    The file that StyleGAN's and the published evaluation use resizes and scales by itself and ends
    in a softmax, unless it is told not to: where its arguments are so named, it is told.
    """
    network, sha256 = load_script(path, "--i3d")
    names = {argument.name for argument in network.forward.schema.arguments}
    keywords = dict.fromkeys(names & set(RAW), False)
    if "return_features" in names:
        keywords["return_features"] = True
    return FeatureNetwork(path.name, network, sha256, **keywords)


def open_features(name: str) -> FeatureNetwork:
    """Open "inception", a TorchScript file or "module:function"; pictures are from 0 to 1."""
    if name == INCEPTION:
        return _inception()
    if not Path(name).exists() and ":" in name:
        return FeatureNetwork(name, made(name, "--features"), None)
    network, sha256 = load_script(Path(name), "--features")
    return FeatureNetwork(Path(name).name, network, sha256)


def load_script(path: Path, option: str) -> tuple[Any, str]:
    """Load a TorchScript file; return the module and the file's SHA-256.

    Raises BundleError for what is no such file, EngineError where torch is missing.
    """
    require("torch")
    import torch

    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with zipfile.ZipFile(path) as archive:
            scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
        if not scripted:
            raise ValueError("weights without code, or another archive")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # I3D exists in no newer form
            module = torch.jit.load(str(path), map_location="cpu").eval()
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise BundleError(
            f"expected a TorchScript file for {option}, found {path} ({reason}): save one with "
            "torch.jit.script or torch.jit.trace"
        ) from error
    return module, digest


def made(factory: str, option: str, *arguments: Any) -> Any:
    """Import "package.module:function" and return what it makes; raises BundleError."""
    module, colon, name = factory.partition(":")
    if not (colon and all(part.isidentifier() for part in f"{module}.{name}".split("."))):
        raise BundleError(
            f"expected a factory like package.module:function, found {factory!r}: correct {option}"
        )
    if sys.path[0] not in ("", os.getcwd()):
        sys.path.insert(0, os.getcwd())  # as with `python -m`
    try:
        target: Any = importlib.import_module(module)
        for part in name.split("."):
            target = getattr(target, part)
        result = target(*arguments)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise BundleError(
            f"expected {factory} to be found and to make a network, found {reason}: run fvae in "
            f"the folder of its code or add that to PYTHONPATH, or correct {option}"
        ) from error
    evaluate: Callable[[], Any] | None = getattr(result, "eval", None)
    if callable(evaluate):
        evaluate()
    return result


def _inception() -> FeatureNetwork:
    """Return the network of the FID in the literature, from the package pytorch-fid."""
    require("torch")
    if find_spec("pytorch_fid") is None:
        raise EngineError(
            "expected the package pytorch-fid for --features inception, found none: pip install "
            "pytorch-fid"
        )
    import torch
    from pytorch_fid.inception import InceptionV3

    weights = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not weights.is_file():
        raise BundleError(
            f"expected the weights of Inception at {weights}, found none, and fvae downloads "
            f"nothing: fetch {INCEPTION_URL} to that path"
        )
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if not digest.startswith(INCEPTION_FILE[-12:-4]):
        raise BundleError(
            f"expected the weights of Inception at {weights}, found a file with another SHA-256 "
            f"({digest[:8]}): fetch {INCEPTION_URL} again"
        )
    return FeatureNetwork(INCEPTION, InceptionV3([3]).eval(), digest)
