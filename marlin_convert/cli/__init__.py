"""The command line."""

from .commands import cli as cli
from .main import main as main
