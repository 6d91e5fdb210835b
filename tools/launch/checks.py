"""What can be known to be wrong with a study before its first job starts."""

from __future__ import annotations

from pathlib import Path

from configs.base import ConfigError
from configs.study import Study
from eval import probes
from eval.studies import ANALYSES
from tools.launch import plan

TOLD = 10  # problems


def check(study: Study) -> None:
    """Makes every config that does not start from another run, and reads every examination.

    Raises:
        ConfigError: names each arm that cannot run, and the field, probe or file that is wrong.
    """
    if study.analysis not in ANALYSES:
        raise ConfigError(f"{study.name}: analysis={study.analysis!r}; there are {', '.join(ANALYSES)}")
    problems = []
    for arm in study.arms:
        try:
            if not arm.source:
                plan.run_of(study, Path(), arm, arm.rates[0], arm.seeds[0], {})
            for examination in arm.examinations:
                probes.choose(",".join(examination.probes), examination.settings)
        except ConfigError as error:
            problems.append(str(error))
        except ValueError as error:
            problems.append(f"{study.name}, arm {arm.name}: {error}")
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        more = f"\n... and {len(problems) - TOLD} more" if len(problems) > TOLD else ""
        raise ConfigError(
            f"{len(problems)} of {len(study.arms)} arms of {study.name} cannot run; nothing was started\n"
            + "\n".join(problems[:TOLD])
            + more
        )
