"""Fine-tuning over HTTP with the official client, from upload to answer, on a tiny model that really learns."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from serving import command, toy
from test_bad_requests import raw

from shoestring.core.errors import UsageError
from shoestring.lab import answering, tiny
from shoestring.server.files import Files
from shoestring.server.fine_tuning import FineTuning, _Job, _matches
from shoestring.server.keys import Keys
from shoestring.server.life import _Life, _Loading
from shoestring.server.service import Service
from shoestring.server.settings import Settings

ASKED = [{"role": "user", "content": "w7 w8"}]
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"w{7 + i % 3} w{8 + i % 3}"},
            {"role": "assistant", "content": "w20 w21 w22"},
        ]
    }
    for i in range(24)
]
HYPER: Any = {"n_epochs": 10, "batch_size": 4, "learning_rate_multiplier": 40.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return answering.folder(tmp_path_factory.mktemp("tuned") / "tiny", num_hidden_layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def server(model: Path, folder: Path) -> Iterator[str]:
    keys = folder / "keys"
    keys.write_text("mine\nyours\n")
    words = [str(model), "--fine-tune", str(folder), "--threads", "1", "--dtype", "fp32"]
    with command(*words, "--api-key-file", str(keys), "--max-jobs", "2") as process:
        yield process.url


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return _client(server, "mine")


def _client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


def _upload(client: openai.OpenAI, rows: list[dict[str, Any]] = ROWS) -> str:
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return client.files.create(file=("rows.jsonl", io.BytesIO(body)), purpose="fine-tune").id


def _create(client: openai.OpenAI, data: str, **more: Any) -> Any:
    hyper = more.pop("hyper", HYPER)
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": hyper}}
    return client.fine_tuning.jobs.create(model="tiny", training_file=data, method=method, seed=1, **more)


def _wait(get: Callable[[], Any], until: Callable[[Any], bool], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not until(found := get()):
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def _ended(client: openai.OpenAI, job_id: str) -> Any:
    return _wait(lambda: client.fine_tuning.jobs.retrieve(job_id), lambda job: job.status in ("succeeded", "failed"))


def _says(client: openai.OpenAI, name: str) -> str:
    told: Any = ASKED
    answer = client.chat.completions.create(model=name, messages=told, max_tokens=3, temperature=0)
    return answer.choices[0].message.content or ""


def test_from_upload_to_answer(client: openai.OpenAI) -> None:
    data = _upload(client)
    assert client.files.retrieve(data).filename == "rows.jsonl"
    assert len(client.files.content(data).read().splitlines()) == len(ROWS)
    assert data in [file.id for file in client.files.list(purpose="fine-tune")]
    before = _says(client, "tiny")
    assert "w20 w21 w22" not in before
    job = _create(client, data, suffix="letters", validation_file=data, metadata={"who": "me"})
    assert job.status == "validating_files" and job.object == "fine_tuning.job" and job.seed == 1
    done = _ended(client, job.id)
    assert done.status == "succeeded", done.error
    assert done.fine_tuned_model == "ft:tiny:letters" and done.finished_at and done.trained_tokens > 500
    assert done.metadata == {"who": "me"} and done.hyperparameters.n_epochs == 10
    # What was learned is said by the new model, at once, and the base is as it was.
    assert _says(client, "ft:tiny:letters") == "w20 w21 w22"
    assert _says(client, "tiny") == before
    assert {"tiny", "ft:tiny:letters"} <= {found.id for found in client.models.list()}
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=7))
    losses = [event.data["train_loss"] for event in events if event.type == "metrics"][::-1]  # type: ignore[index]
    assert len(losses) == 60 and losses[-1] < losses[0] / 5
    kept = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert kept[0].step_number == 60 and 1 <= len(kept) <= 3
    assert kept[0].metrics.full_valid_loss is not None and kept[0].metrics.full_valid_loss < losses[0] / 5
    assert _says(client, kept[0].fine_tuned_model_checkpoint) == "w20 w21 w22"
    (result,) = done.result_files
    table = client.files.content(result).text.splitlines()
    assert table[0].startswith("step,train_loss") and len(table) == 61
    assert client.files.delete(data).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(data)


def test_what_was_left_to_us_is_said_and_models_can_be_deleted(client: openai.OpenAI, folder: Path) -> None:
    data = _upload(client)
    job = _create(client, data, suffix="brief", hyper={"n_epochs": 1})
    done = _ended(client, job.id)
    hyper = done.hyperparameters
    assert (hyper.n_epochs, hyper.batch_size, hyper.learning_rate_multiplier) == (1, 8, 1.0)
    name = done.fine_tuned_model
    assert client.models.delete(name).deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(name)
    for kept in client.fine_tuning.jobs.checkpoints.list(job.id).data:
        assert client.models.delete(kept.fine_tuned_model_checkpoint).deleted
    assert not list((folder / "jobs" / job.id).glob("checkpoint-*"))
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("tiny")
    again = _create(client, data, suffix="brief", hyper={"n_epochs": 1})  # its name is free again
    assert _ended(client, again.id).status == "succeeded"


def test_what_is_uploaded_is_for_the_server_alone_to_read(tmp_path: Path) -> None:
    files = Files(tmp_path)
    made = files.add("mine.jsonl", "fine-tune", io.BytesIO(b"secret"), "")
    assert files.path(made["id"]).read_bytes() == b"secret"
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file-cut.json").write_text('{"id": ')
    files = Files(tmp_path)  # opens all the same
    monkeypatch.setattr("secrets.token_hex", lambda size: "full")
    (tmp_path / "file-full.json").mkdir()
    with pytest.raises(OSError):
        files.add("mine.jsonl", "fine-tune", io.BytesIO(b"x"), "")
    assert not files.path("file-full").exists() and files._known == {}


def test_a_folder_is_one_servers_alone(tmp_path: Path) -> None:
    first = FineTuning(None, tmp_path / "own")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"own is in use by process {os.getpid()}"):
        FineTuning(None, tmp_path / "own")  # type: ignore[arg-type]
    del first
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file cannot be written to"):
        FineTuning(None, tmp_path / "file")  # type: ignore[arg-type]


def test_jobs_are_found_by_their_metadata() -> None:
    jobs: list[dict[str, Any]] = [{"metadata": {"a": "b", "c": "d"}}, {"metadata": None}]
    asked = lambda **query: [_matches(job, query) for job in jobs]
    assert asked() == asked(limit="3") == [True, True]
    assert asked(**{"metadata[a]": "b"}) == asked(**{"metadata[a]": "b", "metadata[c]": "d"}) == [True, False]
    assert asked(**{"metadata[a]": "x"}) == asked(**{"metadata[e]": "b"}) == [False, False]
    assert asked(metadata="null") == [False, True]


def test_a_job_outlives_its_disk(tmp_path: Path) -> None:
    """A line of events that a kill has cut, a file that is no job, a folder that can be written no more."""
    job = _Job(tmp_path / "jobs" / "one", {"id": "one", "created_at": 1, "status": "running"}, "ft:tiny:one", "")
    job.save()
    job.event("first")
    with (job.folder / "events.jsonl").open("a") as out:
        out.write('{"id": "cut')
    again = _Job.read(job.folder)
    assert [event["message"] for event in again.events] == ["first"]
    again.event("second")
    assert [event["message"] for event in _Job.read(job.folder).events] == ["first", "second"]
    (tmp_path / "jobs" / "two").mkdir()
    (tmp_path / "jobs" / "two" / "job.json").write_text("{}")
    assert list(FineTuning(None, tmp_path)._jobs) == ["one"]  # type: ignore[arg-type]
    shutil.rmtree(job.folder)
    job.folder.write_text("no folder")
    job.event("third")
    job.change("failed")
    assert job.shown["status"] == "failed" and job.events[-1]["message"] == "third"


def test_pause_resume_and_cancel(client: openai.OpenAI) -> None:
    jobs = client.fine_tuning.jobs
    data = _upload(client)
    job = _create(client, data, suffix="slow", hyper={**HYPER, "n_epochs": 900})
    _wait(lambda: jobs.retrieve(job.id), lambda found: found.status == "running")
    assert str(jobs.pause(job.id).status) == "paused"
    count = lambda: sum(event.type == "metrics" for event in jobs.list_events(job.id, limit=1000).data)
    time.sleep(0.2)
    first = count()
    time.sleep(0.5)
    assert count() == first
    with pytest.raises(openai.BadRequestError, match="paused"):
        jobs.pause(job.id)
    with pytest.raises(openai.ConflictError):
        client.files.delete(data)
    jobs.resume(job.id)
    _wait(count, lambda now: now > first)
    assert jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        jobs.cancel(job.id)
    assert jobs.retrieve(job.id).fine_tuned_model is None
    assert client.files.delete(data).deleted
    assert [found.id for found in jobs.list(limit=1)][0] == job.id  # newest first, over all pages


def test_jobs_wait_for_each_other_up_to_a_limit(client: openai.OpenAI) -> None:
    jobs = client.fine_tuning.jobs
    data = _upload(client)
    long: Any = {**HYPER, "n_epochs": 900}
    first = _create(client, data, suffix="first", hyper=long)
    with pytest.raises(openai.ConflictError) as taken:
        _create(client, data, suffix="first")
    assert taken.value.param == "suffix"
    second = _create(client, data, suffix="second", hyper=long)
    _wait(lambda: jobs.retrieve(first.id), lambda found: found.status == "running")
    _wait(lambda: jobs.retrieve(second.id), lambda found: found.status == "queued")
    with pytest.raises(openai.RateLimitError, match="2 of your jobs"):
        _create(client, data, suffix="third")
    jobs.cancel(first.id)  # while it runs: the next one begins
    _wait(lambda: jobs.retrieve(second.id), lambda found: found.status == "running")
    jobs.cancel(second.id)
    assert [event.type for event in jobs.list_events(second.id, limit=1)][0] == "message"


def test_what_belongs_to_one_key_is_not_there_for_another(client: openai.OpenAI, server: str) -> None:
    other = _client(server, "yours")
    data = _upload(client)
    job = _create(client, data, suffix="own", hyper={**HYPER, "n_epochs": 1})
    name = _ended(client, job.id).fine_tuned_model
    (kept,) = client.fine_tuning.jobs.checkpoints.list(job.id, limit=1).data
    jobs, files = other.fine_tuning.jobs, other.files
    asks: list[Callable[[], Any]] = [
        lambda: files.retrieve(data),
        lambda: files.content(data),
        lambda: files.delete(data),
        lambda: jobs.retrieve(job.id),
        lambda: jobs.cancel(job.id),
        lambda: jobs.pause(job.id),
        lambda: jobs.resume(job.id),
        lambda: jobs.list_events(job.id),
        lambda: jobs.checkpoints.list(job.id),
        lambda: _create(other, data),
        lambda: _says(other, name),
        lambda: other.models.retrieve(kept.fine_tuned_model_checkpoint),
    ]
    for ask in asks:
        with pytest.raises(openai.NotFoundError) as found:
            ask()
        assert name not in str(found.value)
    assert files.list().data == [] and jobs.list().data == []
    for path in ("v1/models", "v1/ledger", "metrics"):
        own, theirs = (
            httpx.get(f"{server}/{path}", headers={"authorization": f"Bearer {c.api_key}"}).text
            for c in (client, other)
        )
        assert name not in theirs and (name in own or path == "metrics")
    assert _says(client, name) and client.files.delete(data).deleted


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"messages": [{"role": "user", "content": "w7"}]}], "assistant"),
        ([{"prompt": "w7 " * 3000, "completion": "w8"}], "tokens"),
        ([{"question": "w7"}], "known"),
    ],
    ids=["no answer", "too long", "no format"],
)
def test_a_bad_file_fails_its_job_and_says_why(client: openai.OpenAI, rows: list[dict[str, Any]], words: str) -> None:
    done = _ended(client, _create(client, _upload(client, rows)).id)
    assert done.status == "failed" and done.error.param == "training_file"
    assert words in done.error.message and "/" not in done.error.message
    assert done.error.message.startswith(f"{done.training_file}.jsonl:1")
    assert _says(client, "tiny")


def test_a_bad_file_for_validation_is_named(client: openai.OpenAI) -> None:
    bad = _upload(client, [{"question": "w7"}])
    done = _ended(client, _create(client, _upload(client), validation_file=bad).id)
    assert done.status == "failed"
    assert (done.error.param, done.error.code) == ("validation_file", "invalid_validation_file")


def test_what_cannot_be_is_refused(client: openai.OpenAI) -> None:
    data = _upload(client)
    other = client.files.create(file=("a.txt", b"x"), purpose="user_data").id
    create = client.fine_tuning.jobs.create
    for given, error, param in (
        ({"model": "no-such", "training_file": data}, openai.NotFoundError, "model"),
        ({"model": "tiny", "training_file": "file-0"}, openai.NotFoundError, "training_file"),
        ({"model": "tiny", "training_file": other}, openai.BadRequestError, "training_file"),
        ({"model": "tiny", "training_file": data, "suffix": "../up"}, openai.BadRequestError, "suffix"),
        ({"model": "tiny", "training_file": data, "method": {"type": "dpo"}}, openai.BadRequestError, "method.type"),
    ):
        with pytest.raises(error) as found:
            create(**given)  # type: ignore[call-overload]
        assert found.value.param == param
    twice: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}
    with pytest.raises(openai.BadRequestError, match="they differ from those of the method"):
        create(model="tiny", training_file=data, method=twice, hyperparameters={"n_epochs": 1})
    wandb: Any = [{"type": "wandb", "wandb": {"project": "x"}}]
    with pytest.raises(openai.BadRequestError, match=r"integrations: only \[\] is supported"):
        create(model="tiny", training_file=data, integrations=wandb)
    with pytest.raises(openai.BadRequestError) as found:
        client.files.create(
            file=("a", b"x"), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
        )
    assert found.value.param == "expires_after"
    odd = client.files.with_raw_response.create(file=("a", b"x"), purpose="fine-tune", extra_body={"colour": "red"})
    assert "colour" in odd.headers["x-shoestring-warning"] and "purpose" not in odd.headers["x-shoestring-warning"]
    with pytest.raises(openai.BadRequestError, match="n_epochs: Input should be greater than or equal to 1"):
        _create(client, data, hyper={"n_epochs": 0})
    with pytest.raises(openai.BadRequestError) as found:
        client.files.create(file=("a.jsonl", b"x"), purpose="batch")
    assert found.value.param == "purpose"
    with pytest.raises(openai.NotFoundError):
        client.files.content("..%2Fjob.json")


def test_it_is_off_unless_a_folder_is_given() -> None:
    with toy() as server:
        with pytest.raises(openai.PermissionDeniedError, match="--fine-tune"):
            server.client().files.list()
        with pytest.raises(openai.PermissionDeniedError, match="--fine-tune"):
            server.client().fine_tuning.jobs.list()


def test_a_file_that_is_too_long_is_refused(model: Path, tmp_path: Path) -> None:

    with toy(max_file_bytes=1000, idle_seconds=0.3) as server:
        server.service.tuning = type("Tuning", (), {"files": Files(tmp_path)})()
        with pytest.raises(openai.APIStatusError) as found:
            server.client().files.create(file=("a", b"x" * 2000), purpose="fine-tune")
        assert found.value.status_code == 413
        assert server.client().files.list().data == []
        # A browser would send a form for the page of any site, and the password with it.
        form: Any = {"files": {"file": ("a", b"x")}, "data": {"purpose": "fine-tune"}}
        for origin, status in (("http://evil.example", 403), ("null", 403), (server.url, 200)):
            assert server.http.post("/v1/files", headers={"origin": origin}, **form).status_code == status
        # One that is begun and not gone on with is given up.
        head = "POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=x\r\n"
        assert b" 408 " in raw(server, f"{head}content-length: 900\r\n\r\n--x\r\n".encode())


def test_a_killed_server_goes_on_from_the_last_checkpoint(model: Path, tmp_path: Path) -> None:
    words = (str(model), "--fine-tune", str(tmp_path), "--threads", "1", "--dtype", "fp32")
    with command(*words) as process:
        client = _client(process.url)
        job = _create(client, _upload(client), suffix="kept", hyper={**HYPER, "n_epochs": 60})
        jobs = client.fine_tuning.jobs
        _wait(lambda: jobs.checkpoints.list(job.id).data, lambda found: len(found) >= 2)
        os.kill(process.process.pid, signal.SIGKILL)
        process.process.wait()
    saved = max(int(p.name.rpartition("-")[2]) for p in (tmp_path / "jobs" / job.id).glob("checkpoint-*"))
    with command(*words) as process:
        client = _client(process.url)
        done = _ended(client, job.id)
        assert done.status == "succeeded", done.error
        assert _says(client, "ft:tiny:kept") == "w20 w21 w22"
        events = client.fine_tuning.jobs.list_events(job.id, limit=2000).data
        steps = [event.data["step"] for event in events if event.type == "metrics"][::-1]  # type: ignore[index]
    # Every step was done, and those after the last checkpoint at most twice.
    assert sorted(set(steps)) == list(range(1, 361))
    again = [step for step in set(steps) if steps.count(step) > 1]
    assert all(saved < step for step in again)
    with command(*words) as process:  # and it serves after a restart
        assert _says(_client(process.url), "ft:tiny:kept") == "w20 w21 w22"


def test_a_model_that_cannot_be_trained_answers_nothing_before_it_is_refused(tmp_path: Path) -> None:
    plain = answering.folder(tmp_path / "plain", lambda **_: tiny.model("gpt2"))
    settings = Settings(model=str(plain), fine_tune=str(tmp_path / "jobs"))
    service, loading = Service(settings, Keys(())), _Loading(settings)
    loading.start()
    with pytest.raises(UsageError, match="cannot be trained while it answers"):
        asyncio.run(_Life(service, None, loading, print)._load())  # type: ignore[arg-type]
    assert service.state == "loading" and service.loaded is None
    assert loading.engine and loading.engine.state != "ready"
