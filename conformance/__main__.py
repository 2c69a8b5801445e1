"""``python -m sa_softmax.conformance`` is ``sa-softmax conformance``."""

import sys

from sa_softmax.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["conformance"]
    main()
