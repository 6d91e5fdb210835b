"""Stands in for trainings and probes of a sweep: what they leave, without what they compute."""

import json
import math

from tools.launch import plan, results
from tools.launch.plan import Exam


class Fake:
    """Ends each job at once: leaves what a training or a probe leaves; fails as often as its name is in
    ``fail``. ``study`` may be what returns the study as it is now."""

    def __init__(self, study, root, losses=None, fail=(), slots=1):
        self.study, self.root, self.losses, self.fail = study, root, losses or {}, list(fail)
        self.slots, self.commands, self.codes, self.stopped = slots, [], {}, False

    def start(self, tasks):
        assert len(tasks) + len(self.codes) <= self.slots
        for task in tasks:
            self._start(task.name, task.log)
        return []

    def _start(self, name, log):
        self.commands.append(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        failing = name in self.fail
        log.write_text("something broke\n" if failing else "")
        self.codes[name] = int(failing)
        study = self.study() if callable(self.study) else self.study
        outcomes = results.found(study, self.root)
        job = next(job for job in plan.jobs(study, self.root, outcomes) if job.name == name)
        if failing:
            self.fail.remove(name)
            return
        if isinstance(job, Exam):
            (directory := job.out / "2").mkdir(parents=True)
            settings = {"probe": "bits_per_byte", "config": "tiny", "settings": {}, "seconds": 1.0}
            (directory / "bits_per_byte.json").write_text(json.dumps(settings | {"numbers": {"answer": 42}}))
            return
        write_run(job.workdir, job.config, self.losses.get(name, 1.0))

    def ended(self):
        codes, self.codes = self.codes, {}
        return codes

    def stop(self):
        self.stopped = True


def write_run(workdir, config, loss):
    """What `tools.launch` reads of a finished training of two steps."""
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(config.to_json())
    result = {"step": 2, "validation/loss": loss, "validation/bits_per_byte": loss / math.log(2)}
    (workdir / "result.json").write_text(json.dumps(result))
    records = [{"step": step, "seconds/total": 3.0 * step} for step in (1, 2)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
