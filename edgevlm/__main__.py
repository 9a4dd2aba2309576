import os
import sys

from .cli import main

code = main()
if code == 130:
    # Interrupted inside code that a library had compiled from a string, Python ends `python -m` by the signal although the
    # exception was handled (https://github.com/python/cpython/pull/11862); the promised exit code is kept by leaving directly.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
