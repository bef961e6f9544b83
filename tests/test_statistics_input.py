"""The statistics take arrays or anybody's frames, and refuse what they cannot average, in words."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from prefzoo.benchmarks import statistics as harness

pd = pytest.importorskip("pandas")
PACKAGE = Path(__file__).resolve().parent.parent / "benchmarks" / "statistics"


def rows(y_SNKO, *, cluster=True, method=None):
    """One row per judgement, shuffled, with labels that sort as the array does."""
    place = [axis.ravel() for axis in np.indices(y_SNKO.shape)]
    frame = pd.DataFrame({
        "y": y_SNKO.ravel(),
        "seed": place[0],
        "prompt": [f"prompt {i:03d}" for i in place[1]],
        "sample": place[2],
        "order": np.array(["ab", "ba"])[place[3]],
    })  # fmt: skip
    if cluster:
        frame["cluster"] = place[1] // 2
    if method is not None:
        frame["method"] = method
    return frame.sample(frac=1, random_state=0)


def same(a, b):
    """Equal but for the order of sums."""
    return all(
        value == other or value == pytest.approx(other, rel=1e-9)
        for value, other in zip(a.to_dict().values(), b.to_dict().values(), strict=True)
    )


@pytest.fixture
def y_SNKO():
    return np.random.default_rng(0).integers(0, 3, (3, 20, 2, 2)) / 2


@pytest.mark.parametrize("kind", [lambda frame: frame, lambda frame: pa.Table.from_pandas(frame, preserve_index=False)])
def test_a_frame_is_the_array_of_its_means(kind, y_SNKO):
    clusters = np.arange(20) // 2
    expected = harness.win_rate(y_SNKO.mean((2, 3)), clusters=clusters)
    assert same(harness.win_rate(kind(rows(y_SNKO))), expected)
    renamed = rows(y_SNKO).rename(columns={"y": "gold", "prompt": "id", "cluster": "passage", "seed": "run"})
    assert harness.win_rate(kind(renamed), y="gold", prompt="id", cluster="passage", seed="run") == harness.win_rate(
        rows(y_SNKO)
    )
    other = np.random.default_rng(1).random(y_SNKO.shape)
    for paired_seeds in (True, False):
        gap = harness.difference(kind(rows(y_SNKO)), kind(rows(other)), paired_seeds=paired_seeds)
        tables = y_SNKO.mean((2, 3)), other.mean((2, 3))
        assert same(gap, harness.difference(*tables, paired_seeds=paired_seeds, clusters=clusters))


def test_a_single_run_may_be_a_flat_array_or_a_frame_without_seeds():
    y_N = np.random.default_rng(2).random(9)
    frame = pd.DataFrame({"y": y_N, "prompt": range(9)})
    assert harness.mean(y_N) == harness.mean(y_N[None]) == harness.mean(frame)


def test_frames_are_matched_by_their_labels_not_by_their_order():
    a_N, b_N = np.random.default_rng(3).random((2, 9))
    a, b = (pd.DataFrame({"y": y_N, "prompt": list("abcdefghi")}) for y_N in (a_N, b_N))
    assert harness.difference(a, b[::-1], paired_seeds=False) == harness.difference(a_N, b_N, paired_seeds=False)


def test_methods_come_as_a_mapping_or_as_one_frame():
    random = np.random.default_rng(4)
    tables = {name: random.random((3, 20, 1, 1)) for name in ("dpo", "ipo", "kto")}
    frame = pd.concat([rows(y, cluster=False, method=name) for name, y in tables.items()])
    arrays = {name: y.mean((2, 3)) for name, y in tables.items()}
    options = {"paired_seeds": True, "resamples": 200, "pairs": [("dpo", "ipo"), ("dpo", "kto")]}
    assert harness.max_t(frame, **options) == harness.max_t(arrays, **options)
    assert harness.max_t(frame.rename(columns={"method": "name"}), method="name", **options).pairs[1] == ("dpo", "kto")
    assert harness.noise_of(frame) == harness.noise_of(arrays)


def test_unparsed_judgements_are_scored_as_stated_and_counted():
    y_SN = np.array([[1.0, math.nan, 0.0, 1.0], [1.0, 0.5, math.nan, 1.0]])
    for value in (0, 0.5, 1):
        found = harness.win_rate(y_SN, unparsed=value)
        assert found.estimate == np.nan_to_num(y_SN, nan=value).mean() and found.n_unparsed == 2
    bounds = harness.sensitivity(y_SN)
    assert bounds.worst.estimate < bounds.half.estimate < bounds.best.estimate
    frame = pd.DataFrame({"y": [1, None, 0.5, 1], "prompt": [0, 1, 2, 3]})
    assert harness.win_rate(frame, unparsed=0.5).n_unparsed == 1
    assert harness.difference(y_SN, y_SN, paired_seeds=True, unparsed=0.5).n_unparsed == 4
    assert harness.win_rate(np.ones((1, 3)), unparsed=0.5).n_unparsed == 0


def without(frame, **cell):
    keep = np.ones(len(frame), bool)
    for column, value in cell.items():
        keep &= (frame[column] != value).to_numpy()
    return frame[keep] if len(cell) == 1 else frame[~np.logical_and.reduce([frame[c] == v for c, v in cell.items()])]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda f: harness.mean(without(f, seed=1, prompt="prompt 004")), "without a row.*seed 1, prompt 'prompt 004'"),
        (
            lambda f: harness.mean(without(f, seed=2, prompt="prompt 007", sample=0, order="ba")),
            "some orders only, seed 2, prompt 'prompt 007', sample 0, order 'ba' is missing",
        ),
        (lambda f: harness.mean(f.drop(columns="sample")), "several rows with one seed, prompt, order"),
        (lambda f: harness.mean(f.assign(cluster=range(len(f)))), "is in several clusters"),
        (lambda f: harness.mean(f, y="judgment"), "no column 'judgment'"),
        (lambda f: harness.mean(f, prompt="promt"), "did you mean 'prompt'"),
        (lambda f: harness.mean(f, clusters=[1] * 20), "cluster='passage'"),
        (lambda f: harness.mean(f.assign(y=math.nan)), "row 0 of column 'y' is nan.*unparsed=0.5"),
        (lambda f: harness.mean(f[:0]), "no rows"),
        (lambda f: harness.mean([1.0, 0.5], y="gold"), "columns are named for data frames"),
        (lambda f: harness.mean([1.0, math.nan], unparsed=0.3), "0.5, 0 or 1"),
        (
            lambda f: harness.difference(f, without(f, prompt="prompt 003"), paired_seeds=False),
            "b_SN has no prompt 'prompt 003'",
        ),
        (lambda f: harness.difference(f, f.assign(seed=f.seed + 1), paired_seeds=True), "b_SN has no seed 0"),
        (lambda f: harness.mcnemar(f, f), "a_N has 3 seeds"),
        (lambda f: harness.max_t({"a": f}, paired_seeds=True), "1 method"),
        (lambda f: harness.max_t({"a": f, "b": f}, paired_seeds=True, pairs=[("a", "c")]), "no method 'c'"),
        (lambda f: harness.noise_of({"a": [0.1, 0.2], "b": [0.2, 0.3]}), "a has one seed"),
    ],
)
def test_refusals_name_the_place(call, words, y_SNKO):
    with pytest.raises(ValueError, match=words):
        call(rows(y_SNKO))


def test_an_unknown_option_is_not_taken_for_a_column():
    with pytest.raises(TypeError, match="no option 'levle', did you mean 'level'"):
        harness.mean([0.5, 1.0], levle="0.9")


def test_the_package_needs_numpy_and_scipy_only(tmp_path):
    (tmp_path / "statistics_alone").symlink_to(PACKAGE, target_is_directory=True)
    code = f"""
import sys

class OnlyNumpyAndScipy:
    def find_spec(self, name, path=None, target=None):
        root = name.split(".")[0]
        known = root in sys.stdlib_module_names or root.startswith("_")
        if not known and root not in ("numpy", "scipy", "statistics_alone"):
            raise ImportError(name + " is neither numpy nor scipy")

sys.meta_path.insert(0, OnlyNumpyAndScipy())
sys.path += {[str(tmp_path), *site_packages()]!r}
import statistics_alone
print(statistics_alone.win_rate([[1.0, 0.5, 1.0]]).estimate)
"""
    found = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) == pytest.approx(2.5 / 3)


def site_packages() -> list[str]:
    return sorted({str(Path(module.__file__).resolve().parent.parent) for module in (np, __import__("scipy"))})
