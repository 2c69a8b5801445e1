"""The demo, piece by piece and as a whole."""

import importlib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support import VARIANTS, backends

from sa_softmax import reference
from sa_softmax.backends import REGISTRY, Entry
from sa_softmax.backends.numpy.adapter import ReferenceAdapter as NumpyAdapter
from sa_softmax.conformance import oracle
from sa_softmax.conformance.golden import SAFETY

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[1]
STEPS = 30
ROUNDOFF = 2.0**-24
TINY = float(np.finfo(np.float32).tiny)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield importlib.import_module("demo")


@pytest.fixture(scope="module")
def char_model(demo: ModuleType) -> ModuleType:
    return importlib.import_module("char_model")


@pytest.fixture(scope="module")
def corpus(demo: ModuleType, char_model: ModuleType) -> Any:
    return char_model.Corpus.of(demo.read_text(None)[:40_000])


def untrained(char_model: ModuleType, corpus: Any, variant: str = "normalized") -> Any:
    torch.manual_seed(0)
    return char_model.CharModel(len(corpus.alphabet), variant)


def train(char_model: ModuleType, model: Any, corpus: Any, steps: int) -> list[Any]:
    """The first ``steps`` of STEPS, by a clock on which every step takes a second."""
    ticks = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(char_model, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
        return list(itertools.islice(char_model.train(model, corpus, STEPS, seed=0), steps))


@pytest.fixture(scope="module")
def trained(char_model: ModuleType, corpus: Any) -> tuple[Any, list[Any]]:
    model = untrained(char_model, corpus)
    history = train(char_model, model, corpus, STEPS)
    return model.eval(), history


# Training.


def test_training_lowers_the_loss(char_model: ModuleType, corpus: Any, trained: Any) -> None:
    model, history = trained
    assert [now.step for now in history] == list(range(1, STEPS + 1))
    assert [now.spent for now in history] == pytest.approx(np.arange(1, STEPS + 1) / STEPS)
    uniform = np.log2(len(corpus.alphabet))
    assert history[0].bits == pytest.approx(uniform, abs=1)
    # Better than the frequencies of the characters: the model makes use of what came before.
    frequencies = torch.cat([corpus.train, corpus.validation]).bincount().double()
    p = frequencies / frequencies.sum()
    unigram = -float((p * p.log2()).sum())
    assert np.mean([now.bits for now in history[-5:]]) < unigram < history[0].bits
    assert char_model.validation_bits(model, corpus) < unigram


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns_from_the_first_step(char_model: ModuleType, corpus: Any, variant: str) -> None:
    """Queries and keys that start at zero would have no gradient under normalized (semantics of R = 0)."""
    model = untrained(char_model, corpus, variant)
    train(char_model, model, corpus, 1)
    for name, parameter in model.named_parameters():
        assert bool((parameter.grad != 0).any()), name
    for block in model.blocks:
        q, k, _ = block.attention.qkv.weight.grad.chunk(3)
        assert bool((q != 0).any())
        assert bool((k != 0).any())


def test_training_repeats(char_model: ModuleType, corpus: Any, trained: Any) -> None:
    again = train(char_model, untrained(char_model, corpus), corpus, 3)
    assert [now.bits for now in again] == [now.bits for now in trained[1][:3]]


def test_model_does_not_see_the_future(char_model: ModuleType, corpus: Any, trained: Any) -> None:
    model, _ = trained
    text = corpus.validation[: char_model.CONTEXT].clone()
    with torch.no_grad():
        before = model(text[None])[0]
        text[50] = (text[50] + 1) % len(corpus.alphabet)
        after = model(text[None])[0]
    changed = (before != after).any(-1)
    assert not changed[:50].any()
    assert changed[50:].all()


def test_scores_are_what_attention_works_on(demo: ModuleType, corpus: Any, trained: Any) -> None:
    model, _ = trained
    x = model.embedding(corpus.validation[None, :32])
    attention, x = model.blocks[0].attention, model.blocks[0].norm1(x)
    with torch.no_grad():
        _, _, v, _ = attention.heads(x)
        scores, out = attention.scores(x), attention(x)
    assert torch.equal(model.scores(corpus.validation[None, :32])[0], scores)
    y = reference.sa_softmax(scores.double().numpy(), where=np.tri(32, dtype=bool))
    expected = (y @ v.double().numpy()).swapaxes(1, 2).reshape(
        1, 32, -1
    ) @ attention.out.weight.detach().double().numpy().T
    # Three sums in a row, of 32 to 128 terms.
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=200 * ROUNDOFF * abs(expected).max())


def test_sample_goes_on_from_held_out_text(demo: ModuleType, corpus: Any, trained: Any) -> None:
    prompt = corpus.decode(demo.held_out_passage(corpus, 40))
    assert prompt in corpus.decode(corpus.validation)
    panels = [demo.sampled(trained[0], corpus, seed, length=50).renderable.plain for seed in (0, 0, 1)]
    assert all(text.startswith(prompt) and len(text) == 90 for text in panels)
    assert panels[0] == panels[1] != panels[2]


@pytest.mark.parametrize(
    "text",
    ["no paragraphs " * 300, "ab\n\n   cd " + "e" * 4000, "f" * 4500 + "gh" + "\n" * 60],
    ids=["none", "none held out", "blank to the end"],
)
def test_passage_where_paragraphs_are_missing(demo: ModuleType, char_model: ModuleType, text: str) -> None:
    corpus = char_model.Corpus.of(text)
    assert torch.equal(demo.held_out_passage(corpus, 40), corpus.validation[:40])


# Agreement of the backends.


@pytest.fixture(scope="module")
def scores(demo: ModuleType, corpus: Any, trained: Any) -> np.ndarray[Any, Any]:
    """A corner of the model's scores, which 50-digit arithmetic can follow."""
    return np.ascontiguousarray(demo.attention_scores(trained[0], corpus)[:, :1, :, :20, :20])


@pytest.fixture(scope="module")
def bounds(scores: np.ndarray[Any, Any]) -> dict[tuple[str, str], tuple[float, float]]:
    """(largest error, largest value) by variant and operation: the suite's own bound, and exact values."""
    upstream = np.random.default_rng(0).standard_normal(scores.shape, np.float32)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for index in np.ndindex(scores.shape[:-1]):
        x, g = oracle.exact(scores[index]), oracle.exact(upstream[index])
        on = np.arange(len(x)) <= index[-1]
        for variant in VARIANTS:
            row = oracle.row(x, g, on, variant, TINY, ROUNDOFF)
            for operation, value, scale in (
                ("sa_softmax", row.y, row.y_scale),
                ("sa_softmax_vjp", row.dx, row.dx_scale),
            ):
                size = np.abs(value.astype(float))
                error = ROUNDOFF * (SAFETY * np.maximum(scale.astype(float), 0) + size)
                found.setdefault((variant, operation), []).append((error.max(), size.max()))
    return {key: (max(e for e, _ in rows), max(s for _, s in rows)) for key, rows in found.items()}


@pytest.mark.parametrize("entry", backends())
def test_backends_agree_within_rounding(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, scores: Any, bounds: Any, entry: Entry
) -> None:
    monkeypatch.setattr(demo, "REGISTRY", (entry,))
    results = list(demo.agreements(scores, seed=0))
    assert [(result.variant, result.operation) for result in results] == list(
        itertools.product(demo.VARIANTS, ("sa_softmax", "sa_softmax_vjp"))
    )
    declared = entry.adapter().operations
    for result in results:
        if result.operation not in declared:
            assert result.skipped == "not declared"
            continue
        bound, largest = bounds[result.variant, result.operation]
        assert 0 < result.error <= bound
        assert result.relative == pytest.approx(result.error / largest)


class Fake(SimpleNamespace):
    """A registry entry whose backend is an object at hand."""

    name = "fake"

    def installed(self) -> bool:
        return True


def wrong(change: float) -> Fake:
    class Wrong(NumpyAdapter):
        name = "fake"

        def sa_softmax(self, x: Any, **options: Any) -> Any:
            y = super().sa_softmax(x, **options)
            y.flat[0] += change
            return y

    return Fake(adapter=Wrong)


@pytest.mark.parametrize("change", [1e-3, np.nan])
def test_a_wrong_backend_shows(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, scores: Any, change: float) -> None:
    monkeypatch.setattr(demo, "REGISTRY", (wrong(change),))
    for result in demo.agreements(scores, seed=0):
        if result.operation == "sa_softmax":
            assert result.error == pytest.approx(change, rel=1e-3, nan_ok=True)
        else:
            assert result.error < 1e-5


def test_table_shows_what_did_not_run(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, scores: Any) -> None:
    class ForwardOnly(NumpyAdapter):
        operations = ("sa_softmax",)

    absent = Entry("absent", "no_such_framework", "Array", extra="absent")
    monkeypatch.setattr(demo, "REGISTRY", (Fake(adapter=ForwardOnly), absent))
    console = Console(width=80)
    with console.capture() as capture:
        console.print(demo.agreement_table(demo.agreements(scores, seed=0)))
    text = capture.get()
    assert len(re.findall(r"fake .*\de-0\d .*not declared", text)) == len(VARIANTS)
    assert re.search(r"absent +not installed", text)
    assert "'sa-softmax[absent]'" in text


# The whole.


def test_demo_from_end_to_end(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # Every framework conforms in its own tests.
    monkeypatch.setattr(demo, "REGISTRY", [entry for entry in REGISTRY if entry.name in ("numpy", "torch")])
    text = tmp_path / "text.txt"
    text.write_text(demo.read_text(None)[:20_000], encoding="utf-8")
    status = demo.main(["--text", str(text), "--seconds", "2", "--output", str(tmp_path / "out")])
    output = capsys.readouterr().out
    assert status == 0
    steps = ["1  Train", "2  Sample", "3  Agree", "4  Conform", "5  Look"]
    places = [output.index(step) for step in steps]
    assert places == sorted(places)
    assert "20,000 characters" in output
    picture = tmp_path / "out" / "attention.png"
    assert f"saved {picture}" in output
    assert_png(picture)


def test_demo_fails_with_a_backend_that_does_not_conform(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "REGISTRY", [wrong(1e-3)])
    assert demo.main(["--seconds", "0.01", "--output", str(tmp_path)]) == 1
    assert "fake does not conform; see: sa-softmax conformance --backend fake" in capsys.readouterr().out


def assert_png(path: Path) -> None:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content[-8:-4] == b"IEND"
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    assert width > height > 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b"too short", "must have at least 2580 characters; got 9"),
        (b"a" * 5000, "at least two different characters; got only 'a'"),
        (b"\xff\xfe" * 5000, "must be UTF-8 text"),
    ],
    ids=["missing", "empty", "short", "one character", "not UTF-8"],
)
def test_text_that_cannot_be_used(
    demo: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes | None, message: str
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    assert demo.main(["--text", str(text), "--output", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file(demo: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    assert demo.main(["--output", str(tmp_path / "out")]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--seconds", "0"], ["--seconds", "nan"], ["--seconds", "x"], ["--seed", "-1"], ["--variant", "plain"]],
)
def test_arguments_that_make_no_sense(
    demo: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


# 6  Deploy


def printed(table: Any) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_exported_model_writes_the_same_text(
    demo: ModuleType, char_model: ModuleType, corpus: Any, tmp_path: Path
) -> None:
    pytest.importorskip("sa_softmax_native")
    model, file = untrained(char_model, corpus).eval(), tmp_path / "model.onnx"
    char_model.save_onnx(model, corpus.alphabet, file)
    found = demo.deployments(model, corpus, file, seed=0, length=20)
    assert [each.client for each in found] == ["PyTorch", "ONNX, bodies", "ONNX, kernels"]
    assert len({each.text for each in found}) == 1
    assert all(len(each.text) == 20 and each.milliseconds > 0 for each in found)


def test_a_missing_library_is_told_and_the_rest_goes_on(
    demo: ModuleType, char_model: ModuleType, corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    model, file = untrained(char_model, corpus).eval(), tmp_path / "model.onnx"
    char_model.save_onnx(model, corpus.alphabet, file)
    monkeypatch.setitem(sys.modules, "sa_softmax_native", None)
    *_, kernels = demo.deployments(model, corpus, file, seed=0, length=2)
    assert "pip install sa-softmax-native" in kernels.skipped
    assert "not installed" in printed(demo.deployment_table([demo.Deployment("x, bodies", 1.0, "ab"), kernels]))


def test_another_text_is_not_called_the_same(demo: ModuleType) -> None:
    found = [demo.Deployment("PyTorch", 4.0, "abcd"), demo.Deployment("ONNX, bodies", 2.0, "abxd")]
    text = printed(demo.deployment_table(found))
    assert "the same 2 of 4 characters" in text
    assert "0.50 times as fast" in text
    assert "the same text" not in text
