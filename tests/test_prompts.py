import json
from collections import Counter

import pytest

from diffusion_grpo import prompts as prompts_module
from diffusion_grpo.config import PRESETS
from diffusion_grpo.errors import UsageError
from diffusion_grpo.prompts import Prompt, list_prompts, load_prompts, prompt_batch


def _numbered(count: int) -> list[Prompt]:
    return [Prompt(f"prompt {number}") for number in range(count)]


def test_text_file_skips_comments_and_blank_lines(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# a list\n\na red circle\n   two stars  \n  # indented comment\n")
    assert load_prompts(path) == [Prompt("a red circle"), Prompt("two stars")]


def test_json_lines_keep_their_metadata(tmp_path):
    path = tmp_path / "list.jsonl"
    lines = [{"prompt": "a fox", "count": 1, "tags": ["a"]}, {"prompt": "two fo\u2028xes"}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text + "\n\n", encoding="utf-8")
    assert load_prompts(str(path)) == [
        Prompt("a fox", {"count": 1, "tags": ["a"]}),
        Prompt("two fo\u2028xes"),
    ]


def test_byte_order_mark_is_not_part_of_the_first_prompt(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfa fox\r\na hen\r\n")
    assert [prompt.text for prompt in load_prompts(path)] == ["a fox", "a hen"]


def test_named_list_prefers_json_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(
        prompts_module, "resource_path", lambda kind, *parts: tmp_path.joinpath(*parts)
    )
    (tmp_path / "birds.txt").write_text("a wren\n")
    assert load_prompts("birds") == [Prompt("a wren")]
    (tmp_path / "birds.jsonl").write_text('{"prompt": "a hen"}\n')
    assert load_prompts("birds") == [Prompt("a hen")]
    assert list_prompts() == ["birds"]
    with pytest.raises(UsageError, match=r"'bird'.*did you mean 'birds'"):
        load_prompts("bird")


def test_lists_that_come_with_the_project_load_without_repeats():
    names = list_prompts()
    assert {"shapes", "shapes_heldout"} <= set(names)
    for name in names:
        texts = [prompt.text for prompt in load_prompts(name)]
        assert len(texts) == len(set(texts)), name


def test_heldout_prompts_are_not_trained_on():
    for preset in PRESETS.values():
        assert preset.prompts.heldout is not None
        trained = {prompt.text for prompt in load_prompts(preset.prompts.train)}
        heldout = {prompt.text for prompt in load_prompts(preset.prompts.heldout)}
        assert not trained & heldout


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "empty.txt: no prompt in it"),
        ("comments.txt", "# nothing\n\n", "comments.txt: no prompt in it"),
        ("empty.jsonl", "\n", "empty.jsonl: no prompt in it"),
        ("bad.jsonl", '{"prompt": "a"}\n{"prompt": \n', "bad.jsonl, line 2: not valid JSON"),
        ("array.jsonl", '["a"]\n', "array.jsonl, line 1: .* expected an object"),
        ("missing.jsonl", '{"text": "a"}\n', 'missing.jsonl, line 1: "prompt" is None'),
        ("blank.jsonl", '{"prompt": " "}\n', "blank.jsonl, line 1: \"prompt\" is ' '"),
        ("number.jsonl", '{"prompt": 3}\n', 'number.jsonl, line 1: "prompt" is 3'),
        ("list.csv", "a fox\n", "ends in '.csv'; expected '.txt'"),
    ],
)
def test_bad_prompt_file_is_refused_with_its_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_prompts(path)


def test_binary_prompt_file_is_refused(tmp_path):
    path = tmp_path / "image.txt"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read as UTF-8 text"):
        load_prompts(path)


@pytest.mark.parametrize("name", ["no/such/file.txt", "no_such_list", "", "../shapes"])
def test_missing_prompt_list_is_refused(name):
    with pytest.raises(UsageError, match=r"no such list or file|is empty"):
        load_prompts(name)


@pytest.mark.parametrize(("count", "num_prompts"), [(12, 4), (10, 4), (7, 7), (5, 3)])
def test_every_prompt_is_visited_once_before_any_is_visited_again(count, num_prompts):
    prompts = _numbered(count)
    visits = [
        index
        for iteration in range(3 * count)
        for index, _ in prompt_batch(prompts, 3, iteration, num_prompts)
    ]
    for epoch in range(len(visits) // count):
        assert sorted(visits[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_batch_is_a_function_of_seed_and_iteration_alone():
    prompts = _numbered(40)
    forward = [prompt_batch(prompts, 1, iteration, 8) for iteration in range(10)]
    backward = [prompt_batch(prompts, 1, iteration, 8) for iteration in reversed(range(10))]
    assert forward == backward[::-1]
    assert all(prompts[index] is prompt for batch in forward for index, prompt in batch)


def test_order_differs_between_epochs_and_between_seeds():
    prompts = _numbered(40)
    first, second = prompt_batch(prompts, 1, 0, 40), prompt_batch(prompts, 1, 1, 40)
    assert first != second
    assert first != prompt_batch(prompts, 2, 0, 40)


def test_batch_longer_than_the_list_repeats_it_evenly():
    batch = prompt_batch(_numbered(3), 0, 5, 8)
    counts = Counter(index for index, _ in batch)
    assert len(batch) == 8
    assert max(counts.values()) - min(counts.values()) <= 2
    assert set(counts) == {0, 1, 2}


def test_empty_list_and_empty_batch_are_refused():
    with pytest.raises(UsageError, match="empty"):
        prompt_batch([], 0, 0, 4)
    with pytest.raises(UsageError, match="num_prompts is 0"):
        prompt_batch(_numbered(2), 0, 0, 0)
