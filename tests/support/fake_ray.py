"""Ray's client of jobs, without a cluster."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlfusion.config.launch import Launch
from rlfusion.jobs.launch.job import _kept


class FakeRay:
    """Takes jobs, which then run until they are told to stop; ``submitted`` has what came with each."""

    def __init__(self) -> None:
        self.submitted: list[SimpleNamespace] = []
        self.details: list[SimpleNamespace] = []

    def list_jobs(self) -> list[SimpleNamespace]:
        return self.details

    def submit_job(self, *, submission_id: str, metadata: dict, entrypoint: str, runtime_env: dict) -> None:
        assert submission_id not in [one.submission_id for one in self.details], "Ray takes an id once"
        assert all(isinstance(value, str) for value in metadata.values()), "Ray takes texts"
        working_dir = runtime_env.get("working_dir")
        archive = Path(working_dir).read_bytes() if working_dir else b""
        self.submitted.append(SimpleNamespace(entrypoint=entrypoint, environment=runtime_env, archive=archive))
        self._add(submission_id, "RUNNING", metadata)

    def add(self, name: str, status: str = "RUNNING", ours: bool = True, about: dict[str, Any] | None = None) -> None:
        """A job that is there already."""
        known = {
            "rlfusion": "0",
            "version": "0",
            "name": name,
            "command": "finetune",
            "launch": _kept(Launch(env="none")),
        }
        self._add(name, status, {**known, **(about or {})} if ours else {})

    def _add(self, id: str, status: str, metadata: dict) -> None:
        more = {"message": "", "driver_exit_code": None, "start_time": 1000 + len(self.details), "end_time": None}
        self.details.append(SimpleNamespace(submission_id=id, status=status, metadata=metadata, **more))

    def get_job_info(self, id: str) -> SimpleNamespace:
        return next(one for one in self.details if one.submission_id == id)

    def stop_job(self, id: str) -> bool:
        self.get_job_info(id).status = "STOPPED"
        return True

    def get_job_logs(self, id: str) -> str:
        return "a line\n"

    async def tail_job_logs(self, id: str):
        yield "a "
        job = self.get_job_info(id)
        job.status = "SUCCEEDED" if job.status == "RUNNING" else job.status
