"""Find every package under the four folders that make up ``srigl_core``."""

from setuptools import find_packages, setup

ROOTS = {
    "srigl_core": "srigl_core",
    "srigl_core.reference": "reference",
    "srigl_core.backends": "backends",
    "srigl_core.benchmarks": "benchmarks",
}

setup(
    packages=[
        package
        for name, folder in ROOTS.items()
        for package in [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    ]
)
