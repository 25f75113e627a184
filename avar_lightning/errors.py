"""Errors that a user can mend, in one sentence; faults of our own keep their traceback."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path
from typing import NoReturn

PACKAGE_FOLDERS = (str(Path(__file__).parent), str(Path(__file__).parents[1] / "callbacks"))
UNION = "Does not validate against any of the Union subtypes"


def own_sentence(error: Exception) -> str | None:
    """The message of an error that this package raised on purpose; `None` for a fault, which keeps its traceback."""
    text = str(error)
    if text.startswith(UNION):  # raised while jsonargparse built an object of the configuration
        return condense(text)
    if "Original Traceback" in text:  # raised in a DataLoader worker: the message ends with the original one
        ours = any(f'File "{folder}' in text.rsplit("\n  File", 2)[-1] for folder in PACKAGE_FOLDERS)
        return text.strip().splitlines()[-1].partition(": ")[2] if ours else None
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = frame.filename.startswith(PACKAGE_FOLDERS) and (frame.line or "").startswith("raise")
    return text if ours else None


def told(error: Exception) -> bool:
    """Say an error that a user can mend on stderr; false for a fault, of which nothing was said."""
    sentence = own_sentence(error)
    if sentence is not None:
        print(f"error: {sentence}", file=sys.stderr)
    return sentence is not None


class OneSentence:
    """Laid over a parser of jsonargparse: says in one sentence what is wrong with a command line or configuration."""

    exit_on_error: bool
    prog: str

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and leave with status 2; inside a larger parse, let that one say it."""
        if not self.exit_on_error:
            super().error(message, ex)  # type: ignore[misc]
        name = self.prog.replace(" [options]", "")
        print(f"error: {condense(message)}; see `{name} --help`.", file=sys.stderr)
        sys.exit(2)


def condense(message: str) -> str:
    """The one line that matters of jsonargparse's nested report, with the full name of the key.

    >>> condense('Parser key "a":\\n  Does not validate against any of the Union subtypes\\n  Subtypes: [...]\\n'
    ...          "  Errors:\\n    - Problem with given class_path 'x.Y':\\n        Option 'z' is not accepted")
    "a: Option 'z' is not accepted"
    """
    frame = (UNION, "Subtypes:", "Errors:", "Problem with given class_path", "Expected a <class 'NoneType'>")
    keys, facts = [], []
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if found := re.match(r'Parser key "([^"]+)":\s*(.*)', line):
            keys.append(found[1])
            line = found[2]
        if line and not line.startswith((*frame, "Given value")):
            facts.append(line)
    fact = facts[0].rstrip(".") if facts else message.strip()
    fact = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1", fact)
    return f"{'.'.join(keys)}: {fact}" if keys else fact
