import itertools
import json
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import scipy.stats

from diffusion_grpo import prompt_files
from diffusion_grpo.config import PRESETS
from diffusion_grpo.errors import UsageError
from diffusion_grpo.prompts import (
    Prompt,
    fingerprint,
    is_held_out,
    list_prompts,
    load_heldout,
    load_prompts,
    overlap_note,
    prompt_batch,
    shuffled_place,
    split_prompts,
    upcoming_prompts,
)


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
        prompt_files, "resource_path", lambda kind, *parts: tmp_path.joinpath(*parts)
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
        texts = [prompt.text for prompt in load_prompts(name)[:20_000]]
        assert len(texts) == len(set(texts)), name
        assert not any("{" in text or "  " in text for text in texts)


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
        ("list.doc", "a fox\n", r"ends in '.doc'; expected a .txt"),
        ("weight.jsonl", '{"prompt": "a", "weight": 0}\n', 'line 1: "weight" is 0; expected a'),
        ("headless.csv", "a fox\na hen\n", "no column 'prompt'; its columns: a fox"),
        ("near.csv", "Prompt,n\na hen,2\n", "did you mean 'Prompt'"),
        ("ragged.csv", "prompt,n\na fox,1\na hen\n", "ragged.csv, line 3: expected 2 columns"),
        ("wide.csv", "prompt\na fox,1\n", "wide.csv, line 2: expected 1 columns"),
        ("wide_index.csv", ",prompt\n0,a fox,1\n", "line 2: expected 2 columns"),
        ("nameless.csv", "prompt,n,\na,1,2\n", "one of the columns 'prompt', 'n', '' has no name"),
        ("nameless_too.csv", ",prompt,\n0,a,2\n", "columns '', 'prompt', '' has no name"),
        ("twice.csv", "prompt,n,n\na,1,2\n", "column 'n' is there twice"),
        ("quote.csv", 'prompt\n"a fox\n', "not valid CSV"),
        ("weight.csv", "prompt,weight\na,heavy\n", "line 2: \"weight\" is 'heavy'"),
        ("list.yaml", "- a fox\n", "list.yaml: expected a mapping with a list of 'templates'"),
        ("key.yaml", "templates: [a]\nslot: {}\n", "unknown key 'slot' .did you mean 'slots'"),
        ("broken.yaml", "templates: [a\n", "broken.yaml: not valid YAML"),
        ("slot.yaml", "templates: ['a {colour}']\n", "no slot 'colour' .did you mean 'color'"),
        ("word.yaml", "templates: ['{x}']\nslots: {x: [yes]}\n", "a word is True; expected text"),
        ("brace.yaml", "templates: ['a {b c} d']\n", "'{b c}' in .* is no slot"),
        ("few.yaml", "templates: ['{x} {x#2}']\nslots: {x: [a]}\n", "2 different words"),
        ("field.yaml", "templates: ['{color.plural}']\n", "field 'plural', which the word 'red'"),
        (
            "meta.yaml",
            "templates: [{text: '{color}', metadata: {c: '{animal}'}}]\n",
            "the metadata has {animal}, which its text does not have",
        ),
        ("list.parquet", "PAR", "cannot be read as Parquet"),
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


@pytest.fixture(params=["a table of places", "no table"])
def shuffled(request, monkeypatch):
    """Lists are shuffled as short ones are, and as those that are too long for a table."""
    if request.param == "no table":
        monkeypatch.setattr("diffusion_grpo.prompts._SHUFFLED_WHOLE", 0)


@pytest.mark.usefixtures("shuffled")
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


@pytest.mark.usefixtures("shuffled")
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


def test_csv_columns_are_metadata(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text('prompt,task,weight\n"a fox, running",animal,2\n"a ""red"" hen",x,1\n')
    assert load_prompts(path) == [
        Prompt("a fox, running", {"task": "animal"}, 2.0),
        Prompt('a "red" hen', {"task": "x"}, 1.0),
    ]


def test_row_numbers_that_pandas_writes_are_left_out(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text(",prompt,task\n0,a fox,animal\n1,a hen,bird\n")  # df.to_csv("list.csv")
    assert load_prompts(path) == [
        Prompt("a fox", {"task": "animal"}),
        Prompt("a hen", {"task": "bird"}),
    ]


def test_parquet_columns_keep_their_types(tmp_path):
    path = tmp_path / "list.parquet"
    table = pyarrow.table({"prompt": ["a fox"], "count": [2], "tags": [["x", "y"]]})
    pyarrow.parquet.write_table(table, path)
    assert load_prompts(path) == [Prompt("a fox", {"count": 2, "tags": ["x", "y"]})]
    pyarrow.parquet.write_table(table.drop(["prompt"]), path)
    with pytest.raises(UsageError, match="no column 'prompt'; its columns: count, tags"):
        load_prompts(path)


TEMPLATES = """
templates:
  - text: "{a color} {thing} and {a color#2} one"
    metadata: {colors: ["{color}", "{color#2}"], size: "{thing.size}", note: "is {color}"}
  - "no slot"
slots:
  color: [red, orange, blue]
  thing: [{text: box, size: 3}, {text: cup, size: 1.5}]
"""


def test_template_has_every_combination_once(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text(TEMPLATES)
    prompts = load_prompts(path)
    article = {"red": "a red", "orange": "an orange", "blue": "a blue"}
    expected = {"no slot": {}} | {
        f"{article[one]} {thing} and {article[two]} one": {
            "colors": [one, two],
            "size": size,
            "note": f"is {one}",
        }
        for one in article
        for two in article
        if one != two
        for thing, size in (("box", 3), ("cup", 1.5))
    }
    assert len(prompts) == len(expected) == 13
    assert {prompt.text: prompt.metadata for prompt in prompts} == expected
    assert prompts[-1] == prompts[12] and prompts[3:5] == [prompts[3], prompts[4]]
    with pytest.raises(IndexError):
        prompts[13]


def test_template_on_the_command_line_uses_the_slots_of_the_project():
    prompts = load_prompts("{a color} {animal} {activity} {place}")
    assert len(prompts) == 11 * 52 * 30 * 12
    first = [prompt.text for prompt in prompts[:8]]
    assert len({text.split()[1] for text in first}) > 3  # neighbors differ in every slot
    assert len({text.split()[2] for text in first}) > 3


def test_huge_template_is_drawn_from_without_being_expanded():
    prompts = load_prompts(" ".join(["{color}", "{animal}", "{activity}", "{object}"] * 3))
    assert len(prompts) == 11 * 52 * 30 * 54  # a slot that is repeated is the same word
    different = load_prompts(" ".join(f"{{object#{n}}}" for n in range(1, 9)))
    assert len(different) > 10**13
    visited = [different_text for i in range(20) for different_text in _texts(different, i, 8)]
    assert len(set(visited)) == 160
    assert all(len(set(text.split())) == 8 for text in visited)


def _texts(prompts, iteration, count):
    return [prompt.text for _, prompt in prompt_batch(prompts, 0, iteration, count)]


def test_shuffle_without_a_table_is_a_permutation():
    for count in (1, 2, 5, 64, 1000):
        shuffled = [shuffled_place(i, count, (3, 1)) for i in range(count)]
        assert sorted(shuffled) == list(range(count))
    assert shuffled != sorted(shuffled)
    assert shuffled != [shuffled_place(i, 1000, (3, 2)) for i in range(1000)]


def test_places_of_a_shuffle_without_a_table_do_not_depend_on_the_index():
    index = np.arange(4096)
    places = np.array([shuffled_place(i, 4096, (3, 1)) for i in range(4096)])
    for three_bits, others in itertools.product((0, 3, 6, 9), repeat=2):
        table = np.zeros((8, 8))
        np.add.at(table, (index >> three_bits & 7, places >> others & 7), 1)
        assert scipy.stats.chi2_contingency(table).pvalue > 1e-4


def _share(prompts, text, batches=300):
    drawn = [t for i in range(batches) for t in _texts(prompts, i, 10)]
    return sum(text in t for t in drawn) / len(drawn)


def test_prompts_are_drawn_in_proportion_to_their_weights(tmp_path):
    # 3000 draws: the standard deviation of a share of 3/4 is 0.008
    listed = [Prompt("rare"), Prompt("often", weight=3.0)]
    assert abs(_share(listed, "often") - 0.75) < 0.04
    path = tmp_path / "list.yaml"
    path.write_text(
        "templates: [{text: 'an {animal}', weight: 1}, {text: only, weight: 3}]\n"
        "slots: {animal: [ape, eel, ant, asp]}\n"
    )
    prompts = load_prompts(path)
    assert abs(_share(prompts, "only") - 0.75) < 0.04
    assert abs(_share(prompts, "eel") - 0.0625) < 0.025
    assert abs(sum(prompt.weight for prompt in prompts if prompt.text != "only") - 0.25) < 1e-9
    train, _ = split_prompts(prompts, 0.3)
    assert 0 < len(train) < 5
    total = sum(prompt.weight for prompt in train)
    for prompt in train:
        assert abs(_share(train, prompt.text) - prompt.weight / total) < 0.05


def test_a_fingerprint_tells_lists_apart_by_all_that_a_run_takes_from_them():
    def made(*prompts):
        return fingerprint([Prompt(*prompt) for prompt in prompts])

    same = ("a fox", {"count": 1}, 2.0), ("a hen", {}, 1.0)
    others = [
        (same[0],),
        same[::-1],
        (("a box", {"count": 1}, 2.0), same[1]),
        (("a fox", {"count": 2}, 2.0), same[1]),
        (("a fox", {"count": 1}, 3.0), same[1]),
    ]
    assert len({made(*prompts) for prompts in (same, *others)}) == 6
    assert made(*same) == made(*same)


def test_a_fingerprint_of_templates_is_of_templates_and_words(tmp_path):
    def made(templates, words, share=0.0):
        path = tmp_path / "list.yaml"
        path.write_text(json.dumps({"templates": templates, "slots": {"bird": words}}))
        prompts = load_prompts(path)
        return fingerprint(split_prompts(prompts, share)[0] if share else prompts)

    lists = [
        (["a {bird}"], ["hen", "wren", "owl", "tit"]),
        (["a {bird}"], ["hen", "wren", "owl", "jay"]),
        (["the {bird}"], ["hen", "wren", "owl", "tit"]),
        ([{"text": "a {bird}", "weight": 2}], ["hen", "wren", "owl", "tit"]),
        ([{"text": "a {bird}", "metadata": {"n": 1}}], ["hen", "wren", "owl", "tit"]),
    ]
    found = {made(*each) for each in lists} | {made(*lists[0], share=0.5)}
    assert len(found) == 6
    assert made(*lists[0]) == made(*lists[0])
    # of more combinations than could be made one by one
    huge = "a {color} {animal} and {a color#2} {animal#2} and {a color#3} {animal#3}"
    assert fingerprint(load_prompts(huge)) == fingerprint(load_prompts(huge))


def test_split_is_stable_when_the_list_grows_and_is_near_its_share():
    prompts = _numbered(4000)
    train, heldout = split_prompts(prompts, 0.25)
    assert sorted([*train, *heldout], key=lambda p: int(p.text[7:])) == prompts
    assert abs(len(heldout) / 4000 - 0.25) < 0.04  # standard deviation 0.007
    grown_train, grown_heldout = split_prompts([Prompt("new"), *_numbered(5000)], 0.25)
    assert set(map(str, train)) <= set(map(str, grown_train))
    assert set(map(str, heldout)) <= set(map(str, grown_heldout))
    # printf 'a cat' | sha256sum begins with 51e4674156077982, 0.31989 of 2^64
    assert is_held_out("a cat", 0.3199) and not is_held_out("a cat", 0.3198)


def test_template_is_split_too():
    train, heldout = split_prompts(load_prompts("counting"), 0.2)
    assert not {p.text for p in train} & {p.text for p in heldout}
    assert len(train) + len(heldout) == len(load_prompts("counting"))
    assert all(is_held_out(prompt.text, 0.2) for prompt in heldout[:10])


@pytest.mark.parametrize(
    ("share", "message"), [(0.0, "between 0 and 1"), (1.0, "between"), (1e-6, "held-out side of 3")]
)
def test_split_that_leaves_a_side_empty_is_refused(share, message):
    with pytest.raises(UsageError, match=message):
        split_prompts(_numbered(3), share)


def test_held_out_prompts_come_from_a_list_a_share_or_the_training_list():
    train, heldout = load_heldout("animals", "animals_heldout", 0.0)
    assert (len(train), len(heldout)) == (52, 24)
    train, heldout = load_heldout("animals", None, 0.3)
    assert len(train) + len(heldout) == 52 and not set(map(str, train)) & set(map(str, heldout))
    train, heldout = load_heldout("animals", None, 0.0)
    assert train == heldout


def test_held_out_prompts_that_are_trained_on_are_told():
    train = [Prompt(text) for text in ("a cat", "a dog", "a fox")]
    heldout = [Prompt(text) for text in ("an owl", "a dog", "a cat")]
    note = overlap_note(train, heldout)
    assert note is not None and note.startswith("2 of the 3 held-out prompts are trained on too")
    assert "such as 'a dog'" in note
    assert overlap_note(train, heldout[:1]) is None
    assert overlap_note(train * 40_000, heldout) is None  # too long to be gone through
    for name in ("animals", "ocr", "shapes"):
        assert overlap_note(load_prompts(name), load_prompts(f"{name}_heldout")) is None


@pytest.mark.parametrize("text", ["a {color} " + "very " * 60 + "{animal}", "a cat " * 60])
def test_a_text_too_long_for_a_file_is_a_template_or_is_refused(text):
    if "{" in text:
        assert load_prompts(text)[0].text.startswith("a ")
    else:
        with pytest.raises(UsageError, match="no such list or file"):
            load_prompts(text)


def test_metadata_of_the_shipped_templates_is_what_the_text_says():
    prompt = load_prompts("counting")[0]
    (thing,) = prompt.metadata["objects"]
    words = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
    assert prompt.text.split()[0] == words[thing["count"]]
    assert all(prompt.text.count('"') == 2 for prompt in load_prompts("ocr"))
    relations = Counter(p.metadata["relation"] for p in load_prompts("positions")[:400])
    assert len(relations) == 4 and min(relations.values()) > 60
    kinds = Counter(
        p.metadata["task"]
        for i in range(40)
        for _, p in prompt_batch(load_prompts("colors_objects"), 0, i, 10)
    )
    assert len(kinds) == 2 and min(kinds.values()) > 140  # of 400; standard deviation 10


def test_a_long_list_is_encoded_a_few_iterations_at_a_time():
    prompts = load_prompts("colors_objects")
    rows, stop = upcoming_prompts(prompts, 3, range(5, 1000), 8, most=64)
    visited = {i for n in range(5, 13) for i, _ in prompt_batch(prompts, 3, n, 8)}
    assert stop == 13 and set(rows) == visited
    assert sorted(rows.values()) == list(range(len(visited)))
    assert upcoming_prompts(prompts, 3, range(5, 1000), 100, most=64)[1] == 6
    assert upcoming_prompts(prompts, 3, range(998, 1000), 8, most=64)[1] == 1000
    short, stop = upcoming_prompts(_numbered(5), 0, range(2, 9), 2)
    assert short == {i: i for i in range(5)} and stop == 9
