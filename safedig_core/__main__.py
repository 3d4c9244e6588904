"""python -m safedig_core <command>"""

from .cli.parser import main
from .distributed import leave

if __name__ == "__main__":  # not where a benchmark's process of its own imports this
    leave(main())
