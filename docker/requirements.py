"""Prints the requirements of pyproject.toml, those of the extras named included, one a line.

python requirements.py pyproject.toml export dicom-seg
"""

import sys
from pathlib import Path

import tomllib

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
names = project["dependencies"] + [r for extra in sys.argv[2:] for r in project["optional-dependencies"][extra]]
sys.stdout.write("\n".join(names) + "\n")
