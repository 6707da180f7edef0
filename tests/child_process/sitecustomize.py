"""Register the fake engine in every Python process that a test starts.

Python imports this file at startup, since `fake_engine.register` puts its folder on PYTHONPATH.
"""

import sys
from pathlib import Path

from fvae_deploy.engines.base import ENGINES, Entry

sys.path.append(str(Path(__file__).parents[1]))
ENGINES["fake"] = Entry("fake_engine", ("numpy",), "")
