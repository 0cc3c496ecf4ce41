"""Fine-tuning jobs in OpenAI's shape, run by a method that trains inside the engine; their state is on the disk.

FOLDER/files/                 see `files`
FOLDER/jobs/<id>/job.json     the job as clients see it, and what only we need
FOLDER/jobs/<id>/events.jsonl
FOLDER/jobs/<id>/checkpoint-<step>/   adapters, written by the method
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from shoestring.core import catalog
from shoestring.core.errors import ShoestringError, UsageError
from shoestring.core.files import locked, write_text
from shoestring.engine.aio import AsyncEngine
from shoestring.engine.open import Opened
from shoestring.engine.tuning import Objectives, Told, Tuner, TuningJob
from shoestring.server import files as uploads
from shoestring.server import schema
from shoestring.server.errors import ApiError, bad
from shoestring.server.keys import Client, client_of
from shoestring.server.service import Service, log

WORD = "tuner"  # what a method's file defines that trains inside the engine
_OPEN = ("validating_files", "queued", "running", "paused")
_SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class FineTuning:
    """Jobs of one server. Used from the event loop alone.

    Raises:
        UsageError: the folder cannot be had, or is that of a server that runs.
    """

    def __init__(self, service: Service, folder: Path) -> None:
        self.service, self.folder = service, folder
        self._held = ExitStack()
        try:
            # Two servers would both go on with the jobs, and write the same checkpoints.
            self._held.enter_context(locked(folder / ".lock", wait=False))
        except OSError as error:
            raise UsageError(f"--fine-tune {folder} cannot be written to", error.strerror or "") from None
        self.files = uploads.Files(folder / "files")
        self._jobs: dict[str, _Job] = {}
        self._tuner: Tuner | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()  # what is told is acted upon in the order in which it was told
        for job in sorted(_kept(folder / "jobs"), key=lambda job: (job.shown["created_at"], job.id)):
            self._jobs[job.id] = job

    async def plug(self, engine: AsyncEngine) -> None:
        """Plug the method into an engine that need not answer yet.

        Raises:
            UsageError: no method trains in an engine, or the model cannot be trained so.
        """
        settings = self.service.settings
        methods = catalog.that_define(WORD)
        if not methods:
            raise UsageError("No method of this installation trains inside the engine")
        inner = engine.engine
        opened = Opened(inner.runner, inner.tokenizer, inner.name, Path(settings.model))
        objectives = Objectives(settings.ttft / 1000, settings.tpot / 1000)
        self._tuner = await asyncio.to_thread(catalog.module(methods[0].name).tuner, opened, objectives)
        await engine.run(inner.plug_filler, self._tuner)

    async def open(self) -> None:
        """Serve what was trained before, and go on with what was not finished."""
        for job in list(self._jobs.values()):
            for name, path in list(job.served.items()):
                if not ((job.folder / path).is_dir() and await self._serve(job, name, job.folder / path)):
                    job.served.pop(name)
            if job.shown["status"] in _OPEN:
                self._begin(job)

    # ---- what clients ask ----

    def create(self, given: schema.FineTuningRequest, client: Client) -> dict[str, Any]:
        service = self.service
        if given.model not in service.names:
            service.pick(given.model, client)
            raise bad("model", "Only the base model can be fine-tuned here", "model_not_available")
        self._training_file(given.training_file, client, "training_file")
        if given.validation_file:
            self._training_file(given.validation_file, client, "validation_file")
        most = service.settings.max_jobs
        if sum(job.shown["status"] in _OPEN for job in self._of(client)) >= most:
            raise ApiError(429, f"{most} of your jobs have not ended, the most there may be", code="too_many_jobs")
        job_id = f"ftjob-{secrets.token_hex(12)}"
        if given.suffix is not None and not _SUFFIX.fullmatch(given.suffix):
            raise bad("suffix", "At most 64 letters, digits and ._-, beginning with a letter or digit")
        name = f"ft:{service.names[0]}:{given.suffix or job_id[-8:]}"
        taken = {job.name for job in self._jobs.values() if job.shown["status"] in _OPEN}
        if name in taken or name in service.engine.engine.adapters:
            raise ApiError(409, f"There is a model {name} already", param="suffix", code="name_taken")
        chosen = given.chosen
        seed = given.seed if given.seed is not None else secrets.randbelow(2**31)
        hyper = {
            "n_epochs": chosen.n_epochs or "auto",
            "batch_size": chosen.batch_size or "auto",
            "learning_rate_multiplier": chosen.learning_rate_multiplier or "auto",
        }
        shown = {
            "id": job_id,
            "object": "fine_tuning.job",
            "created_at": int(time.time()),
            "error": None,
            "fine_tuned_model": None,
            "finished_at": None,
            "hyperparameters": hyper,
            "model": given.model,
            "organization_id": "shoestring",
            "result_files": [],
            "seed": seed,
            "status": "validating_files",
            "trained_tokens": None,
            "training_file": given.training_file,
            "validation_file": given.validation_file,
            "estimated_finish": None,
            "integrations": [],
            "metadata": given.metadata,
            "method": {"type": "supervised", "supervised": {"hyperparameters": hyper}},
        }
        job = _Job(self.folder / "jobs" / job_id, shown, name, client.digest)
        try:
            job.save()
        except (ShoestringError, OSError):
            raise ApiError(503, "The job could not be kept: the disk may be full", code="disk_full") from None
        self._jobs[job_id] = job
        job.event(f"Created fine-tuning job: {job_id}")
        self._begin(job)
        return shown

    def get(self, job_id: str, client: Client) -> _Job:
        """Raises ApiError 404 when this client has none of that id."""
        job = self._jobs.get(job_id)
        if job is None or job.owner not in ("", client.digest):
            raise ApiError(404, "There is no such job", param="fine_tuning_job_id", code="job_not_found")
        return job

    def all(self, client: Client) -> list[dict[str, Any]]:
        """Those of a client, newest first."""
        return [job.shown for job in self._of(client)][::-1]

    async def cancel(self, job_id: str, client: Client) -> dict[str, Any]:
        job = self._open(job_id, client, _OPEN, "cancelled")
        job.end("cancelled")
        job.event("The job was cancelled")
        await self._order("cancel", job)
        return job.shown

    async def pause(self, job_id: str, client: Client) -> dict[str, Any]:
        job = self._open(job_id, client, ("validating_files", "queued", "running"), "paused")
        job.change("paused")
        job.event("The job is paused")
        await self._order("pause", job)
        return job.shown

    async def resume(self, job_id: str, client: Client) -> dict[str, Any]:
        job = self._open(job_id, client, ("paused",), "resumed")
        job.change("queued")
        job.event("The job goes on")
        await self._order("resume", job)
        return job.shown

    def release(self, file_id: str) -> None:
        """Raises ApiError 409 when a job that has not ended needs the file."""
        for job in self._jobs.values():
            if job.shown["status"] in _OPEN and file_id in (job.shown["training_file"], job.shown["validation_file"]):
                raise ApiError(409, f"The job {job.id} needs this file", code="file_in_use")

    async def delete(self, name: str, client: Client) -> dict[str, Any]:
        """Serve a model no more that a job has made, and give back its place on the disk.

        Raises:
            ApiError: 404 when this client has none of that name; 403 when no job has made it; 409 while its job goes
                on.
        """
        self.service.pick(name, client)
        job = next((job for job in self._of(client) if name in job.served), None)
        if job is None:
            raise ApiError(403, "Only what was fine-tuned here can be deleted", param="model")
        if job.shown["status"] in _OPEN:
            raise ApiError(409, f"The job {job.id} has not ended", param="model", code="job_not_ended")
        path = job.served.pop(name)
        job.checkpoints = [made for made in job.checkpoints if made["fine_tuned_model_checkpoint"] != name]
        job.note()
        await self._drop(name)
        if path not in job.served.values():
            await asyncio.to_thread(shutil.rmtree, job.folder / path, ignore_errors=True)
        return {"id": name, "object": "model", "deleted": True}

    # ---- what happens to a job ----

    def _begin(self, job: _Job) -> None:
        task = asyncio.create_task(self._prepare(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _prepare(self, job: _Job) -> None:
        """Read its files in another thread, then put it in the tuner's line."""
        shown, hyper = job.shown, job.shown["hyperparameters"]
        loop = asyncio.get_running_loop()
        assert self._tuner
        # A number, or what the method takes itself.
        own = {key: None if value == "auto" else value for key, value in hyper.items()}

        def tell(told: Told) -> None:
            try:
                loop.call_soon_threadsafe(lambda: self._told(job, told))
            except RuntimeError:
                pass  # the server has ended; what counts is on the disk

        validation = shown["validation_file"]
        try:
            asked = TuningJob(
                id=job.id,
                base=self.service.settings.model,
                data=self._linked(job, shown["training_file"]),
                validation=self._linked(job, validation) if validation else None,
                folder=job.folder,
                epochs=own["n_epochs"],
                batch_size=own["batch_size"],
                rate=own["learning_rate_multiplier"],
                seed=shown["seed"],
            )
            prepared = await asyncio.to_thread(self._tuner.prepare, asked)
            job.take(prepared.epochs, prepared.batch_size)
            if shown["status"] == "cancelled":
                return
            await self.service.engine.run(self._tuner.start, prepared, tell)
            if shown["status"] == "cancelled":  # while it was put in the line
                await self._order("cancel", job)
            elif shown["status"] == "paused":
                await self._order("pause", job)
            elif shown["status"] == "validating_files":
                job.change("queued")
                job.event("Files validated, the job is in the line")
        except ApiError as error:
            log.warning("job %s waits: %s", job.id, error.detail)  # the server is ending; it goes on at the next start
        except ShoestringError as error:
            # Without the remedy, which speaks of flags.
            about = str(ShoestringError(error.what, error.why))
            other = validation is not None and validation != shown["training_file"] and str(validation) in about
            self._fail(job, about, "validation_file" if other else "training_file")
        except Exception as error:
            log.error("job %s could not begin: %s", job.id, type(error).__name__, exc_info=error)
            self._fail(job, "The job could not begin", None)

    def _told(self, job: _Job, told: Told) -> None:
        shown = job.shown
        if shown["status"] not in _OPEN:
            return
        if shown["status"] in ("queued", "validating_files"):
            job.change("running")
        if told.kind == "step":
            job.step(told, time.time())
        elif told.kind == "checkpoint" and told.folder:
            self._later(self._checkpoint(job, told, told.folder))
        elif told.kind == "finished" and told.folder:
            self._later(self._finish(job, told, told.folder))
        elif told.kind == "failed":
            self._fail(job, told.message, None)

    async def _checkpoint(self, job: _Job, told: Told, path: Path) -> None:
        name = f"{job.name}:ckpt-step-{told.step}"
        async with self._turn:
            await self._keep(job, told, name, path)

    async def _keep(self, job: _Job, told: Told, name: str, path: Path) -> None:
        for old, folder in list(job.served.items()):
            if not (job.folder / folder).is_dir():
                job.served.pop(old)
                await self._drop(old)
        if await self._serve(job, name, path):
            job.served[name] = path.name
        job.checkpoint(told, name)

    async def _finish(self, job: _Job, told: Told, path: Path) -> None:
        async with self._turn:
            await self._succeed(job, told, path)

    async def _succeed(self, job: _Job, told: Told, path: Path) -> None:
        if job.shown["status"] not in _OPEN:  # it was cancelled while its last checkpoint was loaded
            return
        if not await self._serve(job, job.name, path):
            self._fail(job, "The adapter could not be loaded", None)
            return
        job.served[job.name] = path.name
        job.shown |= {"fine_tuned_model": job.name, "trained_tokens": told.tokens}
        try:
            table = io.BytesIO(job.table().encode())
            kept = await asyncio.to_thread(self.files.add, "step_metrics.csv", "fine-tune-results", table, job.owner)
            job.shown["result_files"] = [kept["id"]]
        except (ShoestringError, OSError) as error:
            log.warning("job %s: %s", job.id, error)
            job.event("The table of its steps could not be kept", "warn")
        job.end("succeeded")
        job.event(f"New fine-tuned model created: {job.name}")
        job.event("The job has successfully completed")

    def _fail(self, job: _Job, message: str, param: str | None) -> None:
        code = f"invalid_{param}" if param else "training_failed"
        message = message.replace(f"{job.folder}/", "")  # where things are here is nobody's business
        job.shown["error"] = {"code": code, "message": message, "param": param}
        job.end("failed")
        job.event(message, "error")
        self._later(self._order("cancel", job))

    # ---- small things ----

    def _of(self, client: Client) -> list[_Job]:
        return [job for job in self._jobs.values() if job.owner in ("", client.digest)]

    async def _serve(self, job: _Job, name: str, path: Path) -> bool:
        engine = self.service.engine
        self.service.owners[name] = job.owner
        if name in engine.engine.adapters:
            return True
        try:
            await engine.run(engine.engine.add_adapter, name, path)
            return True
        except (ShoestringError, OSError) as error:
            job.event(f"{name} could not be loaded: {error}", "warn")
            return False

    async def _drop(self, name: str) -> None:
        try:
            await self.service.engine.run(self.service.engine.engine.drop_adapter, name)
        except UsageError:
            pass  # it was dropped by somebody else

    async def _order(self, what: str, job: _Job) -> None:
        await self.service.engine.run(getattr(self._tuner, what), job.id)

    def _later(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _open(self, job_id: str, client: Client, states: tuple[str, ...], wanted: str) -> _Job:
        job = self.get(job_id, client)
        if job.shown["status"] not in states:
            raise bad(None, f"A job that is {job.shown['status']} cannot be {wanted}", "invalid_status")
        return job

    def _training_file(self, file_id: str, client: Client, param: str) -> None:
        if self.files.get(file_id, client, param)["purpose"] != "fine-tune":
            raise bad(param, "The file was uploaded for another purpose than fine-tune", "invalid_purpose")

    def _linked(self, job: _Job, file_id: str) -> Path:
        """The file under a name whose ending says what it is."""
        link = job.folder / f"{file_id}.jsonl"
        if not link.is_symlink():
            link.symlink_to(self.files.path(file_id).resolve())
        return link


class _Job:
    """One job: as it is shown, its events and checkpoints, and all of it on the disk.

    Attributes:
        name: of the model that it makes.
        owner: digest of the client that alone may see it and use its models; "" for everybody's.
        served: adapters of it that the engine has, name -> folder below the job's own.
    """

    def __init__(self, folder: Path, shown: dict[str, Any], name: str, owner: str) -> None:
        self.folder, self.shown, self.name, self.owner = folder, shown, name, owner
        self.served: dict[str, str] = {}
        self.checkpoints: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self._latest = (0, 0.0)  # step and when
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def id(self) -> str:
        return str(self.shown["id"])

    @classmethod
    def read(cls, folder: Path) -> _Job:
        kept = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        job = cls(folder, kept["shown"], kept["name"], kept.get("owner", ""))
        job.served, job.checkpoints = kept["served"], kept["checkpoints"]
        events = folder / "events.jsonl"
        whole = 0
        for line in events.read_bytes().splitlines(keepends=True) if events.is_file() else ():
            try:
                job.events.append(json.loads(line if line.endswith(b"\n") else b""))
            except ValueError:  # the last line of a server that was killed: what comes next must not go on in it
                os.truncate(events, whole)
                break
            whole += len(line)
        return job

    def save(self) -> None:
        """Raises ShoestringError when the disk is full."""
        names = ("shown", "name", "owner", "served", "checkpoints")
        write_text(self.folder / "job.json", json.dumps({name: getattr(self, name) for name in names}, indent=1))

    def note(self) -> None:
        """As `save`, of what has come to pass: where it cannot be written now, it is written with what follows."""
        try:
            self.save()
        except (ShoestringError, OSError) as error:
            log.warning("job %s: %s", self.id, error)

    def change(self, status: str) -> None:
        self.shown["status"] = status
        self.note()

    def take(self, epochs: int, batch_size: int) -> None:
        """What it is done with, where that was left to us."""
        for hyper in (self.shown["hyperparameters"], self.shown["method"]["supervised"]["hyperparameters"]):
            hyper |= {"n_epochs": epochs, "batch_size": batch_size}
            if hyper["learning_rate_multiplier"] == "auto":
                hyper["learning_rate_multiplier"] = 1.0

    def end(self, status: str) -> None:
        self.shown |= {"finished_at": int(time.time()), "estimated_finish": None}
        self.change(status)

    def event(self, message: str, level: str = "info", data: dict[str, Any] | None = None) -> None:
        made = {
            "id": f"ftevent-{secrets.token_hex(12)}",
            "object": "fine_tuning.job.event",
            "created_at": int(time.time()),
            "level": level,
            "message": message,
            "type": "metrics" if data else "message",
            "data": data or {},
        }
        self.events.append(made)
        try:
            with (self.folder / "events.jsonl").open("a", encoding="utf-8") as out:
                out.write(json.dumps(made) + "\n")
        except OSError as error:
            log.warning("job %s: an event is not kept: %s", self.id, error.strerror)

    def step(self, told: Told, now: float) -> None:
        data = {"step": told.step, "total_steps": told.steps, **told.figures}
        # Steps that a killed server did after its last checkpoint are done, and told, again.
        self.event(f"Step {told.step}/{told.steps}: training loss={told.figures['train_loss']:.4f}", data=data)
        before, when = self._latest
        if before and told.step > before:
            each = (now - when) / (told.step - before)
            self.shown["estimated_finish"] = int(now + each * (told.steps - told.step))
        else:
            self._latest = told.step, now

    def checkpoint(self, told: Told, name: str) -> None:
        made = {
            "id": f"ftckpt-{secrets.token_hex(12)}",
            "object": "fine_tuning.job.checkpoint",
            "created_at": int(time.time()),
            "fine_tuned_model_checkpoint": name,
            "fine_tuning_job_id": self.id,
            "metrics": {"step": told.step, **told.figures},
            "step_number": told.step,
        }
        kept = [old for old in self.checkpoints if old["fine_tuned_model_checkpoint"] in self.served]
        self.checkpoints = [*(old for old in kept if old["step_number"] != told.step), made]
        self.note()
        self.event(f"Checkpoint created at step {told.step}")

    def table(self) -> str:
        """The steps' figures with commas."""
        rows = {event["data"]["step"]: event["data"] for event in self.events if event["type"] == "metrics"}
        for made in self.checkpoints:
            rows.setdefault(made["step_number"], {}).update(made["metrics"])
        names = ["step", "train_loss", "train_mean_token_accuracy", "full_valid_loss", "full_valid_mean_token_accuracy"]
        out = io.StringIO()
        writer = csv.DictWriter(out, names, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows[step] for step in sorted(rows))
        return out.getvalue()


def _kept(folder: Path) -> Iterator[_Job]:
    """The jobs on the disk that can be read."""
    for about in folder.glob("*/job.json"):
        try:
            yield _Job.read(about.parent)
        except (OSError, ValueError, LookupError, TypeError) as error:
            log.warning("job %s cannot be read and is left out: %s", about.parent.name, error)


def _matches(job: dict[str, Any], asked: Mapping[str, str]) -> bool:
    """Whether a job has the metadata that a query asks for: `metadata[k]=v`, or `metadata=null` for none."""
    own = job["metadata"] or {}
    wanted = {name[9:-1]: value for name, value in asked.items() if re.fullmatch(r"metadata\[.*\]", name)}
    return wanted.items() <= own.items() and not (own and asked.get("metadata") == "null")


def add_routes(app: FastAPI, service: Service, answer: Any) -> None:
    """`/v1/fine_tuning/jobs`, and the end of what they have made; `answer` makes a response of JSON."""
    base = "/v1/fine_tuning/jobs"

    def of(request: Request, job_id: str) -> _Job:
        found: _Job = service.tuning.get(job_id, client_of(request))
        return found

    @app.post(base, response_model=schema.FineTuningAnswer)
    async def create_job(given: schema.FineTuningRequest, request: Request) -> Response:
        service.engine  # noqa: B018  # refuses while it is loading or ending
        return answer(service.tuning.create(given, client_of(request)), given)

    @app.get(base, response_model=schema.FineTuningList)
    async def list_jobs(request: Request, after: str | None = None, limit: schema.PageLimit = 20) -> Response:
        jobs = [job for job in service.tuning.all(client_of(request)) if _matches(job, request.query_params)]
        return answer(uploads.page(jobs, after, limit))

    @app.get(base + "/{fine_tuning_job_id}", response_model=schema.FineTuningAnswer)
    async def one_job(fine_tuning_job_id: str, request: Request) -> Response:
        return answer(of(request, fine_tuning_job_id).shown)

    @app.get(base + "/{fine_tuning_job_id}/events", response_model=schema.FineTuningList)
    async def events(
        fine_tuning_job_id: str, request: Request, after: str | None = None, limit: schema.PageLimit = 20
    ) -> Response:
        return answer(uploads.page(of(request, fine_tuning_job_id).events[::-1], after, limit))

    @app.get(base + "/{fine_tuning_job_id}/checkpoints", response_model=schema.FineTuningList)
    async def checkpoints(
        fine_tuning_job_id: str, request: Request, after: str | None = None, limit: schema.PageLimit = 10
    ) -> Response:
        return answer(uploads.page(of(request, fine_tuning_job_id).checkpoints[::-1], after, limit))

    @app.post(base + "/{fine_tuning_job_id}/cancel", response_model=schema.FineTuningAnswer)
    async def cancel(fine_tuning_job_id: str, request: Request) -> Response:
        return answer(await service.tuning.cancel(fine_tuning_job_id, client_of(request)))

    @app.post(base + "/{fine_tuning_job_id}/pause", response_model=schema.FineTuningAnswer)
    async def pause(fine_tuning_job_id: str, request: Request) -> Response:
        return answer(await service.tuning.pause(fine_tuning_job_id, client_of(request)))

    @app.delete("/v1/models/{model:path}", response_model=schema.ModelGone)
    async def delete_model(model: str, request: Request) -> Response:
        return answer(await service.tuning.delete(model, client_of(request)))

    @app.post(base + "/{fine_tuning_job_id}/resume", response_model=schema.FineTuningAnswer)
    async def resume(fine_tuning_job_id: str, request: Request) -> Response:
        return answer(await service.tuning.resume(fine_tuning_job_id, client_of(request)))
