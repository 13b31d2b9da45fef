"""python -m mmapwal"""

import sys

from mmapwal.cli import main

if __name__ == "__main__":
    sys.exit(main())
