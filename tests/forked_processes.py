"""Programs run as `python` would, but for what takes seconds to import: a process that has that already forks them."""

import json
import os
import subprocess
import sys
from pathlib import Path


PROGRAM = """
import json, os, runpy, sys, traceback
{imports}
for number, command in enumerate(json.loads(sys.argv[1])):
    if not (process := os.fork()):
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{{number}}.{{name}}", os.O_CREAT | os.O_WRONLY), stream)
        sys.argv, sys.path[0], code = command, os.path.dirname(command[0]), 1
        try:
            runpy.run_path(command[0], run_name="__main__")
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


def run_forked(
    commands: list[list[str | Path]], folder: Path, *, imports: str, **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """Runs each command, a script and its arguments, in `folder`, where it leaves what they print."""
    words = [[str(word) for word in command] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(imports=imports), json.dumps(words)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return [
        subprocess.CompletedProcess(
            command, int(code), *((folder / f"{i}.{name}").read_text() for name in ("out", "err"))
        )
        for i, (command, code) in enumerate(zip(words, done.stdout.split(), strict=True))
    ]
