#!/usr/bin/env python3
"""Stands for gcloud, xpk, docker and kubectl: records its calls, and answers from a scenario.

$STAND_IN is a folder: `calls` gets a JSON line a call; `scenario.json` maps words that a call holds
to the answers that it gets, one after the other (the last one for ever): [status, stdout]. Where
$STAND_IN_HOST is set, that folder is the home of a host, and ssh runs there what it is to run.
"""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

folder, host = Path(os.environ["STAND_IN"]), os.environ.get("STAND_IN_HOST")
call = [Path(sys.argv[0]).name, *sys.argv[1:]]
with open(folder / "calls", "a") as file:
    file.write(json.dumps(call) + "\n")
lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
fcntl.flock(lock, fcntl.LOCK_EX)
scenario = json.loads((folder / "scenario.json").read_text())
text = " ".join(call)
for words, answers in scenario.items():
    if all(word in text for word in words.split()):
        status, output = answers.pop(0) if len(answers) > 1 else answers[0]
        (folder / "scenario.json").write_text(json.dumps(scenario))
        print(output)
        sys.exit(status)
if host and "ssh" in call:
    line = next(word for word in call if word.startswith("--command=")).partition("=")[2]
    sys.exit(subprocess.run(["bash", "-c", line], cwd=host, check=False).returncode)
