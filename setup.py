"""For tools that know no pyproject.toml, where everything stands."""

from setuptools import setup

setup()
