"""The conformance suite: golden cases that every backend of SA-Softmax must pass.

Run it with ``sa-softmax conformance --backend NAME|module:attribute``, or from pytest with :func:`parametrize`.
What a backend implements is in :mod:`sa_softmax.backends.protocol`.
"""

from sa_softmax.conformance.cases import Case, cases
from sa_softmax.conformance.golden import GoldenDataError
from sa_softmax.conformance.runner import Report, Result, execute, load, parametrize, run

__all__ = ["Case", "GoldenDataError", "Report", "Result", "cases", "execute", "load", "parametrize", "run"]
