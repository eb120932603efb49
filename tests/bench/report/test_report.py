"""`fastbert bench report`: pages of real small runs, and of samples with invented numbers of a GPU
that the tests have not got; samples say so in their device's name."""

import copy
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fastbert import cli
from fastbert.errors import UserError
from fastbert_bench.config import ReportConfig, StepBenchConfig
from fastbert_bench.kernels.costs import COSTS, H100, model_sizes
from fastbert_bench.measure import result as results
from fastbert_bench.report import build as report
from fastbert_bench.report import compare as report_compare
from fastbert_bench.report import figures as report_figures
from fastbert_bench.report import files as report_files
from fastbert_bench.report import readme as report_readme
from fastbert_bench.report.page import number
from fastbert_bench.suites import step

SAMPLE_GPU = "SAMPLE GPU (invented numbers)"
SAMPLE_CONDITIONS = {
    "device_type": "cuda", "device": SAMPLE_GPU, "torch": "2.11.0", "triton": "3.6.0",
    "python": "3.12.0", "commit": "0123456789ab", "date": "2026-01-02T03:04:05+00:00",
    "capability": 90, "nvidia_smi": {"power.limit": "700.00 W", "clocks.sm": "1980 MHz"},
}  # fmt: skip
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def times(ms, rounds=5):
    return {"ms": ms, "ms_p20": 0.98 * ms, "ms_p80": 1.03 * ms, "rounds_ms": [ms] * rounds}


def sample_kernels():
    """As kernels.stage writes it: every kernel at 80% of its floor, eager 3 x slower."""
    rows = []
    for cost in COSTS:
        sizes = model_sizes(768, 512)
        floor = 1e3 * H100.floor(cost.bytes_of(sizes), cost.flops_of(sizes))
        for contender, ms in (("ours", floor / 0.8), ("eager", 3 * floor / 0.8)):
            row = {"op": cost.op, "direction": cost.direction, "sizes": sizes}
            rows.append(row | {"contender": contender, "floor_share": floor / ms, **times(ms)})
        rows.append(row | {"contender": "fa3", "why": "MissingError: not installed"})
    ops = {cost.op: {"error": None, "checks": [{"check": "out", "ok": True}]} for cost in COSTS}
    ceilings = {"bandwidth": H100.bandwidth, "matrix": H100.matrix}
    return {
        "stage": "kernels", "quick": False, "conditions": SAMPLE_CONDITIONS, "ops": ops,
        "rows": rows, "ceilings": ceilings,
    }  # fmt: skip


def sample_step(S=512, B=64):
    """As fastbert_bench.gpu.step writes it."""
    rows = [
        {"name": name, "real_tokens_per_second": B * S / ms * 1e3, "ratio": ms / 30,
         "peak_memory_bytes": 2**33, "mfu": 15 / ms, **times(ms)}
        for name, ms in (("fastbert", 30.0), ("hf-sdpa", 60.0))
    ]  # fmt: skip
    return {
        "stage": "step", "conditions": SAMPLE_CONDITIONS,
        "workload": {"name": "sample", "model": "base", "B": B, "S": S, "lengths": "full"},
        "failed": ["hf-eager: OutOfMemoryError: 80 GiB"], "contenders": rows, "floor_ms": 25.0,
        "checks": {"losses are finite and fall": True, "graph: same bits": False},
        "ablations": [
            {"name": "without the CUDA graph", "ms": 36.0, "ratio": 1.2, "peak_memory_bytes": 9},
            {"name": "gradients in bf16", "ms": 29.0, "ratio": 0.97, "peak_memory_bytes": 9},
            {"name": "plain PyTorch ops", "failed": "OutOfMemoryError: 80 GiB"},
        ],
        "targets": {"mfu": {"target": 0.5, "measured": 0.5, "holds": True}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sizes = {
        "model_type": "bert", "vocab_size": 1500, "hidden_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 32,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(sizes))
    return str(path)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, model):
    """Two real runs of `bench step` that differ in sequence length only; short, not compiled."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "can_compile", lambda device: False)
        patch.setattr(step, "SECONDS_PER_ROUND", 0.02)
        for S in (16, 32):
            result = step.run(StepBenchConfig(
                device="cpu", model=model, batch_size=4, max_seq_length=S, rounds=2,
                precision="fp32", against="hf-sdpa,hf-flash",
            ))  # fmt: skip
            results.write(result, folder / f"step-{S}.json")
    return folder


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)
    return folder


class Checker(HTMLParser):
    """Elements close in order; ids are unique; what is loaded is in the page."""

    VOID = frozenset({"meta", "img", "source", "br"})

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.links, self.images, self.loaded = [], [], [], [], []
        self.words = []
        self.feed(page)
        self.close()
        assert self.open == []
        assert len(set(self.ids)) == len(self.ids)
        assert set(self.links) <= set(self.ids)
        assert self.loaded and all(uri.startswith("data:image/png;base64,") for uri in self.loaded)
        assert "url(" not in page and "@import" not in page

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe", "object")
        found = dict(attributes)
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "a":
            assert found["href"].startswith("#")
            self.links.append(found["href"][1:])
        if tag == "img":
            self.images.append(found["alt"])
        self.loaded += [found[key] for key in ("src", "srcset") if key in found]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


def page_of(*paths, **options):
    return Checker(
        report.page_of(*report_files.load([str(path) for path in paths]), **options).html()
    )


def test_real_runs_become_a_page_and_pictures(measured, tmp_path, capsys):
    out = tmp_path / "out"
    report.main(ReportConfig(out=str(out)), [str(measured)])
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    page = Checker((out / "report.html").read_text())
    found = json.loads((measured / "step-16.json").read_text())
    for row in found["rows"]:
        assert number(row["real_tokens_per_second"]) in page.text
    for told in (found["conditions"]["commit"], found["conditions"]["device"], "Not available:"):
        assert told in page.text
    # a rival that is missing says why, and so does what was not measured at all
    assert "hf-flash" in page.text and "Kernels: no file." in page.text
    names = {path.name for path in out.glob("*.png")}
    assert names == {
        f"{name}{dark}.png" for name in ("step-16", "step-32", "step-over-max-seq-length")
        for dark in ("", "-dark")
    }  # fmt: skip
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names)
    bars, _, lines = page.images
    assert "Bars, real tokens a second: fastbert-eager " in bars and "hf-sdpa" in bars
    assert "from" in lines and "at 16 to" in lines and "at 32" in lines


def test_stages_of_a_gpu_become_a_page(tmp_path, capsys):
    folder = write(tmp_path / "gpu", kernels=sample_kernels(), step=sample_step())
    write(folder / "kernels", attention={"checks": [], "timings": []})  # a piece of kernels.json
    page = page_of(folder)
    assert capsys.readouterr().err == ""
    roofline = next(alt for alt in page.images if "Copy 3TB/s" in alt)
    for place, cost in enumerate(COSTS, start=1):
        assert f" {place} {cost.op} {cost.direction} H=768 S=512 80.0% of its ceiling" in roofline
    fall = next(alt for alt in page.images if "Whole step" in alt)
    assert fall.endswith(
        "Whole step 30 ms. Switched off: without the CUDA graph +6 ms; gradients in bf16 -0.9 ms."
    )
    for told in ("power.limit 700.00 W", "1 of 2 checks of correctness hold", "50.0%", "fa3",
                 "OutOfMemoryError: 80 GiB", "graph: same bits", "does not hold"):  # fmt: skip
        assert told in page.text
    assert "say nothing of the kernels" not in page.text
    rehearsed = sample_kernels()
    rehearsed["conditions"] = SAMPLE_CONDITIONS | {"device_type": "cpu"}
    rehearsed["rows"] = rehearsed["rows"][:2]  # each op has its pictures
    assert "say nothing of the kernels" in page_of(write(tmp_path / "cpu", kernels=rehearsed)).text


@pytest.fixture(scope="module")
def others(tmp_path_factory, model):
    """Real runs of other commands."""
    folder = tmp_path_factory.mktemp("others")
    text = tmp_path_factory.mktemp("text") / "text.txt"  # the built-in one takes 8 s to read
    documents = ["We count the same words. So we do!\n" * 4] * 60
    text.write_text("\n\n".join(documents))
    small = ["--model", model, "--max-seq-length", "16", "--device", "cpu"]
    for command in (
        ["bench", "data", "--max-seq-lengths", "64", "--num-workers", "0", "--rounds", "2",
         "--tokens-per-batch", "1024", "--corpus-tokens", "30000", "--seconds", "0.05"],
        ["bench", "convergence", *small, "--tokens-per-batch", "128", "--max-steps", "6",
         "--warmup-steps", "1", "--eval-steps", "2", "--against", "none", "--data", str(text),
         "--vocab-size", "150"],
        ["profile", "kernel", "mask_tokens", "--device", "cpu"],
    ):  # fmt: skip
        file = str(folder / f"{command[1]}.json")
        assert cli.main([*command, "--json", file]) == 0
    return folder


def test_other_kinds_of_results(others):
    page = page_of(others)
    found = {path.stem: json.loads(path.read_text()) for path in others.glob("*.json")}
    (fastbert,) = found["convergence"]["rows"]
    loss = next(alt for alt in page.images if "held-out loss, nats over seconds" in alt)
    assert f"fastbert from {fastbert['eval_losses'][0]:.3g} at 0 to" in loss
    rate = found["data"]["rows"][0]["real_tokens_per_second"]
    assert number(rate) in page.text
    assert any(f" {report_figures.short(rate)}; " in alt for alt in page.images)
    over = next(alt for alt in page.images if "milliseconds over T" in alt)
    sizes = [row["sizes"]["T"] for row in found["kernel"]["rows"]]
    assert f"at {report_figures.short(min(sizes))} to" in over
    assert "Training step: no file." in page.text
    assert "No two files differ in sequence length or batch only." in page.text


def test_a_result_without_rows_has_its_page(measured, tmp_path):
    content = json.loads((measured / "step-16.json").read_text()) | {"rows": []}
    page = report.page_of(*report_files.load([str(write(tmp_path / "none", step=content))]))
    assert "step.json holds no time and no rate to draw." in page.html()


def test_throughput_over_batch_and_length(tmp_path):
    steps = {f"s{S}b{B}": sample_step(S, B) for S, B in ((128, 256), (512, 64), (512, 32))}
    alts = page_of(write(tmp_path / "gpu", **steps)).images
    over = [alt for alt in alts if "Lines" in alt]
    assert len(over) == 2  # 256 x 128 and 64 x 512 tokens; 32 and 64 sequences of 512
    assert "fastbert from 1.09M at 128 to 1.09M at 512" in over[0]
    assert "fastbert from 546k at 32 to 1.09M at 64" in over[1]


def test_light_and_dark_are_two_pictures(tmp_path):
    made = report.page_of(*report_files.load([str(write(tmp_path / "gpu", step=sample_step()))]))
    from matplotlib.image import imread

    for name in ("step", "step-dark"):
        (tmp_path / f"{name}.png").write_bytes(made.pictures[name])
    light, dark = (imread(tmp_path / f"{name}.png") for name in ("step", "step-dark"))
    assert light.shape == dark.shape
    assert light[0, 0, :3].min() > 0.99 and dark[0, 0, :3].max() < 0.2


def without(content, *path):
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return content


BAD = {
    "not JSON": ("{", "not JSON: Expecting property name"),
    "a list": ("[]", "must be one JSON object"),
    "no format": ({"rows": []}, "it has no format"),
    "stage": ({"stage": "data"}, "stage 'data' is not one of kernels, step"),
    "no date": (without(sample_step(), "conditions", "date"), "conditions: 'date' is a required"),
    "no time": (without(sample_step(), "contenders", 1, "ms"), "contenders/1: 'ms' is a required"),
    "no sizes": (without(sample_kernels(), "rows", 0, "sizes"), "rows/0: 'sizes' is a required"),
    "no checks": (without(sample_kernels(), "ops"), "the file: 'ops' is a required property"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_does_not_fit_is_one_line(tmp_path, capsys, name):
    content, why = BAD[name]
    file = write(tmp_path / "bad", bad=content) / "bad.json"
    assert cli.main(["bench", "report", str(file), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"fastbert: error: {file}: ") and why in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()
    # in a folder it does not keep the others from the page, which says so
    write(tmp_path / "bad", good=sample_step())
    assert why in page_of(tmp_path / "bad").text.replace("\n", " ")
    assert why in capsys.readouterr().err


def test_a_result_out_of_bounds_is_refused(measured):
    content = json.loads((measured / "step-16.json").read_text())
    content["rows"][1]["ms"] = -1
    line = "it.json: does not fit the schema: rows/1/ms: -1 is not more than 0"
    with pytest.raises(UserError, match=line):
        report_files.parsed(json.dumps(content), "it.json")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("", "bench report needs files or folders"),
        ("no/such", "no/such: no such file or folder"),
        (f"{__file__} --out {__file__}", f"out = {__file__!r} is a file: give a folder"),
        (f"{Path(__file__).parent}", f"{Path(__file__).parent}: no result file that fits"),
    ],
)
def test_bad_requests_are_one_line(capsys, argv, line):
    assert cli.main(["bench", "report", *argv.split()]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"fastbert: error: {line}") and told.count("\n") == 1


# Comparison


def row(times, name="fastbert"):
    low, middle, high = np.percentile(times, (20, 50, 80))
    return {"name": name, "ms": middle, "ms_p20": low, "ms_p80": high, "rounds_ms": list(times)}


def one(rows, device="a"):
    conditions = {"device": device, "device_type": "cpu", "commit": "c", "date": "2026-01-01"}
    return report_files.Result("x.json", "step", {"model": "m"}, conditions, rows, [])


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ([10, 10.1, 10.2, 10.3, 10.4], [8, 8.1, 8.2, 8.3, 8.4], "faster"),
        ([8, 8.1, 8.2, 8.3, 8.4], [10, 10.1, 10.2, 10.3, 10.4], "slower"),
        ([8, 8.1, 8.2, 8.3, 8.4], [8.1, 8.1, 8.3, 8.3, 8.5], "within noise"),
        ([8, 8.1, 8.2, 8.3], [10, 10.1, 10.2, 10.3, 10.4], "too few rounds"),
    ],
)
def test_what_moved(old, new, verdict):
    (move,), lines = report_compare.moves([one([row(old)])], [one([row(new)])])
    assert move["verdict"] == verdict
    assert move["low"] <= move["ratio"] <= move["high"]
    assert lines == []


def test_noise_seldom_moves_and_a_tenth_is_seen():
    rng = np.random.default_rng(1)

    def share(factor, word):
        pairs = [rng.normal(10, 0.3, (2, 9)) for _ in range(100)]
        found = [report_compare.moves([one([row(a)])], [one([row(b * factor)])])[0][0]
                 for a, b in pairs]  # fmt: skip
        return np.mean([move["verdict"] == word for move in found])

    assert share(1.0, "within noise") >= 0.93
    assert share(1.1, "slower") >= 0.9


def test_what_has_no_counterpart_is_a_line():
    times = [8, 8.1, 8.2, 8.3, 8.4]
    found, lines = report_compare.moves(
        [one([row(times), row(times, "gone")]), one([], "c")],
        [one([row(times), row(times, "added")]), one([], "b")],
    )
    assert len(found) == 1
    assert sorted(line.partition(": ")[2] for line in lines) == [
        "added is not in x.json", "gone is not in x.json",
        "no such measurement on a b in the old set", "not in the new set",
    ]  # fmt: skip


def test_a_page_compares_two_folders(tmp_path):
    new = sample_step()
    new["contenders"][0] |= times(24.0)
    new["contenders"][1] |= times(61.0)
    old = write(tmp_path / "old", step=sample_step())
    new = write(tmp_path / "new", step=new)
    page = page_of(new, old=report_files.load([str(old)])[0], against="old")
    assert "1 of 2 rows moved beyond noise." in page.text
    assert "fastbert 0.8x faster" in page.images[0] and "hf-sdpa 1.02x within" in page.images[0]
    assert report_compare.RULE in page.text


def test_a_page_compares_with_a_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(report_files, "ROOT", tmp_path)
    folder = write(tmp_path / "results", step=sample_step(), odd="[]")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    slower = sample_step()
    slower["contenders"][0] |= times(40.0)
    write(folder, step=slower)
    old, refused = report_files.load_commit("HEAD", [str(folder)])
    assert [one.file for one in old] == ["HEAD:results/step.json"]
    assert refused == ["HEAD:results/odd.json: not a result: must be one JSON object"]
    new, _ = report_files.load([str(folder)])
    moves, _ = report_compare.moves(old, new)
    assert [move["verdict"] for move in moves] == ["slower", "within noise"]
    with pytest.raises(UserError, match="against = 'nope' is no folder, and as a commit: "):
        report_files.load_commit("nope", [str(folder)])
    with pytest.raises(UserError, match="a commit needs files of this repository"):
        report_files.load_commit("HEAD", [str(tmp_path.parent)])


# README


def test_the_readme_says_what_the_files_say(measured, tmp_path):
    assert list(filter(None, report_readme.section(tmp_path))) == [
        "On a CPU: not yet measured.", "On a GPU: not yet measured.",
    ]  # fmt: skip
    shutil.copytree(measured, tmp_path / "here")
    write(tmp_path / "here", old={"benchmark": "step"})
    lines = "\n".join(report_readme.section(tmp_path))
    found = json.loads((measured / "step-16.json").read_text())
    date = found["conditions"]["date"][:10]
    assert f"[step-16](benchmarks/results/here/step-16.json), {date}" in lines
    assert f"**{found['conditions']['device']} (CPU)**" in lines
    sdpa = next(row for row in found["rows"] if row["name"] == "hf-sdpa")
    assert f"{sdpa['real_tokens_per_second']:,.0f} ({sdpa['ratio']:.1f}x)" in lines
    assert "On a GPU: not yet measured." in lines
    assert "Left out: here/old.json: not a result: it has no format" in lines
    write(tmp_path / "sample", kernels=sample_kernels(), step=sample_step())
    lines = "\n".join(report_readme.section(tmp_path))
    assert "not yet measured" not in lines
    assert "| adamw step H=768 S=512 | " in lines and "80% of its ceiling" in lines


def test_the_section_lies_between_its_marks():
    text = f"above\n{report_readme.BEGIN}\nold\n{report_readme.END}\nbelow\n"
    once = report_readme.with_section(text)
    assert once.startswith("above\n") and once.endswith("\nbelow\n") and "\nold\n" not in once
    assert report_readme.with_section(once) == once
    with pytest.raises(ValueError, match="needs the lines"):
        report_readme.with_section("nothing")


def test_the_committed_readme_is_what_the_command_writes():
    readme = report_readme.README.read_text(encoding="utf-8")
    assert report_readme.with_section(readme) == readme, "run: fastbert bench report --readme"


# Browser


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or chrome")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_without_overflow(tmp_path, dark):
    folder = write(tmp_path / "gpu", kernels=sample_kernels(), step=sample_step())
    page = report.page_of(*report_files.load([str(folder)])).html()
    probe = (
        "<script>let d = document, e = d.documentElement; d.title = JSON.stringify("
        "{wide: e.scrollWidth - e.clientWidth, paper: getComputedStyle(d.body).backgroundColor,"
        " broken: [...d.images].filter(i => !i.complete || !i.naturalWidth).length,"
        " dark: [...d.images].filter(i => i.currentSrc != i.src).length})</script></body>"
    )
    path = tmp_path / "report.html"
    path.write_text(page.replace("</body>", probe))
    setting = ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=500,800",
         *setting, "--virtual-time-budget=5000", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    told = json.loads(done.stdout.partition("<title>")[2].partition("</title>")[0])
    assert told["wide"] <= 0 and told["broken"] == 0
    assert (told["dark"] > 0) == dark
    assert told["paper"] == ("rgb(22, 25, 30)" if dark else "rgb(255, 255, 255)")
