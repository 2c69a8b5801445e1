"""The experiment on the paper's claims: what it compares, and that an interruption loses nothing."""

import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[1]
TEXT = "".join(chr(97 + (i * i + i // 7) % 11) for i in range(12_000))


@pytest.fixture(scope="module")
def load() -> Iterator[Any]:
    """Imports a module of the experiment by name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples" / "experiment")
        yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(load: Any) -> ModuleType:
    made: ModuleType = load("model")
    return made


@pytest.fixture(scope="module")
def training(load: Any) -> ModuleType:
    made: ModuleType = load("training")
    return made


@pytest.fixture
def tiny(model: ModuleType, monkeypatch: pytest.MonkeyPatch, training: ModuleType) -> Any:
    monkeypatch.setattr(training, "SAVE_EVERY", 4)
    monkeypatch.setattr(training, "MEASURE_EVERY", 2)
    return model.Size(width=16, heads=2, layers=1, context=32, batch=4, rate=1e-2, steps=10)


@pytest.mark.parametrize("attention", ["softmax", "product", "normalized"])
@pytest.mark.parametrize("position", ["rope", "alibi", "learned"])
def test_no_character_sees_those_after_it(model: ModuleType, tiny: Any, attention: str, position: str) -> None:
    torch.manual_seed(0)
    decoder = model.Decoder(7, tiny, attention, position)
    indices = torch.randint(7, (2, 40))
    changed = indices.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 7
    before, after = decoder(indices), decoder(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().max() > 1e-3


@pytest.mark.parametrize("position", ["rope", "alibi", "learned"])
def test_distance_alone_counts(model: ModuleType, tiny: Any, position: str) -> None:
    """The scores of a query and the keys before it do not depend on where in the text they stand."""
    torch.manual_seed(0)
    encoding = model._ENCODINGS[position](tiny)
    if position == "learned":
        torch.nn.init.normal_(encoding.bias)
    one = torch.randn(1, 2, 1, 8).expand(1, 2, 50, 8)
    q, k, bias = encoding(one, one)
    scores = q @ k.mT + (0 if bias is None else bias)
    for behind in (0, 3, 20, 45):
        diagonal = scores.diagonal(-behind, -2, -1)
        torch.testing.assert_close(diagonal, diagonal[..., :1].expand_as(diagonal))
    assert scores[0, 0, -1].std() > 1e-3  # and it does count


def test_the_three_attentions_differ(model: ModuleType) -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 8).unbind()
    bias = torch.randn(2, 9, 9)
    softmax, product, normalized = (model.attend(q, k, v, attention, bias) for attention in model.ATTENTIONS)
    x = (q @ k.mT / math.sqrt(8) + bias).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -math.inf)
    torch.testing.assert_close(softmax, x.softmax(-1) @ v)
    torch.testing.assert_close(product, (x.masked_fill(x == -math.inf, 0) * x.softmax(-1)) @ v)
    assert (normalized - softmax).abs().max() > 0.1


@pytest.mark.parametrize("stopped", [3, 4, 7, 9])
def test_an_interrupted_run_ends_with_the_numbers_of_one_that_was_not(
    training: ModuleType, tiny: Any, tmp_path: Path, stopped: int
) -> None:
    text = training.Text.of(TEXT, tiny)
    run = training.Run("normalized", "learned", 0, tiny, 10)
    whole = training.train(run, text, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(step: int) -> None:
        if step == stopped:
            raise Stop

    with pytest.raises(Stop):
        training.train(run, text, tmp_path / "parts", progress=stop)
    steps: list[int] = []
    resumed = training.train(run, text, tmp_path / "parts", progress=steps.append)
    assert steps[0] == stopped // 4 * 4 + 1  # it did go on, rather than begin again
    assert resumed == whole
    assert training.train(run, text, tmp_path / "parts") == whole  # and is read from then on
    assert sorted(path.suffix for path in (tmp_path / "parts").iterdir()) == [".json", ".json"]


def test_a_folder_of_another_configuration_is_refused(training: ModuleType, tiny: Any, tmp_path: Path) -> None:
    text = training.Text.of(TEXT, tiny)
    run = training.Run("softmax", "alibi", 0, tiny, 2)
    training.train(run, text, tmp_path)
    with pytest.raises(ValueError, match="another configuration"):
        training.train(replace(run, steps=3), text, tmp_path)


def test_a_short_text_is_refused(training: ModuleType, tiny: Any) -> None:
    with pytest.raises(ValueError, match="at least 2570 characters"):
        training.Text.of(TEXT[:2000], tiny)


def test_seeds_and_attentions_share_their_batches(training: ModuleType, tiny: Any) -> None:
    data = training.Text.of(TEXT, tiny).train
    one, same, other = (training._batch(data, tiny, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_whole_experiment(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    main, model = _main(), load("model")
    monkeypatch.setitem(model.PRESETS, "small", tiny)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    output = tmp_path / "out"
    arguments = ["--steps", "4", "--seeds", "2", "--epochs", "1", "--text", str(text), "--output", str(output)]
    assert main(arguments) == 0
    page = (output / "experiment.md").read_text()
    runs = [json.loads(path.read_text()) for path in sorted((output / "runs").glob("*[0-9].json"))]
    assert len(runs) == 18
    own = [run["held_out"]["1"] for run in runs if (run["attention"], run["position"]) == ("product", "rope")]
    assert f"| rope | product | {sum(own) / 2:.3f} ({min(own):.3f} to {max(own):.3f}) |" in page
    assert (output / "experiment.png").stat().st_size > 10_000
    assert main([*arguments[:5], "2", *arguments[6:]]) == 2  # digits of another number of epochs


def _main() -> Any:
    path = ROOT / "examples" / "experiment" / "__main__.py"
    spec = importlib.util.spec_from_file_location("experiment_main", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main
