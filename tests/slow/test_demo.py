"""The demo in `examples/demo`, in a configuration that takes seconds."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from srigl_core import CondensedWeight, list_backends

REASON = 'the demo needs its packages: pip install -e ".[demo]"'
for package in ("rich", "sklearn", "matplotlib", "joblib"):
    pytest.importorskip(package, reason=REASON)

import run  # noqa: E402
from latency import CSR, DENSE, OURS, contenders, interleaved  # noqa: E402
from network import CondensedMlp  # noqa: E402
from report import Experiment, agreements  # noqa: E402
from rich.console import Console  # noqa: E402
from tables import deployment_sections, example, training_sections  # noqa: E402
from threadpoolctl import threadpool_limits  # noqa: E402

from srigl_core.benchmarks.reproduce.datasets import load_dataset  # noqa: E402
from srigl_core.benchmarks.reproduce.mlp import Mlp  # noqa: E402
from srigl_core.benchmarks.reproduce.training import train  # noqa: E402

DEMO = Path(__file__).parents[2] / "examples" / "demo"
SMALL = (("epochs", 3), ("delta_t", 5))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The report, the folder and the printed text of one small demo."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    console = Console(file=io.StringIO(), width=200)
    experiment = Experiment(sparsities=(0.8, 0.9), seeds=(3,), changes=SMALL)
    with threadpool_limits(1):
        report = run.run_demo(experiment, folder, console=console, rounds=3)
    return report, folder, console.file.getvalue()


def test_the_network_survives_saving_and_every_backend_agrees(tmp_path):
    (spec,) = Experiment(sparsities=(0.9,), seeds=(0,), changes=SMALL).kept()
    data = load_dataset("digits-noise", 0)
    with threadpool_limits(1):
        result, kept = train(spec, keep=True)
    saved = CondensedMlp.from_masked(kept.network, kept.masks, data)
    saved.save(tmp_path / "network.safetensors")
    loaded = CondensedMlp.load(tmp_path / "network.safetensors")
    assert loaded.weights == saved.weights
    assert list(loaded.weights) == ["hidden1", "hidden2", "output"]
    entries = agreements(loaded, kept.network, data)
    assert {entry["backend"] for entry in entries} == {
        status.name
        for status in list_backends()
        if status.available and status.capabilities.device == "cpu"
    }
    for entry in entries:
        assert entry["agrees"]
        assert entry["accuracy"] == pytest.approx(100 * result.accuracy)
    network = kept.network
    wrong = Mlp(network.weights, {name: -bias for name, bias in network.biases.items()})
    assert not any(entry["agrees"] for entry in agreements(loaded, wrong, data))


@pytest.mark.parametrize("batch", [1, 5])
def test_every_contender_computes_the_same(batch):
    rng = np.random.default_rng(0)
    weights = {
        "hidden1": CondensedWeight.random((9, 512), fan_in=5, n_active=7, rng=rng),
        "output": CondensedWeight.random((4, 9), fan_in=3, rng=rng),
    }
    biases = {n: rng.standard_normal(w.shape[0], np.float32) for n, w in weights.items()}
    data = load_dataset("digits-noise", 0)
    network, x = CondensedMlp(weights, biases, data.mean, data.scale), data.test_x[:batch]
    expected = network.to_masked().forward(x)[-1]
    calls = contenders(network, x)
    assert set(calls) == {DENSE, CSR, OURS}
    for name, call in calls.items():
        result = call().T if name == CSR else call()
        np.testing.assert_allclose(
            np.reshape(result, expected.shape), expected, rtol=1e-4, atol=1e-5
        )


def test_contenders_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = interleaved(calls, rounds=4)
    runs = re.sub(r"(.)\1*", r"\1", "".join(order))
    assert runs.endswith("abcbcacababc")
    assert all(len(seconds) == 4 for seconds in samples.values())


def test_full_adds_methods_and_seeds():
    short, full = (Experiment.of_size(7, full=full) for full in (False, True))
    assert short.seeds == (7, 8, 9)
    assert set(full.methods) - set(short.methods) == {"set", "static-fan-in"}
    assert set(short.seeds) < set(full.seeds)
    assert len(short.runs()) == 4 * 3 * (1 + 3 * 4)  # folds, seeds, methods


def test_the_report_is_complete(demo):
    report, folder, _ = demo
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    cells = [(entry["method"], entry["sparsity"]) for entry in report["training"]]
    assert cells[0] == ("dense", 0.0)
    assert len(set(cells)) == len(cells) == 1 + 2 * 4
    by_cell = {}
    for entry in report["training"]:
        values = by_cell[entry["method"], entry["sparsity"]] = 100 * np.array(entry["accuracies"])
        assert entry["accuracy"] == pytest.approx(np.mean(values))
        assert entry["standard_error"] == pytest.approx(np.std(values, ddof=1) / 2)
    assert len(report["differences"]) == 2 * 4
    for entry in report["differences"]:
        other = entry["other"], 0.0 if entry["other"] == "dense" else entry["sparsity"]
        pairs = by_cell["srigl", entry["sparsity"]] - by_cell[other]
        assert entry["mean"] == pytest.approx(np.mean(pairs))
        assert entry["error"] == pytest.approx(np.std(pairs, ddof=1) / 2)
    assert len(report["verdicts"]) == 2 * 4
    assert [network["sparsity"] for network in report["networks"]] == [0.8, 0.9]
    assert all(backend["agrees"] for net in report["networks"] for backend in net["backends"])
    for name in ("accuracy.png", "mask.png", "latency.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_first_layer_is_followed_from_update_to_update(demo):
    for entry in demo[0]["first_layer"]:
        shares = entry["shares_on_pixels"]
        for counts, share in ((entry["before"], shares[0]), (entry["after"], shares[-1])):
            assert share == pytest.approx(sum(counts[:64]) / sum(counts))
        assert len(shares) == 1 + 18  # 3 epochs of 42 steps; at 5, 10, ..., 90, below 94


def test_terminal_and_page_show_the_reports_numbers(demo):
    report, folder, text = demo
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert page.index("<img") < page.index("<table")  # pictures first
    assert not re.search(r"(src|href)='(?!data:)", page)
    sections = training_sections(report) + deployment_sections(report)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for section in sections:
        for row in section.rows:
            assert " ".join(row) in lines
            cells = "</td><td>".join(row).replace("->", "-&gt;")
            assert f"<tr><td>{cells}</td></tr>" in page
    shown = [cell for section in sections for row in section.rows for cell in row]
    for entry in report["training"]:
        assert f"{entry['accuracy']:.1f} ± {entry['standard_error']:.1f}" in shown
    for entry in report["differences"]:
        assert f"{entry['mean']:+.1f} ± {entry['error']:.1f}" in shown
    for each in report["verdicts"]:
        assert f"{each['mean']:+.1f} ± {each['error']:.1f} points, {each['outcome']}" in text
        assert each["text"] in page


def test_the_printed_lines_load_a_network_and_predict_what_the_table_says(demo):
    report, folder, text = demo
    code = example(report, folder)
    assert code in text
    lines = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) - 1 == 5  # and one that says where the files are
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{report['networks'][-1]['backends'][0]['accuracy']:.2f} % correct\n"


def test_latencies_name_every_contender_and_their_ratios_add_up(demo):
    report, _, text = demo
    assert [(entry["sparsity"], entry["batch"]) for entry in report["latency"]] == [
        (0.8, 1),
        (0.8, 256),
        (0.9, 1),
        (0.9, 256),
    ]
    for entry in report["latency"]:
        medians = entry["median_us"]
        assert set(medians) == {DENSE, CSR, OURS}
        for name, key in ((DENSE, "times_faster_than_dense"), (CSR, "times_faster_than_csr")):
            assert entry[key] == pytest.approx(medians[name] / medians[OURS])
            assert f"{entry[key]:.2f}x" in text
        for name, (lower, upper) in entry["quartiles_us"].items():
            assert lower <= medians[name] <= upper


def test_the_command_writes_the_report(monkeypatch, tmp_path):
    small = Experiment(("srigl",), (0.9,), seeds=(0,), changes=SMALL)
    monkeypatch.setattr(Experiment, "of_size", lambda seed, full: small)
    monkeypatch.setattr(run, "BATCHES", (1,))
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "out")])
    run.main()
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_command_fails_where_a_backend_disagrees(monkeypatch, tmp_path):
    networks = [{"backends": [{"backend": "scipy", "agrees": False}]}]
    monkeypatch.setattr(run, "run_demo", lambda *args, **kwargs: {"networks": networks})
    monkeypatch.setattr(sys, "argv", ["demo"])
    with pytest.raises(SystemExit, match=r"differ from the dense network's: scipy"):
        run.main()


@pytest.mark.parametrize(
    ("prelude", "message"),
    [
        ("sys.modules['sklearn'] = None", r'sklearn; .* pip install -e "\.\[demo\]"'),
        ("sys.modules['matplotlib'] = None", r'matplotlib; .* pip install -e "\.\[demo\]"'),
        ("sys.argv += ['--out', sys.argv[0]]", "File exists"),
        ("sys.argv += ['--seed', '-1']", "--seed -1 is negative"),
    ],
)
def test_what_the_user_can_fix_is_one_line(prelude, message, tmp_path):
    (tmp_path / "file").write_text("")
    program = (
        f"import runpy, sys; sys.argv = ['file']; {prelude}; "
        f"runpy.run_path({str(DEMO)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode in (1, 2)
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(rf"error: .*{message}", last), done.stderr
    assert "Traceback" not in done.stderr
