"""The example that pretrains GPT-NeoX: the same start and data for all three, resumed runs, refusals."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
for needed in ("accelerate", "matplotlib", "rich"):
    pytest.importorskip(needed)
ROOT = Path(__file__).parents[1]
TINY = {"width": 16, "layers": 1, "heads": 2, "context": 16, "batch": 4, "steps": 4, "rate": 1e-2}

pytestmark = pytest.mark.filterwarnings("default")  # those of Trainer


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        module = importlib.import_module("pretrain_neox")
        patch.setitem(module.SIZES, "small", module.Size(**TINY))
        yield module
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(b"to be or not to be, that is the question. " * 60)
    return path


def run(example: ModuleType, text: Path, output: Path, *options: str) -> int:
    return example.main(["--text", str(text), "--output", str(output), *options])


def test_three_runs_from_one_start_over_one_order(
    example: ModuleType, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    made: list[Any] = []
    starts: list[list[Any]] = []
    seen: list[list[Any]] = []
    original = example.make

    def make(*args: Any) -> Any:
        model = original(*args)
        made.append(model.config._attn_implementation)
        starts.append([weight.clone() for weight in model.parameters()])
        batches: list[Any] = []
        seen.append(batches)
        model.register_forward_pre_hook(
            lambda module, args, kwargs: batches.append(kwargs["input_ids"]) if module.training else None,
            with_kwargs=True,
        )
        return model

    monkeypatch.setattr(example, "make", make)
    assert run(example, text, tmp_path) == 0
    assert made == ["sdpa", "sa_softmax", "sa_softmax_product"]
    for start, batches in zip(starts, seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(start, starts[0], strict=True))
        assert len(batches) == 4
        assert all(torch.equal(a, b) for a, b in zip(batches, seen[0], strict=True))
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("softmax", "normalized", "product", "step 4"))
    assert (tmp_path / "losses.png").stat().st_size > 10_000
    for name, implementation in list(example.IMPLEMENTATIONS.items())[1:]:
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name / "checkpoint-4")
        assert saved.config._attn_implementation == implementation


def test_an_interrupted_run_goes_on_ends_the_same_and_is_complete(
    example: ModuleType, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: dict[str, Any] = {}
    monkeypatch.setattr(example, "plot", lambda curves, path: whole.update(curves))
    assert run(example, text, tmp_path / "whole") == 0
    expected, steps = dict(whole), []

    class Interrupted(example.Report):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)
            if len(steps) == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(example, "Report", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(example, text, tmp_path / "parts")
        whole.clear()
        assert run(example, text, tmp_path / "parts") == 0
    assert steps == [1, 2, 3, 3, 4] + [1, 2, 3, 4] * 2
    assert whole == expected
    monkeypatch.setattr(example.transformers.Trainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    whole.clear()
    assert run(example, text, tmp_path / "parts") == 0
    assert whole == expected


def test_what_is_refused(example: ModuleType, text: Path, tmp_path: Path, capsys: Any) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"short")
    assert run(example, short, tmp_path / "none") == 2
    assert "must have at least 640 bytes for this size; got 5" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert run(example, tmp_path / "missing", tmp_path / "none") == 2
    (tmp_path / "settings.json").write_text('{"steps": 9}')
    assert run(example, text, tmp_path, "--steps", "4") == 2
    assert "steps: 9 there, 4 now" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(example, text, tmp_path, "--steps", "0")


def test_the_text_by_default_is_python_s_library(example: ModuleType) -> None:
    text = example.read_text(None)
    assert len(text) > 2_000_000
    assert b"def unified_diff" in text
