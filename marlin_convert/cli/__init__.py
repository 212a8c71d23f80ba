"""The command line.

Not public: `marlin_convert` names what is.
"""

from .commands import cli as cli
from .main import main as main
