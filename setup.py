"""What pyproject.toml cannot say: the recipes stand at the top of the repository, and inside the package in a wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dylo_moe", "dylo_moe.*"]), "dylo_moe.recipes"],
    package_dir={"dylo_moe.recipes": "recipes"},
    package_data={
        "": ["py.typed", "*.json"],
        "dylo_moe.recipes": ["*.yaml"],
        "dylo_moe.report": ["templates/*"],
        "dylo_moe.commands.plan": ["configs/*.json"],
    },
)
