"""Measure all that is timed: speed, scaling, quantised bases, serving; a fresh process of each in turn, so that their rounds lie far apart.

python bench/timings.py            # the sizes of the documentation, ten minutes
python bench/timings.py --quick    # a minute
"""

import argparse

import quantised
import scaling
import serving
import speed
from parts import run


def main() -> None:
    """Measure all parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions of small sizes")
    options = ["--quick"] if parser.parse_args().quick else []
    run([module.part(options) for module in (speed, scaling, quantised, serving)])


if __name__ == "__main__":
    main()
