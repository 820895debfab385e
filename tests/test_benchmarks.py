"""The benchmarks compare what they say, tell when a result is wrong, and report what they found."""

import json
import math
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import pytest

from benchmarks import inputs, oracle, report
from benchmarks.__main__ import main
from benchmarks.contenders import CONTENDERS
from benchmarks.rows import LOCAL, TF, Bar, Job, Row, cpu_rows, exponent, gpu_rows
from benchmarks.turns import Worker, _without_folders, measure
from sparse_attn import parse_pattern
from sparse_attn.reference import dense_attention

PATTERNS = [
    "Full()",
    "Causal()",
    "Local(20)",
    "Local((30, None))",
    "Atrous(7)",
    "Causal() & Strided(16)",
    "Prefix(4) | Blocks(16)",
    "~Local(400)",  # some queries have no key
]
on_linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peaks of memory are read from /proc"
)
once = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="each contender chooses its own backend"
)
with_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="plots need matplotlib, of the extra [bench]"
)


@pytest.mark.parametrize("text", PATTERNS)
def test_rows_of_the_oracle_equal_the_whole(text):
    pattern, n = parse_pattern(text), 300
    q, k, v, grad = np.random.default_rng(0).normal(size=(4, n, 2, 4))
    keys = np.array([0, 5, 299])
    queries = np.union1d([0, 7, 150, 299], np.flatnonzero(pattern.mask(n)[:, keys].any(1)))
    out, _, gradients = dense_attention(q[None], k[None], v[None], pattern, out_grad=grad[None])
    whole = [x[0].reshape(n, -1) for x in (out, *gradients.values())]
    rows, columns = oracle.attention_rows(pattern, q, k, v, grad, queries, keys)
    for found, expected in zip([*rows, *columns], whole, strict=True):
        at = keys if len(found) == len(keys) else queries
        np.testing.assert_allclose(found, expected[at], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["attention", "layer"])
def test_the_sampled_answer_is_part_of_the_whole_one(kind, monkeypatch):
    job = Job("any", "Local(20)", 200, "training")
    whole = oracle.expected(job, kind)
    monkeypatch.setattr(oracle, "SHORT", 100)
    sampled = oracle.expected(job, kind)
    for (at, found), (_, expected) in zip(sampled, whole, strict=True):
        assert 0 < len(at) < job.n
        np.testing.assert_allclose(found, expected[at], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("short", [100, 512])
def test_a_wrong_output_is_caught(short, monkeypatch):
    monkeypatch.setattr(oracle, "SHORT", short)
    job = Job("any", "Local(20)", 200, "training")
    outputs = np.zeros((4, job.n, inputs.FEATURES))
    answer = oracle.expected(job, "attention")
    for output, (at, rows) in zip(outputs, answer, strict=True):
        output[at] = rows
    errors = oracle.check(job, "attention", outputs)
    assert list(errors) == list(oracle.NAMES)
    assert max(errors.values()) == 0
    for i, (at, _) in enumerate(answer):
        for wrong in (outputs[i, at[-1], 0] + 0.1, math.nan):
            changed = outputs.copy()
            changed[i, at[-1], 0] = wrong
            with pytest.raises(ArithmeticError, match=f"{oracle.NAMES[i]} of any must be within"):
                oracle.check(job, "attention", changed)


def test_a_wrong_product_is_caught():
    job = Job("any", n=64)
    a, b = inputs.arrays("gemm", job.n)
    assert oracle.check(job, "gemm", [a @ b])["out"] < 1e-6
    with pytest.raises(ArithmeticError, match="out of any"):
        oracle.check(job, "gemm", [b @ a])


@pytest.mark.parametrize("text", PATTERNS)
def test_pairs_are_counted(text):
    pattern = parse_pattern(text)
    assert inputs.pairs(pattern, 300) == pattern.mask(300).sum()


def test_useful_work_is_that_of_the_allowed_pairs():
    local = parse_pattern(LOCAL)
    forward = inputs.flops("attention", local, 1000, "forward")
    assert forward == 4 * 8 * 64 * local.mask(1000).sum()
    assert inputs.flops("attention", local, 1000, "training") == 3.5 * forward


def test_the_exponent_of_known_data():
    lengths = [4096, 8192, 65536]
    assert exponent(lengths, [3e-9 * n**1.5 for n in lengths]) == pytest.approx(1.5)
    assert exponent([4096], [1.0]) is None
    assert exponent(lengths, [1.0, 2.0, 0.0]) is None


@pytest.mark.parametrize("rows", [cpu_rows(), cpu_rows(8), gpu_rows(), gpu_rows(8)])
def test_rows_are_sound(rows):
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert {job.contender for job in row.jobs} <= set(CONTENDERS)
        assert len(set(row.jobs)) == len(row.jobs)
        for bar in row.bars:
            assert bar.quantity in report.QUANTITIES
            assert max(bar.of, bar.against or 0) < len(row.jobs)


def stored(row, seconds):
    """A row as it is stored, with made-up measurements."""
    made_up = {"peak": 10**9, "flops": 10**9, "errors": {"out": 1e-7}}
    measurements = [
        {"job": asdict(job), "seconds": s, "above": 1e8 * s, **made_up}
        for job, s in zip(row.jobs, seconds, strict=True)
    ]
    bars = [{**asdict(bar), "value": bar.value(measurements)} for bar in row.bars]
    about = {"date": "2020-01-01", "machine": {"cores": "2"}, "versions": {"Python": "3.11"}}
    return {**about, "curve": row.curve, "measurements": measurements, "bars": bars}


def made_up_results():
    jobs = (Job(TF), Job("Keras masked"))
    bars = (Bar("time", 0.2, 0, 1), Bar("speed", 9, 0, 1), Bar("share", None, 0, 1))
    row = stored(Row(f"forward, {LOCAL}, n = 4096", jobs, bars), [0.05, 0.4])
    bars = (Bar("exponent of time", 1.15), Bar("gigabytes", 5))
    curve = Row("growth, forward", (Job(TF), Job(TF, n=8192)), bars, curve=True)
    failed = stored(Row("JAX", jobs, (Bar("time", 1, 0, 1),)), [1, 1])
    failed["measurements"][1] = {"job": asdict(jobs[1]), "failed": "MemoryError: a | b"}
    failed["bars"][0]["value"] = Bar("time", 1, 0, 1).value(failed["measurements"])
    rows = {"forward": row, "growth": stored(curve, [1.0, 2.5]), "JAX": failed}
    return {"title": "Benchmarks", "command": "python -m benchmarks", "rows": rows}


def test_the_summary_has_the_ratios():
    lines = report.summary(made_up_results()).splitlines()
    ours = "| sparse_attn TensorFlow, Local(256) | Keras masked, Local(256) |"
    assert lines[2] == f"| forward {ours} 0.12 of its time | ≤ 0.2 | yes |"
    assert lines[3] == f"| forward {ours} 8.0 times as fast | ≥ 9 | no |"
    assert lines[4].endswith("| time ~ n^1.32 | ≤ 1.15 | no |")
    assert lines[5].endswith("| 1.0 GB for the whole process | ≤ 5 GB | yes |")
    assert lines[6] == f"| JAX {ours} failed | ≤ 1 |  |"
    assert len(lines) == 7


@with_matplotlib
def test_the_report_of_stored_results(tmp_path, capsys):
    path = tmp_path / "benchmarks.json"
    path.write_text(json.dumps(made_up_results()))
    main(["--report", str(path)])
    assert "| sparse_attn TensorFlow | forward | 1.32 | 1.32 |" in capsys.readouterr().out
    page = (tmp_path / "benchmarks.md").read_text()
    ours, peer = "sparse_attn TensorFlow, Local(256)", "Keras masked, Local(256)"
    said = f"| forward | {ours} | 8.0 times as fast | {peer} |"
    assert page.count(said) == 2  # a time and a speed
    assert f"| JAX | {ours} | failed | {peer} |" in page
    assert "800% of its rate" in page
    assert r"failed: MemoryError: a \| b" in page
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {path.name, "benchmarks.md", "benchmarks-time.svg", "benchmarks-memory.svg"}
    assert "](benchmarks-time.svg)" in page
    assert (tmp_path / "benchmarks-time.svg").read_text().rstrip().endswith("</svg>")


def test_the_page_is_for_readers_and_has_no_bars():
    page = report.markdown(made_up_results(), {})
    assert not any(word in page for word in ("≤", "≥", "reached", "bar"))


def test_the_bars_of_stored_results_are_printed_for_the_maintainers(tmp_path, capsys):
    path = tmp_path / "benchmarks.json"
    path.write_text(json.dumps(made_up_results()))
    assert main(["--bars", str(path)]) == 0
    assert capsys.readouterr().out == report.summary(made_up_results())
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("quantity", "value", "said"),
    [
        ("time", 0.123, "8.1 times as fast"),
        ("speed", 32.1, "32 times as fast"),
        ("time", 1.25, "0.80 times as fast"),
        ("time", 1.001, "1.0 times as fast"),
        ("peak memory", 0.15, "0.15 of its peak memory"),
        ("speed", None, "failed"),
    ],
)
def test_the_page_says_times_as_speeds(quantity, value, said):
    assert report.result({"quantity": quantity, "value": value}) == said


@pytest.mark.parametrize("rows", [cpu_rows(), gpu_rows()])
def test_every_row_has_a_section_of_the_page(rows):
    titles = {report.section(row.name) for row in rows}
    assert titles <= {title for title, *_ in report.SECTIONS}
    for row in rows:
        assert (report.section(row.name) == "Growth") == row.name.startswith("growth")


@with_matplotlib
def test_the_page_of_the_docs_is_made_of_its_results():
    path = Path(__file__).parents[1] / "docs" / "benchmarks.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    images = {what: f"benchmarks-{what}.svg" for what in report.PLOTS}
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert page == report.markdown(results, images), (
        "run `python -m benchmarks --report docs/benchmarks.json`"
    )


def test_messages_name_no_folders():
    said = _without_folders("cannot import x from y (/root/a-b/c.py), https://z.org/a/b")
    assert said == "cannot import x from y (c.py), https://z.org/a/b"


@on_linux
@once
def test_a_row_is_measured_in_processes_of_their_own_and_failures_are_told():
    jobs = (Job(TF, "Local(16)", 64), Job("Keras dense", "Full()", 64), Job(TF, "Nothing(1)", 64))
    ours, dense, failed = measure(Row("tiny", jobs), rounds=2, pause=0)
    for measurement, job in zip((ours, dense), jobs, strict=False):
        assert measurement["job"] == asdict(job)
        assert len(measurement["turns"]) == 2
        assert 0 < measurement["seconds"] < 10
        assert 0 < measurement["base"] < measurement["peak"]
        assert measurement["errors"]["out"] < 1e-4
    assert ours["flops"] == 4 * 8 * 64 * parse_pattern("Local(16)").mask(64).sum()
    assert failed["job"] == asdict(jobs[2])
    assert failed["failed"].startswith("ValueError: ")
    assert Bar("time", 1, 0, 1).value([ours, dense, failed]) > 0
    assert Bar("time", 1, 0, 2).value([ours, dense, failed]) is None
    assert Bar("exponent of time", 1).value([ours, failed]) is None


@on_linux
@once
@with_matplotlib
@pytest.mark.skipif(find_spec("tqdm") is None, reason="the bar needs tqdm, of the extra [bench]")
@pytest.mark.parametrize(("pattern", "status"), [("Local(16)", 0), ("Nothing(1)", 1)])
def test_the_program_fails_if_a_contender_does(pattern, status, tmp_path, monkeypatch):
    row = Row("tiny", (Job(TF, pattern, 64),))
    monkeypatch.setattr("benchmarks.__main__.cpu_rows", lambda shrink: [row])
    assert main(["--rounds", "1", "--out", str(tmp_path)]) == status
    measured = json.loads((tmp_path / "benchmarks.json").read_text())["rows"]["tiny"]
    assert ("failed" in measured["measurements"][0]) == bool(status)


@on_linux
def test_a_worker_has_a_limit_of_time():
    worker = Worker(Job(TF, n=64), limit=0.2)
    with pytest.raises(ChildProcessError, match=r"no answer in 0\.2 seconds"):
        worker.ask(turn=False)
    worker.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick"], "--quick: needs --out"),
        (["--only", "nothing"], "no row is called so"),
        (["--rounds", "0"], "--rounds: must be at least 1"),
    ],
)
@on_linux
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@on_linux
def test_rows_are_listed_and_chosen(capsys):
    assert main(["--list", "--only", "forward, Atrous"]) == 0
    assert capsys.readouterr().out == "forward, Atrous(64), n = 4096\n"
