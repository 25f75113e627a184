"""What a server does wrong: what passes is tried again, what does not pass is said, the key is never."""

import time
from itertools import pairwise
from pathlib import Path

import httpx2
import pytest

from avar_lightning.synthesis import client, synthesize
from avar_lightning.synthesis.client import retry_after
from avar_lightning.synthesis.journal import Journal
from tests.synthesis.conftest import make_config, output_bytes, rejected, written

PASSING = [408, 409, 429, 500, 502, 503, "drop", "half", "bad json", "list", "empty choices", "null choice"]
PASSING += ["no content", lambda body: "  "]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: "blank" if callable(fault) else str(fault))
def test_what_passes_is_tried_again(server, prepare, fault):
    for name in ("describe", "reason", "anchor"):
        server.faults[name].extend([fault, fault])
    config = prepare(2, concurrency=1)
    report = synthesize(config)
    assert (report.kept, report.left) == (2, 0)
    assert [stage["requests"] for stage in report.spent.values()] == [4, 4, 4]
    assert [stage["answers"] for stage in report.spent.values()] == [2, 2, 2]
    clean = prepare(2, output="clean")
    synthesize(clean)
    assert output_bytes(config.output) == output_bytes(clean.output)


def test_a_slow_answer_is_given_up_and_asked_for_again(server, prepare):
    server.faults["reason"].append("slow")
    report = synthesize(prepare(1, stage={"timeout": 0.6}))
    assert report.kept == 1
    assert report.spent["reason"]["requests"] == 2
    assert report.spent["reason"]["lost_tokens"] > 200  # the server may charge what nobody heard


def test_a_server_that_asks_for_time_gets_it(server, prepare):
    server.faults["describe"].extend([(429, {"Retry-After": "0.7"}, "slow down")] * 2)
    synthesize(prepare(1))
    first, second, third = (body["time"] for body in server.asked("describe"))
    assert second - first >= 0.7
    assert third - second >= 0.7


def test_waits_grow_up_to_the_longest(server, prepare, monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    monkeypatch.setattr(client, "FIRST_WAIT", 0.15)
    server.faults["describe"].extend([503] * 4)
    synthesize(prepare(1, max_wait=0.4))
    waits = [after - before for before, after in pairwise(body["time"] for body in server.asked("describe"))]
    assert all(wait >= least for wait, least in zip(waits, (0.15, 0.3, 0.4, 0.4), strict=True))


def test_dates_are_waits_too():
    assert retry_after("Wed, 01 Jan 2098 00:00:00 GMT") > 50
    assert retry_after("Wed, 01 Jan 1998 00:00:00 GMT") == 0.0
    assert retry_after("nonsense") == 0.0


def test_a_server_that_is_away_is_named_while_it_is(server, prepare, monkeypatch, capsys):
    monkeypatch.setattr(client, "SILENCE", 0.05)
    server.faults["reason"].extend([503] * 500)
    with pytest.raises(RuntimeError, match="same command"):
        synthesize(prepare(3, patience=0.5))
    told = [line for line in capsys.readouterr().err.splitlines() if "has answered nothing for" in line]
    assert len(told) == 1  # not once a call or a try
    assert "(stage reason" in told[0]
    assert "503" in told[0]


def test_a_server_that_stays_away_ends_the_run(server, prepare):
    synthesize(prepare(1))
    server.faults["reason"].extend([503] * 500)
    with pytest.raises(RuntimeError, match=r"reason.*no answer in \d+ tries over 0.5 s.*503.*same command"):
        synthesize(prepare(3, patience=0.5))
    server.faults["reason"].clear()
    described = len(server.asked("describe"))
    assert synthesize(prepare(3)).kept == 3
    assert len(server.asked("describe")) == described == 3


def test_nobody_there_is_said(prepare, tmp_path):
    config = make_config("http://127.0.0.1:9/v1", prepare(1).input, tmp_path / "out", patience=0.3)
    with pytest.raises(RuntimeError, match=r"http://127\.0\.0\.1:9/v1 \(stage describe.*ConnectError"):
        synthesize(config)


def test_one_sample_that_brings_the_server_down_does_not_hold_the_others(server, prepare):
    server.texts["reason", 1] = None
    original = server.answer

    def answer(body):
        value = original(body)
        if value["choices"][0]["message"]["content"] is None:
            time.sleep(0.02)
            raise ConnectionError("told to fail")
        return value

    server.answer = answer
    server.delay = 0.1
    server.http.handle_error = lambda *_: None
    config = prepare(12, patience=0.8, concurrency=2)
    report = synthesize(config)
    assert report.kept == 11
    assert rejected(config)["q1"]["reason"].startswith("refused: reason: no answer in")


def test_answers_that_hold_nothing_are_not_paid_for_ever(server, prepare):
    server.texts["anchor", 0] = ""
    config = prepare(2)
    report = synthesize(config)
    assert (report.kept, report.rejected["refused"]) == (1, 1)
    assert (
        rejected(config)["q0"]["reason"] == "refused: anchor: 6 answers held nothing (last: an answer with no content)"
    )
    assert len(server.asked("anchor")) == 7
    assert report.spent["anchor"]["lost_tokens"] == 6 * 150


@pytest.mark.parametrize(("fault", "reason"), [("length", "cut"), ("content_filter", "refused")])
def test_answers_that_end_early_are_rejected_and_not_paid_again(server, prepare, fault, reason):
    server.faults["anchor"].append(fault)
    config = prepare(1)
    assert synthesize(config).rejected[reason] == 1
    if fault == "length":
        assert rejected(config)["q0"]["reason"] == ("cut: anchor: the answer was cut off at max_tokens=200; raise it")
    assert synthesize(config).rejected[reason] == 1
    assert len(server.asked("anchor")) == 1
    assert synthesize(prepare(1, anchor={"max_tokens": 300})).kept == 1


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (400, "correct the settings of stages.reason"),
        (401, "stages.reason.api_key_variable"),
        (403, "may not use this model"),
        (404, "correct stages.reason.base_url"),
        (422, "correct the settings"),
    ],
)
def test_what_will_not_pass_ends_the_run_at_once(server, prepare, status, hint):
    server.faults["reason"].append(status)
    with pytest.raises(
        RuntimeError, match=rf"/v1 \(stage reason, model reason\) answered {status} .*told to fail.*{hint}"
    ):
        synthesize(prepare(9, concurrency=1))
    assert len(server.requests) == 2
    assert synthesize(prepare(9)).kept == 9
    assert len(server.asked("describe")) == 9


def test_answers_on_their_way_are_kept_when_the_run_ends(server, prepare):
    server.delay = 0.2
    server.faults["describe"].extend([None, 404])
    with pytest.raises(RuntimeError, match="answered 404"):
        synthesize(prepare(4, concurrency=4))
    assert len(server.answered) >= 3
    assert synthesize(prepare(4)).kept == 4
    assert len(server.requests) == 3 * 4 + 1


def test_a_sample_too_long_for_the_model_is_left_out_until_it_is_retried(server, prepare):
    said = "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens."
    server.faults["reason"].append((400, {}, said))
    config = prepare(3, concurrency=1)
    report = synthesize(config)
    assert (report.kept, report.rejected["refused"], report.left) == (2, 1, 0)
    assert "maximum context length" in rejected(config)["q0"]["reason"]
    expected, asked = output_bytes(config.output), len(server.requests)
    assert synthesize(config).rejected["refused"] == 1
    assert (output_bytes(config.output), len(server.requests)) == (expected, asked)
    assert synthesize(prepare(3, retry_refused=True)).kept == 3
    assert synthesize(config).kept == 3
    assert len(server.requests) == asked + 2


def test_a_refusal_of_one_sample_is_told_from_wrong_settings(server, prepare):
    server.faults["reason"].extend([None, 400])
    config = prepare(3, concurrency=1)
    assert synthesize(config).kept == 2
    assert rejected(config)["q1"]["reason"].startswith("refused: reason: status 400")


def test_a_refused_sample_does_not_stop_later_runs(server, prepare):
    server.refusals["reason", 1] = 400, "no"
    config = prepare(3, concurrency=1)
    expected = synthesize(config), output_bytes(config.output)
    asked = len(server.requests)
    assert (synthesize(config), output_bytes(config.output)) == expected
    assert len(server.requests) == asked
    server.refusals["reason", 3] = 400, "no"
    more = synthesize(prepare(4, concurrency=1))  # what the first run was answered tells that the settings are good
    assert (more.kept, more.rejected["refused"]) == (2, 2)
    again = synthesize(prepare(4, concurrency=1, retry_refused=True))
    assert (again.kept, again.rejected["refused"], len(server.asked("reason"))) == (2, 2, 6)


def test_other_settings_are_not_known_to_be_understood(server, prepare):
    synthesize(prepare(2))
    server.faults["reason"].append(400)
    with pytest.raises(RuntimeError, match=r"correct the settings of stages\.reason"):
        synthesize(prepare(3, reason={"extra": {"nonsense": 1}}))


def test_refusals_are_replayed_without_any_server(server, prepare):
    server.texts["anchor", 0] = ""
    server.refusals["reason", 1] = 400, "maximum context length"
    config = prepare(4)
    synthesize(config)
    lost = synthesize(config).spent["anchor"]["lost_tokens"]
    server.stop()
    begun = time.monotonic()
    report = synthesize(prepare(4, filters={"min_anchors": 0}))
    assert time.monotonic() - begun < 10
    assert (report.kept, report.rejected["refused"], report.left) == (2, 2, 0)
    assert report.spent["anchor"]["lost_tokens"] == lost == 6 * 150


def test_empty_answers_are_counted_over_restarts(server, prepare):
    """Killed between two empty answers, or between the last and its refusal."""
    server.texts["anchor", 0] = ""
    config = prepare(1)
    synthesize(config)
    expected = output_bytes(config.output)
    path = Path(config.output) / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert b'"refused"' in lines[-1]
    for dropped, more in ((1, 0), (3, 1), (5, 2)):
        path.write_bytes(b"".join(lines[:-dropped]))
        asked = len(server.requests)
        synthesize(config)
        assert len(server.requests) == asked + more
        assert output_bytes(config.output) == expected
    assert synthesize(prepare(1, retry_refused=True)).rejected["refused"] == 1
    assert len(server.requests) == asked + 2 + 6


def test_tokens_that_nobody_counted_are_estimated_and_said(server, prepare):
    server.faults["describe"].append("no usage")
    report = synthesize(prepare(2, concurrency=1))
    assert report.spent["describe"]["estimated"] == 1
    assert report.spent["reason"]["estimated"] == 0
    assert report.spent["describe"]["prompt_tokens"] > 300
    assert "1 answers did not say, and are estimated" in str(report)


def test_cost_follows_the_prices(server, prepare):
    report = synthesize(prepare(10, stage={"price_input": 2.0, "price_output": 10.0}))
    assert report.cost == pytest.approx(30 * (100 * 2 + 50 * 10) / 1e6)
    assert "cost" in str(report)
    assert synthesize(prepare(10, output="free")).cost is None


def test_the_bar_shows_rate_spending_and_what_is_kept(server, prepare, capfd):
    server.texts["reason", 1] = "<answer>7</answer>"
    synthesize(prepare(3, progress=True, stage={"price_output": 1000.0}))
    bar = capfd.readouterr().err
    for words in ("asking: 100%", "sample/s", "requests=8", "tokens=1,200", "kept=2", "rejected=1", "cost=0.40"):
        assert words in bar


# Keys


def test_the_key_is_sent_and_nowhere_written_or_said(server, prepare, monkeypatch, capfd, caplog):
    caplog.set_level("DEBUG")
    secret = "sk-very-secret-0123456789"
    server.key = secret
    monkeypatch.setenv("THE_KEY", secret)
    server.texts["describe", 0] = f"A sign with {secret} on it."
    server.texts["reason", 1] = {"content": "<answer>1</answer>", "reasoning": f"It reads {secret}."}
    server.faults["anchor"].append((500, {}, f"internal error of {secret}"))
    config = prepare(3, stage={"api_key_variable": "THE_KEY"}, progress=True)
    report = synthesize(config)
    assert (report.kept, report.rejected["refused"]) == (1, 2)
    assert rejected(config)["q0"]["reason"] == "refused: describe: the answer repeats the key"
    assert rejected(config)["q1"]["reason"] == "refused: reason: the answer repeats the key"
    assert [stage["lost_tokens"] for stage in report.spent.values()] == [150, 150, 0]  # they are paid all the same
    assert all(body["headers"]["authorization"] == f"Bearer {secret}" for body in server.requests)
    said = capfd.readouterr()
    wrong = secret + "-old"
    monkeypatch.setenv("THE_KEY", wrong)
    with pytest.raises(RuntimeError) as caught:
        synthesize(prepare(4, stage={"api_key_variable": "THE_KEY"}))
    assert "environment variable THE_KEY" in str(caught.value)
    assert "Incorrect API key provided: [key]" in str(caught.value)
    texts = [str(report), repr(config), str(caught.value), *said, *capfd.readouterr(), caplog.text]
    texts += [path.read_bytes().decode("latin1") for path in Path(config.output).iterdir()]
    assert len(texts) > 9
    assert not [text for text in texts if secret in text]
    assert "internal error of [key]" in (Path(config.output) / "journal.jsonl").read_text()


@pytest.mark.parametrize("key", ["0", "a", "dots", "kept"])
def test_a_dummy_key_changes_no_answer(server, prepare, monkeypatch, key):
    clean = prepare(2, output="clean")
    synthesize(clean)
    monkeypatch.setenv("DUMMY", key)
    config = prepare(2, stage={"api_key_variable": "DUMMY"})
    server.faults["reason"].append((500, {}, f"of {key}."))
    server.faults["anchor"].append((400, {}, f"maximum context length, of {key}"))
    assert synthesize(config).rejected["refused"] == 1
    assert "[not shown: it holds the key]" in (Path(config.output) / "journal.jsonl").read_text()
    assert synthesize(prepare(2, stage={"api_key_variable": "DUMMY"}, retry_refused=True)).kept == 2
    assert output_bytes(config.output) == output_bytes(clean.output)


@pytest.mark.parametrize("key", ["sk-secretsecret\nsk-other", "sk-secret\tother", "sk-secret other", "sk-sécret"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_said(server, prepare, monkeypatch, key):
    monkeypatch.setenv("MY_KEY", key)
    config = prepare(1, stage={"api_key_variable": "MY_KEY"})
    with pytest.raises(ValueError, match=r"variable MY_KEY has blanks, line ends, .* one key in one line") as caught:
        synthesize(config)
    assert not [part for part in ("sk-", "secret", "other") if part in str(caught.value)]
    assert not server.requests
    assert not Path(config.output).exists()


def test_a_line_end_after_the_key_is_dropped(server, prepare, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-0123456789\n")
    synthesize(prepare(1, stage={"api_key_variable": "MY_KEY"}))
    assert server.requests[0]["headers"]["authorization"] == "Bearer sk-0123456789"


def test_what_cannot_be_sent_is_not_quoted(prepare, monkeypatch):
    """It holds the headers, in a form in which the key is not found again."""
    from openai import APIConnectionError

    async def refuse(*_, **__):
        try:
            raise httpx2.LocalProtocolError("Illegal header value b'Bearer sk-\\x00123'")
        except httpx2.LocalProtocolError as error:
            raise APIConnectionError(request=None) from error

    monkeypatch.setattr("openai.resources.chat.AsyncCompletions.create", refuse)
    config = prepare(1, patience=0.1)
    with pytest.raises(RuntimeError, match=r"\(last: LocalProtocolError\)"):
        synthesize(config)
    assert "Bearer" not in (Path(config.output) / "journal.jsonl").read_text()


def test_a_key_that_is_not_set_is_said_before_anything_is_asked(server, prepare, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ValueError, match="environment variable NO_SUCH_KEY is not set"):
        synthesize(prepare(1, anchor={"api_key_variable": "NO_SUCH_KEY"}))
    assert not server.requests


def test_no_key_goes_where_none_was_named(server, prepare, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-somebody")
    synthesize(prepare(1, anchor={"api_key_variable": "OPENAI_API_KEY"}))
    sent = {body["model"]: str(body["headers"]) for body in server.requests}
    assert "sk-of-somebody" in sent["anchor"]
    assert "sk-of-somebody" not in sent["describe"] + sent["reason"]
    assert "org-of-somebody" not in "".join(sent.values())


# Budgets


def test_requests_stay_within_the_budget_over_restarts(server, prepare):
    server.faults["reason"].extend([503, 503])
    config = prepare(6, max_requests=7)
    first = synthesize(config)
    assert len(server.requests) == 7
    assert first.budget == "max_requests=7"
    assert first.left == 6 - first.kept > 0
    assert "max_requests=7 is spent; raise it and run the same command again" in str(first)
    assert synthesize(config).left == first.left
    assert len(server.requests) == 7
    last = synthesize(prepare(6, max_requests=100))
    assert (last.kept, last.left) == (6, 0)
    assert len(server.requests) == last.requests == 18 + 2


@pytest.mark.parametrize("concurrency", [1, 8])
def test_tokens_never_exceed_the_budget(server, prepare, concurrency):
    server.delay = 0.01
    config = prepare(30, max_tokens=6000, concurrency=concurrency)
    report = synthesize(config)
    assert 0 < report.tokens == 150 * len(server.requests) <= 6000
    assert report.budget == "max_tokens=6000"
    assert report.left
    assert set(written(config)) | set(rejected(config)) == {f"q{n}" for n in range(30)} - left_of(config, report)
    assert synthesize(prepare(30, max_tokens=10**6)).kept == 30
    assert len(server.requests) == 90


def left_of(config, report):
    done = set(written(config)) | set(rejected(config))
    left = {f"q{n}" for n in range(30)} - done
    assert len(left) == report.left
    return left


def test_what_a_killed_process_had_on_its_way_counts(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", "x")
    journal.sent("describe", 500)
    journal.failed(journal.sent("describe", 300), "status 503", 0)
    journal.close()  # as the end of a process does
    again = Journal(tmp_path / "journal.jsonl", "x")
    assert (again.total.requests, again.total.tokens, again.reserved) == (2, 500, 0)
    again.close()
