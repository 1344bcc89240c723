import contextlib
import json
import os
import re
import shutil
import socket
import struct
import threading
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
import yaml
from playwright.sync_api import sync_playwright
from recorded_run import HOSTILE, record_run

from diffusion_grpo import report
from diffusion_grpo.commands.view import make_server
from diffusion_grpo.commands.view import run as view
from diffusion_grpo.errors import UsageError
from diffusion_grpo.events import record_event
from diffusion_grpo.gallery import Entry, Gallery
from diffusion_grpo.metrics import MetricsLog, metric_meanings, read_metrics
from diffusion_grpo.report import report_data, report_page, write_report
from diffusion_grpo.report_warnings import run_warnings

PATHS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return record_run(tmp_path_factory.mktemp("report") / "demo", iterations=6, evaluate_every=2)


@pytest.fixture(scope="module")
def browser():
    chromium = next((path for name in PATHS if (path := shutil.which(name))), None)
    if chromium is None:
        assert not os.environ.get("CI"), "CI has to have Chromium: install the package chromium"
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.fixture
def opened(browser, run_dir, tmp_path):
    """The page in a browser that has no network; anything on the console fails the test."""
    complaints = []

    def open_page(*run_dirs, script="", **options):
        path = tmp_path / "report.html"
        path.write_text(report_page(run_dirs or [run_dir]))
        page = browser.new_page(viewport={"width": 1200, "height": 900}, **options)
        page.context.set_offline(True)
        page.add_init_script(script)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield open_page
    assert complaints == []


def test_page_stands_alone(run_dir):
    path = write_report(run_dir)
    page = path.read_text()
    assert path == run_dir / "report.html"
    without_data = re.sub(r'"data:image[^"]*"', "", page)
    links = re.findall(r"(?:src|href)=[\"']?(?!#|data:)(\w[^\"'> ]*)", without_data)
    assert set(links) <= {"x"}  # the prompt that tries to load a picture, as text of the data
    assert "</script><img" not in page and "\\u003cscript>" in page


def test_prompt_that_is_html_stays_text(opened):
    page = opened()
    assert HOSTILE in page.locator("#lapse-grid").inner_text()
    assert HOSTILE in page.locator("#table").inner_text()
    assert page.evaluate("window.hacked") is None
    assert page.locator("#lapse-grid script, #table script, figure img").count() == 0


def test_time_lapse_slider_shows_another_evaluation(opened):
    page = opened()
    picture = page.locator("#lapse-grid .picture").first
    assert page.locator("#lapse-label").inner_text() == "after 6 iterations"
    last = picture.evaluate("node => node.style.backgroundImage")
    page.locator("#lapse-slider").fill("0")
    assert page.locator("#lapse-label").inner_text() == "before training"
    assert picture.evaluate("node => node.style.backgroundImage") != last
    page.locator("#groups-slider").fill("2")
    assert page.locator("#groups-label").inner_text() == "iteration 3"
    assert page.locator(".group").count() == 8 and page.locator(".group .tile").count() == 64


def test_swipe_moves_the_border_between_before_and_after(opened):
    page = opened()
    page.locator("#swipe-stage").scroll_into_view_if_needed()
    box = page.locator("#swipe-stage").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50, steps=4)
    page.mouse.up()
    left = float(page.locator("#swipe-line").evaluate("node => parseFloat(node.style.left)"))
    assert 20 < left < 30
    before = page.locator("#swipe-caption").inner_text()
    first = int(page.locator("#swipe-prompt").input_value())
    page.locator("#swipe-next").click()
    assert page.locator("#swipe-caption").inner_text() != before
    assert int(page.locator("#swipe-prompt").input_value()) == (first + 1) % 24


def test_swipe_begins_with_the_prompt_that_gained_most(opened, run_dir):
    entries = Gallery(run_dir).entries("evaluation")
    total = [np.asarray(entry.scores["total"]) for entry in (entries[0], entries[-1])]
    most = int(np.argmax(total[1] - total[0]))
    assert opened().locator("#swipe-prompt").input_value() == str(most)


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [(0.58, 0.6284, "0.580 → 0.628"), (-0.5, 12.0, "-0.500 → 12.0"), (3456.7, 0, "3457 → 0.000")],
)
def test_held_out_means_keep_their_zeros(before, after, shown, opened, run_dir, monkeypatch):
    data = report_data([run_dir])
    evaluations = data["runs"][0]["evaluations"]
    for entry, value in ((evaluations[0], before), (evaluations[-1], after)):
        entry["scores"]["clip"] = [value] * len(entry["scores"]["clip"])
    monkeypatch.setattr(report, "report_data", lambda *_, **__: data)
    assert shown in opened().locator("#summary").inner_text()


def test_of_a_reward_with_a_weight_below_0_less_is_better(opened, run_dir, monkeypatch):
    data = report_data([run_dir])
    (first, *_, last) = data["runs"][0]["evaluations"]
    count = len(last["prompts"])
    first["scores"]["clip"], last["scores"]["clip"] = [0.9] * count, [0.1] * count
    last["scores"]["clip"][3] = 0.01
    won = {"win_rate": 0.9, "win_rate_low": 0.8, "win_rate_high": 0.95}
    last["summary"] |= {"against_base": {"clip": won}}

    def drawn(lower):
        last["summary"]["lower"] = lower
        monkeypatch.setattr(report, "report_data", lambda *_, **__: data)
        page = opened()
        page.locator("#extremes-by").select_option("clip")
        card = page.locator("#summary div", has_text="clip").first
        best = page.locator("#best").inner_text()
        tone = card.locator("dd").first.get_attribute("class")
        return tone, card.inner_text(), best, page.locator("#swipe-prompt").input_value()

    tone, text, best, first = drawn(["clip"])
    assert tone == "good" and "wins 90 % [80, 95]" in text and "0.01" in best and first == "3"
    tone, text, best, first = drawn([])  # wins are counted the way that is better
    assert tone == "bad" and "wins 90 % [80, 95]" in text and "0.01" not in best and first != "3"


def test_evaluations_on_the_training_prompts_are_not_called_held_out(opened, tmp_path):
    directory = record_run(tmp_path / "run", iterations=2, evaluate_every=1, heldout=4)
    assert "training prompts" not in opened(directory).locator("body").inner_text()
    config = yaml.safe_load((directory / "config.yaml").read_text())
    config["prompts"] |= {"heldout": None, "heldout_share": 0.25}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    assert "held-out prompts" in opened(directory).locator("#summary").inner_text()
    config["prompts"]["heldout_share"] = 0.0
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    (directory / "events.jsonl").unlink()
    page = opened(directory)
    for part, said in (
        ("#summary", "clip, training prompts"),
        ("#lapse", "The same training prompts"),
        ("#charts", "training prompts: reward"),
    ):
        assert said in page.locator(part).inner_text()
    said = page.locator("main").inner_text()
    assert not re.search("held.out", said, re.IGNORECASE)


def test_the_curves_of_one_run_differ_where_runs_are_compared(opened, run_dir, tmp_path):
    other = record_run(tmp_path / "other", iterations=2, heldout=4)
    spy = """window.dashes = new Set();
    const set = CanvasRenderingContext2D.prototype.setLineDash;
    CanvasRenderingContext2D.prototype.setLineDash = function (dash) {
      window.dashes.add(String(dash)); set.call(this, dash); };"""
    page = opened(run_dir, other, script=spy)
    page.wait_for_timeout(100)
    # smallest, mean and largest ratio, each drawn in its own way
    assert len(page.evaluate("[...window.dashes]")) >= 3


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(59.4, "59 s"), (119.7, "2 min 0 s"), (3599.6, "1 h 0 min"), (3660, "1 h 1 min")],
)
def test_a_time_has_no_sixtieth_second(seconds, shown, opened, run_dir, monkeypatch):
    data = report_data([run_dir])
    data["runs"][0]["seconds"] = seconds
    monkeypatch.setattr(report, "report_data", lambda *_, **__: data)
    assert re.search(rf"(?m)^{shown}\b", opened().locator("#summary").inner_text())


def test_table_is_sorted_and_filtered(opened, run_dir):
    page = opened()

    def column(number):
        cells = page.locator(f"#table tbody td.number:nth-last-child({number})").all_inner_texts()
        return [float(text.replace("−", "-").replace("+", "")) for text in cells]

    first = column(1)
    assert len(first) == 24 and first == sorted(first, reverse=True)
    page.locator("#table th button[data-key=after]").click()
    page.locator("#table th button[data-key=after]").click()
    after = column(2)
    assert after == sorted(after) and len(after) == 24
    page.locator("#filter").fill("COUNTING star")
    shown = page.locator("#table tbody tr").all_inner_texts()
    data = report_data([run_dir])["runs"][0]["evaluations"][-1]
    expected = [
        text
        for text, task in zip(data["prompts"], data["tasks"], strict=True)
        if "star" in text and task == "counting"
    ]
    assert 0 < len(shown) == len(expected) < 24
    assert page.locator("#filter-count").inner_text() == f"{len(expected)} of 24"


def test_zoom_narrows_every_chart_and_goes_back(opened):
    page = opened()
    charts = page.locator("#charts .chart")
    assert charts.count() > 10

    def labels(chart):  # what is drawn, read from the pixels by their change
        return chart.locator("canvas").evaluate("node => node.toDataURL()")

    whole = [labels(charts.nth(i)) for i in (0, 4)]
    over = charts.nth(0).locator(".u-over").bounding_box()
    page.mouse.move(over["x"] + over["width"] * 0.4, over["y"] + 40)
    page.mouse.down()
    page.mouse.move(over["x"] + over["width"] * 0.8, over["y"] + 60, steps=5)
    page.mouse.up()
    page.wait_for_timeout(100)
    assert all(labels(charts.nth(i)) != old for i, old in zip((0, 4), whole, strict=True))
    page.mouse.move(5, 5)
    page.locator("#unzoom").click()
    page.wait_for_timeout(100)
    assert [labels(charts.nth(i)) for i in (0, 4)] == whole
    # hovering one chart reads the values of all
    page.mouse.move(over["x"] + over["width"] * 0.9, over["y"] + 40)
    page.wait_for_timeout(100)
    legend = charts.filter(has_text="Clip fraction").locator(".u-value").all_inner_texts()
    assert legend[0].isdigit() and float(legend[1]) > 0


def test_page_fits_a_phone_and_follows_the_dark_scheme(opened):
    page = opened(color_scheme="dark")
    page.set_viewport_size({"width": 360, "height": 740})
    page.wait_for_timeout(500)  # the charts are drawn anew a moment after the window changed
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    luminance = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert max(page.evaluate(luminance)) < 60
    page.locator("#theme").click()
    assert min(page.evaluate(luminance)) > 200


def test_runs_are_compared_on_the_same_charts(opened, run_dir, tmp_path):
    other = record_run(tmp_path / "other" / "demo", iterations=4, heldout=4, seed=1)
    page = opened(run_dir, other)
    legend = page.locator("#charts .chart").first.locator(".u-legend").inner_text()
    assert f"{run_dir.parent.name}/demo" in legend and "other/demo" in legend
    page.locator("#run").select_option("1")
    assert page.locator("#lapse-label").inner_text() == "before training"
    assert page.locator("#lapse-grid .tile").count() == 4


def test_a_live_page_follows_the_run(browser, tmp_path):
    directory = record_run(tmp_path / "live", iterations=2, heldout=4, finished=False)
    complaints = []
    with served(directory) as url:
        page = browser.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        assert "2 of 2 iterations so far" in page.locator("#subtitle").inner_text()
        picture = page.locator("#lapse-grid .picture").first
        assert "sheet/0/evaluation_00000.webp" in picture.get_attribute("style")
        (directory / "evaluation.json").write_text("{}")
        page.get_by_text("finished · ").wait_for()
        page.close()
    assert complaints == []


@contextlib.contextmanager
def served(*run_dirs, every=0.2):
    with make_server([str(run_dir) for run_dir in run_dirs], every=every) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def asked(url: str, tag: str | None = None):
    """Status, ETag and body of an answer."""
    try:
        request = urllib.request.Request(url, headers={"If-None-Match": tag or ""})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers["ETag"], answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, None, error.read()


def test_a_live_page_is_built_anew_only_where_a_file_has_changed(tmp_path, monkeypatch):
    directory = record_run(tmp_path / "live", iterations=2, heldout=4, finished=False)
    with served(directory) as url:
        _, tag, body = asked(f"{url}data.json")
        assert json.loads(body)["runs"][0]["status"] == "2 of 2 iterations so far"
        with monkeypatch.context() as patched:  # nothing may be read for an answer of 304
            patched.setattr("diffusion_grpo.commands.view.report_data", None)
            assert asked(f"{url}data.json", tag)[0] == 304
        (directory / "evaluation.json").write_text("{}")
        status, newer, body = asked(f"{url}data.json", tag)
        assert status == 200 and newer != tag
        assert json.loads(body)["runs"][0]["status"] == "finished"
        lines = (directory / "metrics.jsonl").read_text()
        for change in (
            lambda: (directory / "metrics.jsonl").write_text(lines + '{"iteration": 2}\n'),
            lambda: record_event(directory, 2, "more"),
            lambda: (directory / "gallery" / "rollouts.jsonl").write_text(""),
        ):
            tag = newer
            change()
            status, newer, _ = asked(f"{url}data.json", tag)
            assert status == 200 and newer != tag


def test_a_live_page_stays_quiet_where_the_run_or_the_browser_goes(tmp_path, capfd):
    directory = record_run(tmp_path / "прогон", iterations=2, heldout=4)
    with served(directory) as url:
        host, port = urllib.parse.urlsplit(url).netloc.split(":")
        for _ in range(3):  # a browser that closes the connection at once, with a reset
            with socket.create_connection((host, int(port))) as gone:
                gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                gone.sendall(b"GET / HTTP/1.0\r\nHost: localhost:80\r\n\r\n")
        (directory / "config.yaml").unlink()
        status, _, body = asked(f"{url}data.json")
        assert status == 503 and "прогон" in body.decode()
    assert capfd.readouterr().err == ""


def test_a_live_page_keeps_what_is_open_and_says_when_the_server_is_back(browser, tmp_path):
    directory = record_run(tmp_path / "live", iterations=2, heldout=4, finished=False)
    with served(directory) as url:
        page = browser.new_page()
        page.goto(url)
        page.locator("#config summary").click()
        page.locator("#swipe-prompt").evaluate("node => node.firstChild.id = 'first'")
        with MetricsLog(directory) as log:
            log.write(2, {"kl": 0.5})
        page.get_by_text("3 of 2 iterations so far · ").wait_for()
        assert page.locator("#config details").evaluate("node => node.open")
        assert page.locator("#first").count() == 1  # a list that is open is not made anew
        page.route("**/data.json", lambda route: route.abort())
        page.get_by_text("the server has stopped").wait_for()
        page.unroute("**/data.json")
        page.get_by_text("3 of 2 iterations so far · ").wait_for()
        page.close()


def test_seconds_between_two_looks_are_a_number(tmp_path):
    for every in ("nan", "inf", "0"):
        with pytest.raises(UsageError, match=f"every is {float(every)}; expected a number above 0"):
            view([str(tmp_path), "--every", every])


def test_a_run_that_has_just_begun_has_a_page(opened, tmp_path):
    directory = record_run(tmp_path / "new", iterations=1, heldout=4, finished=False)
    (directory / "metrics.jsonl").write_text("")
    shutil.rmtree(directory / "gallery")
    page = opened(directory)
    assert "0 of 1 iterations so far" in page.locator("#subtitle").inner_text()
    assert not page.locator("#lapse").is_visible()


@pytest.mark.slow
def test_page_of_a_long_run_stays_under_25_megabytes(tmp_path):
    directory = record_run(tmp_path / "long", iterations=2, evaluate_every=2, heldout=64)
    folder = directory / "gallery"
    # 300 iterations with 64 images each of noisy pictures, and 30 evaluations
    for kind, count in (("rollout", 300), ("evaluation", 30)):
        line = json.loads((folder / f"{kind}s.jsonl").read_text().splitlines()[0])
        source = folder / line["sheet"]
        lines = []
        for number in range(count):
            name = f"{kind}_copy{number}.webp"
            shutil.copy(source, folder / name)
            lines.append(json.dumps(line | {"iteration": number, "sheet": name}))
        (folder / f"{kind}s.jsonl").write_text("\n".join(lines) + "\n")
    page = report_page([directory])
    assert len(page.encode()) < 25_000_000
    run = report_data([directory])["runs"][0]
    assert len(run["rollouts"]) + run["rollouts_left_out"] == 300
    assert run["rollouts"][0]["iteration"] == 0 and run["rollouts"][-1]["iteration"] == 299
    assert len(run["rollouts"]) >= 150 and len(run["evaluations"]) == 30


def test_sheets_that_no_page_has_room_for_are_not_reduced(tmp_path, monkeypatch):
    directory = record_run(tmp_path / "long", iterations=1, heldout=4)
    index = directory / "gallery" / "rollouts.jsonl"
    line = json.loads(index.read_text())
    index.write_text("".join(json.dumps(line | {"iteration": i}) + "\n" for i in range(400)))
    made, reduced = [], report._reduced
    monkeypatch.setattr(report, "_reduced", lambda *a: made.append(1) or reduced(*a))
    sheet = (directory / "gallery" / line["sheet"]).stat().st_size
    run = report_data([directory], budget=10 * sheet)["runs"][0]
    kept = [entry["iteration"] for entry in run["rollouts"]]
    assert 20 <= len(kept) < 200 and (kept[0], kept[-1]) == (0, 399)
    gaps = np.diff(kept)
    assert gaps.max() <= 2 * gaps.min() + 1 and run["rollouts_left_out"] == 400 - len(kept)
    assert len(made) <= 3 * len(kept)
    assert sum(len(entry["source"]) for entry in run["rollouts"]) <= 10 * sheet * 4 / 3 + 40 * 400


def test_a_page_is_written_beside_another_process_that_writes_it(run_dir, tmp_path):
    (tmp_path / "report.html.tmp").mkdir()  # as if it were another's
    path = write_report(run_dir, path=tmp_path / "report.html")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.html.tmp"]
    with pytest.raises(UsageError, match="cannot be written"):
        write_report(run_dir, path=tmp_path / "report.html.tmp")
    assert len(list(tmp_path.iterdir())) == 2 and path.stat().st_size > 1000


def test_numbers_that_are_not_finite_leave_gaps_and_a_warning(tmp_path):
    directory = record_run(tmp_path / "run", iterations=3, heldout=4)
    with MetricsLog(directory) as log:
        log.write(3, {"loss": np.nan, "clip_fraction": 0.9})
    data = report_data([directory])["runs"][0]
    assert data["metrics"]["loss"][-1] is None and data["metrics"]["kl"][-1] is None
    assert "loss was not finite in iteration 4" in data["warnings"][0]


def warned(directory, gold, rows=()):
    return run_warnings(list(rows), Gallery(directory).entries("evaluation"), gold)


def test_a_hacked_reward_is_told(tmp_path):
    directory = record_run(tmp_path / "run", iterations=3, heldout=4)
    index = directory / "gallery" / "evaluations.jsonl"
    first = json.loads(index.read_text().splitlines()[0])
    first["scores"]["shapes"], first["summary"]["metrics"]["diversity"] = [0.9] * 4, 0.3
    last = first | {"iteration": 3, "sheet": "evaluation_00003.webp"}
    last["scores"] = first["scores"] | {"shapes": [0.2] * 4, "total": [0.95] * 4}
    last["summary"] = {"metrics": {"diversity": 0.1}}
    index.write_text(json.dumps(first) + "\n" + json.dumps(last) + "\n")
    found = warned(directory, {"shapes": 1.0}, read_metrics(directory))
    assert "gold reward shapes fell from 0.9 to 0.2, by more than chance, while" in found[0]
    assert "diversity of a held-out prompt's images fell from 0.3 to 0.1" in found[1]
    # of a reward with a weight below 0, less is better: nothing got worse
    assert not any("gold" in text for text in warned(directory, {"shapes": -1.0}))


def test_a_gold_reward_that_moves_by_chance_is_not_told():
    def entry(done, gold, against=None, group=1):
        scores = {"total": [0.1 * (done + 1)] * len(gold), "shapes": gold}
        summary = {"against_base": {"shapes": {"difference": against}}} if against else {}
        prompts = [f"prompt {i // group}" for i in range(len(gold))]
        return Entry(done, "", 1, (8, 8), prompts, scores, group=group, summary=summary)

    def told(gains, weight=1.0, **fields):
        evaluations = [entry(0, [0.5] * len(gains)), entry(4, [0.5 + x for x in gains], **fields)]
        return any("hacked" in text for text in run_warnings([], evaluations, {"shapes": weight}))

    # The mean falls by 0.1 each time; its standard errors are 0.1 and 0.2 / sqrt(12) = 0.058.
    within, beyond = [-0.3, 0.1, -0.3, 0.1], [-0.2, 0.0, -0.2, 0.0]
    assert not told(within) and told(beyond * 2) and not told([-0.1])
    # Pictures of one prompt are one number: two prompts, whose means fall by 0.2 and by 0.
    assert not told([-0.2, -0.2, 0.0, 0.0], group=2)
    # Where the evaluation has an interval, that decides.
    interval = {"mean": -0.1, "low": -0.3, "high": 0.02}
    assert not told(beyond * 2, against=interval) and told(
        within, against=interval | {"high": -1e-3}
    )
    # Less is better: the interval of what rose lies above 0.
    rose = {"mean": 0.1, "low": 1e-3, "high": 0.3}
    assert told([0.1] * 4, -1.0, against=rose) and not told([0.1] * 4, 1.0, against=rose)
    assert not told([0.1] * 4, -1.0, against=rose | {"low": -1e-3})


def test_pictures_that_change_without_a_gold_reward_are_told(tmp_path):
    directory = record_run(tmp_path / "run", iterations=3, heldout=4)
    index = directory / "gallery" / "evaluations.jsonl"
    first = json.loads(index.read_text().splitlines()[0])
    measured = first["summary"]["metrics"] = {"saturation": 0.5, "sharpness": 20.0}
    last = first | {"iteration": 3, "sheet": "evaluation_00003.webp"}
    last["scores"] = first["scores"] | {"total": [0.95] * 4}
    last["summary"] = {"metrics": measured | {"saturation": 0.7, "sharpness": 25.0}}
    index.write_text(json.dumps(first) + "\n" + json.dumps(last) + "\n")
    (told,) = warned(directory, {})
    assert "the saturation of pictures of the held-out prompts went from 0.5 to 0.7 while" in told
    assert warned(directory, {"shapes": 1.0}) == []  # that one says whether it is good


def test_a_group_that_becomes_one_picture_is_told_without_evaluations_of_several_images(tmp_path):
    directory = record_run(tmp_path / "run", iterations=3, heldout=4)
    rows = [{"iteration": i, "diversity": 0.3 if i < 15 else 0.1} for i in range(30)]
    (told,) = warned(directory, {"shapes": 1.0}, rows)
    assert "the diversity of a prompt's images fell from 0.3 to 0.1" in told
    assert warned(directory, {"shapes": 1.0}, rows[:19]) == []  # too few to say


def test_events_say_when_a_run_was_stopped_and_resumed(opened, run_dir):
    page = opened()
    page.click("#events summary")
    rows = page.locator("#events-list tr")
    assert rows.count() == 4
    assert "UTC" in rows.nth(0).inner_text() and "begun" in rows.nth(0).inner_text()
    assert HOSTILE in rows.nth(1).inner_text()
    assert rows.nth(3).locator("td.number").inner_text() == "2"


def test_a_long_run_loses_no_evaluation_no_warning_and_no_time(tmp_path):
    directory = record_run(tmp_path / "run", iterations=1, heldout=4)
    with MetricsLog(directory) as log:
        for iteration in range(1, 6001):
            row = {"time/iteration": 2.0, "skipped": iteration % 2}
            log.write(iteration, row | ({"eval/reward/mean": 0.5} if iteration % 1001 == 0 else {}))
    data = report_data([directory])["runs"][0]
    metrics = data["metrics"]
    assert 2000 <= len(metrics["iteration"]) <= 2010 and metrics["iteration"][-1] == 6000
    evaluated = [
        i for i, v in zip(metrics["iteration"], metrics["eval/reward/mean"], strict=True) if v
    ]
    assert [i for i in evaluated if i] == [1001, 2002, 3003, 4004, 5005]
    assert data["seconds"] == pytest.approx(21.0 + 12_000)
    assert any("3000 updates were skipped" in text for text in data["warnings"])
    # as many iterations of which every second one was written took as long
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    (directory / "metrics.jsonl").write_text("\n".join(lines[2::2]) + "\n")
    assert report_data([directory])["runs"][0]["seconds"] == pytest.approx(6001 * 2.0)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        report_page([tmp_path])
    with pytest.raises(UsageError, match="no run given"):
        report_page([])


def test_metric_table_is_read_from_the_documentation():
    meanings = metric_meanings()
    assert meanings["reward/<name>/std"] == meanings["reward/<name>/mean"]
    assert meanings["kl"].endswith("(nats*)") and "diversity" in meanings
