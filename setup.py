"""Stub for tools that look for it; the metadata is in setup.cfg."""

from setuptools import setup

setup()
