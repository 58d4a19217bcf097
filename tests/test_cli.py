"""`python -m fused_ce`: what it prints, what it writes, and how it refuses."""

import csv
import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
import time

import pytest
from matplotlib.figure import Figure

from fused_ce import backends
from fused_ce.__main__ import main
from fused_ce.bench import command, measure
from fused_ce.bench.losses import LOSSES, RIVALS
from fused_ce.bench.rows import Feed, parse_size, rows

QUICK = ["--against", "eager", "--repeats", "2", "--seconds", "0"]


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | environment,
    )


def run_without(module, *arguments):
    code = f"import sys; sys.modules[{module!r}] = None; from fused_ce.__main__ import main"
    return run_python("-c", f"{code}; sys.exit(main({list(arguments)}))")


@pytest.mark.parametrize("rich", [True, False])
def test_info_names_versions_and_backends(rich):
    done = run_python("-m", "fused_ce", "info") if rich else run_without("rich", "info")
    assert done.returncode == 0, done.stderr
    for cell in (*backends.build_info(), *backends.build_info().values()):
        assert cell in done.stdout
    for row in backends.table():
        assert any(all(cell in line for cell in row) for line in done.stdout.splitlines())


def test_import_leaves_the_compiler_out():
    """Which takes a second to import."""
    code = "import sys, torch; before = 'torch._dynamo' in sys.modules; import fused_ce; "
    done = run_python("-c", code + "assert before == ('torch._dynamo' in sys.modules)")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one capability alone")
@pytest.mark.parametrize(
    ("limit", "capabilities"), [("default", ["portable"]), ("avx2", ["avx2", "portable"])]
)
def test_limit_of_cpu_capability(limit, capabilities):
    code = "from fused_ce import backends; print(backends.build_info()['CPU capability'])"
    done = run_python("-c", code, ATEN_CPU_CAPABILITY=limit)
    assert done.stdout.strip() in capabilities, done.stderr


def test_bench_names_the_extra_it_needs():
    done = run_without("matplotlib", "bench", "bce", *QUICK)
    assert done.returncode == 2
    assert "bench needs matplotlib: pip install fused-ce[bench]" in done.stderr


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("bench")
    files = [f"--{kind}={folder / kind}.{kind}" for kind in ("csv", "json")]
    # 1Mi is large enough for the peak memory to be read, and 8Mi for a gradient's to be kept.
    cases = ["--case", "plain,inplace", "--size", "16x24,1Mi,8Mi", "--threads", "1"]
    plot = f"--plot={folder / 'plot.png'}"
    done = run_python("-m", "fused_ce", "bench", "bce", *cases, *QUICK, *files, plot)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_bench_prints_a_line_for_every_row(written):
    table, _ = written
    for case, one, size in [
        ("plain", "forward", "16x24"),
        ("plain", "both", "1Mi"),
        ("inplace", "both", "1Mi"),
    ]:
        wanted = f"{case} {one} float32 {size}".split()
        assert any(
            [c.strip() for c in line.split("│")][1:5] == wanted for line in table.split("\n")
        )
    assert "1 threads" in table


def test_bench_writes_csv(written):
    with (written[1] / "csv.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    # plain: three sizes and two passes; inplace: backward only. Each with ours and eager.
    assert len(records) == (3 * 2 + 3) * 2
    assert {r["contender"] for r in records} == {"fused_ce", "eager"}
    for r in records:
        for column in ("ms", "ms_quartile_1", "ms_quartile_3", "repeats", "ratio", "gb_per_s"):
            assert float(r[column]) > 0
        assert float(r["ms_quartile_1"]) <= float(r["ms"]) <= float(r["ms_quartile_3"])
        assert float(r["loss_error"]) < 1e-5
        assert (r["gradient_error"] == "") == (r["pass"] == "forward")
        assert r["accurate"] == "True"
        # Every byte once: logits and target, and the gradient.
        elements = {"16x24": 16 * 24, "1Mi": 2**20, "8Mi": 2**23}[r["size"]]
        count = 2 if r["pass"] == "forward" else 3
        moved = float(r["gb_per_s"]) * float(r["ms"]) * 1e6
        assert moved == pytest.approx(4 * count * elements)


def test_bench_writes_json_with_the_circumstances(written):
    found = json.loads((written[1] / "json.json").read_text())
    assert found["threads"] == 1
    assert found["copy_gb_per_s"] > 0
    assert found["machine"]
    assert found["build"] == backends.build_info()
    with (written[1] / "csv.csv").open(newline="") as file:
        assert len(found["rows"]) == len(list(csv.DictReader(file)))


@pytest.mark.parametrize("case", ["plain", "inplace"])
def test_bench_times_no_step_behind_another_contenders(case):
    (row,) = rows("bce", [case], ["float32"], ["4"], ["both"], "cpu")
    last = None

    def contender(name):
        def function(*arguments, **options):
            nonlocal last
            if last != name:
                time.sleep(0.02)
            last = name
            return row.entry()[1].fused(*arguments, **options)

        return function

    names = ("fused_ce", "eager")
    times, _ = measure._time(row, {name: contender(name) for name in names}, Feed(row), 3, 0)
    for name in names:
        assert len(times[name]) == 3
        assert max(times[name]) < 10


@pytest.mark.skipif(sys.platform != "linux", reason="the CPU's peak is read from /proc")
@pytest.mark.parametrize("size", ["1Mi", "8Mi"])
def test_bench_reads_the_peak_memory(written, size):
    found = json.loads((written[1] / "json.json").read_text())
    peaks = {
        (r["case"], r["pass"], r["contender"]): r["peak_logits"]
        for r in found["rows"]
        if r["size"] == size
    }
    # Eager keeps two buffers of the logits' size, we the gradient alone, in place not even that.
    assert peaks["plain", "both", "eager"] == pytest.approx(2, abs=0.2)
    assert peaks["plain", "both", "fused_ce"] == pytest.approx(1, abs=0.2)
    assert peaks["plain", "forward", "fused_ce"] == pytest.approx(0, abs=0.2)
    assert peaks["inplace", "both", "fused_ce"] == pytest.approx(0, abs=0.2)


def test_bench_draws_a_plot(written):
    image = (written[1] / "plot.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 5000


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--against", "eager,nobody", "unknown rival 'nobody' (choose from eager, compile)"),
        ("--device", "abacus", "unknown device 'abacus' (choose from cpu, cuda)"),
        ("--dtype", "float8", "unknown dtype 'float8'"),
        ("--case", "plain,odd", "unknown case 'odd'"),
        ("--pass", "sideways", "unknown pass 'sideways'"),
        ("--size", "12Q", "not a size: '12Q'"),
        ("--device", "meta", "unknown device 'meta'"),
        ("--device", "cpu:x", "unknown device 'cpu:x'"),
        ("--device", "cuda:99", "torch finds no cuda:99 here"),
        ("--repeats", "0", "'0' is not an integer of at least 1"),
        ("--repeats", "1.5", "'1.5' is not an integer of at least 1"),
        ("--threads", "x", "'x' is not an integer of at least 1"),
        ("--seconds", "x", "'x' is not a finite number of at least 0"),
        ("--seconds", "-1", "'-1' is not a finite number of at least 0"),
        ("--seconds", "nan", "'nan' is not a finite number of at least 0"),
        ("--seconds", "inf", "'inf' is not a finite number of at least 0"),
        ("--csv", "no/such/folder/x.csv", "cannot be written: no/such/folder/x.csv"),
        ("--csv", ".", "cannot be written: ."),
        ("--plot", "x.xyz", "x.xyz does not end in .png, .pdf or .svg"),
        ("--plot", "no/such/folder/x.png", "cannot be written: no/such/folder/x.png"),
    ],
)
def test_unknown_values_are_refused(option, value, message, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["bench", "bce", "--size", "4", *QUICK, option, value])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def quick_copy(monkeypatch):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(command, "copy_bandwidth", lambda device: 10.0)


@pytest.mark.usefixtures("quick_copy")
def test_inplace_has_no_forward_pass(capsys):
    assert main(["bench", "bce", "--case", "inplace", "--pass", "forward"]) == 2
    assert "nothing to measure" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_copy")
def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    plain = LOSSES["bce"].cases["plain"]
    wrong = dataclasses.replace(plain, fused=lambda x, t: 1.001 * plain.torch(x, t))
    loss = dataclasses.replace(LOSSES["bce"], cases={"plain": wrong})
    monkeypatch.setitem(LOSSES, "bce", loss)
    assert main(["bench", "bce", "--size", "64", *QUICK]) == 1
    assert "wrong result" in capsys.readouterr().err


@pytest.mark.parametrize(
    "size",
    ["1000000Gix1000", "1000000Gix1000000Gi", f"{10**20}x1"],
    ids=["memory", "bytes", "elements"],
)
@pytest.mark.usefixtures("quick_copy")
def test_inputs_that_do_not_fit_are_one_line(size, capsys):
    assert main(["bench", "ce", "--size", size, *QUICK]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"no inputs for plain forward float32 {size}: ")


@pytest.mark.usefixtures("quick_copy")
def test_a_device_may_have_an_index(capsys):
    assert main(["bench", "bce", "--size", "64", "--device", "cpu:3", *QUICK]) == 0
    assert "plain" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_copy")
def test_a_rival_that_raises_is_named_and_the_others_go_on(monkeypatch, tmp_path):
    def fails(*_):
        raise ValueError("\x1b[91mno such shape\x1b[0m: 4\nand more")

    broken = dataclasses.replace(RIVALS["compile"], function=lambda *_: fails)
    monkeypatch.setitem(RIVALS, "compile", broken)
    path = tmp_path / "ce.json"
    options = ["--size", "4x8", "--pass", "both", f"--json={path}", *QUICK]
    assert main(["bench", "ce", *options, "--against", "compile,eager"]) == 0
    written = json.loads(path.read_text())
    assert written["absent"] == ["compile, plain both float32 4x8: no such shape: 4"]
    assert {row["contender"] for row in written["rows"]} == {"fused_ce", "eager"}


@pytest.mark.parametrize(
    ("sizes", "panels"), [("4x8,4x16", 2), ("4x8,2x3x4", 1)], ids=["lines", "bars"]
)
@pytest.mark.usefixtures("quick_copy")
def test_lines_need_two_numbers_of_classes(sizes, panels, monkeypatch, tmp_path):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    options = ["--size", sizes, "--pass", "both", f"--plot={tmp_path / 'ce.png'}", *QUICK]
    assert main(["bench", "ce", *options]) == 0
    assert len(saved[0].axes) == panels  # speed and memory, or ratios
    colours = [{line.get_label(): line.get_color() for line in a.lines} for a in saved[0].axes]
    assert panels == 1 or colours[0] == colours[1]


@pytest.mark.usefixtures("quick_copy")
@pytest.mark.parametrize(
    ("loss", "case"), [(loss, case) for loss in LOSSES for case in LOSSES[loss].cases]
)
def test_every_case_runs_and_is_checked(loss, case, capsys):
    # 3 rows of 7 classes at 5 positions, to a loss over elements just as many of these; and of
    # one class, whose loss and gradient are 0
    options = ["--case", case, "--dtype", "float16", "--size", "3x7x5,3x1"]
    passes = ["--pass", "backward,both"]
    assert main(["bench", loss, *options, *passes, *QUICK]) == 0
    assert case in capsys.readouterr().out


@pytest.mark.usefixtures("quick_copy")
def test_vocabularies_are_plotted_and_absent_rivals_named(tmp_path, capsys):
    plot = tmp_path / "ce.png"
    sizes = ["--size", "4x8,4x16,2x3x4", "--pass", "both", "--case", "plain,inplace"]
    rivals = ["--against", "eager,liger-kernel,cut-cross-entropy"]
    assert main(["bench", "ce", *sizes, f"--plot={plot}", *QUICK, *rivals]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    # Installed or not, it has no kernel for the CPU.
    assert re.search(r"liger-kernel, 6 of 6 rows: (not installed|needs a GPU)", printed)
    assert "cut-cross-entropy, 6 of 6 rows: takes embeddings and a classifier" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_a_rival_cannot_do():
    flash = RIVALS["flash-attn"]
    installed = dataclasses.replace(flash, module="torch.nn")
    broken = dataclasses.replace(flash, module="torch.not_there")
    absent = dataclasses.replace(flash, module="no_such_package.losses")
    assert absent.missing("plain", 2, "cuda") == "not installed"
    assert broken.missing("plain", 2, "cuda") == (
        "cannot be imported: No module named 'torch.not_there'"
    )
    assert installed.missing("plain", 2, "cuda") is None
    assert installed.missing("plain", 2, "cpu") == "needs a GPU"
    assert installed.missing("plain", 4, "cuda") == "takes rows x classes only"
    assert installed.missing("weight", 2, "cuda") == "has no such option"


def test_classes_are_needed(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "ce", "--size", "100"])
    assert "not rows x classes: '100'" in capsys.readouterr().err


def test_sizes():
    assert parse_size("1000000") == (1_000_000,)
    assert parse_size("64Mi") == (64 << 20,)
    assert parse_size("8kx2Ki") == (8000, 2048)
    for wrong in ("0", "-1", "1.5", "K", "8K", "8i", "4x"):
        with pytest.raises(ValueError, match="not a size"):
            parse_size(wrong)


def test_rows_are_the_product_of_the_choices():
    found = list(rows("bce", ["plain", "inplace"], ["float32"], ["1", "2"], ["forward"], "cpu"))
    assert [(r.case, r.size) for r in found] == [("plain", "1"), ("plain", "2")]
