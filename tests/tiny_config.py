"""``--config=tests/tiny_config.py:CORPUS``: the tiny experiment of the tests, from the command line."""

import pathlib

from configs.base import Experiment
from tests.experiments import tiny


def get_config(corpus: str) -> Experiment:
    return tiny(pathlib.Path(corpus))
