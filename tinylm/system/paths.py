"""The paths of files that come with TinyLM: the model and the Serve configs.

In a checkout, `tinylm/models` and `tinylm/configs` are symbolic links to the directories at the top. In a wheel they
are copies.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
DEFAULT_MODEL = _PACKAGE / "models" / "stories-8m"
CONFIGS = _PACKAGE / "configs"
