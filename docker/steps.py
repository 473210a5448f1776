"""A Dockerfile as a shell script: the steps that check_without_docker.sh takes, in the file's own words.

    python steps.py Dockerfile build CHECKOUT     the RUN and COPY steps of all stages, in order
    python steps.py Dockerfile environment        the last stage's ENV as export lines, its WORKDIR
    python steps.py Dockerfile user               the last stage's USER
    python steps.py Dockerfile entrypoint         its ENTRYPOINT, as words for the shell

One root serves all stages, so that COPY --from and bind mounts between stages find their files in place.
"""

import json
import re
import shlex
import sys
from pathlib import Path


def instructions(text: str) -> list[tuple[str, str]]:
    """(name, argument) of every instruction; comments dropped, continued lines joined.

    >>> instructions("# a\\nRUN x \\\\\\n && y\\nUSER 1")
    [('RUN', 'x && y'), ('USER', '1')]
    """
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\s*\\\n\s*", " ", lines)
    found = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(name.upper(), argument.strip()) for name, argument in found]


def build(steps: list[tuple[str, str]], checkout: str) -> list[str]:
    """Shell lines for the RUN, COPY and WORKDIR steps."""
    script = ["set -eu"]
    for name, argument in steps:
        if name == "WORKDIR":
            script += [f"mkdir -p {argument}", f"cd {argument}"]
        elif name == "RUN":
            script.append(re.sub(r"--mount=\S+\s*", "", argument))
        elif name == "COPY" and "--from=" not in argument:
            *sources, target = shlex.split(argument)
            script += [f"cp -r {shlex.quote(f'{checkout}/{source}')} {target}" for source in sources]
    return script


def last(steps: list[tuple[str, str]], name: str) -> str:
    """The argument of the last such instruction."""
    return [argument for found, argument in steps if found == name][-1]


def main(file: str, what: str, checkout: str = "/checkout") -> str:
    steps = instructions(Path(file).read_text())
    if what == "build":
        return "\n".join(build(steps, checkout))
    if what == "environment":
        return f"export {last(steps, 'ENV')}\ncd {last(steps, 'WORKDIR')}"
    if what == "user":
        return last(steps, "USER")
    if what == "entrypoint":
        return shlex.join(json.loads(last(steps, "ENTRYPOINT")))
    raise SystemExit(__doc__)


if __name__ == "__main__":
    sys.stdout.write(main(*sys.argv[1:]) + "\n")
