"""One head of a trained character model under three row operations, by the demo's own code."""

import sys
from pathlib import Path

from rich.console import Console

__all__ = ["maps"]


def maps(path: Path, seconds: float = 60.0) -> None:
    """Train the demo's model for ``seconds`` and draw the sharpest head of its last layer on held-out text."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import demo
    from char_model import Corpus

    corpus = Corpus.of(demo.read_text(None))
    model = demo.train_model(corpus, "normalized", seconds, 0, Console(stderr=True))
    demo.plot_attention(model, corpus, path)
