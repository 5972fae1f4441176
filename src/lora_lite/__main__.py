"""`python -m lora_lite`."""

import sys

from lora_lite.cli import main

if __name__ == "__main__":
    sys.exit(main())
