"""``python -m engine`` is the command ``murmur``."""

from engine.cli import app

app()
