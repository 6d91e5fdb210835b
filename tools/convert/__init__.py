"""Published checkpoints to runs and back; see ``python -m tools.convert --help``."""
