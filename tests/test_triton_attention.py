"""The attention kernels in Triton's interpreter, and packed sequences on every device."""

# ruff: noqa: E402
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from support import VARIANTS

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from sa_softmax.backends.torch import sa_attention, varlen_sa_attention

ROOT = Path(__file__).parent.parent


def test_kernels_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "SA_SOFTMAX_IMPLEMENTATION": "composition"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["tests/interpreted_triton_attention.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    counts = re.search(r"(\d+) passed", run.stdout)
    assert counts is not None
    assert int(counts[1]) >= 45


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_sequences_are_attention_one_by_one(variant: str) -> None:
    q, k, v = (torch.randn(n, h, 4, dtype=torch.float64) for n, h in ((9, 2), (12, 1), (12, 1)))
    cu_q, cu_k = ([0, 4, 4, 9], [0, 5, 7, 12])
    o = varlen_sa_attention(
        q,
        k,
        v,
        *(torch.tensor(cu, dtype=torch.int32) for cu in (cu_q, cu_k)),
        5,
        5,
        variant=variant,
        window_size=(2, 0),
    )
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        shift = (d - c) - (b - a)
        window = torch.arange(d - c) >= torch.arange(b - a).unsqueeze(-1) + shift - 2
        q_, k_, v_ = q[a:b].transpose(0, 1), k[c:d].transpose(0, 1), v[c:d].transpose(0, 1)
        expected = sa_attention(q_, k_, v_, variant=variant, mask=window, is_causal=True, q_offset=shift)
        torch.testing.assert_close(o[a:b].transpose(0, 1), expected, rtol=0, atol=0)


def test_errors_of_packed_sequences() -> None:
    q = torch.ones(4, 2, 3)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    for error, match, change in (
        (ValueError, "must be \\(total length, heads, dimension\\)", {"q": q[None]}),
        (TypeError, "cu_seq_q must have the dtype of cumulative lengths", {"cu_seq_q": cu.long()}),
        (ValueError, "must both be \\(N \\+ 1,\\)", {"cu_seq_k": cu[:1]}),
        (TypeError, "max_k must be an integer", {"max_k": 4.0}),
        (ValueError, "window_size must be \\(left, right\\)", {"window_size": (-2, 0)}),
        (ValueError, "heads must be a multiple", {"k": torch.ones(4, 3, 3), "v": torch.ones(4, 3, 3)}),
    ):
        arguments = {"q": q, "k": q, "v": q, "cu_seq_q": cu, "cu_seq_k": cu, "max_q": 4, "max_k": 4} | change
        with pytest.raises(error, match=match):
            varlen_sa_attention(**arguments)
