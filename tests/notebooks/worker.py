"""Runs notebooks' sources one after another in this process: ``worker.py RESULTS.json SOURCE ...``.

Importing jax takes longer than any of them at smoke size.
"""

import json
import pathlib
import runpy
import sys
import time
import traceback

import matplotlib.pyplot as plt

results, *sources = sys.argv[1:]
found = {}
for source in sources:
    begin, problem = time.process_time(), ""
    try:
        runpy.run_path(source, run_name="__main__")
    except Exception:
        problem = traceback.format_exc()
    figures = len(plt.get_fignums())
    plt.close("all")
    found[pathlib.Path(source).stem] = {
        "problem": problem,
        "figures": figures,
        "cpu_seconds": round(time.process_time() - begin, 1),
    }
    pathlib.Path(results).write_text(json.dumps(found, indent=1))
