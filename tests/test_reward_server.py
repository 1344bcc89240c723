"""The reward server and its client over the loopback interface, and what can go wrong with them."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
import pytest
from reward_servers import answering, mean, pictures, post, service, serving

from diffusion_grpo import http_json
from diffusion_grpo.errors import UsageError
from diffusion_grpo.http_json import request
from diffusion_grpo.reward import (
    RewardError,
    RewardSet,
    of_group,
    parse_reward_specs,
)
from diffusion_grpo.reward_protocol import (
    Limits,
    ProtocolError,
    decode_info,
    decode_request,
    decode_scores,
    encode_request,
)

INFO = {"name": "mean", "of_group": False, "batch_size": 4}


def rewards(url: str, **options: Any) -> RewardSet:
    name = parse_reward_specs([url])[0].name
    given = [f"{name}.{key}={value}" for key, value in options.items()]
    return RewardSet.load(parse_reward_specs([url], given))


@pytest.fixture
def no_pauses(monkeypatch) -> list[float]:
    """Record the client's pauses instead of waiting; its clock stands still between them."""
    pauses: list[float] = []
    monkeypatch.setattr(http_json, "clock", lambda: sum(pauses))
    monkeypatch.setattr(http_json, "pause", pauses.append)
    return pauses


# --- Server and client together -------------------------------------------------------------------


def test_scores_come_back_exactly_as_the_reward_gave_them() -> None:
    images, prompts = pictures(7), [str(10**i) for i in range(7)]
    details = [{"k": i, "é": [1, {"x": None}]} for i in range(7)]
    with serving(service()) as url:
        result = rewards(url, batch_size=3)(images, prompts, details)
    expected = mean(images, prompts, details).astype(np.float32)
    np.testing.assert_array_equal(result.scores["mean"], expected)


def test_a_reward_of_a_group_gets_whole_groups() -> None:
    seen = []

    @of_group
    def best(images, prompts, metadata):
        seen.append((len(images), set(prompts)))
        return images[:, 0, 0, 0] - images[:, 0, 0, 0].max().astype(float)

    images = pictures(6)
    with serving(service(best, "best")) as url:
        loaded = rewards(url, batch_size=2)
        assert loaded.rewards[0].of_group and loaded.rewards[0].name == "best"
        total = loaded(images, ["a"] * 3 + ["b"] * 3, group_size=3).total
    assert seen == [(3, {"a"}), (3, {"b"})]
    first = images[:, 0, 0, 0].astype(float).reshape(2, 3)
    np.testing.assert_array_equal(total, (first - first.max(1, keepdims=True)).ravel())


def test_a_name_can_be_given_where_two_servers_have_the_same() -> None:
    with serving(service()) as first, serving(service()) as second:
        specs = parse_reward_specs([first, second])
        with pytest.raises(UsageError, match="two rewards have the name 'mean'"):
            RewardSet.load(specs)
        specs[1].options["name"] = "other"
        assert [r.name for r in RewardSet.load(specs).rewards] == ["mean", "other"]


def test_a_token_is_asked_for_and_sent(monkeypatch) -> None:
    monkeypatch.delenv("REWARD_SERVER_TOKEN", raising=False)
    with serving(service(token="secret")) as url:
        with pytest.raises(UsageError, match="status 401.*REWARD_SERVER_TOKEN is not set"):
            rewards(url)
        monkeypatch.setenv("REWARD_SERVER_TOKEN", "wrong")
        with pytest.raises(UsageError, match="REWARD_SERVER_TOKEN is wrong"):
            rewards(url)
        body = encode_request(pictures(1), ["a"], [{}])
        assert post(url, body)[0] == post(url, body, token="wrong")[0] == 401
        monkeypatch.setenv("OTHER", "secret")
        assert len(rewards(url, token_variable="OTHER")(pictures(), ["a"] * 4).total) == 4


def test_several_servers_share_the_work_and_stand_in_for_each_other(no_pauses) -> None:
    counts = [0, 0]

    def counting(number: int) -> Any:
        def reward(images, prompts, metadata):
            counts[number] += len(images)
            return mean(images, prompts, metadata)

        return service(reward)

    images, prompts = pictures(8), ["a"] * 8
    with serving(counting(0)) as first:
        with serving(counting(1)) as second:
            loaded = rewards(f"{first},{second}", batch_size=2)
            expected = loaded(images, prompts).total
            assert counts == [4, 4]
        # The second is gone now: the first does it all, without a pause.
        np.testing.assert_array_equal(loaded(images, prompts).total, expected)
        assert counts == [12, 4] and no_pauses == []
    with pytest.raises(RewardError, match=f"'mean' failed: ({first}|{second}): no connection"):
        loaded(images, prompts)


def test_servers_of_different_rewards_are_refused() -> None:
    with serving(service()) as first, serving(service(name="other")) as second:
        with pytest.raises(UsageError, match="different rewards.*is 'mean'.*is 'other'"):
            rewards(f"{first},{second}")


# --- What the server refuses ---------------------------------------------------------------------


def test_the_server_refuses_what_does_not_keep_the_protocol() -> None:
    good = json.loads(encode_request(pictures(2), ["a", "b"], [{}, {}]))
    large = json.loads(encode_request(pictures(1, 64, 64), ["a"], [{}]))
    limits = Limits(bytes=6000, images=3, pixels=3000)
    assert len(json.dumps(good)) < 6000
    cases = [
        (b"not json", 400, "not JSON"),
        ([1], 400, "a list where an object belongs"),
        ({"images": good["images"]}, 400, "'prompts' is not a list with one text an image"),
        (good | {"prompts": ["a"]}, 400, "2 images, 1 prompts and 2 metadata"),
        (good | {"images": [], "prompts": [], "metadata": []}, 400, "at least 1"),
        (good | {"images": ["AAAA", "AAAA"]}, 400, "image 0 is not a PNG in base64"),
        (good | {"images": [good["images"][0], "%%%"]}, 400, "image 1 is not a PNG in base64"),
        (good | {"metadata": [{}, "x"]}, 400, "'metadata' is not a list with one object"),
        ({key: value * 2 for key, value in good.items()}, 400, "at most 3 in a request"),
        (large, 413, "larger than 6000 bytes"),
    ]
    mixed = json.loads(encode_request(pictures(1, 4, 4), ["a"], [{}]))
    two_sizes = {key: good[key][:1] + mixed[key] for key in good}
    cases.append((two_sizes, 400, "image 1 has shape (4, 4, 3), image 0 has (8, 12, 3)"))
    with serving(service(limits=limits)) as url:
        for body, status, message in cases:
            found = post(url, body)
            assert found[0] == status and message in found[1]
        assert post(url, good)[0] == 200
    with serving(service(limits=Limits(pixels=3000))) as url:
        status, said = post(url, large)
        assert status == 400 and "image 0 has 64x64 pixels" in said


def test_a_picture_of_another_format_is_refused() -> None:
    """No decoder but PNG's is offered to the network."""
    import base64
    import io

    from PIL import Image

    for kind in ("JPEG", "TIFF", "GIF"):
        encoded = io.BytesIO()
        Image.fromarray(pictures(1)[0]).save(encoded, kind)
        text = base64.b64encode(encoded.getvalue()).decode()
        body = json.dumps({"images": [text], "prompts": ["a"], "metadata": [{}]}).encode()
        with pytest.raises(ProtocolError, match="image 0 is not a PNG"):
            decode_request(body, Limits())


def test_a_failing_reward_is_told_to_the_client(no_pauses) -> None:
    def fails(images, prompts, metadata):
        if prompts[0] == "usage":
            raise UsageError("images of 8 pixels; expected 16")
        return [np.nan] * len(images) if prompts[0] == "nan" else 1 / 0

    with serving(service(fails, "fails")) as url:
        loaded = rewards(url)
        for prompt, message in (
            ("zero", "status 500: reward 'fails' failed: ZeroDivisionError"),
            ("nan", "status 500: reward 'fails' returned nan for image 0"),
            ("usage", "status 422: reward 'fails' failed: UsageError: images of 8 pixels"),
        ):
            with pytest.raises(RewardError, match=message):
                loaded(pictures(1), [prompt])
    assert no_pauses == []  # such a failure does not pass


def test_an_overloaded_server_says_so_and_the_client_comes_back(no_pauses, monkeypatch) -> None:
    release, began = threading.Event(), threading.Event()

    def slow(images, prompts, metadata):
        began.set()
        assert release.wait(60)
        return mean(images, prompts, metadata)

    found = {}
    with serving(service(slow, concurrency=1, waiting=0)) as url:
        first = rewards(url)
        occupy = threading.Thread(target=lambda: found.update(one=first(pictures(), ["a"] * 4)))
        occupy.start()
        assert began.wait(60)
        impatient = rewards(url, retries=0)
        with pytest.raises(RewardError, match="status 503: 1 requests are being worked on"):
            impatient(pictures(), ["a"] * 4)

        def wait(seconds: float) -> None:
            no_pauses.append(seconds)
            release.set()
            occupy.join()

        monkeypatch.setattr(http_json, "pause", wait)
        second = rewards(url)(pictures(), ["a"] * 4)
    np.testing.assert_array_equal(second.total, found["one"].total)
    assert no_pauses == [1.0]  # as the server asked, Retry-After: 1


def test_a_body_that_comes_too_slowly_is_given_up() -> None:
    import socket

    with serving(service(body_timeout=0.2)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
            )
            assert b" 408 " in connection.recv(4096)
        assert post(url, encode_request(pictures(1), ["a"], [{}]))[0] == 200


def test_a_body_that_is_too_large_is_answered_after_it_was_sent() -> None:
    """A plain client reads nothing before it has sent everything."""
    import http.client

    with serving(service(limits=Limits(bytes=6000))) as url:
        for chunked in (False, True):
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
            body = (b"x" * 2**20 for _ in range(20)) if chunked else b"x" * 20 * 2**20
            headers = {"Connection": "close"}
            connection.request("POST", "/v1/score", body, headers, encode_chunked=chunked)
            answer = connection.getresponse()
            assert answer.status == 413 and b"send fewer images at once" in answer.read()
            connection.close()


# --- What the client puts up with ---------------------------------------------------------------


def test_a_reward_that_fails_on_one_server_is_asked_of_each_other_once(no_pauses) -> None:
    calls: list[str] = []

    def reward(name: str, works: bool) -> Any:
        def score(images, prompts, metadata):
            calls.append(name)
            if not works:
                raise MemoryError("out of memory")
            return mean(images, prompts, metadata)

        return service(score)

    images, prompts = pictures(), ["a"] * 4
    with serving(reward("first", False)) as first, serving(reward("second", False)) as second:
        with serving(reward("third", True)) as third:
            loaded = rewards(f"{first},{second},{third}", retries=0)
            np.testing.assert_array_equal(
                loaded(images, prompts).total, mean(images, prompts, [{}] * 4).astype(np.float32)
            )
            assert calls == ["first", "second", "third"]
        with pytest.raises(
            RewardError,
            match=f"{first}: status 500: .*MemoryError.*; {second}: status 500: .*of 2 attempts",
        ):
            rewards(f"{first},{second}")(images, prompts)
    assert calls[3:] == ["first", "second"] and no_pauses == []


def test_a_call_that_is_repeated_begins_with_another_server(no_pauses) -> None:
    asked: list[tuple[str, int]] = []

    def named(name: str) -> Any:
        def answer(path: str, body: bytes, handler: Any) -> Any:
            if path != "/v1/score":
                return INFO
            images, _, _ = decode_request(body, Limits())
            asked.append((name, int(images[0, 0, 0, 0])))
            return (404, "nothing here", {}) if name == "first" else {"scores": [0.0] * len(images)}

        return answer

    images = pictures(2)
    images[:, 0, 0, 0] = 1, 2
    with answering(named("first")) as first, answering(named("second")) as second:
        loaded = rewards(f"{first},{second}", batch_size=1)
        for _ in range(2):
            with pytest.raises(RewardError, match="status 404"):
                loaded(images, ["a", "b"])
    # the piece that was refused is not refused twice by the same server
    assert [piece for name, piece in asked if name == "first"] == [1, 2]


def test_a_request_that_is_too_large_is_halved_and_later_ones_with_it(no_pauses) -> None:
    sizes: list[int] = []

    def counted(images, prompts, metadata):
        sizes.append(len(images))
        return mean(images, prompts, metadata)

    images, prompts = pictures(7, 64, 64), [str(10**i) for i in range(7)]
    each = len(encode_request(images[:1], prompts[:1], [{}]))
    expected = mean(images, prompts, [{}] * 7).astype(np.float32)
    with serving(service(counted, limits=Limits(bytes=int(2.5 * each)))) as url:
        loaded = rewards(url)
        for _ in range(2):
            np.testing.assert_array_equal(loaded(images, prompts).total, expected)
    assert sizes == [2, 2, 2, 1] * 2 and no_pauses == []
    assert loaded.rewards[0].function.images_at_once == 2
    with serving(service(limits=Limits(bytes=each // 2))) as url:
        with pytest.raises(RewardError, match="413.*one image cannot be divided.*--max-megabytes"):
            rewards(url)(images, prompts)
    with serving(service(of_group(counted), limits=Limits(bytes=int(2.5 * each)))) as url:
        with pytest.raises(RewardError, match="413.*a group cannot be divided.*--max-megabytes"):
            rewards(url)(images[:4], prompts[:4], group_size=4)


def test_an_answer_that_comes_before_the_body_was_read_is_heard() -> None:
    """As of a server that hangs up on what is too large."""
    import socket

    answer = b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 9\r\n\r\ntoo large"
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def hang_up() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(100)
                connection.sendall(answer)

        thread = threading.Thread(target=hang_up)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(http_json.RequestFailed, match="status 413: too large") as failed:
            request(url, b"x" * 50 * 2**20)
        thread.join()
    assert failed.value.status == 413


@pytest.mark.parametrize(
    ("asked", "pause"), [("90", 90.0), ("100000", 600.0), ("0", None), ("soon", 0.5)]
)
def test_a_pause_is_as_long_as_the_server_asks(asked, pause, no_pauses, capsys) -> None:
    answers = [(429, "slow down", {"Retry-After": asked}), {"scores": [0.0] * 4}]
    with answering(lambda path, *_: INFO if path == "/v1/reward" else answers.pop(0)) as url:
        rewards(url)(pictures(), ["a"] * 4)
    assert no_pauses == ([] if pause is None else [pause])
    told = f"{url} asks to wait {pause:.0f} s" if pause and pause > 30 else ""
    assert capsys.readouterr().err.strip() == told


def test_a_pause_can_be_asked_for_by_a_date(no_pauses) -> None:
    from email.utils import formatdate

    when = formatdate(time.time() + 100, usegmt=True)
    answers = [(503, "closed", {"Retry-After": when}), {"scores": [0.0] * 4}]
    with answering(lambda path, *_: INFO if path == "/v1/reward" else answers.pop(0)) as url:
        rewards(url)(pictures(), ["a"] * 4)
    assert len(no_pauses) == 1 and 60 < no_pauses[0] <= 101


def test_each_of_several_servers_has_the_pause_that_it_asks_for(no_pauses) -> None:
    asked: list[str] = []

    def named(name: str, wait: int) -> Any:
        def answer(path: str, body: bytes, handler: Any) -> Any:
            if path != "/v1/score":
                return INFO
            asked.append(name)
            if asked.count(name) == 1:
                return (503, "busy", {"Retry-After": str(wait)})
            return {"scores": [0.0] * 4}

        return answer

    with answering(named("first", 100)) as first, answering(named("second", 7)) as second:
        loaded = rewards(f"{first},{second}")
        loaded(pictures(), ["a"] * 4)
        assert asked == ["first", "second", "second"] and no_pauses == [7.0]
        for _ in range(3):  # the first has 93 seconds left, whosever turn it is
            loaded(pictures(), ["a"] * 4)
        assert set(asked[3:]) == {"second"} and no_pauses == [7.0]
        no_pauses.append(93.0)
        for _ in range(2):
            loaded(pictures(), ["a"] * 4)
        assert "first" in asked[6:]


def test_a_server_that_is_too_slow_is_given_up(no_pauses) -> None:
    release = threading.Event()

    def slow(path: str, body: bytes, handler: Any) -> Any:
        if path == "/v1/score":
            release.wait(60)
        return INFO

    with answering(slow) as url:
        loaded = rewards(url, timeout=0.2, retries=2)
        with pytest.raises(
            RewardError, match=rf"{url}: no answer within 0\.2 s \(the last of 3 attempts\)"
        ):
            loaded(pictures(), ["a"] * 4)
        release.set()
    assert no_pauses == [0.5, 1.0]


def test_an_answer_that_drips_does_not_outlast_the_timeout(no_pauses) -> None:
    def drip(path: str, body: bytes, handler: Any) -> Any:
        if path != "/v1/score":
            return INFO
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):  # a byte always comes before a socket's own timeout
            try:
                handler.wfile.write(b" ")
                handler.wfile.flush()
            except OSError:
                return None
            time.sleep(0.05)
        return None

    with answering(drip) as url:
        start = time.monotonic()
        with pytest.raises(RewardError, match=r"no answer within 0\.3 s"):
            rewards(url, timeout=0.3, retries=0)(pictures(), ["a"] * 4)
        assert time.monotonic() - start < 4


def test_a_server_that_dies_in_mid_batch_and_returns_loses_nothing(no_pauses) -> None:
    deaths = []

    def dying(path: str, body: bytes, handler: Any) -> Any:
        if path != "/v1/score":
            return INFO
        if len(deaths) < 2:
            deaths.append(len(body))
            if len(deaths) == 2:  # once before the answer, once within it
                handler.send_response(200)
                handler.send_header("Content-Length", "1000")
                handler.end_headers()
                handler.wfile.write(b'{"scores": [1.0,')
                handler.wfile.flush()
            handler.connection.close()
            handler.close_connection = True
            return None
        images, prompts, metadata = decode_request(body, Limits())
        return {"scores": mean(images, prompts, metadata).tolist()}

    with answering(dying) as url:
        total = rewards(url)(pictures(), ["a"] * 4).total
    np.testing.assert_array_equal(total, mean(pictures(), ["a"] * 4, [{}] * 4).astype(np.float32))
    assert len(deaths) == 2 and no_pauses == [0.5, 1.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, "<html>hello</html>", {}), "a useless answer: not JSON .*<html>hello"),
        ([1.0] * 4, "a useless answer: a list where an object belongs"),
        ({"score": [1.0] * 4}, "a useless answer: the answer has no list of 'scores'"),
        ({"scores": [1.0] * 3}, "a useless answer: the answer has 3 scores for 4 images"),
        (
            {"scores": [1.0, 2.0, "3", 4.0]},
            "a useless answer: score 2 of the answer is '3', not a finite number",
        ),
        ((200, '{"scores": [1, NaN, 3, 4]}', {}), "a useless answer: score 1 of the answer is nan"),
        ({"scores": [1.0, True, 3.0, 4.0]}, "a useless answer: score 1 of the answer is True"),
        ((302, "", {"Location": "http://elsewhere/"}), "status 302"),
        ((500, '{"error": "out of memory"}', {}), "status 500: out of memory"),
        ((404, "nothing here", {}), "status 404: nothing here"),
        ((200, " " * (17 * 2**20), {}), "an answer of more than 16777216 bytes"),
    ],
)
def test_garbage_is_an_error_that_says_what_came(answer, message, no_pauses) -> None:
    with answering(lambda path, *_: INFO if path == "/v1/reward" else answer) as url:
        with pytest.raises(RewardError, match=f"{url}: {message}"):
            rewards(url, retries=1)(pictures(), ["a"] * 4)


def test_a_server_that_is_not_there_or_none_is_found_before_the_run() -> None:
    with answering(lambda *_: {"hello": 1}) as url:
        with pytest.raises(UsageError, match=f"{url} is not a reward server: GET /v1/reward"):
            rewards(url)
    with pytest.raises(UsageError, match=f"{url}: no connection.*is it running"):
        rewards(url)
    for options, message in (
        ({"timeout": 0}, "timeout is 0.0; expected more than 0"),
        ({"retries": -1}, "retries is -1; expected 0 or more"),
        ({"batch_size": 0}, "batch_size is 0; expected 1 or more"),
        ({"timeot": 1}, "has no option 'timeot' .did you mean 'timeout'"),
    ):
        with pytest.raises(UsageError, match=message):
            rewards(url, **options)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"name": "a"}, "no text 'name' or no true or false 'of_group'"),
        ({"name": 1, "of_group": True}, "no text 'name'"),
        ({"name": "a", "of_group": False, "batch_size": 0}, "'batch_size' is 0"),
    ],
)
def test_what_a_server_says_of_itself_is_checked(body, message) -> None:
    with pytest.raises(ProtocolError, match=message):
        decode_info(json.dumps(body).encode())


# --- The description ------------------------------------------------------------------------------


def test_the_description_names_what_is_sent_and_answered() -> None:
    with serving(service(token="secret")) as url:
        described = json.loads(request(f"{url}/openapi.json"))
        info = json.loads(request(f"{url}/v1/reward", token="secret"))
        body = encode_request(pictures(1), ["a"], [{}])
        answer = json.loads(post(url, body, token="secret")[1])
    assert described["openapi"] == "3.1.0" and described["security"] == [{"token": []}]
    schemas = described["components"]["schemas"]
    for schema, message in (
        ("Reward", info),
        ("ScoreRequest", json.loads(body)),
        ("Scores", answer),
        ("Error", {"error": "x"}),
    ):
        assert (
            set(message) == set(schemas[schema]["properties"]) == set(schemas[schema]["required"])
        )
    used = set(json.dumps(described["paths"]).split('"#/components/schemas/')[1:])
    assert {text.partition('"')[0] for text in used} == set(schemas)
    assert decode_scores(json.dumps(answer).encode(), 1).shape == (1,)
