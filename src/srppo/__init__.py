"""srppo: align language models from demonstrations only, by Self-Rewarding PPO.

    import srppo
    config = srppo.load_recipe("recipes/quickstart.yaml", {"ppo.iterations": 10})
    summary = srppo.align(config)

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srppo.config import RunConfig, load_recipe
    from srppo.errors import SrppoError
    from srppo.job import align, run_diagnose, run_evaluate, run_ppo, run_sft

__version__ = "0.1.0"
_HOME = {
    "align": "job",
    "run_sft": "job",
    "run_ppo": "job",
    "run_evaluate": "job",
    "run_diagnose": "job",
    "RunConfig": "config",
    "load_recipe": "config",
    "SrppoError": "errors",
}
__all__ = ["RunConfig", "SrppoError", "__version__", "align", "load_recipe", "run_diagnose", "run_evaluate", "run_ppo", "run_sft"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'srppo' has no attribute {name!r}")
    return getattr(import_module(f"srppo.{_HOME[name]}"), name)
