"""Time models: python benchmark.py --model beit_base_patch16_224, the same as beitzoo benchmark."""

import sys

from beitzoo.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "benchmark")
    main()
