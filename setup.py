"""The package is pure Python and described in pyproject.toml; this file is for tools that still run setup.py."""

from setuptools import setup

setup()
