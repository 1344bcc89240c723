"""What is told of a run when the file that tells it was cut off."""

from diffusion_grpo.events import EVENTS_FILE, read_events, record_event


def test_a_line_that_was_cut_off_takes_no_other_with_it(tmp_path):
    record_event(tmp_path, 0, "begun")
    record_event(tmp_path, 3, "ended: the disk is full")
    file = tmp_path / EVENTS_FILE
    file.write_bytes(file.read_bytes()[:-20])
    record_event(tmp_path, 3, "resumed, ünd going on")
    record_event(tmp_path, 4, "finished")
    texts = [event["text"] for event in read_events(tmp_path)]
    assert texts == ["begun", "resumed, ünd going on", "finished"]
    assert len(file.read_text(encoding="utf-8").splitlines()) == 4
